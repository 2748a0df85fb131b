"""Rows made while training: each shard labels its own chunks, block by block, and can go on from any row.

    chunks of a file    0 1 2 3 4 5 6 7 ...        of 4 shards: those of shard 1 are 1 5 9 ...
    shard 1 of 4        | block: chunks 1 5 9 | block ........ | ...   then the next pass
                          labelled, certified, packed, rows shuffled by (seed, pass, chunk)
    batches             0   1   2   3   4   5   6   7   ...     batch B is of shard B mod 4
    of process          0   1   0   1   0   1   0   1   ...     of two; and of worker (B div 2) mod 2 of each

A block is made by the code that prepares a whole set, and by nothing before it: so a position is the chunk
where its block begins, and a number of rows. A shard that is through its chunks begins them again at once
and waits for no other; the last row of a block may be short.

Sources that are mixed are lanes beside one another, each with its own position and passes; else all are one.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import UNREADABLE
from hf_clm.data.prepared.division import (
    BEGIN,
    Division,
    Mark,
    Place,
    Position,
    Rest,
    Task,
    cursor_of,
    furthest,
    lane_key,
    to_division,
    to_position,
)
from hf_clm.data.split import AnyDataset, to_limit
from hf_clm.errors import DataError, RecipeError
from hf_clm.schema import TokenizedExample

COUNTED = 1000  # documents of which the dropped are a share that says something
STATE = "stream_state_{}.json"  # of a rank, in a checkpoint
OF_WORKERS = "hf_clm.errors.DataError: "


@dataclass
class StreamBlock:
    """Rows that were made together, of the chunks from ``begin`` up to ``end``, and what became of them."""

    rows: AnyDataset | list[TokenizedExample]
    begin: Mark
    end: Mark
    counts: Counter[str] = field(default_factory=Counter)


ReadBlocks = Callable[[Task, Mark], Iterator[StreamBlock]]


@dataclass(frozen=True)
class StreamPlan:
    """The rows of a run: how many, how many a batch, and of how many shards the batches are in turn.

    shares: of each lane, in what ``by`` counts: rows, tokens or target_tokens.
    """

    rows: int
    batch_rows: int
    shards: int
    shares: Sequence[float] = (1.0,)
    by: str = "rows"


class StreamedRows(torch.utils.data.Dataset):
    """The rows that a run takes from a stream, by number. Those of a batch are asked for in order.

    ``dataset[i]`` is a row with its Position under ``stream``, which PositionCollator puts into the batch.
    The Trainer tells by ``passed`` what was trained on; what workers read ahead does not count.

    Args:
        read_blocks: the blocks of a task from a mark to the end of the pass.
        seed: of the order of the rows of a block; None keeps that of reading.
        max_dropped: the largest share of a shard's documents that may be dropped.
        identity: what has to be the same where a run goes on.
    """

    def __init__(
        self,
        read_blocks: ReadBlocks,
        plan: StreamPlan,
        *,
        seed: int | None,
        max_dropped: float = 1.0,
        identity: Mapping[str, Any] | None = None,
    ):
        self.read_blocks, self.plan = read_blocks, plan
        self.seed, self.max_dropped = seed, max_dropped
        self.identity = {"seed": seed, **(identity or {})}
        self.lanes = range(len(plan.shares))
        self.earlier: dict[str, list[Division]] = {}  # of a lane and a pass: see lane_key
        start = tuple(Place() for _ in self.lanes)
        self.positions = {shard: Position(shard, start) for shard in range(plan.shards)}
        self._open: dict[int, Iterator[Any]] = {}
        self._last: dict[int, int] = {}  # row that was asked for, of each shard

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Any:
        number, size = range(len(self))[index], self.plan.batch_rows
        shard = number // size % self.plan.shards
        last = self._last.get(shard, number - 1)
        gap = 1 if (last + 1) % size else (self.plan.shards - 1) * size + 1
        assert shard not in self._last or number == last + gap, f"row {number} of a stream after {last}"
        self._last[shard] = number
        if shard not in self._open:
            if torch.utils.data.get_worker_info() is not None:  # its threads did not survive the fork
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            self._open[shard] = self._follow(self.positions[shard])
        return next(self._open[shard])

    def passed(self, position: Position) -> None:
        """Notes that a batch was trained on."""
        self.positions[position.shard] = position

    def _follow(self, position: Position) -> Iterator[Any]:
        """The rows of a shard from a position on, pass after pass."""
        while position.rests:
            rest, *others = position.rests
            block, lane = next(self.read_blocks(rest.task, rest.mark)), rest.task.lane
            for number in self._order(rest.epoch, block)[rest.row :]:
                rest = replace(rest, row=rest.row + 1)
                taken = position.places[lane].taken + size_of(block.rows, number, by=self.plan.by)
                place = replace(position.places[lane], taken=taken)
                rests = (rest, *others) if rest.row < len(block.rows) else tuple(others)
                position = position.moved(lane, place, rests=rests)
                yield {**block.rows[number], "stream": position}
        lanes = [self._read_lane(position.shard, lane, position.places[lane]) for lane in self.lanes]
        while True:
            lane = self._next_lane(position.places)
            row, place = next(lanes[lane])
            position = position.moved(lane, place)
            yield {**row, "stream": position}

    def _next_lane(self, places: Sequence[Place]) -> int:
        """The lane that is furthest behind its share."""
        behind = [place.taken / share for place, share in zip(places, self.plan.shares, strict=True)]
        return behind.index(min(behind))

    def _read_lane(self, shard: int, lane: int, place: Place) -> Iterator[tuple[Any, Place]]:
        """The rows of a lane, each with the place behind it."""
        for epoch in count(place.epoch):
            task = Task(lane, shard, Division(self.plan.shards), self.earlier.get(lane_key(lane, epoch), ()))
            began_whole, found = place.mark == BEGIN and not task.earlier, 0
            for block in self.read_blocks(task, place.mark):
                counts = dict(Counter(place.before) + block.counts)
                check_share(counts, self.max_dropped)
                behind = replace(place, mark=block.end, end=BEGIN, row=0, before=counts, counts=counts)
                order = self._order(epoch, block)
                taken = place.taken
                for row in range(place.row, len(order)):
                    taken += size_of(block.rows, order[row], by=self.plan.by)
                    inside = replace(place, mark=block.begin, end=block.end, row=row + 1, counts=counts)
                    reached = inside if row + 1 < len(order) else behind
                    yield block.rows[order[row]], replace(reached, taken=taken)
                place, found = replace(behind, taken=taken), found + len(order)
            if began_whole and not found:
                what = f"no document to train on for shard {shard + 1} of {self.plan.shards}"
                where = f"data.train.{lane}" if len(self.lanes) > 1 else "data.train"
                fix = "fewer processes or train.dataloader_num_workers, or data.streaming: false"
                raise DataError(what, where=where, fix=fix)
            place = replace(place, epoch=epoch + 1, mark=BEGIN, end=BEGIN, row=0)

    def _order(self, epoch: int, block: StreamBlock) -> list[int]:
        if self.seed is None:
            return list(range(len(block.rows)))
        return np.random.default_rng([self.seed, epoch, *block.begin]).permutation(len(block.rows)).tolist()

    def write_state(self, folder: Path, *, rank: int) -> None:
        """Writes where the shards of this process stand; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        moved = [asdict(position) for position in self.positions.values() if position.steps]
        earlier = {key: list(map(asdict, divisions)) for key, divisions in self.earlier.items()}
        state = {
            "identity": self.identity,
            "shards": self.plan.shards,
            "earlier": earlier,
            "positions": moved,
        }
        (folder / STATE.format(rank)).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    def read_state(self, folder: Path) -> None:
        """Goes on from a checkpoint, whatever processes wrote it; raises RecipeError where it cannot.

        With another number of shards what is left of each pass is divided anew: no chunk is lost, and none is
        read twice.
        """
        states = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(STATE.format("*")))]
        if not states:
            what, fix = "the checkpoint holds no position in a stream", "data.streaming as in the run before"
            raise RecipeError(what, where=str(folder), fix=fix)
        before = states[0]["identity"]
        for name in {**before, **self.identity}:
            if self.identity.get(name) != before.get(name):
                what = f"the stream cannot go on: {name} was {before.get(name)}"
                raise RecipeError(what, where=str(folder), got=str(self.identity.get(name)), fix=FIXES[name])
        self.earlier = {
            key: [to_division(one) for one in divisions] for key, divisions in states[0]["earlier"].items()
        }
        known = furthest(to_position(entry) for state in states for entry in state["positions"])
        shards = states[0]["shards"]
        if shards == self.plan.shards:
            self.positions |= {position.shard: position for position in known}
        else:
            start = tuple(Place() for _ in self.lanes)
            every = {shard: Position(shard, start) for shard in range(shards)}
            self._divide_anew(list((every | {position.shard: position for position in known}).values()))

    def _divide_anew(self, old: Sequence[Position]) -> None:
        """Notes what the old shards have read, and gives the blocks that they had begun to the new ones."""
        rests = [rest for position in old for rest in position.rests]
        starts: list[Place] = []
        totals: list[dict[str, int]] = []
        for lane in self.lanes:
            places = [position.places[lane] for position in old]
            first, last = min(place.epoch for place in places), max(place.epoch for place in places)
            for position, place in zip(old, places, strict=True):
                if place.row:
                    earlier = tuple(self.earlier.get(lane_key(lane, place.epoch), ()))
                    task = Task(lane, position.shard, Division(len(old)), earlier)
                    rests.append(Rest(task, place.epoch, place.mark, place.row))
            for epoch in range(first, last + 1):
                cursors = [cursor_of(place, epoch) for place in places]
                self.earlier.setdefault(lane_key(lane, epoch), []).append(Division(len(old), cursors))
            counts = sum((Counter(place.counts) for place in places), Counter())
            taken = sum(place.taken for place in places) / self.plan.shards
            starts.append(Place(first, taken=taken))
            totals.append(dict(counts))
        for shard in range(self.plan.shards):
            places = starts
            if shard == 0:  # what was counted so far is told by one
                pairs = zip(starts, totals, strict=True)
                places = [replace(place, before=found, counts=found) for place, found in pairs]
            own = tuple(rests[shard :: self.plan.shards])
            self.positions[shard] = Position(shard, tuple(places), own, steps=1)


def size_of(rows: AnyDataset | list[TokenizedExample], number: int, *, by: str) -> int:
    """How much a row counts where sources are mixed; of packed ones the documents that begin in it."""
    match by:
        case "tokens":
            return len(rows[number]["input_ids"])
        case "target_tokens":
            return int((np.asarray(rows[number]["labels"]) >= 0).sum())
    return sum(start == 0 for _, start, _ in rows.pieces[number]) if isinstance(rows, PackedDataset) else 1


FIXES = {
    "seed": "the seed, and the train_sampling_strategy, of the run before",
    "documents": "data.shuffle_buffer as before",
    "files": "the same files as before: names, sizes, content",
    "weights": "the weights of the sources, and data.mixing.by, as before",
}


class PositionCollator:
    """Another collator, and the position behind the batch's last row."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, "stream": rows[-1]["stream"]} if "stream" in rows[-1] else batch


def check_share(counts: Mapping[str, int], max_dropped: float) -> None:
    """Raises DataError where too many of a shard's documents are lost; a few documents say nothing yet."""
    total = sum(counts.values())
    lost = {name: number for name, number in counts.items() if name.startswith(("dropped", UNREADABLE))}
    if total >= COUNTED and sum(lost.values()) > max_dropped * total:
        got = ", ".join(f"{number:,} {name}" for name, number in lost.items())
        what = f"{sum(lost.values()):,} of {total:,} documents of a stream cannot be trained on"
        limit = to_limit(sum(lost.values()) / total)
        fix = f"raise data.max_length, mend them, or allow it by data.max_dropped={limit}"
        raise DataError(what, where="data.train", got=got, fix=fix)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A DataError that one process alone meets, as it was raised in its worker: the text has no traceback."""
    try:
        yield
    except DataError as error:
        plain = DataError(error.what.rpartition(OF_WORKERS)[2].strip()) if OF_WORKERS in error.what else error
        plain.is_own = True
        raise plain from None
