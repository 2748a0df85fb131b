"""Stops a run on a signal: all processes stop after the same step, with a checkpoint to resume from.

SIGTERM, SIGUSR1, SIGHUP, SIGINT   or the end of the launcher
     |  recorded
     v
the end of a step                  all processes agree on the strongest reason
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
from datetime import timedelta
from functools import cache, partial
from multiprocessing import sharedctypes, util
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clm.errors import Preempted
from hf_clm.training.callbacks import write_line

# From the weakest to the strongest. The processes compare the indices.
REASONS = ("", "SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM", "the end of its launcher")
SIGNALS = {int(getattr(signal, name)): name for name in REASONS[1:5] if hasattr(signal, name)}
# Environment variables that only accelerate launch and torchrun set.
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_DYNAMIC")
REPEAT_SECONDS = 1.0  # a launcher forwards a signal that its processes have already received

FORKED_SECONDS = 30  # a process that was forked from the run ends this long after SIGTERM


class Stop:
    """The reason for which this process should stop, as an index into REASONS.

    The first signal is recorded. A second SIGINT raises KeyboardInterrupt. Any other second signal ends the
    process immediately, even if it waits for another process inside a library.

    Args:
        shows: whether to acknowledge signals on stderr.
        group: the processes that agree, whose messages do not pass through a GPU; None is the default group.
    """

    def __init__(self, *, shows: bool = True, group: "torch.distributed.ProcessGroup | None" = None):
        self.shows = shows
        self.group = group
        self.reason = 0
        self.is_launched = any(mark in os.environ for mark in LAUNCHER_VARIABLES)
        self.is_listening = False
        self._handled_at = 0.0

    def agree(self) -> int:
        """Returns the strongest reason of any process, on all processes. Every process must call it.

        The reasons are compared on the hosts: reading the result on a GPU would wait for its queued work.
        """
        if not self.reason and self.is_launched and os.getppid() != first_parent():
            self.reason = REASONS.index("the end of its launcher")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.reason
        strongest = torch.tensor(self.reason)
        torch.distributed.all_reduce(strongest, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return int(strongest)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Records a signal. Python calls this between two bytecode instructions."""
        self.reason = self.reason or REASONS.index(SIGNALS[number])
        before, self._handled_at = self._handled_at, time.monotonic()
        if before and number == signal.SIGINT and not self._is_repeat(self._handled_at - before):
            raise KeyboardInterrupt

    def listen(self, reader: int) -> None:
        """Reads signals from a pipe until a 0. Acknowledges the first, and ends the process on the second."""
        began = 0.0
        while number := os.read(reader, 1)[0]:
            name, now = SIGNALS.get(number), time.monotonic()
            if name and not began:
                began = now
                self._print(f"{name}: saving and stopping after this step; send it again to stop now")
            elif name and number != signal.SIGINT and not self._is_repeat(now - began):
                self._print(f"{name} again: stopping now, without saving; earlier checkpoints are intact")
                os._exit(128 + number)

    def block(self) -> None:
        """Runs before a fork: blocks signals, which the child would write to the pipe of this process."""
        if self.is_listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def unblock(self) -> None:
        """Runs after a fork in this process."""
        if self.is_listening:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def detach(self) -> None:
        """Runs in a forked process, such as a data loader worker, which ignores the signals of a terminal."""
        if self.is_listening:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, _end_later if number == signal.SIGTERM else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _is_repeat(self, seconds: float) -> bool:
        return self.is_launched and seconds < REPEAT_SECONDS

    def _print(self, line: str) -> None:
        if self.shows:
            with suppress(OSError):  # the terminal is gone
                os.write(2, f"{line}\n".encode())


@cache
def first_parent() -> int:
    """Returns the id of the parent process at the first call, which ``train`` makes when it begins."""
    return os.getppid()


class StopCallback(TrainerCallback):
    """Saves and ends training at the step where the processes agree to stop. Must be the last callback.

    An evaluation that is due at this step runs first, as the resumed run will not repeat it. A run at its
    last step ends normally. Raises Preempted after saving.
    """

    def __init__(self, stop: Stop, *, words: str):
        self.stop, self.words = stop, words
        self.reason = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reason = self.stop.agree()
        if reason and not control.should_training_stop and state.global_step < state.max_steps:
            self.reason = reason
            control.should_save = control.should_training_stop = control.should_log = True
            args.save_only_model = False  # which could not be resumed

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reason:  # with save_strategy "best", this step has not been saved yet
            control.should_save, control.should_evaluate = True, False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reason:
            checkpoint = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            facts = {"step": state.global_step, "steps": state.max_steps, "checkpoint": checkpoint}
            resumes = str(args.resume_from_checkpoint or "auto").lower() in ("auto", "must", "true")
            words = self.words if resumes else "with --resume_from_checkpoint auto"
            raise Preempted(REASONS[self.reason], **facts, words=words)


@contextmanager
def stoppable(trainer: Trainer, *, words: str = "") -> Iterator[None]:
    """Lets signals stop the training inside the block, and restores the caller's handlers afterwards.

    All processes wait for the main one to write everything, as a launcher kills the others after the first.

    Args:
        words: how to change the command to resume, such as "without --overwrite".
    """
    stop = Stop(shows=trainer.is_world_process_zero(), group=host_group(trainer.args))
    with listening(stop):
        trainer.add_callback(StopCallback(stop, words=words))
        try:
            yield
        except Preempted as error:
            if trainer.is_world_process_zero():
                write_line(str(error))
            stop.agree()
            raise


def host_group(arguments: TrainingArguments) -> "torch.distributed.ProcessGroup | None":
    """Returns a group of all processes that communicates between hosts; None if the default group does.

    All processes must call it.
    """
    if arguments.world_size == 1 or arguments.device.type == "cpu":
        return None
    timeout = timedelta(seconds=arguments.ddp_timeout)
    group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, torch.distributed.ProcessGroup)  # an int for processes outside of it
    return group


def let_workers_last(loader: DataLoader) -> DataLoader:
    """Makes data loader workers ignore a SIGTERM to the process group, so that the step can finish."""
    base: Any = getattr(loader, "base_dataloader", loader)  # inside accelerate's loader
    if base.num_workers:
        base.worker_init_fn = partial(_begin_worker, begin=base.worker_init_fn, is_over=_end_of(os.getpid()))
    return loader


@cache
def _end_of(process: int) -> Any:
    """Returns a byte that is shared with the workers and set to 1 when this process ends."""
    is_over = sharedctypes.RawValue("b", 0)
    util.Finalize(None, setattr, (is_over, "value", 1), exitpriority=100)
    return is_over


def _begin_worker(number: int, *, begin: Callable[[int], None] | None, is_over: Any) -> None:
    if begin is not None:
        begin(number)
    signal.signal(signal.SIGTERM, partial(_end_with, is_over=is_over))  # replaces torch's handler
    signal.alarm(0)  # set by an earlier SIGTERM


def _end_with(number: int, frame: FrameType | None, *, is_over: Any) -> None:
    if is_over.value:  # if the training process is killed, torch's loop in the worker ends by itself
        os._exit(0)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(FORKED_SECONDS)


@contextmanager
def listening(stop: Stop) -> Iterator[Stop]:
    """Lets ``stop`` receive signals, in the main thread only. Ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=stop.listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    os.register_at_fork(before=stop.block, after_in_parent=stop.unblock, after_in_child=stop.detach)
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.handle) for number in numbers}
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
