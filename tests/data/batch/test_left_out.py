"""Leaving a record out removes its loss from the training, and changes nothing else."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PAD, SIZES, X, build_recipe, byte_tokenizer, save_folder, tiny_model, write_jsonl
from pyarrow import parquet
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM, StaticShape
from hf_clm.data.batch.left_out import KEPT, LeavingOutCollator, LeavingOutDataset, mask_left_out
from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.batch.sampling import EvenRows
from hf_clm.data.label.datasets import TokenizedDataset, TokenizedRows
from hf_clm.errors import RecipeError
from hf_clm.model.attention import NAME, register
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.run import train
from hf_clm.training.trainer import CLMTrainer

# Four rows of 2, 1, 3 and 5 targets.
IDS = [[5, 6, 7, 8], [9, 1], [3, 3, 4, 4, 5, 250], [8, 7, 6, 5, 4, 3]]
LABELS = [[X, X, 7, 8], [X, 1], [X, X, X, 4, 5, 250], [X, 7, 6, 5, 4, 3]]
WEIGHTS = [[9.0, 9.0, 1.0, 0.5], [9.0, 2.0], [9.0, 9.0, 9.0, 1.0, 0.25, 4.0], [9.0, 1.0, 0.0, 2.0, 3.0, 1.0]]
STATIC = StaticShape(tokens=24, documents=4, max_length=8, targets=(16, 24))
COLLATORS = {
    "padded": DataCollatorForCausalLM(PAD),
    "packed": DataCollatorForPackedCausalLM(with_targets=True),
    "static": DataCollatorForPackedCausalLM(with_targets=True, static=STATIC, pad_token_id=PAD),
}
Gradients = dict[str, torch.Tensor]


def build_rows(*, weighted: bool = False) -> TokenizedDataset:
    flat = [np.concatenate(part).astype(np.int32) for part in (IDS, LABELS)]
    offsets = np.cumsum([0, *map(len, IDS)])
    weights = np.concatenate(WEIGHTS).astype(np.float32) if weighted else None
    return TokenizedDataset(TokenizedRows(*flat, offsets, np.arange(4), weights=weights))


# --- rows and batches


def test_a_packed_row_tells_which_of_its_tokens_are_kept():
    """Best fit packs rows 2 and 1 (8 tokens), and rows 3 and 0 (10)."""
    packed = PackedDataset(build_rows(), max_length=10)
    dataset = LeavingOutDataset(packed, np.array([1]))

    rows = [dataset[0], dataset[1]]

    assert [packed.pieces[row] for row in (0, 1)] == [[(2, 0, 6), (1, 0, 2)], [(3, 0, 6), (0, 0, 4)]]
    assert rows[0][KEPT].tolist() == [1] * 6 + [0] * 2
    assert rows[0][KEPT].dtype == np.float32
    assert rows[0]["labels"].tolist() == [X, X, X, 4, 5, 250, X, 1]
    assert KEPT not in rows[1]


def test_both_parts_of_a_row_that_was_cut_are_left_out():
    """Packing stream cuts 18 tokens after 5, 10, ... and repeats the token before a cut."""
    packed = PackedDataset(build_rows(), max_length=5, packing="stream")
    dataset = LeavingOutDataset(packed, np.array([2]))

    pieces = [packed.pieces[row] for row in range(len(packed))]
    kept = [dataset[row].get(KEPT) for row in range(len(packed))]

    assert [None if part is None else part.tolist() for part in kept] == [
        [float(number != 2) for number, start, stop in row for _ in range(start, stop)]
        if 2 in [number for number, *_ in row]
        else None
        for row in pieces
    ]
    assert sum(2 in [number for number, *_ in row] for row in pieces) == 2


def test_a_row_that_is_drawn_twice_is_left_out_twice():
    drawn = DrawnDataset(build_rows(), np.array([1, 0, 1]))
    dataset = LeavingOutDataset(drawn, np.array([1]))

    assert [dataset[number].get(KEPT) is None for number in range(3)] == [False, True, False]
    assert dataset[2][KEPT].tolist() == [0, 0]


def test_rows_are_counted_from_the_end_too_and_filled_for_processes():
    dataset = EvenRows(LeavingOutDataset(build_rows(), np.array([0, 3])), 3)

    assert dataset[3][KEPT].tolist() == [0] * 6
    assert LeavingOutDataset(build_rows(), np.array([3]))[-1][KEPT].tolist() == [0] * 6
    assert (len(dataset), dataset[5][KEPT].tolist(), dataset[5]["labels"]) == (6, [0], [X])


@pytest.mark.parametrize(
    ("collator", "kept"),
    [
        ("padded", [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]),
        ("packed", [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]),
        ("static", [[1, 1, 1, 1] + [0] * 20]),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_has_the_same_tensors_and_which_tokens_are_kept(collator, kept, weighted):
    plain = build_rows(weighted=weighted)
    dataset = LeavingOutDataset(plain, np.array([2]))
    collate = COLLATORS[collator]

    expected = collate([plain[0], plain[2]])
    batch = LeavingOutCollator(collate)([dataset[0], dataset[2]])

    assert batch.pop(KEPT).tolist() == kept
    assert batch.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected[key])) for key in expected)


def test_a_batch_without_such_rows_is_not_changed():
    rows = LeavingOutDataset(build_rows(), np.array([2]))

    assert KEPT not in LeavingOutCollator(COLLATORS["packed"])([rows[0], rows[1]])


def test_the_weights_of_a_batch_become_0_for_what_is_left_out():
    kept = torch.tensor([[1.0, 0.0, 1.0]])
    batches = [{KEPT: kept}, {KEPT: kept, "w": torch.tensor([[0.5, 2.0, 3.0]])}, {"w": torch.ones(1, 3)}]

    for batch in batches:
        mask_left_out(batch, weights="w")

    assert [batch["w"].tolist() for batch in batches] == [[[1, 0, 1]], [[0.5, 0, 3]], [[1, 1, 1]]]
    assert not any(KEPT in batch for batch in batches)


# --- gradients


class Step(TrainerCallback):
    """Records the gradients of a step before the optimizer uses them."""

    def __init__(self):
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def build_model(name: str = "qwen2") -> Any:
    """Returns a tiny model. Granite scales its logits, so the Trainer computes its loss."""
    register()
    torch.manual_seed(0)
    scaled = AutoConfig.for_model("granite", **SIZES["llama"], vocab_size=260, logits_scaling=2.0)
    model = AutoModelForCausalLM.from_config(scaled) if name == "granite" else tiny_model(name)
    model.set_attn_implementation(NAME)
    return model


def one_step(
    folder: Path, dataset: Any, *, collator: str = "packed", name: str = "qwen2", **settings: Any
) -> tuple[dict[str, float], Gradients]:
    """Returns the log entry and the gradients of a step with all rows of a dataset."""
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "logging_steps": 1, "max_steps": 1}
    options |= {"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": len(dataset)}
    collate, step = COLLATORS[collator], Step()
    trainer = CLMTrainer(
        build_model(name),
        TrainingArguments(str(folder), **(options | settings)),
        data_collator=LeavingOutCollator(collate) if isinstance(dataset, LeavingOutDataset) else collate,
        train_dataset=dataset,
        callbacks=[step],
    )
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry), step.gradients


def by_hand(
    numbers: Sequence[int], *, divisor: float, weighted: bool = False, name: str = "qwen2"
) -> tuple[float, Gradients]:
    """Computes the loss of some rows and its gradients from the logits of the stock model."""
    model, total = build_model(name), torch.zeros(())
    for number in numbers:
        logits = model(input_ids=torch.tensor([IDS[number]]), use_cache=False).logits[0, :-1]
        for place, label in enumerate(LABELS[number][1:]):
            if label != X:
                weight = WEIGHTS[number][place + 1] if weighted else 1.0
                total = total + weight * cross_entropy(logits[place], torch.tensor(label))
    (total / divisor).backward()
    return (total / divisor).item(), {key: weight.grad for key, weight in model.named_parameters()}


def assert_close(result: Gradients, expected: Gradients) -> None:
    """Asserts differences of at most 1e-6 of the largest gradient."""
    assert result.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((result[name] - gradient).abs().max()) <= 1e-6 * largest, name


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_has_the_loss_of_the_other_rows_divided_as_if_nothing_were_left_out(
    tmp_path, collator, batch, accumulation, weighted
):
    """The divisor is 2 + 1 + 3 + 5 labels, or the sum of their weights: 1.5 + 2 + 5.25 + 7."""
    dataset = LeavingOutDataset(build_rows(weighted=weighted), np.array([0, 2]))
    expected, gradients = by_hand([1, 3], divisor=15.75 if weighted else 11, weighted=weighted)

    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    log, result = one_step(tmp_path, dataset, collator=collator, **batches)

    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert_close(result, gradients)


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_a_model_with_a_loss_of_its_own_leaves_it_out_too(tmp_path, collator):
    dataset = LeavingOutDataset(build_rows(), np.array([0, 2]))
    expected, gradients = by_hand([1, 3], divisor=11, name="granite")
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    log, result = one_step(tmp_path, dataset, collator=collator, name="granite", **batches)

    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert_close(result, gradients)


def test_in_a_packed_row_one_of_two_documents_is_left_out(tmp_path):
    dataset = LeavingOutDataset(PackedDataset(build_rows(), max_length=10), np.array([0]))
    expected, gradients = by_hand([1, 2, 3], divisor=11)

    log, result = one_step(tmp_path, dataset)

    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert_close(result, gradients)


def test_the_gradient_of_the_others_does_not_change(tmp_path):
    """The gradient of all rows, minus that of row 2 alone, remains."""
    _, everything = one_step(tmp_path, build_rows())
    _, of_one = by_hand([2], divisor=11)

    _, result = one_step(tmp_path, LeavingOutDataset(build_rows(), np.array([2])))

    assert_close(result, {name: everything[name] - of_one[name] for name in everything})


def test_if_nothing_is_kept_there_is_no_gradient(tmp_path):
    log, gradients = one_step(tmp_path, LeavingOutDataset(build_rows(), np.arange(4)))

    assert log["loss"] == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


def test_what_is_left_out_still_counts_as_read(tmp_path):
    """The schedule of a run by tokens would otherwise change with it."""
    log, _ = one_step(tmp_path, LeavingOutDataset(build_rows(), np.array([2])))

    assert (log["tokens_seen"], log["target_tokens_seen"]) == (18, 11)


# --- runs

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 6)]


def recipe_without(folder: Path, *places: str, **changes: Any) -> Recipe:
    """Returns the recipe of one step of SGD on all five records, without some of them."""
    folder.mkdir(exist_ok=True)
    dropout = changes.pop("dropout", 0.0)
    model = tiny_model("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    name = save_folder(folder / "model", model, byte_tokenizer())
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    settings |= {"weight_decay": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 5}
    data = {"without": list(places)} | changes.pop("data", {})
    settings |= {"warmup_steps": 0} | changes.pop("train", {})
    return build_recipe(folder, RECORDS, model={"name_or_path": name}, data=data, train=settings, **changes)


def step_by_hand(folder: Path, numbers: Sequence[int], *, divisor: int) -> dict[str, torch.Tensor]:
    """Returns the weights after a step of SGD with a learning rate of 1, from the text of the records."""
    model, total = tiny_model("gpt2"), torch.zeros(())
    for number in numbers:
        prompt, label = (RECORDS[number][key].encode() for key in ("instruct", "label"))
        ids = torch.tensor([[*prompt, *label, 256]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total = total + cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
    (total / divisor).backward()
    return {name: (weight - weight.grad).detach() for name, weight in model.named_parameters()}


def assert_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    saved = load_file(folder / "run" / "model.safetensors")
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


# Labels of 2, 6, 3, 8 and 15 letters, each with an end token: 39 targets.
@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"packing": "none"}},
        {"data": {"packing": "best_fit"}},
        {"train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}},
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}},
    ],
)
def test_a_step_of_a_run_equals_one_by_hand(tmp_path, changes):
    train(recipe_without(tmp_path, "rows.jsonl:2", "rows.jsonl:5", **changes))

    assert_weights(tmp_path, step_by_hand(tmp_path, [0, 2, 3], divisor=39))


def test_a_record_of_a_mixture_is_left_out_as_often_as_it_is_drawn(tmp_path):
    """Two passes of the records: 78 targets."""
    sources = [{"path": write_jsonl(tmp_path / "rows.jsonl", RECORDS), "epochs": 2.0}]
    settings = {"per_device_train_batch_size": 10}
    train(recipe_without(tmp_path, "rows.jsonl:2", data={"train": sources}, train=settings))

    expected = step_by_hand(tmp_path, [0, 2, 3, 4] * 2, divisor=78)
    assert_weights(tmp_path, expected)


def test_the_record_is_in_the_ledger_and_the_fates_balance(tmp_path, capsys):
    train(recipe_without(tmp_path, "rows.jsonl:2"))

    rows = parquet.read_table(tmp_path / "run" / "ledger.parquet").to_pylist()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [row["fate"] for row in rows] == ["used", "left out", "used", "used", "used"]
    assert [row["target_tokens"] for row in rows] == [3, 7, 4, 9, 16]
    assert [row["kept_targets"] for row in rows] == [3, 0, 4, 9, 16]
    assert record["train"]["fates"] == {"used": 4, "left out": 1}
    totals = record["proof"]["train"]["ledger"]
    assert {fate: (counts["rows"], counts["kept_targets"]) for fate, counts in totals.items()} == {
        "used": (4, 32),
        "left out": (1, 0),
    }
    assert f"left out  {tmp_path / 'rows.jsonl'}:2 (data.without)\n" in capsys.readouterr().out


RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


def test_a_resumed_run_keeps_leaving_the_record_out(tmp_path):
    settings = RESUMED | {"optim": "adamw_torch", "learning_rate": 1e-2}
    train(recipe_without(tmp_path, "rows.jsonl:5", dropout=0.1, train=settings))
    again = settings | {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")}
    torch.manual_seed(987)  # a new process has another random state

    other = again | {"output_dir": str(tmp_path / "second")}
    train(recipe_without(tmp_path, "rows.jsonl:5", dropout=0.1, train=other))
    other = again | {"output_dir": str(tmp_path / "third")}
    train(recipe_without(tmp_path, dropout=0.1, train=other, resume_override=["data.without"]))

    whole, second, third = (load_file(tmp_path / n / "model.safetensors") for n in ("run", "second", "third"))
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    assert not all(torch.equal(whole[name], third[name]) for name in whole)


def test_another_choice_is_refused_on_a_resume(tmp_path):
    train(recipe_without(tmp_path, "rows.jsonl:5", train=RESUMED))
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    settings = RESUMED | {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")}

    with pytest.raises(RecipeError, match=r"differs from that of the run: data\.without"):
        train(recipe_without(tmp_path, "rows.jsonl:4", train=settings))


# --- errors


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (
            "rows.jsonl:6",
            "data.without: no training record has this place; got rows.jsonl:6; fix: name a record as",
        ),
        ("ows.jsonl:1", "no training record has this place"),
        ("rows.jsonl:1", "several training records have this place"),
    ],
)
def test_a_place_without_one_record_is_an_error(tmp_path, place, says):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write_jsonl(tmp_path / name / "rows.jsonl", RECORDS))

    with pytest.raises(RecipeError, match=says):
        train(recipe_without(tmp_path, place, data={"train": paths}))


def test_a_record_that_was_dropped_cannot_be_left_out(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", [*RECORDS, RECORDS[0]])

    with pytest.raises(
        RecipeError, match=r"the record has no row to leave out; got rows\.jsonl:6 \(duplicate\)"
    ):
        train(recipe_without(tmp_path, "rows.jsonl:6", data={"train": [path], "duplicates": "drop"}))


def test_a_stream_leaves_nothing_out(tmp_path):
    with pytest.raises(ValueError, match=r"data\.without"):
        recipe_without(tmp_path, "rows.jsonl:1", data={"streaming": True})
