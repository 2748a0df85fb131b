"""The positions of a stream's shards and the assignment of chunks to shards; stored in checkpoints as JSON.

Each chunk belongs to one shard. When a run resumes with a different number of shards, a Division records what
the old shards have read, and the rest is divided among the new ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_clm.data.read.readers import compression, is_parted

MIN_FILES_PER_SHARD = 8  # files that cannot be read by chunk are then assigned to shards as a whole


class Mark(NamedTuple):
    """A chunk of a lane, by the numbers of its source, file and chunk in the file."""

    source: int = 0
    file: int = 0
    chunk: int = 0


BEGIN, END = Mark(), Mark(1 << 40)


@dataclass(frozen=True)
class Division:
    """A division of chunks among shards. Shard i has read its chunks before ``cursors[i]``."""

    shards: int
    cursors: Sequence[Mark] = ()

    def holder(self, mark: Mark, *, goes_whole: bool) -> int:
        """Returns the shard to which a chunk belongs."""
        return (mark.file if goes_whole else mark.file + mark.chunk) % self.shards

    def has_read(self, mark: Mark, *, goes_whole: bool) -> bool:
        """Whether the chunk was read."""
        return mark < self.cursors[self.holder(mark, goes_whole=goes_whole)]


@dataclass(frozen=True)
class Task:
    """The chunks of a lane that a shard reads in a pass: its own, except those read in earlier divisions."""

    lane: int
    shard: int
    division: Division
    earlier: Sequence[Division] = ()

    def wants(self, mark: Mark, files: Sequence[str] | None) -> bool:
        """Whether the task includes a chunk. ``files`` are those of its source, None if it is on the Hub."""
        by_file = [self._goes_whole(division, files) for division in (self.division, *self.earlier)]
        return self.division.holder(mark, goes_whole=by_file[0]) == self.shard and not any(
            division.has_read(mark, goes_whole=is_whole)
            for division, is_whole in zip(self.earlier, by_file[1:], strict=True)
        )

    def is_of_others(self, file: int, files: Sequence[str] | None) -> bool:
        """Whether all chunks of a file belong to another shard."""
        is_whole = self._goes_whole(self.division, files)
        return is_whole and self.division.holder(Mark(0, file), goes_whole=True) != self.shard

    @staticmethod
    def _goes_whole(division: Division, files: Sequence[str] | None) -> bool:
        if files is None or len(files) < MIN_FILES_PER_SHARD * division.shards:
            return False
        return bool(compression(files[0])) or not is_parted(files[0])


@dataclass(frozen=True)
class LanePlace:
    """The position of a shard in a lane: after ``row`` rows of the block that begins at ``mark``.

    epoch    number of completed passes
    end      end of the block; BEGIN if not known yet
    before   number of documents by fate, without the current block; ``counts`` includes it
    taken    amount taken from the lane, in the unit of the mix
    """

    epoch: int = 0
    mark: Mark = BEGIN
    end: Mark = BEGIN
    row: int = 0
    taken: float = 0.0
    before: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rest:
    """A block begun in an earlier division; its rows from ``row`` on remain to be read."""

    task: Task
    epoch: int
    mark: Mark
    row: int


@dataclass(frozen=True)
class Position:
    """The position of a shard. It reads ``rests`` first. ``steps`` increases with every row."""

    shard: int
    places: Sequence[LanePlace]
    rests: Sequence[Rest] = ()
    steps: int = 0

    def moved(self, lane: int, place: LanePlace, *, rests: Sequence[Rest] = ()) -> "Position":
        """Returns the position after one more row, with a new place in a lane."""
        places = (*self.places[:lane], place, *self.places[lane + 1 :])
        return replace(self, places=places, rests=rests, steps=self.steps + 1)


def lane_key(lane: int, epoch: int) -> str:
    """Returns the JSON key for a pass over a lane."""
    return f"{lane} {epoch}"


def cursor_of(place: LanePlace, epoch: int) -> Mark:
    """Returns how far a shard has read in a pass; a block that it has begun counts as read."""
    if place.epoch != epoch:
        return END if place.epoch > epoch else BEGIN
    return place.end if place.row else place.mark


def to_division(entry: Mapping[str, Any]) -> Division:
    """Converts the output of ``dataclasses.asdict`` back to a Division."""
    return Division(entry["shards"], [Mark(*mark) for mark in entry["cursors"]])


def _to_task(entry: Mapping[str, Any]) -> Task:
    earlier = tuple(map(to_division, entry["earlier"]))
    return Task(entry["lane"], entry["shard"], to_division(entry["division"]), earlier)


def to_position(entry: Mapping[str, Any]) -> Position:
    """Converts the output of ``dataclasses.asdict`` back to a Position."""
    places = [
        LanePlace(**{**one, "mark": Mark(*one["mark"]), "end": Mark(*one["end"])}) for one in entry["places"]
    ]
    rests = [
        Rest(_to_task(one["task"]), one["epoch"], Mark(*one["mark"]), one["row"]) for one in entry["rests"]
    ]
    return Position(entry["shard"], tuple(places), tuple(rests), entry["steps"])


def furthest(positions: Iterable[Position]) -> list[Position]:
    """Returns the latest position of each shard; a resumed process also has old positions of other shards."""
    latest: dict[int, Position] = {}
    for position in positions:
        before = latest.get(position.shard)
        if before is None or position.steps > before.steps:
            latest[position.shard] = position
    return list(latest.values())
