"""Rows made while training: each shard reads its records block by block, and can go on from any row.

    shard 1 of 4   records --> | block 0: 1000 documents | block 1 ............. | ...   then the next pass
                                   tokenized, packed, rows shuffled by (seed, pass, shard, block)
    batches          0   1   2   3   4   5   6   7   ...     batch B is of shard B mod 4
    of process       0   1   0   1   0   1   0   1   ...     of two; and of worker (B div 2) mod 2 of each

A block is made by the code that prepares a whole set, and by nothing before it: so a position is the place
where its block begins, and a number of rows. A shard that is through its records begins them again at once
and waits for no other; the last row of a block may be short.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.config import Recipe
from hf_clm.data.build import load_examples, pack_rows, to_limit, tokenize_examples
from hf_clm.data.positions import BEGIN, WHOLE, Found, Mark, Share, list_files, read_share, take_some
from hf_clm.data.read.readers import ReadReport
from hf_clm.data.read.records import Examples, check_records, no_example, read_options
from hf_clm.errors import DataError, RecipeError

HEAD = 1000  # documents of each source that are read and proved before the first step
CHARACTERS = 1 << 22  # of a block's records at most, but for the last of them: so memory stays flat
STATE = "stream_state_{}.json"  # of a rank, in a checkpoint
UNREADABLE = "unreadable"
OF_WORKERS = "hf_clm.errors.DataError: "


@dataclass
class Block:
    """Documents that were read together: their rows, where reading goes on, and what became of them."""

    rows: Sequence[Any]
    end: Mark
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Position:
    """Where a shard stands: behind ``row`` rows of the block that begins at ``mark``.

    ``before`` counts the documents, by what became of them, up to the block; ``counts`` with the block.
    """

    shard: int
    epoch: int = 0  # passes over the shard's records that are done
    block: int = 0  # of this pass
    mark: Mark = BEGIN
    row: int = 0
    before: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamPlan:
    """The rows of a run: how many, how many a batch, and of how many shards the batches are in turn."""

    rows: int
    batch_rows: int
    shards: int


ReadBlocks = Callable[[Share, Mark], Iterator[Block]]


class StreamedRows(torch.utils.data.Dataset):
    """The rows that a run takes from a stream, by number. Those of a batch are asked for in order.

    ``dataset[i]`` is a row with its Position under ``stream``, which PositionCollator puts into the batch.
    The Trainer tells by ``passed`` what was trained on; what workers read ahead does not count.

    Args:
        read_blocks: the blocks of a shard from a mark to the end of its records.
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
        self.identity = {"shards": plan.shards, "seed": seed, **(identity or {})}
        self.positions = {shard: Position(shard) for shard in range(plan.shards)}
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

    def write_state(self, folder: Path, *, rank: int) -> None:
        """Writes where the shards of this process stand; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        moved = [
            asdict(position) for position in self.positions.values() if position != Position(position.shard)
        ]
        state = {"identity": self.identity, "positions": moved}
        (folder / STATE.format(rank)).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    def read_state(self, folder: Path) -> None:
        """Goes on from a checkpoint, whatever processes wrote it. Raises RecipeError where it cannot."""
        states = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(STATE.format("*")))]
        if not states:
            what, fix = "the checkpoint holds no position in a stream", "data.streaming as in the run before"
            raise RecipeError(what, where=str(folder), fix=fix)
        for name, value in states[0]["identity"].items():
            if self.identity.get(name) != value:
                what = f"the stream cannot go on: {name} was {value}"
                raise RecipeError(what, where=str(folder), got=str(self.identity.get(name)), fix=FIXES[name])
        known = [entry for state in states for entry in state["positions"]]
        for position in furthest(Position(**{**entry, "mark": Mark(*entry["mark"])}) for entry in known):
            self.passed(position)

    def _follow(self, position: Position) -> Iterator[Any]:
        """The rows of a shard from a position on, pass after pass."""
        share = Share(position.shard, self.plan.shards)
        while True:
            begin, found = position, 0
            for block in self.read_blocks(share, position.mark):
                counts = dict(Counter(position.before) + block.counts)
                check_share(counts, self.max_dropped)
                behind = replace(position, block=position.block + 1, mark=block.end, row=0)
                behind = replace(behind, before=counts, counts=counts)
                order = self._order(position, len(block.rows))
                for row in range(position.row, len(order)):
                    inside = replace(position, row=row + 1, counts=counts)
                    reached = inside if row + 1 < len(order) else behind
                    yield {**block.rows[order[row]], "stream": reached}
                position, found = behind, found + len(order)
            if begin.block == 0 and not found:
                what = f"no document to train on for shard {share.number + 1} of {share.count}"
                fix = "fewer processes or train.dataloader_num_workers, or data.streaming: false"
                raise DataError(what, where="data.train", fix=fix)
            position = replace(position, epoch=position.epoch + 1, block=0, mark=BEGIN)

    def _order(self, position: Position, rows: int) -> list[int]:
        if self.seed is None:
            return list(range(rows))
        place = [self.seed, position.epoch, position.shard, position.block]
        return np.random.default_rng(place).permutation(rows).tolist()


def _reached(position: Position) -> tuple[int, int, int]:
    return position.epoch, position.block, position.row


def furthest(positions: Iterable[Position]) -> list[Position]:
    """One position of each shard: a process that went on knows others' shards too, as they were then."""
    found: dict[int, Position] = {}
    for position in positions:
        before = found.get(position.shard)
        if before is None or _reached(position) > _reached(before):
            found[position.shard] = position
    return list(found.values())


FIXES = {
    "shards": "as many processes x train.dataloader_num_workers as before",
    "seed": "the seed, and the train_sampling_strategy, of the run before",
    "documents": "data.shuffle_buffer as before",
    "files": "the same files as before: names, sizes, content",
}


class PositionCollator:
    """Another collator, and the position behind the batch's last row."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, "stream": rows[-1]["stream"]} if "stream" in rows[-1] else batch


def load_head(recipe: Recipe) -> tuple[Examples, Examples | None]:
    """The first documents of each training source, in place of all, and the whole evaluation set."""
    data, found = recipe.data, Examples()
    pairs: list[Any] = []
    for source in data.train:
        options: dict[str, Any] = {"options": read_options(data, source), "report": found.report}
        records = read_share(source, WHOLE, **options, start=BEGIN)
        some, _ = take_some(records, documents=HEAD, characters=CHARACTERS)
        pairs += check_records(
            (item.record for item in some), source, data=recipe.data, found=found, first={}
        )
    if not pairs:
        raise no_example(data.train, found.report)
    head = replace(found, places=[place for place, _ in pairs], examples=[example for _, example in pairs])
    return head, load_examples(data.eval, data) if data.eval else None


def read_blocks(
    share: Share, start: Mark, *, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Block]:
    """The blocks of a shard, tokenized, fitted and packed; one holds documents of one source only."""
    data = recipe.data
    for number in range(start.source, len(data.train)):
        report = ReadReport()
        begin = start if number == start.source else Mark(number)
        source = data.train[number]
        options = read_options(data, source)
        found = read_share(source, share, options=options, report=report, start=begin)
        some: dict[str, Any] = {"documents": data.shuffle_buffer, "characters": CHARACTERS}
        is_last = False
        while not is_last:
            chunk, is_last = take_some(found, **some)
            block = build_block(chunk, report, recipe=recipe, tokenizer=tokenizer)
            report.bad_lines.clear()
            if block.counts:
                yield replace(block, end=Mark(number + 1)) if is_last else block


def build_block(
    chunk: list[Found], report: ReadReport, *, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> Block:
    """The rows of records of one source, by the code that prepares a whole set."""
    end = chunk[-1].mark if chunk else BEGIN
    source = recipe.data.train[end.source]
    found = Examples(report=report, sources=[source])
    records = (item.record for item in chunk)
    pairs = list(check_records(records, source, data=recipe.data, found=found, first={}))
    found.places, found.examples = [place for place, _ in pairs], [example for _, example in pairs]
    found.origins = np.zeros(len(pairs), dtype=np.int32)
    rows = tokenize_examples(found, recipe, tokenizer=tokenizer)
    counts = Counter(f"{fate.kind}: {fate.reason}" if fate.reason else fate.kind for fate in rows.rows.fates)
    counts[UNREADABLE] += len(report.bad_lines)
    packed: Any = pack_rows(rows, recipe) if len(rows) else []
    return Block(packed, end, +counts)


def check_share(counts: Mapping[str, int], max_dropped: float) -> None:
    """Raises DataError where too many of a shard's documents are lost; a few documents say nothing yet."""
    total = sum(counts.values())
    lost = {name: count for name, count in counts.items() if name.startswith(("dropped", UNREADABLE))}
    if total >= HEAD and sum(lost.values()) > max_dropped * total:
        got, share = (
            ", ".join(f"{count:,} {name}" for name, count in lost.items()),
            sum(lost.values()) / total,
        )
        what = f"{sum(lost.values()):,} of {total:,} documents of a stream cannot be trained on"
        fix = f"raise data.max_length, mend them, or allow it by data.max_dropped={to_limit(share)}"
        raise DataError(what, where="data.train", got=got, fix=fix)


def stream_identity(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same for a position to mean the same row, beside shards and seed."""
    files = [list_files(source) for source in recipe.data.train]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {"documents": recipe.data.shuffle_buffer, "files": digest[:16]}


@contextmanager
def plain_errors() -> Iterator[None]:
    """A DataError that one process alone meets, as it was raised in its worker: the text has no traceback."""
    try:
        yield
    except DataError as error:
        plain = DataError(error.what.rpartition(OF_WORKERS)[2].strip()) if OF_WORKERS in error.what else error
        plain.is_own = True
        raise plain from None
