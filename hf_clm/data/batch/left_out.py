"""Leaves records out of training without any other change: ``data.without``, and the replays of hf-clm why.

packed row     | doc 3 ........| doc 7 ..| doc 1 |        doc 7 is to be left out
kept           | 1 1 1 1 1 1 1 1 | 0 0 0 0 | 1 1 1 |      float32, with the row; in its batch as ``kept``
loss           kept x weight x loss of each label         summed, and divided as if nothing were left out

Removing the row, or its labels, would also change the shapes of the batch, the random numbers of dropout, and
the divisor of its step, and with them what every other row does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_clm.data.batch.mixing import AnyDataset
from hf_clm.data.label.datasets import TokenizedDataset

LEFT_OUT = "left out"  # the fate of a record in data.without
KEPT = "kept"  # of a row (T,) float32, of a batch (B, T) float32: 0 for the tokens of what is left out


class LeavingOutDataset(torch.utils.data.Dataset):
    """The rows of a dataset, with ``kept`` if they contain tokens of what is left out.

    Args:
        hidden: the numbers of the tokenized rows that are left out.
    """

    def __init__(self, dataset: AnyDataset, hidden: np.ndarray):
        self.dataset, self.hidden = dataset, hidden

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.dataset[index])
        numbers, sizes = self._pieces(index)
        if (is_hidden := np.isin(numbers, self.hidden)).any():
            row[KEPT] = np.repeat(np.where(is_hidden, 0.0, 1.0).astype(np.float32), sizes)
        return row

    def _pieces(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokenized row of each document of a row, and its number of tokens."""
        if isinstance(self.dataset, TokenizedDataset):  # each row is one document
            number = range(len(self.dataset))[index]
            return np.array([number]), self.dataset.lengths[[number]]
        pieces = self.dataset.pieces
        part = pieces.of_row(index)
        return pieces.examples[part], pieces.stops[part] - pieces.starts[part]


class LeavingOutCollator:
    """Collates rows with another collator, and adds ``kept`` if a row has it, in the shape of the labels."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        if any(KEPT in row for row in rows):
            as_weights = [{**row, "weights": row.get(KEPT)} for row in rows]
            batch[KEPT] = self.collate(as_weights)["loss_weights"]
        return batch


def mask_left_out(batch: dict[str, Any], *, weights: str) -> None:
    """Sets the weights of a batch to 0 for what is left out. ``weights``: their key in the batch.

    Called after the labels of a step have been counted, so that its divisor includes what is left out.
    """
    kept = batch.pop(KEPT, None)
    if kept is not None:
        given = batch.get(weights)
        batch[weights] = kept if given is None else kept * given
