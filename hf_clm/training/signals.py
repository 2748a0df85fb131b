"""A run that is asked to stop: all processes stop at the same step, save once, and say how to go on.

SIGTERM, SIGUSR1, SIGHUP, SIGINT   or the end of the launcher
     |  only remembered
     v
the end of a step                  all processes agree: the strongest reason of any
     |
     v
one checkpoint                     -> Preempted: exit code 75, or 130 after SIGINT
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing import sharedctypes, util
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clm.errors import Preempted
from hf_clm.training.callbacks import write_line

# From the weakest to the strongest; their places are what the processes compare.
REASONS = ("", "SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM", "the end of its launcher")
SIGNALS = {int(getattr(signal, name)): name for name in REASONS[1:5] if hasattr(signal, name)}
# What accelerate launch and torchrun write into the environment of a process, and nobody by hand.
MARKS_OF_A_LAUNCHER = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_DYNAMIC")
REPEAT_SECONDS = 1.0  # a launcher passes a signal on that has also reached its processes themselves

FORKED_SECONDS = 30  # that a process which was forked from a run lives on after SIGTERM


class Stop:
    """What this process was asked for: a place in REASONS.

    A first signal is remembered. A second SIGINT raises KeyboardInterrupt, any other second signal ends the
    process at once, even where it waits for another process inside of a library.

    Args:
        shows: whether a signal is acknowledged on stderr.
    """

    def __init__(self, *, shows: bool = True):
        self.shows = shows
        self.reason = 0
        self.is_launched = any(mark in os.environ for mark in MARKS_OF_A_LAUNCHER)
        self.is_listening = False
        self._handled_at = 0.0

    def agree(self, device: torch.device) -> int:
        """The strongest reason of all processes, on all of them. Each must call it."""
        if not self.reason and self.is_launched and os.getppid() != first_parent():
            self.reason = REASONS.index("the end of its launcher")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.reason
        strongest = torch.tensor(self.reason, device=device)
        torch.distributed.all_reduce(strongest, op=torch.distributed.ReduceOp.MAX)
        return int(strongest)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remembers a signal; Python calls this between two of its own operations."""
        self.reason = self.reason or REASONS.index(SIGNALS[number])
        before, self._handled_at = self._handled_at, time.monotonic()
        if before and number == signal.SIGINT and not self._is_repeat(self._handled_at - before):
            raise KeyboardInterrupt

    def listen(self, reader: int) -> None:
        """Reads signals from a pipe, at once, until a 0: says the first, ends the process with a second."""
        began = 0.0
        while number := os.read(reader, 1)[0]:
            name, now = SIGNALS.get(number), time.monotonic()
            if name and not began:
                began = now
                self._say(f"{name}: the run saves and stops at the end of this step; once more ends it now")
            elif name and number != signal.SIGINT and not self._is_repeat(now - began):
                self._say(f"{name} again: the run ends now; its earlier checkpoints are as they were")
                os._exit(128 + number)

    def hold(self) -> None:
        """Before a fork: a signal must not reach the new process while it has the pipe of this one."""
        if self.is_listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def go_on(self) -> None:
        """After a fork, in this process."""
        if self.is_listening:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def leave(self) -> None:
        """In a forked process, such as a worker that loads data: the signals of a terminal are not for it."""
        if self.is_listening:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, _end_later if number == signal.SIGTERM else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _is_repeat(self, seconds: float) -> bool:
        return self.is_launched and seconds < REPEAT_SECONDS

    def _say(self, line: str) -> None:
        if self.shows:
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, f"{line}\n".encode())


@cache
def first_parent() -> int:
    """The parent of this process when this was asked first; ``train`` does at its very begin."""
    return os.getppid()


class StopCallback(TrainerCallback):
    """Saves and ends the training at the step where the processes agree to stop. On all of them, and last.

    An evaluation that is due at this step is made first, so that the resumed run lacks none. The last step
    ends as ever. Raises Preempted behind the save.
    """

    def __init__(self, stop: Stop, *, words: str):
        self.stop, self.words = stop, words
        self.reason = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reason = self.stop.agree(args.device)
        if reason and not control.should_training_stop and state.global_step < state.max_steps:
            self.reason = reason
            control.should_save = control.should_training_stop = control.should_log = True
            args.save_only_model = False  # nothing could go on from it

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reason:  # save_strategy best, and this step was not: nothing has been saved yet
            control.should_save, control.should_evaluate = True, False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reason:
            checkpoint = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            facts = {"step": state.global_step, "steps": state.max_steps, "checkpoint": checkpoint}
            goes_on = str(args.resume_from_checkpoint or "auto").lower() in ("auto", "must", "true")
            words = self.words if goes_on else "with --resume_from_checkpoint auto"
            raise Preempted(REASONS[self.reason], **facts, words=words)


@contextmanager
def stoppable(trainer: Trainer, *, words: str = "") -> Iterator[None]:
    """Lets signals stop the training inside, and says so; the handlers of the caller come back afterwards.

    No process leaves before the main one has written everything: a launcher ends the others with the first.

    Args:
        words: how the command must differ so that it goes on, such as "without --overwrite".
    """
    with listening(Stop(shows=trainer.is_world_process_zero())) as stop:
        trainer.add_callback(StopCallback(stop, words=words))
        try:
            yield
        except Preempted as error:
            if trainer.is_world_process_zero():
                write_line(str(error))
            stop.agree(trainer.args.device)
            raise


def let_workers_last(loader: DataLoader) -> DataLoader:
    """Lets the processes that load data outlive a SIGTERM to all of them, so that the step can end."""
    own: Any = getattr(loader, "base_dataloader", loader)  # of accelerate's
    if own.num_workers:
        own.worker_init_fn = partial(_begin_worker, begin=own.worker_init_fn, is_over=_end_of(os.getpid()))
    return loader


@cache
def _end_of(process: int) -> Any:
    """A byte shared with the processes that load data: 1 once this process ends, and sends them SIGTERM."""
    is_over = sharedctypes.RawValue("b", 0)
    util.Finalize(None, setattr, (is_over, "value", 1), exitpriority=100)
    return is_over


def _begin_worker(number: int, *, begin: Callable[[int], None] | None, is_over: Any) -> None:
    if begin is not None:
        begin(number)
    signal.signal(signal.SIGTERM, partial(_end_with, is_over=is_over))  # torch has put its own there
    signal.alarm(0)  # of a SIGTERM before


def _end_with(number: int, frame: FrameType | None, *, is_over: Any) -> None:
    if is_over.value:  # torch's loop in a worker ends by itself where the process that trains died
        os._exit(0)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(FORKED_SECONDS)


@contextmanager
def listening(stop: Stop) -> Iterator[Stop]:
    """Lets ``stop`` hear the signals, in the main thread only; one that is ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=stop.listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    os.register_at_fork(before=stop.hold, after_in_parent=stop.go_on, after_in_child=stop.leave)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.handle) for number in heard}
    stop.is_listening = True
    try:
        yield stop
    finally:
        stop.is_listening = False
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
