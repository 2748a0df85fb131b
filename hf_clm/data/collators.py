"""Rows -> one batch. The only place where padding becomes -100."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_clm.schema import IGNORE_INDEX


class DataCollatorForCausalLM:
    """Right-pads a list of ``TokenizedExample`` to one batch.

    B = batch size, T = longest example, rounded up to ``pad_to_multiple_of`` (tokens).

    Returns (from a call):
        input_ids       (B, T) int64
        attention_mask  (B, T) int64, 1 for a real token, 0 for padding
        labels          (B, T) int64, -100 where no loss is taken. NOT shifted: the model compares
                        logits t with labels t+1.

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
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {key: torch.from_numpy(value) for key, value in batch.items()}


class DataCollatorForPackedCausalLM:
    """Lays rows one behind the other: no padding, no attention mask.

    T = tokens of all rows, D = documents in them. A row is a packed row (``position_ids`` restart at each
    document) or a ``TokenizedExample``, which is one document.

    Returns (from a call):
        input_ids, labels  (1, T) int64; the first label of each document is -100 already
        position_ids       (1, T) int64, counted from 0 in each document
        cu_seq_lens_q, _k  (D + 1,) int32, where each document starts, and T
        max_length_q, _k   int, the longest document
    """

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        position_ids = np.concatenate([_positions(example) for example in examples])
        starts = np.flatnonzero(position_ids == 0)
        bounds = np.append(starts, position_ids.size).astype(np.int32)
        cu_seq_lens = torch.from_numpy(bounds)
        max_length = int(np.diff(bounds).max())
        return {
            "input_ids": _flat(examples, "input_ids"),
            "labels": _flat(examples, "labels"),
            "position_ids": torch.from_numpy(position_ids)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_length,
            "max_length_k": max_length,
        }


def _flat(examples: Sequence[Any], key: str) -> torch.Tensor:
    return torch.from_numpy(
        np.concatenate([np.asarray(example[key], dtype=np.int64) for example in examples])
    )[None]


def _positions(example: Any) -> np.ndarray:
    positions = example.get("position_ids")
    return (
        np.arange(len(example["input_ids"])) if positions is None else np.asarray(positions, dtype=np.int64)
    )
