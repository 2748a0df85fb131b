"""Proves on the real model, data and kernel that batching changes neither loss nor gradient."""

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
from hf_clm.model.load import max_positions, takes_targets
from hf_clm.model.router_loss import RouterLoss
from hf_clm.schema import TokenizedExample

BUDGET_FLOP = 2e11  # a second or two on two CPU cores
PASSES = 5  # forward and backward passes over the documents
DOCUMENTS = 4
OF_TRAINING = "the {} of training is not the model's"
SHORTEST, LONGEST = 8, 256  # tokens taken of a document

# Largest relative difference that rounding explains, by the type that the model computes in.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
NEIGHBOUR = 1e-5  # the same sums in the same order: if documents are apart, the difference is 0 in any type


@dataclass(frozen=True)
class Comparison:
    """One number computed in two ways; ``name`` says what is wrong if they differ."""

    name: str
    value: float
    reference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.value - self.reference) <= self.tolerance * max(abs(self.reference), 1e-6)


@dataclass(frozen=True)
class SelfTest:
    """What was compared, on how many documents and tokens."""

    comparisons: list[Comparison]
    documents: int
    tokens: int
    seconds: float

    def require(self) -> None:
        """Raises ModelError unless all comparisons hold."""
        if not all(math.isfinite(comparison.reference) for comparison in self.comparisons):
            got = f"loss {self.comparisons[0].reference:g}, gradient norm {self.comparisons[1].reference:g}"
            what = "the model's loss on this data, or its gradient, is not finite"
            raise ModelError(what, where="model", got=got, fix="try another model.dtype, or another model")
        for comparison in self.comparisons:
            if comparison.holds:
                continue
            where, fix = "model.attention", "set model.attention to sdpa or eager, or data.packing to none"
            if "of training" in comparison.name:
                where, fix = "model", "report it with the model's config.json; it needs a loss of its own"
            got = f"{comparison.value:.6g} instead of {comparison.reference:.6g}"
            raise ModelError(
                f"the self-test of the loss fails: {comparison.name}",
                where=where,
                got=f"{got} (tolerance {comparison.tolerance:g})",
                fix=fix,
            )

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def self_test(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    autocast: torch.dtype | None = None,
    measuring: Callable[[], AbstractContextManager[None]] | None = None,
) -> SelfTest:
    """Compares a packed row with one document at a time and with padding, and changes one of its documents.

    The model must be on its device. Its gradients are None afterwards; its mode is as before.

    Args:
        autocast: the type of autocast in training; None is without.
        measuring: inside what it returns, the model computes the loss of training, which is then compared
            with the model's own; None where they are the same.
    """
    started, was_training = time.monotonic(), model.training
    documents = choose_documents(examples, model.num_parameters(), positions=max_positions(model.config))
    targets, tolerance = sum(map(count_targets, documents)), TOLERANCES[autocast or model.dtype]
    packed, padded = DataCollatorForPackedCausalLM(), DataCollatorForCausalLM(pad_token_id)
    row, router = packed([to_packed_row(documents)]), RouterLoss(model)
    measure = partial(_measure, model, router=router, targets=targets)
    model.eval()  # dropout draws other numbers for another batch
    with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        together = measure([row])
        alone = measure([packed([part]) for part in documents])
        wide = measure([padded(documents)])
        plain = _plain_loss(model, row, router=router, targets=targets)
        changed, kept = _change_beside(model, documents, collate=packed)
        trained = None
        if measuring is not None:
            collate = DataCollatorForPackedCausalLM(with_targets=takes_targets(model))
            with measuring():
                trained = measure([collate([to_packed_row(documents)])])
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    labels = int((row["labels"] >= 0).sum())
    comparisons = [
        *_compare("one document at a time gives another {}", alone, together, tolerance),
        *_compare("padded rows give another {}", wide, together, tolerance),
        Comparison("the model's loss is not the cross entropy of the targets", together[0], plain, tolerance),
        Comparison("a document changes with its neighbour in a row", changed, kept, NEIGHBOUR),
        Comparison("a batch has other labels than its rows", labels, targets, 0.0),
        *(_compare(OF_TRAINING, trained, together, tolerance) if trained else []),
    ]
    tokens = sum(len(document["input_ids"]) for document in documents)
    return SelfTest(comparisons, len(documents), tokens, time.monotonic() - started)


def choose_documents(
    examples: Sequence[TokenizedExample], parameters: int, *, positions: int | None = None
) -> list[TokenizedExample]:
    """The first few documents, each cut to what leads to its last label, with different lengths.

    Their weights are left out, because the model's own loss does not know them.

    Args:
        positions: of the model, in tokens, because a row of a stream may be longer; None: no limit.
    """
    tokens = BUDGET_FLOP / (6 * parameters * PASSES)
    length = int(min(LONGEST, max(SHORTEST, tokens / DOCUMENTS), positions or LONGEST))
    chosen = []
    for number in range(min(len(examples), DOCUMENTS)):
        row = examples[number]
        example: TokenizedExample = {"input_ids": row["input_ids"], "labels": row["labels"]}
        end = max(i for i, label in enumerate(example["labels"]) if label >= 0) + 1
        chosen.append(slice_row(example, start=max(0, end - length + number), stop=end))
    return chosen


def to_packed_row(documents: Sequence[TokenizedExample]) -> dict[str, list[int]]:
    """Concatenates documents, with positions that begin again at each, as ``PackedDataset`` does."""
    row = {key: [i for document in documents for i in document[key]] for key in ("input_ids", "labels")}
    return {**row, "position_ids": [i for document in documents for i in range(len(document["input_ids"]))]}


def _compare(
    name: str, found: tuple[float, float], reference: tuple[float, float], tolerance: float
) -> list[Comparison]:
    """Loss and gradient of one way with those of another; ``name`` has a place for the word."""
    return [
        Comparison(name.format("loss"), found[0], reference[0], tolerance),
        Comparison(name.format("gradient"), found[1], reference[1], 10 * tolerance),
    ]


def _measure(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], *, router: RouterLoss, targets: int
) -> tuple[float, float]:
    """The loss of accumulated batches over all ``targets``, and the norm of its gradient."""
    model.zero_grad(set_to_none=True)
    items = torch.tensor(targets, device=model.device)
    loss = 0.0
    for batch in batches:
        given = _on(model, batch)
        with router.weighing(given, items):
            part = model(**given, use_cache=False, num_items_in_batch=items).loss
        part.backward()
        loss += float(part.detach())
    norms = [weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]
    return loss, float(torch.stack(norms).norm())


@torch.no_grad()
def _plain_loss(model: PreTrainedModel, batch: dict[str, Any], *, router: RouterLoss, targets: int) -> float:
    """The mean cross entropy of the targets, and what the routers of a mixture add to it."""
    loss = _sum_nll(model, batch) / targets
    if not router.is_used:
        return loss
    given = _on(model, batch)
    with router.weighing(given, targets):
        return loss + router.coefficient * float(model(**given, use_cache=False).aux_loss)


@torch.no_grad()
def _sum_nll(model: PreTrainedModel, batch: dict[str, Any], *, start: int = 0) -> float:
    """The negative log-likelihood of the labels after position ``start``, by plain cross entropy."""
    inputs = _on(model, batch)
    labels = inputs.pop("labels")
    nll = token_nll(model(**inputs, use_cache=False).logits, labels)
    return float(nll[:, start:].double().sum())


def _change_beside(
    model: PreTrainedModel, documents: list[TokenizedExample], *, collate: Callable[..., dict[str, Any]]
) -> tuple[float, float]:
    """The loss of all documents but the first: with another first document, and with the first as it is."""
    first, text = documents[0], model.config.get_text_config()
    others = [token for token in range(text.vocab_size) if token != text.pad_token_id]  # GPT-2 warns of a pad
    ids = [others[(token + 1) % len(others)] for token in first["input_ids"]]
    other: TokenizedExample = {"input_ids": ids, "labels": first["labels"]}
    batches = [collate([to_packed_row([head, *documents[1:]])]) for head in (other, first)]
    changed, kept = (_sum_nll(model, batch, start=len(first["input_ids"])) for batch in batches)
    return changed + 1.0, kept + 1.0  # a single document has nothing after it


def _on(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
