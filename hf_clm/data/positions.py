"""Which records of a source are a shard's, and where it reads on: each record is of exactly one shard.

.jsonl .parquet    | shard 0 ....| shard 1 ....| shard 2 ....|    of each file a span of bytes, or of rows
.txt, many .gz     | shard 0 | shard 1 | shard 2 | shard 0 |      whole files in turn
others, the Hub      0 1 2 0 1 2 0 1 2 0                          records in turn
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_clm.config import Source
from hf_clm.data.read.opening import file_size, open_raw
from hf_clm.data.read.readers import (
    READERS,
    TEXTS,
    Items,
    ReadOptions,
    ReadReport,
    Record,
    Span,
    Stream,
    suffix,
)
from hf_clm.data.read.sources import find_files, open_stream, read_hub, to_records

FILES_A_SHARD = 8  # from so many on, whole files in turn are as even as records, and each is read by one
PROBES, PROBE_BYTES = 16, 16_384
LINES = (".jsonl", ".ndjson")


class Mark(NamedTuple):
    """Where reading goes on: in a file of a source, behind ``at`` bytes, rows or records of it."""

    source: int = 0
    file: int = 0
    at: int = 0


BEGIN = Mark()


@dataclass(frozen=True)
class Share:
    """One shard of ``count``."""

    number: int
    count: int

    def span(self, size: int) -> Span:
        """Its part of so many bytes or rows."""
        return size * self.number // self.count, size * (self.number + 1) // self.count

    def holds(self, number: int) -> bool:
        """Whether it is the shard's, where they go in turn."""
        return number % self.count == self.number


WHOLE = Share(0, 1)


class Found(NamedTuple):
    """A record, and where reading goes on behind it."""

    record: Record
    mark: Mark


def read_share(
    source: Source, share: Share, *, options: ReadOptions, report: ReadReport, start: Mark
) -> Iterator[Found]:
    """The records of a source that are a shard's, from ``start`` on: those before it are not parsed again.

    Of a file of lines or of row groups no more is read than the shard's span of it.
    """
    files = find_files(source.path, split=source.split, report=report)
    if files is None:
        yield from _read_hub_share(source, share, options=options, report=report, start=start)
        return
    report.files += files
    for number in range(start.file, len(files)):
        file, first = files[number], start.at if number == start.file else 0
        part = share
        if _goes_whole(file, is_many=len(files) >= FILES_A_SHARD * share.count):
            if not share.holds(number):
                continue
            part = WHOLE
        with open_stream(file, options, report=report) as stream:
            items, at = _open_part(stream, part, first=first)
            for record in to_records(items, file=file, options=options, report=report, is_whole=False):
                yield Found(record, Mark(start.source, number, at()))


def list_files(source: Source) -> list[tuple[str, int, str]]:
    """Name, size in bytes and a digest of each file; of a source on the Hub its name and revision."""
    files = find_files(source.path, split=source.split)
    if files is None:
        return [(f"{source.path} {source.name} {source.split} {source.revision}", 0, "")]
    return [(os.path.basename(file), file_size(file), _sample(file)) for file in files]


def _sample(file: str) -> str:
    """sha256 of PROBES pieces at even distances: of a file that is too large to be read at each start."""
    size, digest = file_size(file), hashlib.sha256()
    with open_raw(file) as stream:
        for number in range(PROBES):
            stream.seek(max(0, size - PROBE_BYTES) * number // (PROBES - 1))
            digest.update(stream.read(PROBE_BYTES))
    return digest.hexdigest()


class _Counter:
    """Passes items on; ``at`` counts them."""

    def __init__(self, items: Items, *, at: int):
        self.items, self.at = items, at

    def __iter__(self) -> Items:
        for item in self.items:
            self.at += 1
            yield item


def _open_part(stream: Stream, share: Share, *, first: int) -> tuple[Items, Callable[[], int]]:
    """The shard's items of a file from ``first`` on, and how to ask how far they were read."""
    read = READERS[suffix(stream.file)]
    if not _is_divisible(stream.file):
        every = _Counter(read(stream), at=0)
        own = (item for number, item in enumerate(every) if number >= first and share.holds(number))
        return own, lambda: every.at
    if suffix(stream.file) in LINES:
        start, stop = share.span(file_size(stream.file))
        lines = replace(stream, span=(max(start, first), stop))
        return read(lines), lambda: lines.at
    from pyarrow import parquet

    start, stop = share.span(parquet.ParquetFile(stream.stream).metadata.num_rows)
    rows = _Counter(read(replace(stream, span=(max(start, first), stop))), at=max(start, first))
    return iter(rows), lambda: rows.at


def _read_hub_share(
    source: Source, share: Share, *, options: ReadOptions, report: ReadReport, start: Mark
) -> Iterator[Found]:
    kind = {"split": source.split, "name": source.name, "revision": source.revision}
    every = _Counter(read_hub(source.path, **kind, first=start.at), at=start.at)
    own = (item for number, item in enumerate(every, start=start.at) if share.holds(number))
    for record in to_records(own, file=source.path, options=options, report=report, is_whole=False):
        yield Found(record, Mark(start.source, 0, every.at))


def _is_divisible(file: str) -> bool:
    """Whether the shards can read spans of it: those before are passed over without being parsed."""
    return file.lower().endswith((*LINES, ".parquet"))


def _goes_whole(file: str, *, is_many: bool) -> bool:
    """Whether one shard reads the file alone, which is one of many or not; a text is one record."""
    return suffix(file) in TEXTS or (is_many and not _is_divisible(file))


def take_some(found: Iterator[Found], *, documents: int, characters: int) -> tuple[list[Found], bool]:
    """The next records, and whether they are the last: so many, or fewer with more than ``characters``."""
    some: list[Found] = []
    for item in found:
        some.append(item)
        characters -= len(str(item.record.data))
        if len(some) == documents or characters <= 0:
            return some, False
    return some, True
