"""The loss of a step is the weighted sum of its labels' losses divided by the sum of their weights."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import free_port, run_program
from helpers import PAD, SIZES, X, tiny_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import TokenizedDataset, TokenizedRows
from hf_clm.doctor.selftest import choose_documents
from hf_clm.model.attention import NAME, register
from hf_clm.model.loss import LossOptions
from hf_clm.training.trainer import CLMTrainer

# Four rows of 2, 1, 3 and 5 targets. In micro-batches of one or two rows, and in the second of two
# processes, some have weights and some do not.
PLAIN = [
    {"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]},
    {"input_ids": [9, 1], "labels": [X, 1]},
    {"input_ids": [3, 3, 4, 4, 5, 250], "labels": [X, X, X, 4, 5, 250]},
    {"input_ids": [8, 7, 6, 5, 4, 3], "labels": [X, 7, 6, 5, 4, 3]},
]
ROWS = [
    PLAIN[0],
    {**PLAIN[1], "weights": [9.0, 3.0]},  # the 9 has no label
    PLAIN[2],
    {**PLAIN[3], "weights": [9.0, 0.5, 0.0, 2.0, 0.3, 1.0]},
]
STATIC = StaticShape(tokens=24, documents=4, max_length=8, targets=(8, 16, 24))
COLLATORS = {
    "padded": DataCollatorForCausalLM(PAD),
    "packed": DataCollatorForPackedCausalLM(with_targets=True),
    "static": DataCollatorForPackedCausalLM(with_targets=True, static=STATIC, pad_token_id=PAD),
}
MODELS = ["qwen2", "granite"]  # granite scales its logits, so the Trainer computes its loss
Gradients = dict[str, torch.Tensor]


class Step(TrainerCallback):
    """Records the gradients of a step before the optimizer uses them."""

    def __init__(self):
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def build(name: str) -> PreTrainedModel:
    register()
    if name == "qwen2":
        model = tiny_model(name)
    else:
        torch.manual_seed(0)
        scaled: dict[str, Any] = {**SIZES["llama"], "vocab_size": 260, "logits_scaling": 2.0}
        if name == "granitemoe":
            scaled |= {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **scaled))
    model.set_attn_implementation(NAME)
    return model


def build_trainer(
    folder: Path, rows: list[dict], *, name: str = "qwen2", collator: str = "padded", **settings: Any
) -> CLMTrainer:
    """Builds a trainer for one step of all rows, in one micro-batch by default."""
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "logging_steps": 1, "max_steps": 1}
    options |= {"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": len(rows)}
    terms = LossOptions(z_loss=settings.pop("z_loss", 0.0))
    return CLMTrainer(
        build(name),
        TrainingArguments(str(folder), **(options | settings)),
        data_collator=COLLATORS[collator],
        train_dataset=rows,
        eval_dataset=rows,
        loss_options=terms,
    )


def one_step(folder: Path, rows: list[dict], **settings: Any) -> tuple[dict[str, float], Gradients]:
    """Returns the log entry and the gradients of a step."""
    trainer, step = build_trainer(folder, rows, **settings), Step()
    trainer.add_callback(step)
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry), step.gradients


def by_hand(
    name: str, rows: list[dict], *, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[float, Gradients]:
    """Computes loss and gradients of a step row by row from the logits of the stock model."""
    model = build(name)
    total, count = torch.zeros(()), 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        weights = row.get("weights", [1.0] * len(row["labels"]))
        for place, label in enumerate(row["labels"][1:]):
            if label != X:
                term = cross_entropy(logits[place], torch.tensor(label), label_smoothing=smoothing)
                term = term + z_loss * logits[place].logsumexp(dim=-1) ** 2
                total = total + weights[place + 1] * term
                count += weights[place + 1]
    (total / count).backward()
    return (total / count).item(), {key: weight.grad for key, weight in model.named_parameters()}


def assert_close(result: Gradients, expected: Gradients) -> None:
    """Asserts differences of at most 1e-6 of the largest gradient."""
    assert result.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((result[name] - gradient).abs().max()) <= 1e-6 * largest, name


# --- the program that runs in each of two processes


def main(rank: int, folder: Path) -> None:
    """Writes log entry and gradients of a step of each model; rank 0 has rows 0 and 2, rank 1 has 1 and 3."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    result = {name: one_step(folder / "run", ROWS, name=name, **batches) for name in MODELS}
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- the tests


@pytest.mark.parametrize(
    ("name", "collator", "settings"),
    [
        ("qwen2", "padded", {}),
        ("qwen2", "packed", {"label_smoothing_factor": 0.2}),
        ("qwen2", "static", {"z_loss": 0.1}),
        ("granite", "padded", {"label_smoothing_factor": 0.2}),
        ("granite", "packed", {}),
    ],
)
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_a_step_is_the_weighted_mean_however_it_is_batched(
    tmp_path, name, collator, settings, batch, accumulation
):
    expected, gradients = by_hand(
        name,
        ROWS,
        smoothing=settings.get("label_smoothing_factor", 0.0),
        z_loss=settings.get("z_loss", 0.0),
    )

    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    log, result = one_step(tmp_path, ROWS, name=name, collator=collator, **batches, **settings)

    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert_close(result, gradients)


@pytest.mark.slow
def test_a_step_of_two_processes_equals_one_if_only_one_has_weights(tmp_path):
    (tmp_path / "port").write_text(free_port())

    run_program(__file__, tmp_path)

    result = torch.load(tmp_path / "result.pt")
    for name in MODELS:
        expected, gradients = by_hand(name, ROWS)
        assert result[name][0]["loss"] == pytest.approx(expected, rel=1e-6)
        assert_close(result[name][1], gradients)


@pytest.mark.parametrize("collator", COLLATORS)
def test_weights_of_1_have_no_effect(tmp_path, collator):
    weighted = [{**row, "weights": [1.0] * len(row["labels"])} for row in PLAIN]
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    log, expected = one_step(tmp_path, PLAIN, collator=collator, **batches)
    weighted_log, result = one_step(tmp_path, weighted, collator=collator, **batches)

    assert weighted_log["loss"] == log["loss"]
    assert all(torch.equal(result[name], gradient) for name, gradient in expected.items())


def test_the_loss_of_a_model_that_scales_its_logits_includes_the_load_balancing_loss(tmp_path):
    """It is about 2, in addition to a negative log-likelihood of about 5.6."""
    weighted = [{**row, "weights": [1.0] * len(row["labels"])} for row in PLAIN]

    log, expected = one_step(tmp_path, PLAIN, name="granitemoe")
    weighted_log, result = one_step(tmp_path, weighted, name="granitemoe")

    assert log["loss"] > by_hand("granitemoe", PLAIN)[0] + 1
    assert weighted_log["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_close(result, expected)


@pytest.mark.parametrize(("name", "collator"), [("granite", "padded"), ("qwen2", "packed")])
def test_a_row_of_weight_2_equals_two_copies_of_the_row(tmp_path, name, collator):
    options = {"name": name, "collator": collator}
    twice = {**PLAIN[2], "weights": [2.0] * 6}

    log, expected = one_step(tmp_path, [PLAIN[3], PLAIN[2], PLAIN[2]], **options)
    weighted_log, result = one_step(tmp_path, [PLAIN[3], twice], **options)

    assert weighted_log["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_close(result, expected)


@pytest.mark.parametrize(("name", "collator"), [("qwen2", "padded"), ("granite", "packed")])
def test_a_weight_of_0_equals_no_label(tmp_path, name, collator):
    options = {"name": name, "collator": collator}
    weighted = {**PLAIN[3], "weights": [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]}
    masked = {**PLAIN[3], "labels": [X, 7, X, 5, X, 3]}

    log, expected = one_step(tmp_path, [PLAIN[0], masked], **options)
    weighted_log, result = one_step(tmp_path, [PLAIN[0], weighted], **options)

    assert weighted_log["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_close(result, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_with_only_weights_of_0_has_no_gradient(tmp_path, name):
    """0 divided by 0 would stop the run."""
    log, gradients = one_step(tmp_path, [{**PLAIN[0], "weights": [0.0] * 4}], name=name)

    assert log["loss"] == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "collator"), [("granite", "padded"), ("qwen2", "packed"), ("qwen2", "static")]
)
def test_evaluation_and_accuracy_ignore_weights(tmp_path, name, collator):
    expected, _ = by_hand(name, PLAIN)
    options = {"name": name, "collator": collator, "per_device_eval_batch_size": 2}
    trainer, plain = (build_trainer(tmp_path, rows, **options) for rows in (ROWS, PLAIN))

    metrics = trainer.evaluate()
    logs = []
    for one in (trainer, plain):
        one.train()
        logs.append(next(entry for entry in one.state.log_history if "loss" in entry))

    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_target_tokens"] == 11
    assert logs[0]["target_tokens_seen"] == 11
    assert logs[0]["token_accuracy"] == logs[1]["token_accuracy"]
    assert logs[0]["loss"] != logs[1]["loss"]


def test_a_packed_row_keeps_the_weights_of_its_tokens():
    """Documents of 2 and 5 tokens; packing stream cuts the second, and repeats the token before the cut."""
    flat = np.array([8, 9, 1, 2, 3, 4, 5], dtype=np.int32)
    weights = np.array([1, 4, 1, 0.5, 2, 7, 3], dtype=np.float32)
    rows = TokenizedRows(flat, flat, np.array([0, 2, 7]), np.arange(2), weights=weights)

    (whole,) = PackedDataset(TokenizedDataset(rows), max_length=7)
    stream = list(PackedDataset(TokenizedDataset(rows), max_length=5, packing="stream"))

    assert whole["labels"].tolist() == [X, 2, 3, 4, 5, X, 9]
    assert whole["weights"].tolist() == [1, 0.5, 2, 7, 3, 1, 4]
    assert [row["labels"].tolist() for row in stream] == [[X, 9, X, 2, 3], [X, 4, 5]]
    assert [row["weights"].tolist() for row in stream] == [[1, 4, 1, 0.5, 2], [2, 7, 3]]


def test_the_self_test_ignores_weights():
    """It compares with the model's own loss, which does not support weights."""
    (document,) = choose_documents([ROWS[3]], 1000)

    assert document == {"input_ids": [8, 7, 6, 5, 4, 3], "labels": [X, 7, 6, 5, 4, 3]}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
