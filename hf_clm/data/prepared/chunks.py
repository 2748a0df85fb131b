"""Reads a recipe's data in unparsed chunks, and groups chunks into blocks that are labelled together.

    a.jsonl   | 8 KiB of lines | 8 KiB of lines | ...      b.parquet   | 1,024 rows | ...      c.csv   records
                  \\_ a block of about BLOCK_BYTES, of one source _/

Reading a chunk is cheap, so one process can feed many. The boundaries depend on the files alone, so a block
has the same rows on every machine.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeAlias

import pyarrow

from hf_clm.data.read.formats import AFTER_BYTE, FirstSeen
from hf_clm.data.read.readers import (
    COLUMN_TYPES,
    LINE_TYPES,
    READERS,
    Items,
    RawRecord,
    ReadOptions,
    ReadReport,
    Stream,
    batch_rows,
    column_batches,
    suffix,
)
from hf_clm.data.read.records import read_example, read_options
from hf_clm.data.read.sources import check_value, find_files, open_stream, read_hub
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Source

BLOCK_BYTES = 1 << 20  # about a second of work, with little memory
CHUNK_BYTES = 1 << 13  # of a file of lines
CHUNK_RECORDS = 16  # of a file that has to be parsed to be read

Content: TypeAlias = bytes | pyarrow.RecordBatch | list[tuple[str, object]]


@dataclass(frozen=True)
class Chunk:
    """Adjacent records of a file: lines, a batch of columns, or (place, value) pairs from a reader.

    number: number of the chunk in its file.
    before: number of lines or rows before the chunk, counted from the byte ``counted_from``.
    counted_from: not 0 if the lines at the beginning of the file were not read.
    """

    file: str
    number: int
    before: int
    content: Content
    counted_from: int = 0

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        match self.content:
            case bytes():
                return len(self.content)
            case list():
                return sum(len(str(value)) for _, value in self.content)
            case _:
                return self.content.nbytes

    @property
    def records(self) -> int:
        """Approximate number of records."""
        match self.content:
            case bytes():
                return self.content.count(b"\n")
            case list():
                return len(self.content)
            case _:
                return self.content.num_rows

    def items(self, options: ReadOptions, report: ReadReport) -> Items:
        """Yields the parsed (place, value) pairs; the value is an error if it cannot be parsed."""
        match self.content:
            case bytes():
                text: io.BufferedReader = io.BufferedReader(io.BytesIO(self.content))
                origin = f"{AFTER_BYTE}{self.counted_from:,})" if self.counted_from else ""
                name = f"{self.file}{origin}"
                lines = Stream(name, text, options, report, before=self.before)
                yield from READERS[".jsonl"](lines)
            case list():
                yield from self.content
            case _:
                for number, row in enumerate(batch_rows(self.content), start=self.before + 1):
                    yield f"{self.file}: record {number}", row


@dataclass(frozen=True)
class RawBlock:
    """Chunks of one source that are labelled together.

    split: name of the set, train or eval.
    source: number of the source in the set.
    first: properties of the first record of each file, which the other records must share.
    formats: formats of records that have already been read.
    """

    split: str
    source: int
    number: int
    chunks: Sequence[Chunk]
    first: FirstSeen = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)


def read_blocks(data: Data, split: str, *, report: ReadReport) -> Iterator[RawBlock]:
    """Yields all blocks of a set. Adds their files to the report.

    Raises DataError if a file cannot be read.
    """
    number = 0
    for at, source in enumerate(data.sources(split)):
        first: FirstSeen = {}
        waiting: list[Chunk] = []
        size = 0
        for chunk in read_chunks(source, data, report=report):
            see_first(chunk, source, data=data, first=first)
            waiting.append(chunk)
            size += chunk.size
            if size >= BLOCK_BYTES:
                yield RawBlock(split, at, number, waiting, first)
                waiting, size, number = [], 0, number + 1
                first = _of_file(first, chunk.file)
        if waiting:
            yield RawBlock(split, at, number, waiting, first)
            number += 1


def see_first(chunk: Chunk, source: Source, *, data: Data, first: FirstSeen) -> None:
    """Records the properties of the first record of a chunk's file, unless they are known."""
    if knows_first(chunk.file, source, first):
        return
    for where, value in chunk.items(read_options(data, source), ReadReport()):
        with suppress(DataError):
            check_value(value, where)
            read_example(RawRecord(value, where), source, data=data, first=first)
        if _of_file(first, chunk.file):
            return


def knows_first(file: str, source: Source, first: FirstSeen) -> bool:
    """Whether the properties that a file's records must share are known or not needed."""
    is_named = source.template is not None or source.format not in (None, "tokenized")
    return is_named or bool(_of_file(first, file))


def _of_file(first: FirstSeen, file: str) -> FirstSeen:
    """Returns the known properties of one file."""
    names = (f"format {file}", f"masks {file}")
    return {key: seen for key, seen in first.items() if key in names}


def read_chunks(source: Source, data: Data, *, report: ReadReport) -> Iterator[Chunk]:
    """Yields the chunks of a source in order. Adds its files to the report."""
    remaining, files = source.limit, find_files(source.path, split=source.split)
    report.files += files or [source.path]
    options = read_options(data, source)
    for file in files or [None]:
        if file is None:
            chunks = read_hub_chunks(source, streams=data.streaming)
        else:
            chunks = read_file_chunks(file, options, limit=remaining, report=report)
        for chunk in chunks:
            if remaining is not None:
                chunk = replace(chunk, content=chunk.content[:remaining])
                remaining -= len(chunk.content)
            yield chunk
            if remaining == 0:
                return


def read_hub_chunks(source: Source, *, streams: bool = False) -> Iterator[Chunk]:
    """Yields the chunks of a dataset on the Hub, which is downloaded first unless it ``streams``."""
    kind = {"split": source.split, "name": source.name, "revision": source.revision}
    yield from _in_lists(source.path, read_hub(source.path, **kind, streams=streams))


def read_file_chunks(
    file: str,
    options: ReadOptions,
    *,
    report: ReadReport,
    limit: int | None = None,
    is_needed: Callable[[int], bool] | None = None,
) -> Iterator[Chunk]:
    """Yields the chunks of a file in order.

    Args:
        limit: maximum number of records that the caller needs; the file is then parsed to count them.
        is_needed: whether the chunk with a number is needed; other chunks of a file of lines are not read.
    """
    with open_stream(file, options, report=report) as stream:
        if limit is not None:
            chunks = _in_lists(file, READERS[suffix(file)](stream))
        elif suffix(file) in LINE_TYPES:
            chunks = _line_chunks(stream, is_needed=is_needed)
        elif suffix(file) in COLUMN_TYPES:
            chunks = _column_chunks(stream)
        else:
            chunks = _in_lists(file, READERS[suffix(file)](stream))
        yield from (chunk for chunk in chunks if is_needed is None or is_needed(chunk.number))


def _line_chunks(stream: Stream, *, is_needed: Callable[[int], bool] | None) -> Iterator[Chunk]:
    """Yields chunks of lines: chunk k has the lines that begin in the k-th CHUNK_BYTES of the text."""
    at, before, counted_from, number = 0, 0, 0, 0
    end = os.path.getsize(stream.file) if isinstance(stream.stream.raw, io.FileIO) else None
    while True:
        if is_needed and end is not None and not is_needed(number):
            number = next((n for n in range(number, end // CHUNK_BYTES + 1) if is_needed(n)), -1)
            if number < 0:
                return
            stream.stream.seek(number * CHUNK_BYTES - 1)
            at = number * CHUNK_BYTES - 1 + _skip_line(stream)
            before, counted_from = 0, at
            if at >= (number + 1) * CHUNK_BYTES:
                number = at // CHUNK_BYTES
                continue
        block = stream.stream.read((number + 1) * CHUNK_BYTES - at)
        if not block:
            return
        at += len(block)
        if not block.endswith(b"\n"):
            rest = stream.stream.readline(stream.options.max_line_bytes + 1)
            block, at = block + rest, at + len(rest)
            is_too_long = len(rest) > stream.options.max_line_bytes
            if is_too_long and not rest.endswith(b"\n"):  # skip the end of the line
                block, at = block + b"\n", at + _skip_line(stream)
        yield Chunk(stream.file, number, before, block, counted_from)
        before += block.count(b"\n")
        number = max(number + 1, at // CHUNK_BYTES)


def _skip_line(stream: Stream) -> int:
    """Skips the rest of a line; returns its length in bytes."""
    size = 0
    while part := stream.stream.readline(BLOCK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _column_chunks(stream: Stream) -> Iterator[Chunk]:
    before = 0
    for number, batch in enumerate(column_batches(stream)):
        yield Chunk(stream.file, number, before, batch)
        before += batch.num_rows


def _in_lists(file: str, items: Items) -> Iterator[Chunk]:
    """Groups parsed items into chunks."""
    for number in count():
        batch, size = [], 0
        for item in items:
            batch.append(item)
            size += len(str(item[1]))
            if len(batch) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                break
        if not batch:
            return
        yield Chunk(file, number, number * CHUNK_RECORDS, batch)
