"""Where the time of a step goes: the clock, the parts of a Trainer's steps, the bars and the advice."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_clm import step_time as module
from hf_clm.bench import WINDOWS, WindowCallback
from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.model import loss
from hf_clm.step_time import PARTS, StepClock, StepTime, advise
from hf_clm.training.trainer import CLMTrainer

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}] * 64
SECONDS = {"input": 0.1, "forward": 0.3, "loss": 0.0, "backward": 0.4, "optimizer": 0.15, "Python": 0.05}


def run_step(clock: StepClock) -> dict[str, float]:
    """A forward with a loss inside, from 1 to 7 on a clock that is read once for each mark."""
    compute_loss = clock.timed("loss", lambda: None)
    clock.start()
    clock.timed("forward", compute_loss)()
    return clock.stop()


def test_a_part_inside_another_interrupts_it_and_the_parts_sum_to_the_step(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 1.0, 3.0, 6.0, 7.0, 9.0]).__next__)

    seconds = run_step(StepClock(torch.device("cpu")))

    expected = {"input": 0, "forward": 3, "loss": 3, "backward": 0, "optimizer": 0, "Python": 3}
    assert seconds == expected
    assert sum(seconds.values()) == 9


def test_a_gpu_is_timed_by_events_and_waited_for_once_at_the_end(monkeypatch):
    milliseconds, waits = iter([0, 1000, 3000, 6000, 7000, 9000]), []

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool):
            assert (device.type, enable_timing) == ("cuda", True)

        def record(self) -> None:
            self.at = next(milliseconds)

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch, "Event", Event)

    seconds = run_step(StepClock(torch.device("cuda")))

    assert {part: value for part, value in seconds.items() if value} == {"forward": 3, "loss": 3, "Python": 3}
    assert waits == [9000]


def sleepy(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return run


class SleepyOptimizer(torch.optim.SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return super().step(*args, **kwargs)


class SleepyCallback(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.06)


@pytest.mark.parametrize("kind", ["llama", "cohere"])  # cohere scales its logits, so it needs its own loss
def test_each_delay_shows_in_its_part_once_for_each_micro_batch(tmp_path, monkeypatch, kind):
    sizes: Any = {**SIZES["llama"], "vocab_size": 260}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        max_steps=WINDOWS + 3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer = CLMTrainer(
        model,
        arguments,
        data_collator=sleepy(0.02, DataCollatorForCausalLM(0)),
        train_dataset=ROWS,
        optimizers=(SleepyOptimizer(model.parameters(), lr=1e-3), None),
        callbacks=[SleepyCallback()],
    )
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.025))
    if trainer.target_loss:
        monkeypatch.setattr(loss, "measure_targets", sleepy(0.03, loss.measure_targets))
    else:
        model.loss_function = sleepy(0.03, model.loss_function)
    model.model.norm.weight.register_hook(lambda gradient: time.sleep(0.035))
    windows = WindowCallback(trainer)
    trainer.add_callback(windows)

    trainer.train()

    expected = {"input": 0.04, "forward": 0.05, "loss": 0.06, "backward": 0.07, "optimizer": 0.05}
    assert {
        part for part, least in (expected | {"Python": 0.06}).items() if windows.seconds[part] < least
    } == set()
    assert windows.loss == {"llama": "with its gradients", "cohere": ""}[kind]
    assert len(windows.logs) == WINDOWS + 1  # a window to warm up, and those that count for the speed


def test_the_bars_are_as_long_as_the_shares_and_the_advice_follows():
    advice = ["input: " + "words " * 14]

    lines = StepTime(SECONDS, "with its gradients", advice).to_lines(rows=4)

    assert lines == [
        "step      1.000 s with a micro-batch of 4:",
        "          input      10.0%  ########                        read, collate, copy",
        "          forward    30.0%  ######################",
        "          loss        0.0%                                  with its gradients",
        "          backward   40.0%  ##############################",
        "          optimizer  15.0%  ###########                     clip and update",
        "          Python      5.0%  ####                            the rest",
        "change    input: words words words words words words words words words words",
        "            words words words words",
    ]
    assert StepTime(SECONDS, "", []).to_lines(rows=4)[-1] == (
        "change    nothing: the model itself takes 70% of the step"
    )


def advice_for(
    tmp_path, shares: dict[str, float], *, own_loss: str = "", padding: float = 0.0, **settings: Any
) -> list[str]:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **settings)
    small = dict.fromkeys(PARTS, 0.05)
    return advise(
        small | shares,
        arguments,
        dtype=torch.float32,
        vocabulary=151936,
        own_loss=own_loss,
        padding=padding,
    )


@pytest.fixture
def plain_machine(monkeypatch):
    """A machine of four cores without bfloat16, which does nothing else."""
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    monkeypatch.setattr(module, "has_bf16", lambda device: False)
    monkeypatch.setattr("os.getloadavg", lambda: (4.0, 4.0, 4.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.mark.parametrize(
    ("shares", "facts", "expected"),
    [
        ({"forward": 0.3, "backward": 0.6}, {}, []),
        (
            {"input": 0.11},
            {},
            [
                "input: set train.dataloader_num_workers to 2, so that more batches are collated while the"
                " model computes"
            ],
        ),
        ({"input": 0.4}, {"dataloader_num_workers": 4}, []),  # on four cores
        (
            {},
            {"padding": 0.48},
            ["padding: 48% of all positions; set data.packing to best_fit"],
        ),
        (
            {"loss": 0.4},
            {},
            [
                "loss: computed at the targets only over 151,936 tokens; a smaller vocabulary or fewer"
                " targets would be faster"
            ],
        ),
        (
            {"loss": 0.4},
            {"own_loss": "it transforms the output of its head"},
            [
                "loss: computed at every position (it transforms the output of its head) over 151,936 tokens;"
                " a smaller vocabulary or shorter rows would be faster"
            ],
        ),
        (
            {},
            {"gradient_checkpointing": True},
            [
                "backward: includes a second forward pass; set train.gradient_checkpointing to false if"
                " memory allows"
            ],
        ),
        (
            {"optimizer": 0.3},
            {"optim": "adamw_torch", "gradient_accumulation_steps": 4},
            [
                "optimizer: set train.optim to adamw_torch_fused",
                "optimizer: take fewer, larger steps; set train.gradient_accumulation_steps to 8"
                " (changes the global batch)",
            ],
        ),
        (
            {"Python": 0.3},
            {},
            [
                "Python: costs the same for every micro-batch; use fewer and larger ones"
                " (train.per_device_train_batch_size or data.tokens_per_batch)"
            ],
        ),
    ],
)
def test_the_advice_for_a_large_part_names_the_key_to_change(
    tmp_path, plain_machine, shares, facts, expected
):
    assert advice_for(tmp_path, shares, **facts) == expected


def test_the_advice_for_a_machine_is_about_its_precision_and_its_cores(tmp_path, plain_machine, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    monkeypatch.setattr(module, "has_bf16", lambda device: True)
    monkeypatch.setattr("os.getloadavg", lambda: (13.7, 9.6, 5.5))

    assert advice_for(tmp_path, {}) == [
        "precision: float32, but this machine has bfloat16, which is faster; set train.bf16 to true",
        "cores: 4 of 8 in use; unset OMP_NUM_THREADS or raise it",
        "cores: other programs use them (load average 14 on 8); measure again when idle",
    ]
