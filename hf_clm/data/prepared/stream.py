"""Makes rows during training. Each shard labels its own chunks, block by block, and can resume at any row.

    chunks of a file    0 1 2 3 4 5 6 7 ...        with 4 shards, shard 1 has the chunks 1 5 9 ...
    shard 1 of 4        | block: chunks 1 5 9 | block ........ | ...   then the next pass
                          labelled, certified, packed; rows shuffled by (seed, pass, chunk)
    batch               0   1   2   3   4   5   6   7   ...     batch B comes from shard B mod 4
    process (of two)    0   1   0   1   0   1   0   1   ...     in each, worker (B div 2) mod 2

Blocks are made by the same code as prepared sets and do not depend on earlier blocks. A position is therefore
the first chunk of a block and a number of rows. A shard that has read all its chunks starts again at once,
without waiting for the other shards; the last row of a block may be short.

When sources are mixed, each source is a lane with its own position and passes; otherwise there is one lane.
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

from hf_clm.data.batch.mixing import AnyDataset
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import UNREADABLE
from hf_clm.data.prepared.division import (
    BEGIN,
    Division,
    LanePlace,
    Mark,
    Position,
    Rest,
    Task,
    cursor_of,
    furthest,
    lane_key,
    to_division,
    to_position,
)
from hf_clm.errors import DataError, RecipeError, to_limit
from hf_clm.schema import TokenizedExample

MIN_DOCUMENTS = 1000  # before the share of dropped documents is checked
STATE_FILE = "stream_state_{}.json"  # of a rank, in a checkpoint
OF_WORKERS = "hf_clm.errors.DataError: "


@dataclass
class StreamBlock:
    """The rows of the chunks from ``begin`` up to ``end``, and the number of documents by fate."""

    rows: AnyDataset | list[TokenizedExample]
    begin: Mark
    end: Mark
    counts: Counter[str] = field(default_factory=Counter)


ReadBlocks = Callable[[Task, Mark], Iterator[StreamBlock]]


@dataclass(frozen=True)
class StreamPlan:
    """The number of rows in a run and in a batch, and the number of shards, which take turns in batches.

    shares: share of each lane in the unit ``by``: rows, tokens or target_tokens.
    """

    rows: int
    batch_rows: int
    shards: int
    shares: Sequence[float] = (1.0,)
    by: str = "rows"


class StreamedRows(torch.utils.data.Dataset):
    """The rows that a run takes from a stream, by number. The rows of a batch must be read in order.

    ``dataset[i]`` is a row with its Position under the key ``stream``, which PositionCollator adds to the
    batch. The Trainer calls ``passed`` for each batch trained on; rows that workers read ahead do not count.

    Args:
        read_blocks: yields the blocks of a task from a mark to the end of the pass.
        seed: seed for shuffling the rows of a block; None keeps the reading order.
        max_dropped: largest share of a shard's documents that may be dropped.
        identity: properties that must not change when a run resumes.
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
        self.earlier: dict[str, list[Division]] = {}  # by lane and pass; see lane_key
        start = tuple(LanePlace() for _ in self.lanes)
        self.positions = {shard: Position(shard, start) for shard in range(plan.shards)}
        self._open: dict[int, Iterator[Any]] = {}
        self._last: dict[int, int] = {}  # last row read, by shard

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
            if torch.utils.data.get_worker_info() is not None:  # threads do not survive a fork
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            self._open[shard] = self._follow(self.positions[shard])
        return next(self._open[shard])

    def passed(self, position: Position) -> None:
        """Records that a batch was trained on."""
        self.positions[position.shard] = position

    def _follow(self, position: Position) -> Iterator[Any]:
        """Yields the rows of a shard from a position on, pass after pass."""
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

    def _next_lane(self, places: Sequence[LanePlace]) -> int:
        """Returns the lane that has read the least, relative to its share."""
        progress = [place.taken / share for place, share in zip(places, self.plan.shares, strict=True)]
        return progress.index(min(progress))

    def _read_lane(self, shard: int, lane: int, place: LanePlace) -> Iterator[tuple[Any, LanePlace]]:
        """Yields the rows of a lane, each with the place after it."""
        for epoch in count(place.epoch):
            task = Task(lane, shard, Division(self.plan.shards), self.earlier.get(lane_key(lane, epoch), ()))
            is_full_pass, rows = place.mark == BEGIN and not task.earlier, 0
            for block in self.read_blocks(task, place.mark):
                counts = dict(Counter(place.before) + block.counts)
                check_share(counts, self.max_dropped)
                after = replace(place, mark=block.end, end=BEGIN, row=0, before=counts, counts=counts)
                order = self._order(epoch, block)
                taken = place.taken
                for row in range(place.row, len(order)):
                    taken += size_of(block.rows, order[row], by=self.plan.by)
                    inside = replace(place, mark=block.begin, end=block.end, row=row + 1, counts=counts)
                    reached = inside if row + 1 < len(order) else after
                    yield block.rows[order[row]], replace(reached, taken=taken)
                place, rows = replace(after, taken=taken), rows + len(order)
            if is_full_pass and not rows:
                what = f"no document to train on for shard {shard + 1} of {self.plan.shards}"
                where = f"data.train.{lane}" if len(self.lanes) > 1 else "data.train"
                fix = "use fewer processes or train.dataloader_num_workers, or set data.streaming: false"
                raise DataError(what, where=where, fix=fix)
            place = replace(place, epoch=epoch + 1, mark=BEGIN, end=BEGIN, row=0)

    def _order(self, epoch: int, block: StreamBlock) -> list[int]:
        if self.seed is None:
            return list(range(len(block.rows)))
        return np.random.default_rng([self.seed, epoch, *block.begin]).permutation(len(block.rows)).tolist()

    def write_state(self, folder: Path, *, rank: int) -> None:
        """Writes the positions of this process's shards. Creates the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        moved = [asdict(position) for position in self.positions.values() if position.steps]
        earlier = {key: list(map(asdict, divisions)) for key, divisions in self.earlier.items()}
        state = {
            "identity": self.identity,
            "shards": self.plan.shards,
            "earlier": earlier,
            "positions": moved,
        }
        (folder / STATE_FILE.format(rank)).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    def read_state(self, folder: Path) -> None:
        """Resumes from a checkpoint, whatever the number of processes that wrote it.

        If the number of shards has changed, the rest of each pass is divided again, without losing or
        repeating a chunk. Raises RecipeError if the stream cannot be resumed.
        """
        states = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(STATE_FILE.format("*")))]
        if not states:
            what, fix = "the checkpoint has no stream position", "set data.streaming as in the earlier run"
            raise RecipeError(what, where=str(folder), fix=fix)
        before = states[0]["identity"]
        for name in {**before, **self.identity}:
            if self.identity.get(name) != before.get(name):
                what = f"cannot resume the stream: {name} was {before.get(name)}"
                raise RecipeError(
                    what, where=str(folder), got=str(self.identity.get(name)), fix=IDENTITY_FIXES[name]
                )
        self.earlier = {
            key: [to_division(one) for one in divisions] for key, divisions in states[0]["earlier"].items()
        }
        saved = furthest(to_position(entry) for state in states for entry in state["positions"])
        shards = states[0]["shards"]
        if shards == self.plan.shards:
            self.positions |= {position.shard: position for position in saved}
        else:
            start = tuple(LanePlace() for _ in self.lanes)
            every = {shard: Position(shard, start) for shard in range(shards)}
            self._divide_anew(list((every | {position.shard: position for position in saved}).values()))

    def _divide_anew(self, old: Sequence[Position]) -> None:
        """Records what the old shards have read, and assigns the blocks that they had begun to new shards."""
        rests = [rest for position in old for rest in position.rests]
        starts: list[LanePlace] = []
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
            starts.append(LanePlace(first, taken=taken))
            totals.append(dict(counts))
        for shard in range(self.plan.shards):
            places = starts
            if shard == 0:  # only one shard reports the counts so far
                pairs = zip(starts, totals, strict=True)
                places = [replace(place, before=total, counts=total) for place, total in pairs]
            own_rests = tuple(rests[shard :: self.plan.shards])
            self.positions[shard] = Position(shard, tuple(places), own_rests, steps=1)


def size_of(rows: AnyDataset | list[TokenizedExample], number: int, *, by: str) -> int:
    """Returns the size of a row in the unit of the mix; of a packed row, the documents that begin in it."""
    match by:
        case "tokens":
            return len(rows[number]["input_ids"])
        case "target_tokens":
            return int((np.asarray(rows[number]["labels"]) >= 0).sum())
    return sum(start == 0 for _, start, _ in rows.pieces[number]) if isinstance(rows, PackedDataset) else 1


IDENTITY_FIXES = {
    "seed": "use the same seed and train_sampling_strategy as before",
    "documents": "use the same data.shuffle_buffer as before",
    "files": "use the same files as before: names, sizes and content",
    "weights": "use the same source weights and data.mixing.by as before",
}


class PositionCollator:
    """Wraps a collator and adds the position after the batch's last row."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, "stream": rows[-1]["stream"]} if "stream" in rows[-1] else batch


def check_share(counts: Mapping[str, int], max_dropped: float) -> None:
    """Raises DataError if too many of a shard's documents are lost, once there are MIN_DOCUMENTS."""
    total = sum(counts.values())
    lost = {name: number for name, number in counts.items() if name.startswith(("dropped", UNREADABLE))}
    if total >= MIN_DOCUMENTS and sum(lost.values()) > max_dropped * total:
        got = ", ".join(f"{number:,} {name}" for name, number in lost.items())
        what = f"{sum(lost.values()):,} of {total:,} documents of the stream cannot be trained on"
        limit = to_limit(sum(lost.values()) / total)
        fix = f"raise data.max_length, correct the documents, or set data.max_dropped={limit}"
        raise DataError(what, where="data.train", got=got, fix=fix)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Strips the worker's traceback from the text of a DataError, which only this process reports."""
    try:
        yield
    except DataError as error:
        plain = DataError(error.what.rpartition(OF_WORKERS)[2].strip()) if OF_WORKERS in error.what else error
        plain.is_own = True
        raise plain from None
