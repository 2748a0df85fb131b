"""The self-test of the loss: it passes for correct models, and reports each fault."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import EOS, PAD, X, tiny_model
from transformers import PreTrainedModel

from hf_clm.data.batch import collators
from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.doctor.selftest import SelfTest, choose_documents, self_test
from hf_clm.errors import ExitCode, ModelError
from hf_clm.model import loss
from hf_clm.model.attention import NAME, register
from hf_clm.model.loss import LossOptions, use_target_loss
from hf_clm.training import assemble as assemble_module
from hf_clm.training.run import train

# "say N\n" is the prompt, N letters and the end token are targets: 8, 9, 10, 11, 12 tokens.
ROWS = [
    {"input_ids": [*b"say %d\n" % n, *b"x" * n, EOS], "labels": [X] * 6 + [*b"x" * n, EOS]}
    for n in range(1, 6)
]
RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "x" * n} for n in range(1, 7)]

ALONE = "one document at a time gives a different loss"
PADDED = "padded rows give a different loss"
ENTROPY = "the model's loss is not the cross entropy of the targets"
NEIGHBOUR = "a document depends on its neighbour in a row"
LABELS = "a batch has other labels than its rows"
OF_TRAINING = {
    "the loss of training differs from the model's",
    "the gradient of training differs from the model's",
}


def build_model(kind: str = "qwen2", attention: str = NAME, **settings: Any) -> PreTrainedModel:
    register()
    model = tiny_model(kind, **settings)
    model.set_attn_implementation(attention)
    return model


def run(model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> SelfTest:
    return self_test(model, ROWS, pad_token_id=PAD, autocast=autocast)


def failed(result: SelfTest) -> set[str]:
    return {comparison.name for comparison in result.comparisons if not comparison.holds}


# --- valid cases


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_correct_models_pass(kind, attention, autocast):
    result = run(build_model(kind, attention), autocast=autocast)

    result.require()
    assert failed(result) == set()
    assert (result.documents, result.tokens) == (4, 8 + 9 + 10 + 11)
    content = result.to_json()
    assert [len(content["comparisons"]), content["comparisons"][0]["name"]] == [7, ALONE]


def test_gradients_mode_and_random_state_are_restored():
    model = build_model("gpt2", resid_pdrop=0.5).train()
    before = torch.get_rng_state()

    run(model).require()

    assert all(weight.grad is None for weight in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_documents_are_truncated_to_the_tokens_before_their_last_label():
    """A large model gets few tokens, 5 to 8 per document; tokens after the last label are useless."""
    rows = [{"input_ids": [*range(20, 60)], "labels": [X] * 12 + [32, 33] + [X] * 26} for _ in range(6)]

    documents = choose_documents(rows, 2_000_000_000)

    assert [document["input_ids"] for document in documents] == [
        [26, 27, 28, 29, 30, 31, 32, 33],
        [27, 28, 29, 30, 31, 32, 33],
        [28, 29, 30, 31, 32, 33],
        [29, 30, 31, 32, 33],
    ]
    assert all(document["labels"][-2:] == [32, 33] for document in documents)


def test_a_document_is_not_longer_than_the_positions_of_the_model():
    rows = [{"input_ids": [*range(20, 60)], "labels": [X, *range(21, 60)]}]

    assert choose_documents(rows, 2_000, positions=3) == [{"input_ids": [57, 58, 59], "labels": [X, 58, 59]}]
    assert len(choose_documents(rows, 2_000)[0]["input_ids"]) == 40


# --- faults


def one_document(monkeypatch, model) -> None:
    """As in LLaMA-Factory without neat_packing: documents attend to each other."""
    monkeypatch.setattr("hf_clm.model.attention.pairwise", lambda starts: [(starts[0], starts[-1])])


def borders_shifted(monkeypatch, model) -> None:
    def shifted(starts):
        return pairwise([starts[0], *(start + 1 for start in starts[1:-1]), starts[-1]])

    monkeypatch.setattr("hf_clm.model.attention.pairwise", shifted)


def edit_packed(monkeypatch, **changes) -> None:
    """Makes the packed collator change values; None removes one."""
    collate = DataCollatorForPackedCausalLM.__call__

    def broken(self, examples):
        batch = collate(self, examples)
        batch |= {key: change(batch) for key, change in changes.items() if change}
        return {key: value for key, value in batch.items() if changes.get(key, True)}

    monkeypatch.setattr(DataCollatorForPackedCausalLM, "__call__", broken)


def bounds_dropped(monkeypatch, model) -> None:
    edit_packed(monkeypatch, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None)


def positions_run_on(monkeypatch, model) -> None:
    edit_packed(monkeypatch, position_ids=lambda batch: torch.arange(batch["input_ids"].shape[1])[None])


def positions_of_packed_rows_ignored(monkeypatch, model) -> None:
    """Rows of a batch are still isolated, but not the documents of a row."""
    import numpy as np

    monkeypatch.setattr(collators, "_positions", lambda example: np.arange(len(example["input_ids"])))


def last_label_dropped(monkeypatch, model) -> None:
    """Drops the last label of each document, so that all ways of batching agree."""
    edit_packed(
        monkeypatch, labels=lambda batch: without_ends(batch["labels"], batch["cu_seq_lens_q"][1:] - 1)
    )
    pad = DataCollatorForCausalLM.__call__

    def broken(self, examples):
        batch = pad(self, examples)
        for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
            batch["labels"][row, length - 1] = X
        return batch

    monkeypatch.setattr(DataCollatorForCausalLM, "__call__", broken)


def without_ends(labels: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    labels = labels.clone()
    labels[0, ends] = X
    return labels


def padding_labelled(monkeypatch, model) -> None:
    monkeypatch.setattr(collators, "IGNORE_INDEX", PAD)


def labels_shifted_twice(monkeypatch, model) -> None:
    """The collator shifts the labels, and the loss shifts them again."""
    edit_packed(monkeypatch, labels=lambda batch: batch["labels"].roll(-1, dims=1))


def loss_averages_each_micro_batch(monkeypatch, model) -> None:
    def mean(logits, labels, vocab_size, **kwargs):
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        )

    model.loss_function = mean


def loss_does_not_shift(monkeypatch, model) -> None:
    def unshifted(logits, labels, vocab_size, num_items_in_batch, **kwargs):
        flat = logits.flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum") / num_items_in_batch

    model.loss_function = unshifted


def nan_shown_as_0(monkeypatch, model) -> None:
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: own(*args, **kwargs).nan_to_num() * 0.0


# The fault, the model and its attention, and the failed comparisons.
BROKEN = [
    (one_document, "gpt2", NAME, {ALONE, NEIGHBOUR}),
    (one_document, "qwen2", NAME, {ALONE, NEIGHBOUR}),
    (one_document, "llama", NAME, {ALONE, NEIGHBOUR}),
    (borders_shifted, "qwen2", NAME, {ALONE}),
    (bounds_dropped, "qwen2", NAME, {ALONE, NEIGHBOUR}),
    (positions_run_on, "gpt2", NAME, {ALONE}),
    (positions_run_on, "qwen2", "sdpa", {ALONE, NEIGHBOUR}),
    (positions_of_packed_rows_ignored, "llama", NAME, {ALONE, NEIGHBOUR}),
    (last_label_dropped, "qwen2", NAME, {LABELS}),
    (padding_labelled, "qwen2", NAME, {PADDED}),
    (padding_labelled, "gpt2", "sdpa", {PADDED}),
    (labels_shifted_twice, "qwen2", NAME, {PADDED}),
    (loss_averages_each_micro_batch, "qwen2", NAME, {ALONE}),
    (loss_does_not_shift, "qwen2", NAME, {ENTROPY}),
    (nan_shown_as_0, "qwen2", NAME, {ENTROPY}),
]


@pytest.mark.parametrize(
    ("breaks", "kind", "attention", "failures"),
    BROKEN,
    ids=[f"{b[0].__name__}-{b[1]}-{b[2]}" for b in BROKEN],
)
def test_each_fault_is_reported(breaks, kind, attention, failures, monkeypatch):
    model = build_model(kind, attention)
    breaks(monkeypatch, model)

    result = run(model)

    assert failures <= failed(result)
    with pytest.raises(ModelError) as error:
        result.require()
    assert error.value.exit_code == ExitCode.MODEL
    assert str(error.value).startswith("model.attention: the self-test of the loss failed: ")


def test_leaks_below_the_rounding_of_bfloat16_are_detected(monkeypatch):
    """Untrained weights attend to all tokens equally, so the loss changes little; but it must not change."""
    model = build_model()
    one_document(monkeypatch, model)

    assert failed(run(model, autocast=torch.bfloat16)) >= {NEIGHBOUR}


def test_the_message_includes_both_values_and_the_tolerance(monkeypatch):
    model = build_model()
    last_label_dropped(monkeypatch, model)

    with pytest.raises(ModelError) as error:
        run(model).require()

    assert str(error.value) == (
        "model.attention: the self-test of the loss failed: a batch has other labels than its rows; "
        "got 10 instead of 14 (tolerance 0); "
        "fix: set model.attention to sdpa or eager, or data.packing to none"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported(value):
    model = build_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 7] = value

    with pytest.raises(ModelError) as error:
        run(model).require()

    assert str(error.value).startswith(
        "model: the model's loss on this data, or its gradient, is not finite; got loss "
    )


# --- the loss of training


def last_chunk_dropped(monkeypatch) -> None:
    """With chunks of 4 targets, of 14 in total."""
    chunks = loss._chunks
    monkeypatch.setitem(loss.LOGIT_CHUNK_TOKENS, "cpu", 4)
    monkeypatch.setattr(loss, "_chunks", lambda rows, weight: [*chunks(rows, weight)][:-1])


def chunk_counted_twice(monkeypatch) -> None:
    """Only in the gradient of the head; the loss is correct."""
    add = loss._add_product
    monkeypatch.setattr(loss, "_add_product", lambda left, right, total: add(2 * left, right, total=total))


def mean_of_the_micro_batch(monkeypatch) -> None:
    """As for a loss that ignores the number of targets of the step."""
    measure = loss.measure_targets

    def mean(*head, targets, **options):
        total, nll, correct = measure(*head, targets=targets, **options)
        return total / len(targets), nll, correct

    monkeypatch.setattr(loss, "measure_targets", mean)


def targets_shifted_twice(monkeypatch) -> None:
    measure = loss.measure_targets
    monkeypatch.setattr(
        loss,
        "measure_targets",
        lambda *head, targets, **options: measure(*head, targets=targets.roll(-1), **options),
    )


def training_self_test(model: PreTrainedModel, **options: Any) -> SelfTest:
    measuring = use_target_loss(model, LossOptions()).measuring
    return self_test(model, ROWS, pad_token_id=PAD, measuring=measuring, **options)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_the_loss_of_training_is_compared_with_that_of_the_model(kind, autocast):
    result = training_self_test(build_model(kind), autocast=autocast)

    result.require()
    assert {comparison.name for comparison in result.comparisons[7:]} == OF_TRAINING


@pytest.mark.parametrize(
    "breaks", [last_chunk_dropped, chunk_counted_twice, mean_of_the_micro_batch, targets_shifted_twice]
)
def test_a_wrong_loss_of_training_is_reported(breaks, monkeypatch):
    breaks(monkeypatch)

    result = training_self_test(build_model())

    assert failed(result) and failed(result) <= OF_TRAINING
    with pytest.raises(ModelError, match=r"^model: the self-test of the loss failed: the \w+ of training"):
        result.require()


# --- in a run


def test_label_smoothing_does_not_fail_the_self_test(tmp_path):
    """The model's own loss has no smoothing: the likelihoods are compared, and training uses smoothing."""
    losses = {}
    for smoothing in (0.0, 0.5):
        folder = tmp_path / f"run-{smoothing}"
        settings = {"output_dir": str(folder), "max_steps": 1, "label_smoothing_factor": smoothing}
        train(helpers.build_recipe(tmp_path, RECORDS, train=settings))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[smoothing] = next(entry["loss"] for line in lines if "loss" in (entry := json.loads(line)))
        assert len(read_proof(folder)["self_test"]["comparisons"]) == 9

    assert losses[0.0] != losses[0.5]


def test_a_failed_self_test_stops_the_run_before_its_first_step(tmp_path, monkeypatch, capsys):
    """The kernel breaks after the model is loaded; a kernel broken before would not be used."""
    build_trainer = assemble_module.build_trainer

    def breaking(*args, **options):
        one_document(monkeypatch, None)
        return build_trainer(*args, **options)

    monkeypatch.setattr(assemble_module, "build_trainer", breaking)

    with pytest.raises(ModelError) as error:
        train(helpers.build_recipe(tmp_path, RECORDS))

    assert str(error.value).startswith(f"model.attention: the self-test of the loss failed: {ALONE}; got ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "step 1/" not in capsys.readouterr().out


def test_run_json_records_the_checks_that_ran_or_were_turned_off(tmp_path):
    for on in (True, False):
        settings = {"output_dir": str(tmp_path / f"run-{on}"), "max_steps": 1}
        doctor = {"self_test": on, "round_trip": "off"}
        train(helpers.build_recipe(tmp_path, RECORDS, doctor=doctor, train=settings))

    proved, off = (read_proof(tmp_path / f"run-{on}") for on in (True, False))
    assert (proved["self_test"]["documents"], len(proved["self_test"]["comparisons"])) == (4, 9)
    assert (off["self_test"], off["round_trip"]) == ("off", "off")
    assert proved["train"]["certificate"]["valid"] is True
    assert proved["train"]["ledger"]["used"]["rows"] == 6


def read_proof(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["proof"]
