"""What each of n machines reads: files, and spans of large ones, cut where n equal parts of all bytes end.

    |-- a.jsonl ------|-- b.parquet ------------------------|-- c.txt --|
    |      shard 1      |       shard 2       |        shard 3          |      a text file is one record

Lines and tables are cut by bytes, columns by rows; a record belongs to the span that it begins in. Each
shard finds the same cuts, whatever the others do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from hf_clm.config import Data, Recipe, Source
from hf_clm.data.build import split_text
from hf_clm.data.read.formats import FirstSeen
from hf_clm.data.read.opening import file_size
from hf_clm.data.read.readers import (
    READ_BYTES,
    WHOLE,
    ReadOptions,
    ReadReport,
    Record,
    Span,
    compression,
    count_rows,
    suffix,
)
from hf_clm.data.read.records import Examples, check_records, read_options
from hf_clm.data.read.sources import find_files, open_stream, read_file, read_records
from hf_clm.errors import RecipeError
from hf_clm.schema import AnyExample

LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
COLUMNS = (".parquet", ".arrow")
UNKNOWN_BYTES = 1 << 20  # of data on the Hub, which one shard reads whole


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALONE = Shard(1, 1)


class Task(NamedTuple):
    """What is read of a source: all of it, or (``file``) a span of one of its files.

    ``origin``: the number of the source in the recipe.
    """

    source: Source
    origin: int
    file: str | None = None
    span: Span = WHOLE


@dataclass
class Reading:
    """The records of a set (place, example, origin), and what is learned of them on the way.

    ``found`` holds all but the examples; ``counted`` the records and bad lines by file, of files in spans.
    """

    records: Iterator[tuple[str, AnyExample, int]]
    found: Examples = field(default_factory=Examples)
    counted: dict[str, int] = field(default_factory=dict)


def to_shard(text: str) -> Shard:
    """``Shard(2, 8)`` of "2/8". Raises RecipeError for anything else."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return Shard(int(number), int(count))
    fix = "i/n, counted from 1: --shard 1/8 on the first of eight machines, --shard 8/8 on the last"
    raise RecipeError("no part of a whole", where="--shard", got=repr(text), fix=fix)


def open_readings(recipe: Recipe, shard: Shard = ALONE) -> dict[str, Reading]:
    """The sets of a recipe as they are read, in blocks: eval, if there is one, then train.

    The short one comes first: what is wrong with it is known early. A single text of which a share is held
    out is parted here; the first shard reads it.
    """
    data = recipe.data
    if data.eval_fraction and not data.eval and (parts := _read_alone(data)):
        train, evaluation = map(_to_reading, parts if shard.number == 1 else (Examples(), Examples()))
        return {"eval": evaluation, "train": train}
    sets = {"eval": data.eval, "train": data.train} if data.eval else {"train": data.train}
    readings = {
        name: _open_reading(plan(sources, data, shard=shard), data, sources=sources)
        for name, sources in sets.items()
    }
    if shard.number == 1 and shard.count > 1:  # what a folder has besides is said once
        for name, sources in sets.items():
            for source in sources:
                find_files(source.path, split=source.split, report=readings[name].found.report)
    return readings


def plan(sources: Sequence[Source], data: Data, *, shard: Shard) -> list[Task]:
    """What a shard reads, in order."""
    if shard.count == 1:
        return [Task(source, origin) for origin, source in enumerate(sources)]
    sized = [piece for origin, source in enumerate(sources) for piece in _measure(source, origin, data=data)]
    whole = sum(size for _, _, size in sized)
    first, last = (whole * number // shard.count for number in (shard.number - 1, shard.number))
    tasks, start = [], 0
    for task, units, size in sized:
        low, high = (min(max(cut - start, 0), size) * units // size for cut in (first, last))
        if low < high:
            tasks.append(task._replace(span=WHOLE if (low, high) == (0, units) else (low, high)))
        start += size
    return tasks


def _measure(source: Source, origin: int, *, data: Data) -> Iterator[tuple[Task, int, int]]:
    """(task, its places to cut, its bytes). What is limited, or on the Hub, is one piece."""
    files = find_files(source.path, split=source.split)
    if files is None:
        yield Task(source, origin), 1, UNKNOWN_BYTES
    elif source.limit is not None:
        yield Task(source, origin), 1, max(1, sum(map(file_size, files)))
    else:
        for file in files:
            units, size = _measure_file(file, read_options(data, source))
            yield Task(source, origin, file), max(1, units), max(1, size)


def _measure_file(file: str, options: ReadOptions) -> tuple[int, int]:
    """How many places there are to cut at (bytes of text, or rows), and the bytes of the text."""
    size = file_size(file)
    if suffix(file) not in (*LINES, *COLUMNS):
        return 1, size
    with open_stream(file, options, report=ReadReport()) as source:
        if suffix(file) in COLUMNS:
            return count_rows(source)
        if compression(file):
            size = sum(map(len, iter(lambda: source.stream.read(READ_BYTES), b"")))
    return size, size


def _open_reading(tasks: list[Task], data: Data, *, sources: Sequence[Source]) -> Reading:
    reading = Reading(iter(()))
    reading.found.sources = list(sources)
    reading.records = _read_tasks(tasks, data, reading=reading)
    return reading


def _read_tasks(tasks: list[Task], data: Data, *, reading: Reading) -> Iterator[tuple[str, AnyExample, int]]:
    for task in tasks:
        first = _read_schema(task, data)
        records = _read_task(task, data, report=reading.found.report)
        before = reading.found.report.records
        checked = check_records(records, task.source, data=data, found=reading.found, first=first)
        yield from ((place, example, task.origin) for place, example in checked)
        if task.span != WHOLE and task.file is not None:
            reading.counted[task.file] = reading.found.report.records - before


def _read_task(task: Task, data: Data, *, report: ReadReport) -> Iterator[Record]:
    source, options = task.source, read_options(data, task.source)
    if task.file is None:
        kind = {"split": source.split, "name": source.name, "revision": source.revision}
        return islice(read_records(source.path, options, report=report, **kind), source.limit)
    if task.span[0] == 0:
        report.files.append(task.file)
    return read_file(task.file, options, report=report, span=task.span)


def _read_schema(task: Task, data: Data) -> FirstSeen:
    """What the first record of a file says of it, for a span that begins behind that."""
    first: FirstSeen = {}
    if task.file is not None and task.span[0] and not task.source.format and not task.source.template:
        records = read_file(task.file, read_options(data, task.source), report=ReadReport())
        next(check_records(records, task.source, data=data, found=Examples(), first=first), None)
    return first


def _read_alone(data: Data) -> tuple[Examples, Examples] | None:
    """The parts of a set that is a single text, of which the end is held out."""
    reading = _open_reading(plan(data.train, data, shard=ALONE), data, sources=data.train)
    read = list(islice(reading.records, 2))
    if len(read) != 1:
        return None
    examples = Examples([read[0][1]], [read[0][0]], origins=np.array([read[0][2]]))
    examples.report, examples.formats = reading.found.report, reading.found.formats
    examples.unknown_keys, examples.sources = reading.found.unknown_keys, reading.found.sources
    return split_text(examples, read[0][1], fraction=data.eval_fraction)


def _to_reading(examples: Examples) -> Reading:
    """Examples that were read already."""
    records = zip(examples.places, examples.examples, examples.origins.tolist(), strict=True)
    return Reading(iter(records), replace(examples, examples=[], places=[]))
