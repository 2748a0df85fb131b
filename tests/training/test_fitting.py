"""A run that runs out of memory equals a run with smaller micro-batches from the beginning."""

import json
from pathlib import Path
from typing import Any

import helpers
import launched
import pytest
import torch
from safetensors.torch import load_file

from hf_clm.errors import EnvironmentFault, ExitCode
from hf_clm.training import fitting
from hf_clm.training.run import train
from hf_clm.training.trainer import CLMTrainer

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz" * n} for n in range(1, 15)]
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "runtime", "samples_per_second")


class Memory:
    """Simulates a machine on which micro-batches of more rows do not fit, from a given step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, *, error: Exception | None = None):
        self.rows, self.from_step, self.tries = rows, 0, []
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        measure = CLMTrainer.measure_loss

        def limited(trainer: CLMTrainer, model: Any, inputs: Any, **options: Any) -> Any:
            size = trainer.args.train_batch_size if model.training else trainer.args.eval_batch_size
            if model.training:
                self.tries.append(size)
            if size > self.rows and trainer.state.global_step >= self.from_step:
                raise error
            return measure(trainer, model, inputs, **options)

        monkeypatch.setattr(CLMTrainer, "measure_loss", limited)


def build(folder: Path, **train_fields: Any):
    """With dropout, which would reveal another random state."""
    model = helpers.tiny_model("gpt2", resid_pdrop=0.2, embd_pdrop=0.2)
    name = helpers.save_folder(folder / "gpt2", model, helpers.byte_tokenizer())
    fields = {"max_steps": 6, "per_device_eval_batch_size": 1, **train_fields}
    return helpers.build_recipe(folder, RECORDS, model={"name_or_path": name}, train=fields)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run with micro-batches of 2 rows and 2 micro-batches per step."""
    folder = tmp_path_factory.mktemp("small")
    train(build(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    return folder


@pytest.mark.parametrize("tried_first", [False, True])
def test_the_run_is_bitwise_equal_to_one_with_smaller_micro_batches(
    small, tried_first, tmp_path, monkeypatch, capsys
):
    memory = Memory(monkeypatch, rows=2)

    train(build(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=tried_first))

    assert "\nrestart   out of memory at step 1: per_device_train_batch_size 4 -> 2, " in (
        capsys.readouterr().out
    )
    found, expected = weights(tmp_path), weights(small)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(tmp_path) == metrics(small)
    assert memory.tries[0] == 4 and set(memory.tries[1:]) == {2}


def test_the_micro_batch_is_halved_until_it_fits(tmp_path, monkeypatch, capsys):
    Memory(monkeypatch, rows=1)

    train(build(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=1))

    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("restart")] == [
        "restart   out of memory at step 1: per_device_train_batch_size 4 -> 2,"
        " gradient_accumulation_steps 6 (same global batch)",
        "restart   out of memory at step 1: per_device_train_batch_size 2 -> 1,"
        " gradient_accumulation_steps 12 (same global batch)",
    ]


def test_with_enough_memory_trying_has_no_effect(small, tmp_path):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    train(build(tmp_path, **fields, auto_find_batch_size=True))

    assert all(torch.equal(part, weights(small)[name]) for name, part in weights(tmp_path).items())
    assert metrics(tmp_path) == metrics(small)


def test_the_trial_computes_like_training(tmp_path, monkeypatch):
    """Autocast and checkpointing affect the memory of a step."""
    dtypes, computed = [], []
    measure = CLMTrainer.measure_loss

    def noted(trainer: CLMTrainer, model: Any, inputs: Any, **options: Any) -> Any:
        layer = (
            model.transformer.h[0].mlp if hasattr(model, "transformer") else model.module.transformer.h[0].mlp
        )
        hook = layer.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
        computed.append((model.training, model.is_gradient_checkpointing))
        try:
            return measure(trainer, model, inputs, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(CLMTrainer, "measure_loss", noted)
    fields = {"bf16": True, "activation_checkpointing": True, "auto_find_batch_size": True, "max_steps": 1}
    train(build(tmp_path, **fields, eval_on_start=False))

    assert computed[:2] == [(True, True)] * 2  # what is tried, and the first step
    assert dtypes[0] == dtypes[1] == torch.bfloat16


@pytest.mark.parametrize("begins", ["auto", "never", "overwrite"])
def test_the_restart_resumes_from_an_earlier_checkpoint(tmp_path, monkeypatch, capsys, begins):
    """Even if the recipe starts a new run, as the first start belongs to this run."""
    fields = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    memory = Memory(monkeypatch, rows=2)
    memory.from_step = 3
    word = {"resume_from_checkpoint": begins} if begins != "overwrite" else {}

    train(build(tmp_path, **fields, **word).model_copy(update={"overwrite": begins == "overwrite"}))

    printed = capsys.readouterr().out
    assert "restart   out of memory at step 4: per_device_train_batch_size 4 -> 2" in printed
    assert "resumes   from " in printed and "checkpoint-2" in printed
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert memory.tries[:4] == [4] * 4 and set(memory.tries[4:]) == {2}


def test_an_evaluation_that_does_not_fit_does_not_affect_training(small, tmp_path, monkeypatch, capsys):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    Memory(monkeypatch, rows=2)

    train(build(tmp_path, **fields, per_device_eval_batch_size=4))

    assert "restart   out of memory at step 1: per_device_eval_batch_size 4 -> 2\n" in (
        capsys.readouterr().out
    )
    assert all(torch.equal(part, weights(small)[name]) for name, part in weights(tmp_path).items())


@pytest.mark.parametrize(
    ("size", "budget", "message"),
    [
        (
            1,
            None,
            "train.per_device_train_batch_size: out of memory at step 1, and it cannot be halved; got 1",
        ),
        (
            3,
            None,
            "train.per_device_train_batch_size: out of memory at step 1, and it cannot be halved; got 3",
        ),
        (1, 64, "data.tokens_per_batch: out of memory at step 1, and it cannot be halved; got 64"),
    ],
)
def test_a_batch_that_cannot_be_halved_is_reported_in_one_line(size, budget, message, tmp_path, monkeypatch):
    Memory(monkeypatch, rows=0)
    recipe = build(tmp_path, per_device_train_batch_size=size, eval_on_start=False)
    data = recipe.data.model_copy(update={"packing": "none", "tokens_per_batch": budget})

    with pytest.raises(EnvironmentFault) as caught:
        train(recipe.model_copy(update={"data": data}))

    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_running_out_of_memory_in_a_later_step_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "FIRST_STEPS", 3)
    memory = Memory(monkeypatch, rows=0)
    memory.from_step = 4

    with pytest.raises(
        EnvironmentFault, match=r"^train.per_device_train_batch_size: out of memory at step 5; fix"
    ):
        train(build(tmp_path, eval_on_start=False, per_device_train_batch_size=2))


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_errors_of_other_allocators_are_recognised(words, tmp_path, monkeypatch, capsys):
    Memory(monkeypatch, rows=1, error=RuntimeError(words))

    train(build(tmp_path, per_device_train_batch_size=2, max_steps=1))

    assert "restart   out of memory" in capsys.readouterr().out


# Only the second process has too little memory for two rows.
POOR = """\
import os, sys, torch
from hf_clm.cli import main
from hf_clm.training.trainer import CLMTrainer

measure = CLMTrainer.measure_loss

def limited(trainer, model, inputs, **options):
    if os.environ["RANK"] == "1" and model.training and trainer.args.train_batch_size > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return measure(trainer, model, inputs, **options)

CLMTrainer.measure_loss = limited
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_restart_together_if_one_runs_out_of_memory(tmp_path):
    poor, rich = launched.prepare(tmp_path / "poor"), launched.prepare(tmp_path / "rich")
    (poor / "poor.py").write_text(POOR)

    words = ["--max_steps", "2", "--samples", "null", "--save_strategy", "no"]
    done = launched.train_on_two(poor, *words, "--auto_find_batch_size", program=[str(poor / "poor.py")])
    smaller = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    launched.train_on_two(rich, *words, *smaller)

    said = "restart   out of memory at step 1: per_device_train_batch_size 2 -> 1"
    assert done.out.count(said) == 1
    found, expected = weights(poor), weights(rich)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_errors_are_not_mistaken_for_out_of_memory(tmp_path, monkeypatch):
    Memory(monkeypatch, rows=1, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    with pytest.raises(RuntimeError, match="mat1"):
        train(build(tmp_path, per_device_train_batch_size=2))
