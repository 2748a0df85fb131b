"""Arrays on disk that are written and read in blocks, so that memory holds a block and never the whole."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from hf_clm.data.label.labels import Fate

BLOCK_TOKENS = 1 << 21
BLOCK_ITEMS = 1 << 16
TOKENS = 2  # the column of an example's tokens among its numbers in Fates


class ArrayWriter:
    """A ``.npy`` file that grows; once closed it holds the very bytes of ``np.save``.

    Args:
        columns: 0 for one number an item.
    """

    def __init__(self, path: Path, dtype: str, *, columns: int = 0):
        self.dtype, self.columns, self.length = np.dtype(dtype), columns, 0
        self.file = path.open("wb")
        self._write_header()

    def append(self, values: Any) -> None:
        """Writes the items behind those that are there."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self.file.write(array.data if array.size else b"")
        self.length += len(array)

    def close(self) -> None:
        """Writes the length into the head of the file."""
        end = self.file.tell()
        self.file.seek(0)
        self._write_header()
        assert end >= self.file.tell(), "the head of a .npy file leaves room for a longer number"
        self.file.close()

    def _write_header(self) -> None:
        shape = (self.length, self.columns) if self.columns else (self.length,)
        head = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self.file, head)


class Table(Sequence[Any]):
    """Items that are made of the rows of an array when they are asked for."""

    def __init__(self, array: np.ndarray, make: Callable[[list[int]], Any]):
        self.array, self.make = array, make

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        found = self.array[index].tolist()
        return list(map(self.make, found)) if isinstance(index, slice) else self.make(found)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), BLOCK_ITEMS):
            yield from self[first : first + BLOCK_ITEMS]


class Fates(Table):
    """Fates by four numbers each: which of ``kinds`` (kind and reason), cut tokens, tokens, target tokens."""

    def __init__(self, array: np.ndarray, kinds: Sequence[Sequence[str]]):
        super().__init__(array, self._to_fate)
        self.kinds = kinds

    def _to_fate(self, numbers: list[int]) -> Fate:
        at, cut, tokens, targets = numbers
        return Fate(self.kinds[at][0], self.kinds[at][1], cut, tokens, targets)


class Places(Table):
    """Places by two numbers each: which of ``prefixes`` ("poems.jsonl:"), and the line or record (17)."""

    def __init__(self, array: np.ndarray, prefixes: Sequence[str]):
        super().__init__(array, self._to_place)
        self.prefixes = prefixes

    def _to_place(self, numbers: list[int]) -> str:
        return f"{self.prefixes[numbers[0]]}{numbers[1]}"


def to_fates(fates: Sequence[Fate]) -> Fates:
    """The same fates as numbers; kinds are in order."""
    if isinstance(fates, Fates):
        return fates
    kinds = sorted({(fate.kind, fate.reason) for fate in fates})
    numbers = {kind: number for number, kind in enumerate(kinds)}
    rows = [(numbers[f.kind, f.reason], f.cut_tokens, f.tokens, f.target_tokens) for f in fates]
    return Fates(np.array(rows, dtype=np.int64).reshape(-1, 4), kinds)


def dropped(fates: Sequence[Fate]) -> np.ndarray:
    """The numbers of the examples that were dropped."""
    known = to_fates(fates)
    kinds = [number for number, kind in enumerate(known.kinds) if kind[0] == "dropped"]
    return np.flatnonzero(np.isin(known.array[:, 0], kinds))


def to_places(places: Sequence[str]) -> Places:
    """The same places as numbers; prefixes are in order."""
    if isinstance(places, Places):
        return places
    cut = [_cut_number(place) for place in places]
    prefixes = sorted({prefix for prefix, _ in cut})
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    rows = [(numbers[prefix], number) for prefix, number in cut]
    return Places(np.array(rows, dtype=np.int64).reshape(-1, 2), prefixes)


def map_array(path: Path) -> np.ndarray:
    """The array as a view of the file: as an np.memmap every slice of it would take microseconds more."""
    return np.asarray(np.load(path, mmap_mode="r"))


def release(*arrays: np.ndarray) -> None:
    """Gives back the memory that holds what was read of mapped files; other arrays are left alone."""
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def row_blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first row, past the last row) of blocks of up to ``BLOCK_TOKENS`` and ``BLOCK_ITEMS``, or one row."""
    first, count = 0, len(offsets) - 1
    while first < count:
        until = (
            np.searchsorted(offsets[: first + BLOCK_ITEMS + 1], offsets[first] + BLOCK_TOKENS, "right") - 1
        )
        last = min(max(first + 1, int(until)), count)
        yield first, last
        first = last


def item_blocks(count: int) -> Iterator[slice]:
    """0 to ``count`` in stretches of ``BLOCK_ITEMS``."""
    return (slice(first, min(first + BLOCK_ITEMS, count)) for first in range(0, count, BLOCK_ITEMS))


def _cut_number(place: str) -> tuple[str, int]:
    """("poems.jsonl:", 17) of "poems.jsonl:17"."""
    prefix = place.rstrip("0123456789")
    return prefix, int(place[len(prefix) :])
