"""The lines that a run prints, and the files that it appends to."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_clm.errors import DivergedError
from hf_clm.training.callbacks import (
    MetricsCallback,
    ProgressCallback,
    ReportCallback,
    SamplesCallback,
    SkippedStepsCallback,
    epoch_means,
)
from hf_clm.training.trainer import CLMTrainer

LOG = {
    "loss": 1.25,
    "grad_norm": 0.5,
    "learning_rate": 0.001,
    "token_accuracy": 0.5,
    "tokens_per_second": 1234.6,
}


def event(callback, name: str, *, step: int, logs: dict | None = None, is_main: bool = True, **more) -> None:
    state = TrainerState(global_step=step, max_steps=200, is_world_process_zero=is_main, **more)
    getattr(callback, name)(SimpleNamespace(spec=TrainingArguments), state, TrainerControl(), logs=logs)


def test_a_log_event_is_one_line_with_the_time_left(capsys, monkeypatch):
    clock = iter([1000.0, 1500.0, 1510.0])  # 10 seconds for 50 of 200 steps: 30 more
    monkeypatch.setattr("hf_clm.training.callbacks.time.monotonic", lambda: next(clock))
    callback = ProgressCallback(is_terminal=False)

    event(callback, "on_train_begin", step=0)
    event(callback, "on_step_begin", step=0)  # after an evaluation of 500 seconds
    event(callback, "on_log", step=50, logs=LOG)

    assert capsys.readouterr().out == (
        "step  50/200  epoch 0.00  loss 1.2500  grad norm 0.5  lr 0.001  accuracy 50%  tokens/s 1,235"
        "  30s left\n"
    )


def test_an_evaluation_is_one_line(capsys):
    event(
        ProgressCallback(is_terminal=False),
        "on_log",
        step=200,
        logs={"eval_loss": 2.0, "eval_token_accuracy": 0.25},
    )

    assert capsys.readouterr().out == "step 200/200  epoch 0.00  eval loss 2.0000  eval accuracy 25%\n"


@pytest.mark.parametrize(
    ("logs", "is_main"), [(LOG, False), ({"train_runtime": 3.0, "train_loss": 1.0}, True)]
)
def test_other_processes_and_the_sums_of_the_trainer_are_not_shown(capsys, logs, is_main):
    event(ProgressCallback(is_terminal=False), "on_log", step=1, logs=logs, is_main=is_main)

    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_instead_of_lines(capsys):
    callback = ProgressCallback(is_terminal=True)

    event(callback, "on_train_begin", step=0)
    event(callback, "on_step_end", step=50)
    event(callback, "on_log", step=50, logs=LOG)
    event(callback, "on_train_end", step=200)

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "50/200" in shown.err and "loss 1.2500" in shown.err


def test_rank_0_writes_metrics_as_one_json_object_per_line(tmp_path, monkeypatch):
    clock = iter([90.0, 100.0, 102.5, 110.0])
    monkeypatch.setattr("hf_clm.training.callbacks.time.monotonic", lambda: next(clock))
    path = tmp_path / "metrics.jsonl"
    callback = MetricsCallback(path, measure_memory=lambda: 4096)

    event(callback, "on_train_begin", step=0)
    event(callback, "on_log", step=3, logs={"loss": 1.5})
    event(callback, "on_log", step=3, logs={"loss": 9.0}, is_main=False)
    event(callback, "on_log", step=4, logs={"eval_loss": 2.0})

    assert path.read_text().splitlines() == [
        '{"step": 3, "loss": 1.5, "seconds": 2.5, "peak_memory_bytes": 4096}',
        '{"step": 4, "eval_loss": 2.0, "seconds": 10.0, "peak_memory_bytes": 4096}',
    ]


def test_the_seconds_of_a_resumed_run_continue(tmp_path, monkeypatch):
    clock = iter([90.0, 100.0, 103.0])
    monkeypatch.setattr("hf_clm.training.callbacks.time.monotonic", lambda: next(clock))
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "seconds": 7.0}\n{"step": 5, "seconds": 9.0}\n')
    callback = MetricsCallback(path, measure_memory=lambda: 0)

    event(callback, "on_train_begin", step=4)
    event(callback, "on_log", step=5, logs={})

    assert path.read_text().splitlines() == [
        '{"step": 4, "seconds": 7.0}',
        '{"step": 5, "seconds": 10.0, "peak_memory_bytes": 0}',
    ]


def test_samples_are_taken_at_most_once_per_step(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    callback = SamplesCallback(["春", "b"], lambda: ["答", "B"], path=path, every_steps=2)

    event(callback, "on_train_begin", step=0)
    for step in (1, 2, 3, 4):
        event(callback, "on_step_end", step=step)
    event(callback, "on_train_end", step=4)

    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(entry["step"], entry["prompt"], entry["text"]) for entry in entries] == [
        (0, "春", "答"),
        (0, "b", "B"),
        (2, "春", "答"),
        (2, "b", "B"),
        (4, "春", "答"),
        (4, "b", "B"),
    ]
    assert capsys.readouterr().out.splitlines()[0] == "  sample at step 0: '春' -> '答'"


def test_without_an_interval_samples_are_taken_only_before_and_after_training(tmp_path):
    path = tmp_path / "samples.jsonl"
    callback = SamplesCallback(["a"], lambda: ["A"], path=path, every_steps=None)

    event(callback, "on_train_begin", step=0)
    event(callback, "on_step_end", step=1)
    event(callback, "on_train_end", step=2)

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]


def test_samples_can_be_taken_at_the_end_of_each_epoch(tmp_path):
    path = tmp_path / "samples.jsonl"
    callback = SamplesCallback(["a"], lambda: ["A"], path=path, every_epoch=True)

    event(callback, "on_train_begin", step=0)
    for step, epoch in [(1, 1 / 3), (3, 1.0), (4, 1 + 1 / 3), (6, 2.0)]:
        event(callback, "on_step_end", step=step, epoch=epoch)
    event(callback, "on_train_end", step=6, epoch=2.0)

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 3, 6]


def log_event(step: int, epoch: float, *, loss: float, accuracy: float, targets: int) -> dict:
    return {
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "token_accuracy": accuracy,
        "target_tokens_seen": targets,
    }


FIRST = log_event(1, 0.25, loss=8.0, accuracy=0.0, targets=10)
SECOND = log_event(4, 1.0, loss=4.0, accuracy=0.5, targets=40)
THIRD = log_event(6, 1.5, loss=3.0, accuracy=0.5, targets=50)
FOURTH = log_event(8, 2.0, loss=1.0, accuracy=1.0, targets=80)


@pytest.mark.parametrize(
    ("history", "means"),
    [
        # one step of loss 8 and three of 4; 10 targets of accuracy 0 and 30 of one half
        ([FIRST, SECOND], (1.0, 5.0, 0.375)),
        # two steps of 3 and two of 1; 10 targets of one half and 30 of 1
        ([FIRST, SECOND, {"eval_loss": 9.0, "epoch": 1.0}, THIRD, FOURTH], (2.0, 2.0, 0.875)),
        ([FIRST], None),  # in the middle of an epoch
        ([THIRD, FOURTH], None),  # the epoch began before these events
        (
            [log_event(1, 1.0, loss=1.0, accuracy=1.0, targets=9)],
            None,
        ),  # an epoch of one step is its own mean
    ],
)
def test_the_means_of_an_epoch_are_weighted_by_steps_and_targets(history, means):
    expected = dict(zip(("epoch", "epoch_loss", "epoch_token_accuracy"), means, strict=True)) if means else {}

    assert epoch_means(history) == expected


class Clock:
    """A clock that the test advances."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("hf_clm.training.callbacks.time.monotonic", lambda: self.now)

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


def test_the_report_takes_at_most_one_hundredth_of_the_time(monkeypatch):
    """Log events occur every 0.3 seconds. A report takes 0.1 seconds at first, and 10 % longer each time."""
    clock, written = Clock(monkeypatch), []

    def write():
        clock.pass_seconds(0.1 * 1.1 ** len(written))
        written.append(clock.now - 1000)

    callback = ReportCallback(write, is_main=True)
    event(callback, "on_train_begin", step=0)
    spent = 0.1
    for step in range(1, 3000):
        clock.pass_seconds(0.3)
        pages = len(written)
        event(callback, "on_log", step=step)
        spent += sum(0.1 * 1.1**page for page in range(pages, len(written)))
        if len(written) > 1:
            assert spent <= 0.01 * (clock.now - 1000)

    assert written[0] == pytest.approx(0.1)
    assert 110 < written[1] < 111  # 0.1 seconds were spent, and 1 is expected
    assert len(written) == 23  # 1.1^23 - 1 = 7.95 of 907 seconds; with 1.5 x 0.81 it would be too much


def test_the_last_report_is_written_however_long_it_takes(monkeypatch):
    clock, written = Clock(monkeypatch), []
    callback = ReportCallback(lambda: written.append(clock.now), is_main=True)

    event(callback, "on_train_begin", step=0)
    callback.close()

    assert written == [1000.0, 1000.0]


def test_other_processes_write_no_report():
    callback = ReportCallback(lambda: pytest.fail("written"), is_main=False)

    event(callback, "on_train_begin", step=0, is_main=False)
    event(callback, "on_log", step=1, is_main=False)
    callback.close()


def test_a_full_disk_is_reported_once_and_does_not_stop_training(monkeypatch, capsys):
    clock = Clock(monkeypatch)

    def write():
        raise OSError(28, "No space left on device", "run/report.html")

    callback = ReportCallback(write, is_main=True)
    event(callback, "on_train_begin", step=0)
    clock.pass_seconds(101)
    event(callback, "on_log", step=1)
    callback.close()

    assert capsys.readouterr().out == (
        "warning   the report cannot be written, and training continues: "
        "[Errno 28] No space left on device: 'run/report.html'\n"
    )


def test_a_float16_run_that_skips_20_steps_in_a_row_stops_with_a_reason():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([weight], lr=1.0))
    callback = SkippedStepsCallback(SimpleNamespace(accelerator=accelerator))

    def make_step(number: int, gradient: float) -> None:
        accelerator.scaler.scale((weight * gradient).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        event(callback, "on_step_end", step=number)

    for number in range(1, 20):
        make_step(number, float("inf"))
    make_step(20, 0.5)
    for number in range(21, 40):
        make_step(number, float("inf"))
    with pytest.raises(DivergedError) as error:
        make_step(40, float("inf"))

    assert weight.item() == 0.5
    assert str(error.value) == (
        "step 40: the last 20 steps were skipped, as their gradients overflow in float16; "
        "got a loss scale of 1.19209e-07; "
        "fix: set train.fp16: false to train in float32, or train.bf16: true on a GPU that has it"
    )


@pytest.mark.parametrize("fp16", [False, True])
def test_skipped_steps_are_watched_in_float16_only(fp16, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.fp16 = fp16  # a CPU would be refused

    trainer = CLMTrainer(tiny_model(), arguments)

    watched = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert (SkippedStepsCallback in watched) == fp16
