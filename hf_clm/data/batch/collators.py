"""Collates rows to a batch. The only place where the labels of padding become -100."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_clm.data.batch.mixing import AnyDataset
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.schema import IGNORE_INDEX

# Numbers of targets in a static batch, relative to the typical one. The last is that of all tokens. Each is a
# shape that torch.compile compiles for, and few batches need more than the first.
TARGET_SIZES = (1.05, 1.25, 2.0)


class DataCollatorForCausalLM:
    """Right-pads a list of ``TokenizedExample`` to a batch.

    B = batch size, T = length of the longest example, rounded up to a multiple of ``pad_to_multiple_of``.

    Returns (from a call):
        input_ids       (B, T) int64
        attention_mask  (B, T) int64, 1 for tokens, 0 for padding
        labels          (B, T) int64, -100 where there is no loss. NOT shifted: the model compares
                        logits t with labels t+1.
    and, if a row has ``weights``:
        loss_weights    (B, T) float32, factor of each label's loss: 1 in rows without ``weights``, 0 for
                        padding. Only CLMTrainer uses them; a stock Trainer would pass them to the model,
                        which does not accept them.

    Raises ValueError for packed rows.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        if "position_ids" in examples[0]:  # the documents of a packed row would attend to each other
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
    """One shape for all batches, so that torch.compile compiles the model once.

    tokens            number of tokens in every batch, including padding
    documents         maximum number of documents in a batch, without padding
    max_length        maximum length of a document in tokens
    targets           ascending numbers of targets, of which the smallest that fits is used; the last is the
                      largest possible. None keeps the exact number.
    """

    tokens: int
    documents: int
    max_length: int
    targets: tuple[int, ...] = ()

    @property
    def bounds(self) -> int:
        """Length of ``cu_seq_lens``: padding is also split into documents of at most ``max_length``."""
        return self.documents - (-self.tokens // self.max_length) + 1


class DataCollatorForPackedCausalLM:
    """Concatenates rows, without padding and attention mask.

    T = tokens of all rows, D = documents, N = targets. A row is either a packed row (``position_ids``
    restart at each document) or a ``TokenizedExample``, which is one document.

    Args:
        with_targets: for a model whose ``forward`` accepts ``logits_to_keep``, which then computes the same
            loss from the logits at the targets only.
        static: pads every batch to this shape.
        pad_token_id: the token to pad with.

    Returns (from a call):
        input_ids, labels  (1, T) int64; the first label of each document is -100
        position_ids       (1, T) int64, counted from 0 in each document
        cu_seq_lens_q, _k  (D + 1,) int32, start of each document, then T (repeated for a static shape)
        max_length_q, _k   int, length of the longest document, or ``max_length`` of the static shape
    and, if a row has ``weights``:
        loss_weights       (1, T) float32, factor of each label's loss: 1 in rows without ``weights``, 0 for
                           padding. Only CLMTrainer uses them; a stock Trainer would pass them to the model,
                           which does not accept them.
    and, with targets:
        logits_to_keep     (N,) int64, positions whose next token has a label
        shift_labels       (1, N) int64, these labels; -100 for entries that only fill the shape
    and, with a static shape:
        padding_tokens     int, number of padding tokens at the end

    Raises ValueError if a batch does not fit into the static shape.
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
        labels[starts] = IGNORE_INDEX  # the token before belongs to another document
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
            batch |= _targets(labels, sizes=self.static.targets if self.static else ())
        return batch


def _bounds(starts: np.ndarray, real: int, *, total: int, static: StaticShape | None) -> dict[str, Any]:
    """Returns the boundaries of the documents in the form that transformers' attention functions accept."""
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


def _targets(labels: np.ndarray, *, sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Returns the positions that predict a label, and these labels; at least one, so that there is a loss."""
    positions = np.flatnonzero(labels[1:] != IGNORE_INDEX)
    exact = max(1, len(positions))
    count = next((size for size in sizes if size >= exact), exact)
    logits_to_keep, shift_labels = np.zeros(count, dtype=np.int64), np.full((1, count), IGNORE_INDEX)
    logits_to_keep[: len(positions)], shift_labels[0, : len(positions)] = positions, labels[positions + 1]
    return {
        "logits_to_keep": torch.from_numpy(logits_to_keep),
        "shift_labels": torch.from_numpy(shift_labels),
    }


def _has_weights(example: Any) -> bool:
    return example.get("weights") is not None


def _weights(example: Any) -> np.ndarray:
    """Returns (T,) float32, the factor of each label's loss in a row; 1 without ``weights``."""
    if _has_weights(example):
        return np.asarray(example["weights"], dtype=np.float32)
    return np.ones(len(example["input_ids"]), dtype=np.float32)


def _positions(example: Any) -> Any:
    positions = example.get("position_ids")
    return np.arange(len(example["input_ids"])) if positions is None else positions


def static_shape(datasets: Sequence[AnyDataset], *, rows: int, target_share: float) -> StaticShape:
    """Returns one shape for all batches of at most ``rows`` rows, so that torch.compile compiles once.

    target_share: the share of the training tokens that have a label.
    """
    longest, documents = 1, rows
    for dataset in datasets:
        if isinstance(dataset, PackedDataset):
            fullest = np.sort(np.diff(dataset.pieces.offsets))[-rows:]
            longest, documents = max(longest, dataset.max_length), max(documents, int(fullest.sum()))
        else:
            longest = max(longest, int(dataset.lengths.max()))
    tokens = rows * longest
    typical = tokens * target_share
    sizes = {min(tokens, math.ceil(factor * typical)) for factor in TARGET_SIZES} | {tokens}
    # leave room for the one-token filler rows of EvenRows
    return StaticShape(tokens, documents + rows, longest, targets=tuple(sorted(sizes)))
