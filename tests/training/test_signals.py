"""A signal stops a run after its step, with one checkpoint, and restores the caller's handlers."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from helpers import X, tiny_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.errors import ExitCode, Preempted
from hf_clm.training.callbacks import LastEvaluationCallback
from hf_clm.training.signals import Stop, listening, stoppable
from hf_clm.training.trainer import CLMTrainer

ROWS = [{"input_ids": [n, n + 1, n + 2], "labels": [X, n + 1, n + 2]} for n in range(1, 9)]


class Signals(TrainerCallback):
    """Sends signals to this process during a step, and records the events of each step."""

    def __init__(self, *numbers: int, step: int):
        self.numbers, self.step = numbers, step
        self.events: list[tuple[str, int]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                signal.raise_signal(number)

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))


def build_trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> CLMTrainer:
    """8 rows, an epoch of 4 steps, 6 steps in total, and dropout, so that the random state matters."""
    defaults: dict[str, Any] = {"use_cpu": True, "report_to": "none", "logging_steps": 1, "max_steps": 6}
    defaults |= {"remove_unused_columns": False, "disable_tqdm": True, "logging_nan_inf_filter": False}
    defaults |= {"per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    trainer = CLMTrainer(
        model,
        TrainingArguments(str(folder), **(defaults | settings)),
        data_collator=DataCollatorForCausalLM(257),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        callbacks=[*callbacks],
    )
    trainer.add_callback(LastEvaluationCallback())
    return trainer


def stop(folder: Path, *numbers: int, step: int = 3, **settings: Any) -> tuple[Preempted, Signals]:
    """Returns what a run raises after signals during a step."""
    signals = Signals(*numbers, step=step)
    trainer = build_trainer(folder, signals, **settings)
    with pytest.raises(Preempted) as error, stoppable(trainer):
        trainer.train()
    return error.value, signals


@pytest.fixture(autouse=True)
def hearing_hangups():
    """Under nohup, SIGHUP is ignored, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", ExitCode.PREEMPTED),
        ("SIGUSR1", ExitCode.PREEMPTED),
        ("SIGHUP", ExitCode.PREEMPTED),
        ("SIGINT", ExitCode.INTERRUPTED),
    ],
)
def test_a_signal_stops_at_the_end_of_its_step_and_saves_once(tmp_path, capfd, name, code):
    error, signals = stop(tmp_path, getattr(signal, name))

    assert error.code == code
    assert error.to_json() == {"stopped_by": name, "stopped_at_step": 3}
    assert signals.events == [("step", 1), ("step", 2), ("step", 3), ("save", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    shown = capfd.readouterr()
    line = f"stopped by {name} at step 3 of 6; saved in {tmp_path / 'checkpoint-3'}; "
    assert shown.out.splitlines()[-1] == f"{line}the same command resumes from there"
    assert f"{name}: saving and stopping after this step; send it again to stop now\n" in shown.err


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    build_trainer(tmp_path / "whole", save_strategy="steps", save_steps=6).train()
    stop(tmp_path / "cut", signal.SIGTERM)
    torch.manual_seed(987)  # a new process has another random state

    resumed = build_trainer(tmp_path / "cut", save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))

    whole, cut = (
        load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_step_that_is_saved_anyway_is_saved_once(tmp_path):
    _, signals = stop(tmp_path, signal.SIGTERM, save_strategy="steps", save_steps=3)

    assert signals.events == [("step", 1), ("step", 2), ("step", 3), ("save", 3)]


def test_an_evaluation_that_is_due_at_the_step_still_runs(tmp_path):
    """The resumed run would not repeat it."""
    _, signals = stop(tmp_path, signal.SIGTERM, eval_strategy="steps", eval_steps=3)

    assert signals.events == [("step", 1), ("step", 2), ("step", 3), ("evaluate", 3), ("save", 3)]


def test_an_evaluation_at_the_end_of_the_epoch_runs_at_its_last_step(tmp_path):
    """8 rows are an epoch of 4 steps. The resumed run begins with the next epoch."""
    _, signals = stop(tmp_path, signal.SIGTERM, step=4, eval_strategy="epoch", per_device_train_batch_size=2)

    assert signals.events[-3:] == [("step", 4), ("evaluate", 4), ("save", 4)]


def test_a_stop_saves_even_if_only_the_best_checkpoints_are_saved(tmp_path):
    best: dict[str, Any] = {"save_strategy": "best", "metric_for_best_model": "target_tokens"}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}

    _, signals = stop(tmp_path, signal.SIGTERM, **best)  # as many tokens each time: only the first is best

    saves = [event for event in signals.events if event[0] != "step"]
    assert saves == [("evaluate", 1), ("save", 1), ("evaluate", 2), ("evaluate", 3), ("save", 3)]


def test_a_run_that_reaches_its_last_step_ends_normally(tmp_path):
    signals = Signals(signal.SIGTERM, step=6)
    trainer = build_trainer(tmp_path, signals)

    with stoppable(trainer):
        trainer.train()

    assert signals.events[-2:] == [("step", 6), ("evaluate", 6)]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_twice_interrupts_immediately(tmp_path):
    signals = Signals(signal.SIGINT, signal.SIGINT, step=3)
    trainer = build_trainer(tmp_path, signals)

    with pytest.raises(KeyboardInterrupt), stoppable(trainer):
        trainer.train()

    assert signals.events == [("step", 1), ("step", 2)]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_a_launcher_forwards_counts_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    error, _ = stop(tmp_path, signal.SIGINT, signal.SIGINT)

    assert error.step == 3


def test_the_handlers_of_the_caller_are_restored(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        stop(tmp_path, signal.SIGTERM)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert os.read(reader, 9) == bytes([signal.SIGTERM])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """A shell makes background processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = build_trainer(tmp_path, Signals(signal.SIGINT, step=3))
        with stoppable(trainer):
            assert trainer.train().global_step == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_installed():
    before, found = signal.getsignal(signal.SIGTERM), []

    def look():
        with listening(Stop()):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()

    assert found == [before]


def test_the_end_of_a_launcher_stops_a_run_and_that_of_a_shell_does_not(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_DYNAMIC", raising=False)
    of_a_shell = Stop()
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    launched = Stop()

    assert (of_a_shell.agree(), launched.agree()) == (0, 0)

    monkeypatch.setattr(os, "getppid", lambda: 0)

    assert (of_a_shell.agree(), launched.agree()) == (0, 5)


def test_a_forked_process_does_not_pass_its_signals_to_the_run():
    """Ctrl-C in a terminal also reaches the data loader workers."""
    with listening(Stop(shows=False)) as heard:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    assert heard.reason == 0


LEAVES_WORKERS = """
from torch.utils.data import DataLoader
from hf_clm.training.signals import let_workers_last
rows = iter(let_workers_last(DataLoader(list(range(8)), num_workers=2, persistent_workers=True)))
next(rows)
raise SystemExit(3)
"""


def test_a_process_that_ends_early_ends_its_data_loader_workers(tmp_path):
    """Otherwise, they would outlive it as they outlive any SIGTERM, and be reported as failed."""
    (tmp_path / "leaves.py").write_text(LEAVES_WORKERS)

    process = Forked(tmp_path, ["leaves.py"])

    assert process.wait(20) == 3
    assert process.read().err == ""


def test_preempted_ends_a_loop_that_catches_exceptions():
    """A loop over runs with ``except Exception`` must not start the next run."""
    facts = {"step": 1, "steps": 2, "checkpoint": "run/checkpoint-1"}

    assert not isinstance(Preempted("SIGTERM", **facts), Exception)
    assert json.dumps(Preempted("SIGTERM", **facts).to_json())
