"""The order of the rows, and their division among processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hf_clm.data.label.labels import to_filler

LISTED_ROWS = 1 << 16


class EvenRows(torch.utils.data.Dataset):
    """Pads a dataset with unlabelled one-token rows to a multiple of ``multiple``.

    The processes then see each row exactly once; without padding, accelerate would repeat some rows.
    """

    def __init__(self, dataset: Any, multiple: int):
        self.dataset = dataset
        self.rows = len(dataset)
        self.length = -(-self.rows // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        number = range(self.length)[index]
        is_filler = number >= self.rows
        return to_filler(self.dataset[0]) if is_filler else self.dataset[number]


class EpochSampler(torch.utils.data.Sampler[int]):
    """Yields every row once per epoch, in an order that depends only on (seed, epoch); fillers come last.

    The order is the same for any number of processes and after a resume.
    """

    def __init__(self, rows: int, *, total: int, seed: int):
        self.rows, self.total, self.seed, self.epoch = rows, total, seed, 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        for first in range(
            0, self.rows, LISTED_ROWS
        ):  # one list of all rows would take four times the memory
            yield from order[first : first + LISTED_ROWS].tolist()
        yield from range(self.rows, self.total)
