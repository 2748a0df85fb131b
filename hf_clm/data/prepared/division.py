"""Where the shards of a stream stand, and which chunks are whose: kept in checkpoints as JSON.

Each chunk belongs to one shard. When a run resumes on another number of shards, a Division records what the
old shards have read, and the rest is divided among the new ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_clm.data.prepared.chunks import is_parted
from hf_clm.data.read.readers import compression

FILES_A_SHARD = 8  # packed or parsed files that are as even as chunks: then each goes to a shard as a whole


class Mark(NamedTuple):
    """A chunk of a lane: which source, file of it and chunk in the file."""

    source: int = 0
    file: int = 0
    chunk: int = 0


BEGIN, END = Mark(), Mark(1 << 40)


@dataclass(frozen=True)
class Division:
    """Chunks divided among shards; those of shard i before ``cursors[i]`` were read under this division."""

    shards: int
    cursors: Sequence[Mark] = ()

    def holder(self, mark: Mark, *, goes_whole: bool) -> int:
        """The shard that a chunk is of."""
        return (mark.file if goes_whole else mark.file + mark.chunk) % self.shards

    def has_read(self, mark: Mark, *, goes_whole: bool) -> bool:
        """Whether the chunk was read."""
        return mark < self.cursors[self.holder(mark, goes_whole=goes_whole)]


@dataclass(frozen=True)
class Task:
    """What a shard reads of a lane in one pass: its own, if it was not read under an earlier division."""

    lane: int
    shard: int
    division: Division
    earlier: Sequence[Division] = ()

    def wants(self, mark: Mark, files: Sequence[str] | None) -> bool:
        """``files``: of the source; None: on the Hub."""
        whole = [self._goes_whole(division, files) for division in (self.division, *self.earlier)]
        return self.division.holder(mark, goes_whole=whole[0]) == self.shard and not any(
            division.has_read(mark, goes_whole=is_whole)
            for division, is_whole in zip(self.earlier, whole[1:], strict=True)
        )

    def is_of_others(self, file: int, files: Sequence[str] | None) -> bool:
        """Whether a file goes whole to another shard."""
        is_whole = self._goes_whole(self.division, files)
        return is_whole and self.division.holder(Mark(0, file), goes_whole=True) != self.shard

    @staticmethod
    def _goes_whole(division: Division, files: Sequence[str] | None) -> bool:
        if files is None or len(files) < FILES_A_SHARD * division.shards:
            return False
        return bool(compression(files[0])) or not is_parted(files[0])


@dataclass(frozen=True)
class Place:
    """Where a shard stands in a lane: behind ``row`` rows of the block that begins at ``mark``.

    end      where the block ends; BEGIN: not known yet
    before   the documents, by what became of them, up to the block; ``counts``: with it
    taken    of the lane, in what mixing counts
    """

    epoch: int = 0  # passes that are done
    mark: Mark = BEGIN
    end: Mark = BEGIN
    row: int = 0
    taken: float = 0.0
    before: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rest:
    """A block that was begun under an earlier division: its rows from ``row`` on are still to be read."""

    task: Task
    epoch: int
    mark: Mark
    row: int


@dataclass(frozen=True)
class Position:
    """Where a shard stands. ``rests``: what it reads first. ``steps`` tells the later of two apart."""

    shard: int
    places: Sequence[Place]
    rests: Sequence[Rest] = ()
    steps: int = 0

    def moved(self, lane: int, place: Place, *, rests: Sequence[Rest] = ()) -> "Position":
        """The position one row on, at another place in a lane."""
        places = (*self.places[:lane], place, *self.places[lane + 1 :])
        return replace(self, places=places, rests=rests, steps=self.steps + 1)


def lane_key(lane: int, epoch: int) -> str:
    """A lane and a pass over it, as a key of JSON."""
    return f"{lane} {epoch}"


def cursor_of(place: Place, epoch: int) -> Mark:
    """How far a shard has read in a pass; a block that it has begun counts as read."""
    if place.epoch != epoch:
        return END if place.epoch > epoch else BEGIN
    return place.end if place.row else place.mark


def to_division(entry: Mapping[str, Any]) -> Division:
    """A Division from what ``dataclasses.asdict`` made of it."""
    return Division(entry["shards"], [Mark(*mark) for mark in entry["cursors"]])


def _to_task(entry: Mapping[str, Any]) -> Task:
    earlier = tuple(map(to_division, entry["earlier"]))
    return Task(entry["lane"], entry["shard"], to_division(entry["division"]), earlier)


def to_position(entry: Mapping[str, Any]) -> Position:
    """A Position from what ``dataclasses.asdict`` made of it."""
    places = [
        Place(**{**one, "mark": Mark(*one["mark"]), "end": Mark(*one["end"])}) for one in entry["places"]
    ]
    rests = [
        Rest(_to_task(one["task"]), one["epoch"], Mark(*one["mark"]), one["row"]) for one in entry["rests"]
    ]
    return Position(entry["shard"], tuple(places), tuple(rests), entry["steps"])


def furthest(positions: Iterable[Position]) -> list[Position]:
    """One position of each shard: a process that went on knows others' shards too, as they were then."""
    found: dict[int, Position] = {}
    for position in positions:
        before = found.get(position.shard)
        if before is None or position.steps > before.steps:
            found[position.shard] = position
    return list(found.values())
