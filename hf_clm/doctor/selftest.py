"""Tests on the real model, data and kernel that batching changes neither the loss nor the gradient."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.label.labels import count_targets, slice_row
from hf_clm.errors import ModelError
from hf_clm.evaluation.metrics import token_nll
from hf_clm.machine import widest_float
from hf_clm.model.load import max_positions, takes_targets
from hf_clm.model.router_loss import RouterLoss
from hf_clm.schema import TokenizedExample

BUDGET_FLOP = 2e11  # a second or two on two CPU cores
PASSES = 5  # forward and backward passes over the documents
DOCUMENTS = 4
TRAINING_NAME = "the {} of training differs from the model's"
SHORTEST, LONGEST = 8, 256  # tokens taken from a document

# Largest relative difference due to rounding, by the dtype of the computation.
LOSS_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
NEIGHBOUR_TOLERANCE = 1e-5  # same sums in the same order: 0 in any dtype if documents are isolated


@dataclass(frozen=True)
class Comparison:
    """A value computed in two ways; ``name`` describes the fault if they differ."""

    name: str
    value: float
    reference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.value - self.reference) <= self.tolerance * max(abs(self.reference), 1e-6)


@dataclass(frozen=True)
class SelfTest:
    """The comparisons, and the number of documents and tokens used."""

    comparisons: list[Comparison]
    documents: int
    tokens: int
    seconds: float

    def require(self) -> None:
        """Raises ModelError unless all comparisons hold."""
        if not all(math.isfinite(comparison.reference) for comparison in self.comparisons):
            got = f"loss {self.comparisons[0].reference:g}, gradient norm {self.comparisons[1].reference:g}"
            what = "the model's loss on this data, or its gradient, is not finite"
            raise ModelError(what, where="model", got=got, fix="use another model.dtype or another model")
        for comparison in self.comparisons:
            if comparison.holds:
                continue
            where, fix = "model.attention", "set model.attention to sdpa or eager, or data.packing to none"
            if "of training" in comparison.name:
                where, fix = "model", "report it, with the model's config.json"
            got = f"{comparison.value:.6g} instead of {comparison.reference:.6g}"
            raise ModelError(
                f"the self-test of the loss failed: {comparison.name}",
                where=where,
                got=f"{got} (tolerance {comparison.tolerance:g})",
                fix=fix,
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the content for run.json."""
        return asdict(self)


def self_test(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    autocast: torch.dtype | None = None,
    measuring: Callable[[], AbstractContextManager[None]] | None = None,
) -> SelfTest:
    """Compares a packed row with its documents one at a time, padded, and next to another document.

    The model must be on its device. Clears its gradients, and restores its mode.

    Args:
        autocast: the dtype of autocast in training; None for none.
        measuring: returns a context in which the model computes the loss of training, which is compared with
            the model's own; None if they are the same.
    """
    started, was_training = time.monotonic(), model.training
    documents = choose_documents(examples, model.num_parameters(), positions=max_positions(model.config))
    targets, tolerance = sum(map(count_targets, documents)), LOSS_TOLERANCES[autocast or model.dtype]
    packed, padded = DataCollatorForPackedCausalLM(), DataCollatorForCausalLM(pad_token_id)
    row, router = packed([to_packed_row(documents)]), RouterLoss(model)
    measure = partial(_measure, model, router=router, targets=targets)
    model.eval()  # dropout differs between batches
    with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        together = measure([row])
        alone = measure([packed([part]) for part in documents])
        wide = measure([padded(documents)])
        plain = _plain_loss(model, row, router=router, targets=targets)
        changed, unchanged = _change_neighbour(model, documents, collate=packed)
        training = None
        if measuring is not None:
            collate = DataCollatorForPackedCausalLM(with_targets=takes_targets(model))
            with measuring():
                training = measure([collate([to_packed_row(documents)])])
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    labels = int((row["labels"] >= 0).sum())
    comparisons = [
        *_compare("one document at a time gives a different {}", alone, together, tolerance),
        *_compare("padded rows give a different {}", wide, together, tolerance),
        Comparison("the model's loss is not the cross entropy of the targets", together[0], plain, tolerance),
        Comparison("a document depends on its neighbour in a row", changed, unchanged, NEIGHBOUR_TOLERANCE),
        Comparison("a batch has other labels than its rows", labels, targets, 0.0),
        *(_compare(TRAINING_NAME, training, together, tolerance) if training else []),
    ]
    tokens = sum(len(document["input_ids"]) for document in documents)
    return SelfTest(comparisons, len(documents), tokens, time.monotonic() - started)


def choose_documents(
    examples: Sequence[TokenizedExample], parameters: int, *, positions: int | None = None
) -> list[TokenizedExample]:
    """Selects the first few documents, each truncated to different lengths and to the end of its last label.

    Leaves out their weights, which the model's own loss does not support.

    Args:
        positions: the model's positions, as a row of a stream may be longer; None for no limit.
    """
    tokens = BUDGET_FLOP / (6 * parameters * PASSES)
    length = int(min(LONGEST, max(SHORTEST, tokens / DOCUMENTS), positions or LONGEST))
    documents = []
    for number in range(min(len(examples), DOCUMENTS)):
        row = examples[number]
        example: TokenizedExample = {"input_ids": row["input_ids"], "labels": row["labels"]}
        end = max(i for i, label in enumerate(example["labels"]) if label >= 0) + 1
        documents.append(slice_row(example, start=max(0, end - length + number), stop=end))
    return documents


def to_packed_row(documents: Sequence[TokenizedExample]) -> dict[str, list[int]]:
    """Concatenates documents, with positions that restart at each document, as in ``PackedDataset``."""
    row = {key: [i for document in documents for i in document[key]] for key in ("input_ids", "labels")}
    return {**row, "position_ids": [i for document in documents for i in range(len(document["input_ids"]))]}


def _compare(
    name: str, values: tuple[float, float], reference: tuple[float, float], tolerance: float
) -> list[Comparison]:
    """Compares loss and gradient norm with a reference; ``name`` has a placeholder for the quantity."""
    return [
        Comparison(name.format("loss"), values[0], reference[0], tolerance),
        Comparison(name.format("gradient"), values[1], reference[1], 10 * tolerance),
    ]


def _measure(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], *, router: RouterLoss, targets: int
) -> tuple[float, float]:
    """Returns the loss of accumulated batches, divided by ``targets``, and the norm of its gradient."""
    model.zero_grad(set_to_none=True)
    items = torch.tensor(targets, device=model.device)
    loss = 0.0
    for batch in batches:
        inputs = _to_device(model, batch)
        with router.weighing(inputs, items):
            part = model(**inputs, use_cache=False, num_items_in_batch=items).loss
        part.backward()
        loss += float(part.detach())
    norms = [weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]
    return loss, float(torch.stack(norms).norm())


@torch.no_grad()
def _plain_loss(model: PreTrainedModel, batch: dict[str, Any], *, router: RouterLoss, targets: int) -> float:
    """Returns the mean cross entropy of the targets, plus the load-balancing loss of a mixture of experts."""
    loss = _sum_nll(model, batch) / targets
    if not router.is_used:
        return loss
    inputs = _to_device(model, batch)
    with router.weighing(inputs, targets):
        return loss + router.coefficient * float(model(**inputs, use_cache=False).aux_loss)


@torch.no_grad()
def _sum_nll(model: PreTrainedModel, batch: dict[str, Any], *, start: int = 0) -> float:
    """Sums the negative log-likelihood of the labels after position ``start``, with plain cross entropy."""
    inputs = _to_device(model, batch)
    labels = inputs.pop("labels")
    nll = token_nll(model(**inputs, use_cache=False).logits, labels)
    return float(nll[:, start:].sum(dtype=widest_float(nll.device)))


def _change_neighbour(
    model: PreTrainedModel, documents: list[TokenizedExample], *, collate: Callable[..., dict[str, Any]]
) -> tuple[float, float]:
    """Returns the loss of all documents after the first, with a changed and an unchanged first document."""
    first, text = documents[0], model.config.get_text_config()
    others = [token for token in range(text.vocab_size) if token != text.pad_token_id]  # GPT-2 warns of pads
    ids = [others[(token + 1) % len(others)] for token in first["input_ids"]]
    other: TokenizedExample = {"input_ids": ids, "labels": first["labels"]}
    batches = [collate([to_packed_row([head, *documents[1:]])]) for head in (other, first)]
    changed, unchanged = (_sum_nll(model, batch, start=len(first["input_ids"])) for batch in batches)
    return changed + 1.0, unchanged + 1.0  # + 1: with a single document, both are 0


def _to_device(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
