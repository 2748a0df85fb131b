"""The ledger: what became of every input row and where it sits; the totals balance or the run stops."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.data.datasets import TokenizedRows
from hf_clm.data.labels import Fate
from hf_clm.data.mixing import DrawnDataset
from hf_clm.data.packing import PackedDataset
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, Example, PromptExample, SegmentsExample, TextExample, TokenizedExample

SHOWN = 3  # rows in an error
COMPARED = 500  # packed rows that are compared with their pieces, token by token
FATES = ("used", "cut", "split", "duplicate", "dropped", "unreadable")


@dataclass(frozen=True)
class LedgerRow:
    """One input row. ``rows`` are the packed (or, without packing, the tokenized) rows that hold it.

    ``tokens`` and ``target_tokens`` are those of the input; ``kept_tokens`` and ``kept_targets`` are in rows.
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
    unreadable: list[str]
    duplicates: list[str]

    def totals(self) -> dict[str, dict[str, int]]:
        """Fate -> rows and ``COUNTS``; only the fates that occur."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.rows:
            found[row.fate].update({"rows": 1, **{name: getattr(row, name) for name in COUNTS}})
        for fate, places in (("duplicate", self.duplicates), ("unreadable", self.unreadable)):
            if places:
                found[fate]["rows"] = len(places)
        return {fate: dict(found[fate]) for fate in FATES if fate in found}

    def to_lines(self) -> list[str]:
        """A small table, with the reasons of what was dropped."""
        heads = ("rows", "tokens", "targets", "tokens kept", "targets kept")
        lines = [f"{'fate':<12}" + "".join(f"{head:>14}" for head in heads)]
        for fate, total in self.totals().items():
            lines.append(f"{fate:<12}" + "".join(f"{total.get(key, 0):>14,}" for key in ("rows", *COUNTS)))
        reasons = Counter(row.reason for row in self.rows if row.fate == "dropped")
        return lines + [f"  dropped: {count:,} x {reason}" for reason, count in reasons.most_common()]


def build_ledger(
    rows: TokenizedRows,
    places: Sequence[str],
    *,
    packed: PackedDataset | None,
    unreadable: Sequence[str] = (),
    duplicates: Sequence[str] = (),
) -> Ledger:
    """Enters every input row. ``places`` names them ("poems.jsonl:17")."""
    assert (np.diff(rows.sources) >= 0).all(), "tokenized in the order of the input"
    first = _first_rows(rows, len(places))
    spans = rows.offsets[first]
    held_in, seats = (np.arange(len(rows)), first) if packed is None else _find_seats(packed, first)
    kept_tokens, kept_targets = np.diff(spans).tolist(), np.diff(_targets_before(rows)[spans]).tolist()
    sits = [held_in[a:b].tolist() for a, b in pairwise(seats.tolist())]
    entries = [
        LedgerRow(source, place, fate.kind, fate.reason, fate.tokens, fate.target_tokens, *kept)
        for source, (place, fate, *kept) in enumerate(
            zip(places, rows.fates, kept_tokens, kept_targets, sits, strict=True)
        )
    ]
    return Ledger(entries, list(unreadable), list(duplicates))


def check_balance(ledger: Ledger, rows: TokenizedRows, *, packed: PackedDataset | None) -> None:
    """Raises DataError unless no row loses a token or a label that its fate does not name."""
    for row in ledger.rows:
        if not _is_balanced(row, rows.fates[row.row]):
            what = f"the ledger does not balance: {row.fate}, {row.kept_tokens} of {row.tokens} tokens kept"
            got = f"{row.kept_targets} of {row.target_tokens} labels, rows {row.rows}"
            raise DataError(what, where=row.source, got=got, fix="report this as a bug of hf_clm")
    if packed is not None:
        check_packing(packed, rows, times=np.ones(len(rows), dtype=np.int64))


def check_packing(packed: PackedDataset, rows: TokenizedRows, *, times: np.ndarray) -> None:
    """Raises DataError unless the packed rows hold each label as often as ``times`` says of its row."""
    before, pieces = _targets_before(rows), packed.pieces
    begins = rows.offsets[pieces.examples]  # the first token of a piece has no label in its row
    labels = before[begins + pieces.stops] - before[begins + pieces.starts + 1]
    kept = np.bincount(pieces.examples, weights=labels, minlength=len(rows)).astype(np.int64)
    wanted = np.diff(before[rows.offsets]) * times
    if not np.array_equal(kept, wanted):
        what = f"packing keeps {kept.sum():,} labels of {wanted.sum():,}"
        raise DataError(what, where="data.packing", fix="report this as a bug of hf_clm")
    _check_packed(packed, rows)


def write_ledgers(ledgers: Mapping[str, Ledger], path: Path) -> None:
    """Writes a parquet file of one row an input row; ``ledgers`` by split (train, eval)."""
    import pyarrow
    from pyarrow import parquet

    rows = [(split, row) for split, ledger in ledgers.items() for row in ledger.rows]
    names = [field.name for field in fields(LedgerRow)]
    columns = {name: [getattr(row, name) for _, row in rows] for name in names}
    parquet.write_table(pyarrow.table({"split": [split for split, _ in rows], **columns}), path)


def add_draws(
    path: Path, dataset: PackedDataset | DrawnDataset, *, rows: TokenizedRows, times: np.ndarray
) -> None:
    """Writes a ledger again: the ``rows`` of each training example as drawn, and how many ``times`` it was.

    An evaluation row is read once, if it is not dropped.
    """
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    held_in, seats = _find_seats(dataset, _first_rows(rows, len(times)))
    kind = pyarrow.list_(pyarrow.int64())
    others = table.column("rows").slice(len(times)).cast(kind)
    drawn = pyarrow.ListArray.from_arrays(seats.astype(np.int32), held_in)
    once = [int(bool(held)) for held in others.to_pylist()]
    seen = pyarrow.chunked_array([drawn, *others.chunks], type=kind)
    table = table.set_column(table.column_names.index("rows"), "rows", seen)
    parquet.write_table(table.append_column("times", pyarrow.array([*times.tolist(), *once])), path)


def find_duplicates(examples: Iterable[Example | TokenizedExample]) -> list[int | None]:
    """For each example the number of an earlier, exactly equal one, or None."""
    first: dict[Any, int] = {}
    found: list[int | None] = []
    for number, example in enumerate(examples):
        earlier = first.setdefault(text_key(example), number)
        found.append(earlier if earlier != number else None)
    return found


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
    train: Sequence[Example | TokenizedExample],
    evaluation: Sequence[Example | TokenizedExample],
    *,
    places: Sequence[str],
) -> Leakage:
    """Compares whole examples, prompt and target. ``places`` names the evaluation rows."""
    exact = {text_key(example) for example in train}
    loose = {_normalised(key) for key in exact}
    found_exact, found_loose = [], []
    for place, example in zip(places, evaluation, strict=True):
        key = text_key(example)
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


def text_key(example: Example | TokenizedExample) -> tuple[str, ...]:
    """What makes two examples the same: their texts with roles and masks."""
    if isinstance(example, TextExample):
        return ("text", example.text)
    if isinstance(example, PromptExample):
        return ("prompt", example.prompt, example.completion)
    if isinstance(example, SegmentsExample):
        return ("segments", *(f"{segment.is_target}{segment.text}" for segment in example.segments))
    if isinstance(example, ChatExample):
        turns = [(turn["role"], str(turn.get("train", True)), turn["content"]) for turn in example.messages]
        return ("chat", *(part for turn in turns for part in turn))
    return ("tokens", str(example["input_ids"]), str(example["labels"]))


def _normalised(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.casefold().split()) for part in key)


def _first_rows(rows: TokenizedRows, examples: int) -> np.ndarray:
    """(E + 1,) integers for E examples: the tokenized rows of example i are first[i]:first[i + 1]."""
    return np.searchsorted(rows.sources, np.arange(examples + 1))


def _find_seats(dataset: PackedDataset | DrawnDataset, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that hold example i are held_in[seats[i]:seats[i + 1]], in their order."""
    if isinstance(dataset, PackedDataset):
        pieces = dataset.pieces
        held, holders = pieces.examples, np.repeat(np.arange(len(pieces)), np.diff(pieces.offsets))
    else:
        held, holders = dataset.numbers, np.arange(len(dataset))
    order = np.argsort(held, kind="stable")
    return holders[order], np.searchsorted(held[order], first)


def _check_packed(packed: PackedDataset, rows: TokenizedRows) -> None:
    """Raises DataError where a packed row is not its pieces, token by token, each with its own positions."""
    for number in np.unique(np.linspace(0, len(packed) - 1, COMPARED, dtype=np.int64)).tolist():
        row, pieces = packed[number], packed.pieces[number]
        spans = [slice(rows.offsets[at] + first, rows.offsets[at] + last) for at, first, last in pieces]
        ids, labels = (
            np.concatenate([part[span] for span in spans]) for part in (rows.input_ids, rows.labels)
        )
        places = np.concatenate([np.arange(last - first) for _, first, last in pieces])
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


def _targets_before(rows: TokenizedRows) -> np.ndarray:
    """(S + 1,) integers, how many of S tokens have a label before each, and in all."""
    found = np.zeros(len(rows.labels) + 1, dtype=np.int32 if len(rows.labels) < 2**31 else np.int64)
    np.cumsum(rows.labels >= 0, out=found[1:])
    return found
