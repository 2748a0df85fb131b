"""Packs examples into rows of one length: complete examples by best fit, or a stream cut into full rows.

best_fit   | doc 3 ........| doc 7 ..| doc 1 |      complete documents; rows nearly full
stream     | doc 1 ..| doc 2 ........| doc 3 ...|   rows full; a document may continue in the next row
           |(doc 3) ...| doc 4 ..| doc 5 .......|
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypedDict

import numpy as np
import torch
from typing_extensions import NotRequired  # typing has it from Python 3.11

from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.label.labels import mask_places

RowPiece = tuple[int, int, int]  # example, first token, end token (exclusive)


class PackedRow(TypedDict):
    """Concatenated documents. T = tokens of the row.

    input_ids, labels  (T,) int32
    position_ids       (T,) int64, restarting at 0 in each document
    weights            (T,) float32, factor of each label's loss; absent if all are 1
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    weights: NotRequired[np.ndarray]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tokens and examples in each row. As a sequence, it has a list of ``RowPiece`` for each row.

    P = pieces, R = rows.

        examples, starts, stops  (P,) int64: piece p is tokens starts[p]:stops[p] of example examples[p]
        offsets                  (R + 1,) int64: row r has the pieces offsets[r]:offsets[r + 1]
    """

    examples: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[RowPiece]:
        part = self.of_row(index)
        columns = (self.examples, self.starts, self.stops)
        return list(zip(*(column[part].tolist() for column in columns), strict=True))

    def __iter__(self) -> Iterator[list[RowPiece]]:
        return (self[row] for row in range(len(self)))

    def of_row(self, index: int) -> slice:
        """Returns the slice of a row's pieces; accepts negative numbers, raises IndexError past the end."""
        row = range(len(self))[index]
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    @property
    def row_tokens(self) -> np.ndarray:
        """(R,) int64, length of each row in tokens."""
        ends = np.concatenate([[0], np.cumsum(self.stops - self.starts, dtype=np.int64)])
        return np.diff(ends[self.offsets])


class PackedDataset(torch.utils.data.Dataset):
    """Packed rows of a tokenized dataset. ``pieces[i]`` are the pieces of row i.

    Args:
        packing: ``best_fit`` never cuts an example; ``stream`` cuts where a row is full. The next row then
            begins with the token before the cut, without a label, so that no label is lost or repeated.
        pieces: an earlier packing of this dataset; None packs it now.
        numbers: the examples to pack, in this order; they may repeat. None packs each example once.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        max_length: int,
        packing: str = "best_fit",
        pieces: Pieces | None = None,
        numbers: np.ndarray | None = None,
    ):
        self.dataset = dataset
        self.max_length = max_length
        if pieces is None:
            pack = stream_rows if packing == "stream" else best_fit_rows
            lengths = dataset.rows.lengths
            pieces = pack(lengths if numbers is None else lengths[numbers], max_length)
            if numbers is not None:
                pieces = replace(pieces, examples=numbers[pieces.examples])
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> PackedRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[PackedRow]:
        """Returns the rows of a batch, which the loader asks for at once. Far faster than one at a time."""
        pieces = self.pieces
        parts = [pieces.of_row(index) for index in indices]
        numbers = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        firsts, lasts = pieces.starts[numbers], pieces.stops[numbers]
        ids_of, labels_of, weights = self.dataset.rows.views(pieces.examples[numbers], firsts, lasts)
        sizes = lasts - firsts
        stops = np.cumsum(sizes)
        starts = stops - sizes
        labels = np.concatenate(labels_of)
        mask_places(labels, starts)  # nothing precedes the first token of a piece
        ids = np.concatenate(ids_of)
        positions = np.arange(len(labels)) - np.repeat(starts, sizes)
        factors = None if weights is None else np.concatenate(weights)
        ends = stops[np.cumsum([part.stop - part.start for part in parts]) - 1].tolist()
        rows: list[PackedRow] = []
        for first, last in pairwise([0, *ends]):
            span = slice(first, last)
            rows.append({"input_ids": ids[span], "labels": labels[span], "position_ids": positions[span]})
            if factors is not None:
                rows[-1]["weights"] = factors[span]
        return rows

    @property
    def fill(self) -> float:
        """Fraction of the rows' positions that contain a token."""
        return int(self.pieces.row_tokens.sum()) / (len(self) * self.max_length)


def best_fit_rows(lengths: Sequence[int] | np.ndarray, max_length: int) -> Pieces:
    """Packs by best-fit decreasing: each example, longest first, goes into the fullest row that fits.

    Every example is in exactly one row. No length may exceed ``max_length``.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size == 0 or 0 < sizes.min() <= sizes.max() <= max_length, (sizes, max_length)
    counts = np.bincount(sizes, minlength=max_length + 1)
    shelves = Shelves(max_length)
    used = np.flatnonzero(counts)[::-1]
    placed = [rows for length in used.tolist() for rows in shelves.place(length, int(counts[length]))]
    examples = stable_order(max_length - sizes)
    rows = np.concatenate(placed) if placed else np.zeros(0, dtype=np.int64)
    examples = examples[stable_order(rows)]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shelves.rows))]).astype(np.int64)
    return Pieces(examples, np.zeros_like(examples), sizes[examples], offsets)


class Shelves:
    """Open rows grouped by free tokens (room), so that one step fills many rows with the same room.

    Best fit takes the rows with the least sufficient room first. A row that receives an example of ``length``
    has even less room, so it is chosen again until its room is below ``length``: each row receives
    ``room // length`` examples at once. Every group except the last is used up, so there are few steps per
    length.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.rows = 0
        self.counts = np.zeros(max_length + 1, dtype=np.int64)  # number of open rows by room
        self._open: dict[int, list[np.ndarray]] = defaultdict(list)  # room -> the rows, in several arrays

    def place(self, length: int, count: int) -> Iterator[np.ndarray]:
        """Yields the rows of ``count`` examples, in several arrays. Call it with decreasing lengths."""
        for room in (np.flatnonzero(self.counts[length:]) + length).tolist():
            if count == 0:
                return
            rows = self._take(room, min(int(self.counts[room]), -(-count // (room // length))))
            yield self._fill(rows, room, length=length, count=count)
            count = max(0, count - len(rows) * (room // length))
        if count:
            rows = np.arange(self.rows, self.rows - (-count // (self.max_length // length)))
            self.rows += len(rows)
            yield self._fill(rows, self.max_length, length=length, count=count)

    def _fill(self, rows: np.ndarray, room: int, *, length: int, count: int) -> np.ndarray:
        """Fills rows of equal room as far as possible; the last row receives the remaining examples."""
        each = room // length
        rest = min(count, each * len(rows)) - each * (len(rows) - 1)
        self._put(rows[:-1], room - each * length)
        self._put(rows[-1:], room - rest * length)
        return np.repeat(rows, each)[:count]

    def _take(self, room: int, count: int) -> np.ndarray:
        self.counts[room] -= count
        parts, groups = [], self._open[room]
        while count:
            rows = groups.pop()
            if len(rows) > count:
                groups.append(rows[:-count])
            parts.append(rows[-count:])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _put(self, rows: np.ndarray, room: int) -> None:
        if len(rows) and room:
            self.counts[room] += len(rows)
            self._open[room].append(rows)


def stream_rows(lengths: Sequence[int] | np.ndarray, max_length: int) -> Pieces:
    """Cuts the concatenated documents into rows of ``max_length`` tokens; the last row may be shorter.

    A row is also one token shorter if only the first token of a document would fit: it has no label, and the
    next row would repeat it.
    """
    parts = list(stream_blocks([np.asarray(lengths, dtype=np.int64)], max_length))
    return Pieces(
        np.concatenate([part.examples for part in parts]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.stops for part in parts]),
        np.concatenate([part.offsets for part in parts]),
    )


def stream_blocks(blocks: Iterable[np.ndarray], max_length: int) -> Iterator[Pieces]:
    """Does the same as ``stream_rows`` for lengths in blocks; the last result has only the closing offset."""
    assert max_length > 1, "a row of one token has no label"
    at, example, pieces = 0, 0, 0  # the first row begins at the token ``at`` of the block
    for sizes in blocks:
        assert sizes.size == 0 or sizes.min() > 0, "a document without a token"
        part, at = _stream_block(sizes, at, max_length=max_length)
        yield Pieces(part.examples + example, part.starts, part.stops, part.offsets + pieces)
        example, pieces = example + len(sizes), pieces + len(part.examples)
    nothing = np.zeros(0, dtype=np.int64)
    yield Pieces(nothing, nothing, nothing, np.array([pieces], dtype=np.int64))


def _stream_block(sizes: np.ndarray, at: int, *, max_length: int) -> tuple[Pieces, int]:
    """Returns the pieces of a block of documents, and the token after it at which the next row begins."""
    ends = np.cumsum(sizes)
    heads = ends - sizes  # where each document begins in the block
    total = int(ends[-1]) if sizes.size else 0
    cuts, after = _cut_stream(heads, total, at=at, max_length=max_length)
    firsts = np.sort(np.concatenate([heads, cuts]))
    firsts = firsts[np.diff(firsts, prepend=-1) > 0]
    lasts = np.append(firsts[1:], total)
    documents = np.searchsorted(heads, firsts, side="right") - 1
    begins = heads[documents]
    is_kept = (firsts > begins) | (lasts - firsts > 1) | (sizes[documents] == 1)
    firsts, lasts, documents, begins = (a[is_kept] for a in (firsts, lasts, documents, begins))
    offsets = np.searchsorted(firsts, cuts).astype(np.int64)
    return Pieces(documents, np.maximum(firsts - begins - 1, 0), lasts - begins, offsets), after - total


def _cut_stream(heads: np.ndarray, total: int, *, at: int, max_length: int) -> tuple[np.ndarray, int]:
    """Returns the first token of each row from ``at`` on, and the first token of the next block's first row.

    The repeated token does not count. A row that begins with a document takes ``max_length`` new tokens; any
    other row takes one less, since it repeats one. Rows are therefore equally spaced up to the next document
    that begins a row, which is the next document with the same remainder. This takes one step per such
    document, not one per row.
    """
    step, stride = max_length - 1, total + 1
    keys = np.sort(heads % step * stride + heads)  # by remainder, then by place
    rows = [np.zeros(0, dtype=np.int64)]
    while at < total:
        group = at % step * stride
        place = int(np.searchsorted(keys, group + at))
        head = int(keys[place]) - group if place < len(keys) else total
        if head < total:
            rows.append(np.arange(at, head + 1, step))
            at = head + max_length
        else:
            rows.append(np.arange(at, total, step))
            at = int(rows[-1][-1]) + step
    return np.concatenate(rows), at


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Does the same as ``np.argsort(keys, kind="stable")`` for non-negative keys, but faster.

    Sorts each (key, position) as one number.
    """
    bits = len(keys).bit_length()
    pairs = keys << bits
    pairs |= np.arange(len(keys))
    pairs.sort()
    pairs &= (1 << bits) - 1
    return pairs


def is_sorted(numbers: np.ndarray) -> bool:
    """Whether the numbers never decrease."""
    return bool((numbers[1:] >= numbers[:-1]).all())
