"""The order of the rows, and how they divide among processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hf_clm.data.label.labels import to_filler

LISTED_ROWS = 1 << 16


class EvenRows(torch.utils.data.Dataset):
    """A dataset filled up with unlabelled rows of one token to a multiple of ``multiple``.

    So many processes see each row exactly once: where rows do not divide, accelerate repeats some.
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
    """Every row once an epoch, in an order that (seed, epoch) alone decide; fillers of EvenRows come last.

    So the order is the same for every number of processes, and after a resume.
    """

    def __init__(self, rows: int, *, total: int, seed: int):
        self.rows, self.total, self.seed, self.epoch = rows, total, seed, 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        for first in range(0, self.rows, LISTED_ROWS):  # as a list the whole would take four times the memory
            yield from order[first : first + LISTED_ROWS].tolist()
        yield from range(self.rows, self.total)
