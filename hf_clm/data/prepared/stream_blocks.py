"""Reads the blocks of a stream's shard: its chunks of each source, labelled and packed."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from transformers import (
    PreTrainedTokenizerFast,
)

from hf_clm.data.label.datasets import UNREADABLE, TokenizedDataset
from hf_clm.data.prepared.block import BlockMaker
from hf_clm.data.prepared.chunks import (
    BLOCK_BYTES,
    Chunk,
    RawBlock,
    knows_first,
    read_file_chunks,
    read_hub_chunks,
    see_first,
)
from hf_clm.data.prepared.division import Mark, Task
from hf_clm.data.prepared.stream import StreamBlock
from hf_clm.data.prepared.tables import to_rows
from hf_clm.data.read.files import find_files
from hf_clm.data.read.formats import FirstSeen
from hf_clm.data.read.opening import file_size, open_raw
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import read_options
from hf_clm.data.split import pack_rows
from hf_clm.recipe.recipe import Data, Recipe, Source
from hf_clm.schema import Json

SAMPLES, SAMPLE_BYTES = 16, 16_384  # of a file, to check that it is unchanged


def lanes_of(data: Data) -> list[list[int]]:
    """Returns the sources of each lane: one per lane if they are mixed, otherwise all in one lane."""
    numbers = range(len(data.train))
    is_mixed = any(source.weight is not None for source in data.train)
    return [[number] for number in numbers] if is_mixed else [list(numbers)]


def shares_of(data: Data) -> tuple[float, ...]:
    """Returns the share of each lane."""
    return tuple(data.train[first].weight or 1.0 for first, *_ in lanes_of(data))


def counted_by(data: Data) -> str:
    """Returns the unit of the shares."""
    return data.mixing.by if data.mixing else "rows"


def read_stream(
    task: Task, start: Mark, *, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[StreamBlock]:
    """Yields the labelled, certified and packed blocks of a task from a chunk on. Each has one source.

    Unusable records are dropped and counted.
    """
    data, maker = recipe.data, BlockMaker(recipe, tokenizer)
    for source in lanes_of(data)[task.lane]:
        waiting: list[tuple[Mark, Chunk]] = []
        size = records = 0
        first: FirstSeen = {}
        for mark, chunk in _own_chunks(source, task=task, start=start, data=data, first=first):
            if size >= BLOCK_BYTES or records >= data.shuffle_buffer:
                yield _make(waiting, first, mark, recipe=recipe, maker=maker)
                waiting, size, records = [], 0, 0
            waiting.append((mark, chunk))
            size, records = size + chunk.size, records + chunk.records
        if waiting:
            yield _make(waiting, first, Mark(source + 1), recipe=recipe, maker=maker)


def _own_chunks(
    number: int, *, task: Task, start: Mark, data: Data, first: FirstSeen
) -> Iterator[tuple[Mark, Chunk]]:
    """Yields the chunks of a source that belong to a task. Fills in ``first`` from the start of each file."""
    source = data.train[number]
    files = find_files(source.path, split=source.split)
    for at, file in enumerate(files or [source.path]):
        if Mark(number, at + 1) <= start or task.is_of_others(at, files):
            continue

        def is_own(chunk: int, at: int = at) -> bool:
            mark = Mark(number, at, chunk)
            return mark >= start and task.wants(mark, files)

        def is_read(chunk: int, file: str = file, is_own: Callable[[int], bool] = is_own) -> bool:
            return is_own(chunk) or not knows_first(file, source, first)

        if files is None:
            chunks = read_hub_chunks(source, streams=True)
        else:
            options = read_options(data, source)
            chunks = read_file_chunks(file, options, report=ReadReport(), is_needed=is_read)
        for chunk in chunks:
            see_first(chunk, source, data=data, first=first)
            if is_own(chunk.number):
                yield Mark(number, at, chunk.number), chunk


def _make(
    chunks: Sequence[tuple[Mark, Chunk]], first: FirstSeen, end: Mark, *, recipe: Recipe, maker: BlockMaker
) -> StreamBlock:
    begin = chunks[0][0]
    block = maker.make(RawBlock("train", begin.source, 1, [chunk for _, chunk in chunks], first))
    block.certificate.require()
    rows = TokenizedDataset(to_rows(block.rows))
    counts: Counter[str] = Counter()
    for kind, reason in zip(
        *(block.ledger.column(name).to_pylist() for name in ("fate", "reason")), strict=True
    ):
        counts[f"{kind}: {reason}" if reason and kind != UNREADABLE else kind] += 1
    packed = pack_rows(rows, recipe) if len(rows) else []
    return StreamBlock(packed, begin, end, counts)


def stream_identity(recipe: Recipe) -> dict[str, Json]:
    """Returns the properties, besides the seed, on which the meaning of a position depends."""
    files = [_list_files(source) for source in recipe.data.train]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    identity: dict[str, Json] = {"documents": recipe.data.shuffle_buffer, "files": digest[:16]}
    shares = shares_of(recipe.data)
    return {**identity, "weights": [counted_by(recipe.data), *shares]} if len(shares) > 1 else identity


def _list_files(source: Source) -> list[tuple[str, int, str]]:
    """Returns name, size in bytes and digest of each file; for a source on the Hub, its name and revision."""
    files = find_files(source.path, split=source.split)
    if files is None:
        return [(f"{source.path} {source.name} {source.split} {source.revision}", 0, "")]
    return [(os.path.basename(file), file_size(file), _sample(file)) for file in files]


def _sample(file: str) -> str:
    """Returns the sha256 of evenly spaced samples, since hashing large files at each start takes too long."""
    size, digest = file_size(file), hashlib.sha256()
    with open_raw(file) as stream:
        for number in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
