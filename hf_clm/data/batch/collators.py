"""Rows -> one batch. The only place where padding becomes -100."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
)

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.split import AnyDataset
from hf_clm.model.attention import NAME as PACKED
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import IGNORE_INDEX

STATIC_TARGETS = 256  # the number of targets is rounded up to a multiple of it


class DataCollatorForCausalLM:
    """Right-pads a list of ``TokenizedExample`` to one batch.

    B = batch size, T = longest example, rounded up to ``pad_to_multiple_of`` (tokens).

    Returns (from a call):
        input_ids       (B, T) int64
        attention_mask  (B, T) int64, 1 for a real token, 0 for padding
        labels          (B, T) int64, -100 where no loss is taken. NOT shifted: the model compares
                        logits t with labels t+1.
    and where a row has ``weights``:
        loss_weights    (B, T) float32, how much the loss of the label at the same place counts: 1 in rows
                        without ``weights``, 0 for padding. CLMTrainer uses them; a stock Trainer would hand
                        them to the model, which knows nothing of them.

    Raises ValueError for packed rows.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        if "position_ids" in examples[0]:  # without them the documents of a row would read each other
            raise ValueError("packed rows need DataCollatorForPackedCausalLM")
        lengths = [len(example["input_ids"]) for example in examples]
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(examples), width)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            input_ids[row, :length] = example["input_ids"]
            attention_mask[row, :length] = 1
            labels[row, :length] = example["labels"]
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
        if any(map(_has_weights, examples)):
            weights = np.zeros(shape, dtype=np.float32)
            for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
                weights[row, :length] = _weights(example)
            batch["loss_weights"] = torch.from_numpy(weights)
        return batch


@dataclass(frozen=True)
class StaticShape:
    """One shape for all batches, so that a compiled model is compiled once.

    tokens            of every batch; what the rows leave free is padding
    documents         of a batch at most, padding not counted
    max_length        tokens of a document at most
    targets_multiple  the number of targets is rounded up to a multiple of it
    """

    tokens: int
    documents: int
    max_length: int
    targets_multiple: int = 1

    @property
    def bounds(self) -> int:
        """The length of ``cu_seq_lens``: padding too is cut into documents of at most ``max_length``."""
        return self.documents - (-self.tokens // self.max_length) + 1


class DataCollatorForPackedCausalLM:
    """Concatenates rows: no padding, no attention mask.

    T = tokens of all rows, D = documents in them, N = targets. A row is a packed row (``position_ids``
    restart at each document) or a ``TokenizedExample``, which is one document.

    Args:
        with_targets: for a model whose forward takes ``logits_to_keep``: it then computes the same loss from
            the logits at the targets alone.
        static: pads every batch to this shape.
        pad_token_id: of that padding.

    Returns (from a call):
        input_ids, labels  (1, T) int64; the first label of each document is -100
        position_ids       (1, T) int64, counted from 0 in each document
        cu_seq_lens_q, _k  (D + 1,) int32, where each document starts, and T; repeats T to a static length
        max_length_q, _k   int, the longest document; a static one is that of the shape
    and where a row has ``weights``:
        loss_weights       (1, T) float32, how much the loss of the label at the same place counts: 1 in rows
                           without ``weights``, 0 for padding. CLMTrainer uses them; a stock Trainer would
                           hand them to the model, which knows nothing of them.
    and with targets:
        logits_to_keep     (N,) int64, the positions whose next token has a label
        shift_labels       (1, N) int64, these labels; -100 for what fills up, and for the one of no target
    and with a static shape:
        padding_tokens     int, how many of the last tokens are padding

    Raises ValueError where a batch does not fit into the static shape.
    """

    def __init__(
        self, *, with_targets: bool = False, static: StaticShape | None = None, pad_token_id: int = 0
    ):
        self.with_targets = with_targets
        self.static = static
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        positions = [_positions(example) for example in examples]
        real = sum(map(len, positions))
        total = self.static.tokens if self.static else real
        if real > total:
            raise ValueError(f"{real} tokens in a batch of {total} at most")
        input_ids, labels, position_ids = arrays = np.empty((3, total), dtype=np.int64)
        np.concatenate([example["input_ids"] for example in examples], out=input_ids[:real])
        np.concatenate([example["labels"] for example in examples], out=labels[:real])
        np.concatenate(positions, out=position_ids[:real])
        starts = np.flatnonzero(position_ids[:real] == 0)
        labels[starts] = IGNORE_INDEX  # the token before it is of another document
        batch: dict[str, Any] = {}
        if self.static:
            input_ids[real:], labels[real:] = self.pad_token_id, IGNORE_INDEX
            position_ids[real:] = np.arange(total - real) % self.static.max_length
            batch["padding_tokens"] = total - real
        names = ("input_ids", "labels", "position_ids")
        batch |= {name: torch.from_numpy(array)[None] for name, array in zip(names, arrays, strict=True)}
        batch |= _bounds(starts, real, total=total, static=self.static)
        if any(map(_has_weights, examples)):
            weights = np.zeros((1, total), dtype=np.float32)
            np.concatenate([_weights(example) for example in examples], out=weights[0, :real])
            batch["loss_weights"] = torch.from_numpy(weights)
        if self.with_targets:
            batch |= _targets(labels, multiple=self.static.targets_multiple if self.static else 1)
        return batch


def _bounds(starts: np.ndarray, real: int, *, total: int, static: StaticShape | None) -> dict[str, Any]:
    """Where the documents start and end, as the attention functions of transformers take it."""
    if static is None:
        bounds = np.append(starts, total).astype(np.int32)
        longest = int(np.diff(bounds).max())
    else:
        if len(starts) > static.documents:
            raise ValueError(f"{len(starts)} documents in a batch of {static.documents} at most")
        bounds, longest = np.full(static.bounds, total, dtype=np.int32), static.max_length
        padding = np.arange(real, total, static.max_length)
        bounds[: len(starts)] = starts
        bounds[len(starts) : len(starts) + len(padding)] = padding
    cu_seq_lens = torch.from_numpy(bounds)
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _targets(labels: np.ndarray, *, multiple: int) -> dict[str, torch.Tensor]:
    """The positions that predict a label, and these labels; at least one, so that there is a loss."""
    found = np.flatnonzero(labels[1:] != IGNORE_INDEX)
    count = -(-max(1, len(found)) // multiple) * multiple
    logits_to_keep, shift_labels = np.zeros(count, dtype=np.int64), np.full((1, count), IGNORE_INDEX)
    logits_to_keep[: len(found)], shift_labels[0, : len(found)] = found, labels[found + 1]
    return {
        "logits_to_keep": torch.from_numpy(logits_to_keep),
        "shift_labels": torch.from_numpy(shift_labels),
    }


def _has_weights(example: Any) -> bool:
    return example.get("weights") is not None


def _weights(example: Any) -> np.ndarray:
    """(T,) float32: how much the label of each token of a row counts; 1 where the row does not say."""
    if _has_weights(example):
        return np.asarray(example["weights"], dtype=np.float32)
    return np.ones(len(example["input_ids"]), dtype=np.float32)


def _positions(example: Any) -> Any:
    positions = example.get("position_ids")
    return np.arange(len(example["input_ids"])) if positions is None else positions


def build_collator(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    with_targets: bool = False,
    static: StaticShape | None = None,
) -> Callable[..., dict[str, Any]]:
    """The collator of a recipe: it concatenates rows, and pads only unpacked rows for another attention."""
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer gives it one"
    if recipe.resolved_packing == "none" and recipe.model.attention != PACKED:
        return DataCollatorForCausalLM(tokenizer.pad_token_id)
    return DataCollatorForPackedCausalLM(
        with_targets=with_targets, static=static, pad_token_id=tokenizer.pad_token_id
    )


def static_shape(datasets: Sequence[AnyDataset], *, rows: int) -> StaticShape:
    """One shape that holds every batch of at most ``rows`` rows, so that torch.compile compiles once."""
    longest, documents = 1, rows
    for dataset in datasets:
        if isinstance(dataset, PackedDataset):
            fullest = np.sort(np.diff(dataset.pieces.offsets))[-rows:]
            longest, documents = max(longest, dataset.max_length), max(documents, int(fullest.sum()))
        else:
            longest = max(longest, int(dataset.lengths.max()))
    # every process may have rows of one token that only fill up
    return StaticShape(rows * longest, documents + rows, longest, targets_multiple=STATIC_TARGETS)
