"""Puts many examples into rows of one length: whole ones by best fit, or a stream that is cut at full rows.

best_fit   | doc 3 ........| doc 7 ..| doc 1 |      every document whole; rows nearly full
stream     | doc 1 ..| doc 2 ........| doc 3 ...|   every row full; a document goes on in the next row
           |(doc 3) ...| doc 4 ..| doc 5 .......|
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

from hf_clm.data.datasets import PretrainDataset, SFTDataset

Piece = tuple[int, int, int]  # example, first token, past the last token


class PackedRow(TypedDict):
    """Documents one behind the other; ``position_ids`` count from 0 in each."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


class PackedDataset(torch.utils.data.Dataset):
    """Packed rows over a tokenized dataset. ``pieces[i]`` says which tokens of which examples are in row i.

    Args:
        packing: ``best_fit`` keeps every example whole; ``stream`` cuts where a row is full. Then the next
            row begins with the token before the cut, unlabelled, so that each label is learned exactly once.
    """

    def __init__(self, dataset: SFTDataset | PretrainDataset, *, max_length: int, packing: str = "best_fit"):
        lengths = dataset.rows.lengths
        self.dataset = dataset
        self.max_length = max_length
        self.pieces: list[list[Piece]] = (
            stream_rows(lengths, max_length)
            if packing == "stream"
            else [[(i, 0, int(lengths[i])) for i in row] for row in best_fit_rows(lengths, max_length)]
        )

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> PackedRow:
        row: PackedRow = {"input_ids": [], "labels": [], "position_ids": []}
        for example, start, stop in self.pieces[index]:
            document = self.dataset.rows.piece(example, start=start, stop=stop)
            row["input_ids"] += document["input_ids"]
            row["labels"] += document["labels"]
            row["position_ids"] += range(stop - start)
        return row

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token."""
        tokens = sum(stop - start for row in self.pieces for _, start, stop in row)
        return tokens / (len(self) * self.max_length)


def best_fit_rows(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing: each example, longest first, goes into the fullest row that still has room for it.

    Returns the examples of each row; every example exactly once. ``max_length`` must not be under any length.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free places -> rows with just that many
    rooms: list[int] = []  # the keys of with_room, sorted
    for example in order.tolist():
        length = int(lengths[example])
        assert length <= max_length, (length, max_length)
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([example])
            row, room = len(rows) - 1, max_length
        else:
            room = rooms[at]
            row = with_room[room].pop()
            rows[row].append(example)
            if not with_room[room]:
                del with_room[room], rooms[at]
        if room > length:
            if room - length not in with_room:
                insort(rooms, room - length)
            with_room.setdefault(room - length, []).append(row)
    return rows


def stream_rows(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[Piece]]:
    """Cuts the documents, one behind the other, into rows of ``max_length`` tokens; the last may be shorter.

    So may be, by one, a row before a document: its first token alone has no label and would be read twice.
    """
    assert max_length > 1, "a row of one token has no label"
    rows: list[list[Piece]] = [[]]
    room = max_length
    for document, length in enumerate(np.asarray(lengths).tolist()):
        start = 0
        while start < length - 1 or start == 0:
            stop = min(length, start + room)
            if stop - start > 1 or length == 1:  # one token alone has no label: start in the next row
                rows[-1].append((document, start, stop))
                room -= stop - start
                start = stop if stop == length else stop - 1
            else:
                room = 0
            if room == 0:
                rows.append([])
                room = max_length
    return [row for row in rows if row]
