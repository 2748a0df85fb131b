"""The ledger: what became of every input row and where it sits; the totals balance or the run stops."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.data.arrays import release, row_blocks
from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, is_sorted, stable_order
from hf_clm.data.label.datasets import TokenizedRows
from hf_clm.data.label.labels import Fate
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

GROUP_ROWS = 1 << 13  # of the file, which wait in memory
SHOWN = 3  # rows in an error
COMPARED = 500  # packed rows that are compared with their pieces, token by token
PLACE = re.compile(
    "(.*?(?::[0-9]+|: record [0-9]+)): (.*)", re.DOTALL
)  # of a record, and what is wrong there
FATES = ("used", "cut", "split", "duplicate", "dropped", "unreadable")


@dataclass(frozen=True)
class LedgerRow:
    """One input row. ``rows`` are the packed (or, without packing, the tokenized) rows that hold it.

    ``tokens`` and ``target_tokens`` are those of the input; ``kept_tokens`` and ``kept_targets`` are in rows.
    ``row`` is -1 for what was read but became no example.
    """

    row: int
    source: str
    fate: str
    reason: str
    tokens: int
    target_tokens: int
    kept_tokens: int
    kept_targets: int
    rows: list[int]


COUNTS = ("tokens", "target_tokens", "kept_tokens", "kept_targets")


@dataclass(frozen=True)
class Ledger:
    """All rows of one set, and what was read but became none: ``unreadable`` lines, ``duplicates``."""

    rows: list[LedgerRow]
    unreadable: Sequence[str] = ()
    duplicates: Sequence[str] = ()

    def totals(self) -> dict[str, dict[str, int]]:
        """Fate -> rows and ``COUNTS``; only the fates that occur."""
        return self._sums().to_json()

    def to_lines(self) -> list[str]:
        """A small table, with the reasons of what was dropped."""
        return self._sums().to_lines()

    def _sums(self) -> "Totals":
        totals = Totals()
        totals.add(self)
        return totals


class Totals:
    """What a ledger sums up to, or one that comes in blocks."""

    def __init__(self):
        self.found: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()

    def add(self, ledger: Ledger) -> None:
        """Counts a ledger in."""
        for row in ledger.rows:
            sums = self.found[row.fate]
            sums["rows"] += 1
            for name in COUNTS:
                sums[name] += getattr(row, name)
        self.reasons.update(row.reason for row in ledger.rows if row.fate == "dropped")
        for fate, places in (("duplicate", ledger.duplicates), ("unreadable", ledger.unreadable)):
            if places:
                self.found[fate]["rows"] += len(places)

    def to_json(self) -> dict[str, dict[str, int]]:
        """Fate -> rows and ``COUNTS``; only the fates that occur."""
        return {fate: dict(self.found[fate]) for fate in FATES if fate in self.found}

    def to_lines(self) -> list[str]:
        """A small table, with the reasons of what was dropped."""
        heads = ("rows", "tokens", "targets", "tokens kept", "targets kept")
        lines = [f"{'fate':<12}" + "".join(f"{head:>14}" for head in heads)]
        for fate, total in self.to_json().items():
            lines.append(f"{fate:<12}" + "".join(f"{total.get(key, 0):>14,}" for key in ("rows", *COUNTS)))
        return lines + [f"  dropped: {count:,} x {reason}" for reason, count in self.reasons.most_common()]


def build_ledger(
    rows: TokenizedRows,
    places: Sequence[str],
    *,
    packed: PackedDataset | None,
    unreadable: Sequence[str] = (),
    duplicates: Sequence[str] = (),
) -> Ledger:
    """Enters every input row. ``places`` names them ("poems.jsonl:17")."""
    blocks = ledger_blocks(rows, places, packed=packed)
    return Ledger([row for block in blocks for row in block.rows], unreadable, duplicates)


def ledger_blocks(
    rows: TokenizedRows, places: Sequence[str], *, packed: PackedDataset | None
) -> Iterator[Ledger]:
    """The ledger in blocks of input rows, in order."""
    first_rows = np.searchsorted(rows.sources, np.arange(len(places) + 1, dtype=rows.sources.dtype))
    seats = Seats(len(rows), packed)  # the tokenized rows of source i are first_rows[i]:first_rows[i + 1]
    for first, last in row_blocks(rows.offsets[first_rows]):
        own = first_rows[first : last + 1]
        assert (np.diff(rows.sources[own[0] : own[-1]]) >= 0).all(), "tokenized in the order of the input"
        begin, stop = rows.offsets[own[0]], rows.offsets[own[-1]]
        before = targets_before(rows.labels[begin:stop])
        spans = rows.offsets[own]
        kept = zip(np.diff(spans).tolist(), np.diff(before[spans - begin]).tolist(), strict=True)
        named = zip(range(first, last), places[first:last], rows.fates[first:last], strict=True)
        entries = [
            LedgerRow(source, place, fate.kind, fate.reason, fate.tokens, fate.target_tokens, *its, held)
            for (source, place, fate), its, held in zip(named, kept, seats.of_sources(own), strict=True)
        ]
        release(rows.labels)
        yield Ledger(entries)


class Seats:
    """Which rows hold a tokenized row: itself, or the packed rows with its pieces."""

    def __init__(self, rows: int, packed: PackedDataset | DrawnDataset | None):
        self.pieces = packed.pieces if packed is not None else None
        self.order: np.ndarray | None = None
        if self.pieces is not None and not is_sorted(self.pieces.examples):
            self.order = stable_order(self.pieces.examples)  # by example; those of one by row
        self.rows = rows

    def of_sources(self, first_rows: np.ndarray) -> list[list[int]]:
        """For each source the rows that hold it; its tokenized rows begin at ``first_rows``."""
        if self.pieces is None:
            return [list(range(first, last)) for first, last in pairwise(first_rows.tolist())]
        examples, order = self.pieces.examples, self.order
        found = np.searchsorted(examples, first_rows, sorter=order)
        own = np.arange(found[0], found[-1]) if order is None else order[found[0] : found[-1]]
        held_in = (np.searchsorted(self.pieces.offsets, own, side="right") - 1).tolist()
        return [held_in[first:last] for first, last in pairwise((found - found[0]).tolist())]


def check_balance(ledger: Ledger, rows: TokenizedRows, *, packed: PackedDataset | None) -> None:
    """Raises DataError unless no row loses a token or a label that its fate does not name."""
    check_entries(ledger, rows.fates)
    if packed is not None:
        check_packing(rows, packed)


def check_entries(ledger: Ledger, fates: Sequence[Fate]) -> None:
    """Raises DataError for a row that lost more than its fate says."""
    first = ledger.rows[0].row if ledger.rows else 0
    known = fates[first : first + len(ledger.rows)]
    for row, fate in zip(ledger.rows, known, strict=True):
        if not _is_balanced(row, fate):
            what = f"the ledger does not balance: {row.fate}, {row.kept_tokens} of {row.tokens} tokens kept"
            got = f"{row.kept_targets} of {row.target_tokens} labels, rows {row.rows}"
            raise DataError(what, where=row.source, got=got, fix="report this as a bug of hf_clm")


def check_packing(rows: TokenizedRows, packed: PackedDataset) -> None:
    """Raises DataError where the packed rows do not keep each label once, or are not their pieces."""
    pieces, kept, labels = packed.pieces, 0, 0
    order = None if is_sorted(pieces.examples) else stable_order(pieces.examples)
    for first, last in row_blocks(rows.offsets):
        bounds = np.searchsorted(pieces.examples, [first, last], sorter=order)
        own = np.arange(*bounds) if order is None else order[slice(*bounds)]
        begin = rows.offsets[first]
        before = targets_before(rows.labels[begin : rows.offsets[last]])
        begins = rows.offsets[pieces.examples[own]] - begin  # the first token of a piece has no label
        kept += int((before[begins + pieces.stops[own]] - before[begins + pieces.starts[own] + 1]).sum())
        labels += int(before[-1])
        release(rows.labels)
    if kept != labels:
        what = f"packing keeps {kept:,} labels of {labels:,}"
        raise DataError(what, where="data.packing", fix="report this as a bug of hf_clm")
    check_pieces(packed, rows)


def lost_rows(ledger: Ledger) -> Iterator[LedgerRow]:
    """The entries of what was read but became no example, with the reason."""
    for message in ledger.unreadable:
        found = PLACE.match(message)
        place, reason = found.groups() if found else ("", message)
        yield LedgerRow(-1, place, "unreadable", reason, 0, 0, 0, 0, [])
    for place in ledger.duplicates:
        yield LedgerRow(-1, place, "duplicate", "", 0, 0, 0, 0, [])


class LedgerWriter:
    """A parquet file of one row an input row, written block by block."""

    def __init__(self, path: Path):
        import pyarrow
        from pyarrow import parquet

        texts = dict.fromkeys(("split", "source", "fate", "reason"), pyarrow.string())
        columns = {"split": None, **{field.name: None for field in fields(LedgerRow)}}
        kinds = {**dict.fromkeys(columns, pyarrow.int64()), **texts, "rows": pyarrow.list_(pyarrow.int64())}
        self.schema = pyarrow.schema([(name, kinds[name]) for name in columns])
        self.writer = parquet.ParquetWriter(path, self.schema)
        self.waiting: list[tuple[str, LedgerRow]] = []

    def append(self, split: str, block: Ledger) -> None:
        """Writes the rows, then what was lost; those that fill no row group wait for more."""
        for row in chain(block.rows, lost_rows(block)):
            self.waiting.append((split, row))
            if len(self.waiting) == GROUP_ROWS:
                self._write_group()

    def close(self) -> None:
        """Writes what waits and the end of the file."""
        if self.waiting:
            self._write_group()
        self.writer.close()

    def _write_group(self) -> None:
        import pyarrow

        group, self.waiting = self.waiting, []
        columns = {name: [getattr(row, name) for _, row in group] for name in self.schema.names[1:]}
        table = pyarrow.table({"split": [split for split, _ in group], **columns}, schema=self.schema)
        self.writer.write_table(table)


def write_ledgers(ledgers: Mapping[str, Ledger], path: Path) -> None:
    """Writes a parquet file of one row an input row; ``ledgers`` by split (train, eval)."""
    writer = LedgerWriter(path)
    for split, ledger in ledgers.items():
        writer.append(split, ledger)
    writer.close()


def find_duplicates(examples: Iterable[AnyExample]) -> list[int | None]:
    """For each example the number of an earlier, exactly equal one, or None."""
    first: dict[Any, int] = {}
    found: list[int | None] = []
    for number, example in enumerate(examples):
        earlier = first.setdefault(example.identity, number)
        found.append(earlier if earlier != number else None)
    return found


def are_repeated(digests: np.ndarray) -> np.ndarray:
    """(N,) bool, whether each of N digests, (N, 2) uint64, equals an earlier one."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    is_same = np.zeros(len(order), dtype=bool)
    is_same[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    found = np.zeros(len(order), dtype=bool)
    found[order[is_same]] = True
    return found


def digest(example: AnyExample) -> bytes:
    """16 bytes that stand for an example where memory cannot hold it; equal for equal ones."""
    return _digest(example.identity)


def loose_digest(example: AnyExample) -> bytes:
    """The same but for case and white space."""
    return _digest(_normalised(example.identity))


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows that are training rows: exactly, or but for case and white space (``normalised``)."""

    rows: int
    exact: list[str]
    normalised: list[str]

    @property
    def share(self) -> float:
        return (len(self.exact) + len(self.normalised)) / max(1, self.rows)


def measure_leakage(
    train: Sequence[AnyExample],
    evaluation: Sequence[AnyExample],
    *,
    places: Sequence[str],
) -> Leakage:
    """Compares whole examples, prompt and target. ``places`` names the evaluation rows."""
    exact = {example.identity for example in train}
    loose = {_normalised(key) for key in exact}
    found_exact, found_loose = [], []
    for place, example in zip(places, evaluation, strict=True):
        key = example.identity
        if key in exact:
            found_exact.append(place)
        elif _normalised(key) in loose:
            found_loose.append(place)
    return Leakage(len(evaluation), found_exact, found_loose)


def check_leakage(leakage: Leakage, max_leakage: float) -> None:
    """Raises DataError where more than ``max_leakage`` of the evaluation rows are training rows."""
    if leakage.share > max_leakage:
        listed = (leakage.exact + leakage.normalised)[:SHOWN]
        raise DataError(
            f"{leakage.share:.1%} of the evaluation rows are training rows "
            f"({len(leakage.exact):,} exactly, {len(leakage.normalised):,} but for case and white space)",
            where="data.eval",
            got=", ".join(listed),
            fix="remove them, set data.duplicates=drop, or allow it by data.max_leakage",
        )


def _digest(key: tuple[str, ...]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in key:
        text = part.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(text))
        content.update(text)
    return content.digest()


def _normalised(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.casefold().split()) for part in key)


def check_pieces(packed: PackedDataset, rows: TokenizedRows) -> None:
    """Raises DataError where a packed row is not its pieces, token by token, each with its own positions."""
    for number in np.unique(np.linspace(0, len(packed) - 1, COMPARED, dtype=np.int64)).tolist():
        row, pieces = packed[number], packed.pieces[number]
        spans = [slice(rows.offsets[at] + first, rows.offsets[at] + last) for at, first, last in pieces]
        ids, labels = (
            np.concatenate([part[span] for span in spans]) for part in (rows.input_ids, rows.labels)
        )
        places = np.concatenate([np.arange(last - first) for _, first, last in pieces])
        release(rows.input_ids, rows.labels)
        given = np.asarray(row["labels"])
        is_same = (
            np.array_equal(row["input_ids"], ids)
            and np.array_equal(row["position_ids"], places)
            and np.array_equal(np.maximum(given, -1), np.where(places > 0, np.maximum(labels, -1), -1))
        )
        if not is_same:
            what = f"packed row {number:,} is not its {len(pieces)} documents with positions that begin again"
            raise DataError(what, where="data.packing", fix="report this as a bug of hf_clm")


def _is_balanced(row: LedgerRow, fate: Fate) -> bool:
    """Whether the row kept what its fate says, and sits somewhere if it kept anything."""
    if (row.kept_tokens > 0) != bool(row.rows):
        return False
    whole = row.tokens - fate.cut_tokens
    match row.fate:
        case "used":
            return (row.kept_tokens, row.kept_targets) == (whole, row.target_tokens)
        case "cut":
            return row.kept_tokens == whole and 0 < row.kept_targets <= row.target_tokens
        case "split":
            return fate.reason == "windows" or row.kept_targets == row.target_tokens
    return row.kept_tokens == 0


def targets_before(labels: np.ndarray) -> np.ndarray:
    """(S + 1,) int64, how many of S tokens have a label before each, and in all."""
    found = np.zeros(len(labels) + 1, dtype=np.int64)
    np.cumsum(labels >= 0, out=found[1:])
    return found
