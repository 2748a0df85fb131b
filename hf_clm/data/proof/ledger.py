"""The ledger: what became of every record and where it sits; the totals balance or the run stops."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, stable_order
from hf_clm.data.label.labels import Fate
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample

if TYPE_CHECKING:
    import pyarrow

    from hf_clm.data.prepared.tables import StoredLedger

GROUP_ROWS = 1 << 13  # of the file, which wait in memory
SHOWN = 3  # rows in an error
COMPARED = 500  # packed rows that are compared with their pieces, token by token
FATES = ("used", "cut", "split", "duplicate", "dropped", "unreadable")
COUNTS = ("tokens", "target_tokens", "kept_tokens", "kept_targets")
BUG = "report this as a bug of hf_clm"


class Totals:
    """What a ledger sums up to."""

    def __init__(self, ledger: "StoredLedger"):
        self.found: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        sums = [(name, "sum") for name in COUNTS]
        for group in ledger.table.group_by(["fate"]).aggregate([*sums, ([], "count_all")]).to_pylist():
            self.found[group["fate"]] = Counter({name: group[f"{name}_sum"] for name in COUNTS})
            self.found[group["fate"]]["rows"] = group["count_all"]
        for (fate, reason), count in ledger.totals.items():
            if fate == "dropped":
                self.reasons[reason] += count

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


def check_entry(fate: Fate, kept_tokens: int, kept_targets: int, *, where: str) -> None:
    """Raises DataError unless a record lost no token and no label that its fate does not name."""
    whole = fate.tokens - fate.cut_tokens
    match fate.kind:
        case "used":
            is_balanced = (kept_tokens, kept_targets) == (whole, fate.target_tokens)
        case "cut":
            is_balanced = kept_tokens == whole and 0 < kept_targets <= fate.target_tokens
        case "split":
            is_balanced = fate.reason == "windows" or kept_targets == fate.target_tokens
        case _:
            is_balanced = kept_tokens == 0
    if not is_balanced:
        what = f"the ledger does not balance: {fate.kind}, {kept_tokens} of {fate.tokens} tokens kept"
        got = f"{kept_targets} of {fate.target_tokens} labels"
        raise DataError(what, where=where, got=got, fix=BUG)


def check_packing(packed: PackedDataset, *, times: np.ndarray | None = None) -> None:
    """Raises DataError unless the packed rows hold each token of a row as often as ``times`` says of it.

    The pieces alone show it: those that begin a row are as many as it was drawn, and every other begins at
    the last token of an earlier one, which it reads again without a label.

    Args:
        times: (N,) of the tokenized rows; None: each once.
    """
    pieces, lengths = packed.pieces, packed.dataset.rows.lengths
    is_begin, is_end = pieces.starts == 0, pieces.stops == lengths[pieces.examples]
    begun = np.bincount(pieces.examples[is_begin], minlength=len(lengths))
    wanted = np.ones(len(lengths), dtype=np.int64) if times is None else times
    stride = int(lengths.max(initial=0)) + 1
    goes_on = np.sort(pieces.examples[~is_begin] * stride + pieces.starts[~is_begin] + 1)
    breaks_off = np.sort(pieces.examples[~is_end] * stride + pieces.stops[~is_end])
    if not (np.array_equal(begun, wanted) and np.array_equal(goes_on, breaks_off)):
        what = f"packing holds {begun.sum():,} of {wanted.sum():,} rows, or parts of some twice or never"
        raise DataError(what, where="data.packing", fix=BUG)
    check_pieces(packed)


def check_pieces(packed: PackedDataset) -> None:
    """Raises DataError where a packed row is not its pieces, token by token, each with its own positions."""
    rows = packed.dataset.rows
    for number in np.unique(np.linspace(0, len(packed) - 1, COMPARED, dtype=np.int64)).tolist():
        row, pieces = packed[number], packed.pieces[number]
        whole = [rows[example] for example, _, _ in pieces]
        ids, labels = (
            np.array([item for row, (_, a, b) in zip(whole, pieces, strict=True) for item in row[name][a:b]])
            for name in ("input_ids", "labels")
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
            raise DataError(what, where="data.packing", fix=BUG)


@dataclass(frozen=True)
class Entered:
    """The ledger of a split, and the rows of its records: ``packed``, or themselves; ``times`` if mixed."""

    ledger: "StoredLedger"
    packed: PackedDataset | DrawnDataset | None
    times: np.ndarray | None = None


def write_ledger(path: Path, splits: Mapping[str, Entered]) -> None:
    """Writes ledger.parquet: one line for each record, with the rows that hold it.

    Where one split is mixed there is also how many ``times`` each record was drawn.
    """
    import pyarrow
    from pyarrow import parquet

    whole = pyarrow.int64()
    texts = dict.fromkeys(("source", "fate", "reason"), pyarrow.string())
    counts = dict.fromkeys(COUNTS, whole)
    columns = {"split": pyarrow.string(), "row": whole, **texts, **counts, "rows": pyarrow.list_(whole)}
    schema = pyarrow.schema(columns)
    if any(split.times is not None for split in splits.values()):
        schema = schema.append(pyarrow.field("times", whole))
    with parquet.ParquetWriter(path, schema) as writer:
        for name, split in splits.items():
            for group in _groups(name, split):
                writer.write_table(pyarrow.table({key: group[key] for key in schema.names}, schema=schema))


def _groups(name: str, split: Entered) -> Iterator[dict[str, "pyarrow.Array | list[str] | np.ndarray"]]:
    import pyarrow

    ledger = split.ledger
    first_rows = np.concatenate([[0], np.cumsum(ledger.numbers("rows"))])
    seats = Seats(split.packed, rows=int(first_rows[-1]))
    for first in range(0, len(ledger), GROUP_ROWS):
        last = min(first + GROUP_ROWS, len(ledger))
        part = ledger.table.slice(first, GROUP_ROWS)
        offsets, held = seats.of_rows(first_rows[first : last + 1])
        if split.times is not None:
            times = split.times[first:last]
        else:  # read once, if anything is left of it
            times = (part.column("rows").to_numpy() > 0).astype(np.int64)
        yield {
            "split": [name] * (last - first),
            "row": np.arange(first, last),
            "source": ledger.places[first:last],
            "fate": part.column("fate").to_pylist(),
            "reason": list(map(ledger.rename, part.column("reason").to_pylist())),
            **{count: part.column(count).to_numpy() for count in COUNTS},
            "rows": pyarrow.ListArray.from_arrays(offsets.astype(np.int32), held),
            "times": times,
        }


class Seats:
    """Which rows hold a tokenized row: itself, or the packed rows with its pieces."""

    def __init__(self, packed: PackedDataset | DrawnDataset | None, *, rows: int):
        if packed is None:
            self.examples = self.held_in = np.arange(rows)
            return
        pieces = packed.pieces
        order = stable_order(pieces.examples)  # by row; the pieces of one in the order of the packed rows
        self.examples = pieces.examples[order]
        self.held_in = np.searchsorted(pieces.offsets, order, side="right") - 1

    def of_rows(self, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the records whose rows begin at ``firsts``: offsets in the numbers of their rows, and these."""
        found = np.searchsorted(self.examples, firsts)
        return found - found[0], self.held_in[found[0] : found[-1]]


def digest(example: AnyExample) -> bytes:
    """16 bytes that stand for an example where memory cannot hold it; equal for equal ones."""
    return _digest(example.identity)


def loose_digest(example: AnyExample) -> bytes:
    """The same but for case and white space."""
    return _digest(_normalised(example.identity))


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows that are training rows: exactly, or but for case and white space (``normalised``).

    ``prompts``: how many ask what a training row asks; only said, as the answers may differ.
    """

    rows: int
    exact: Sequence[str]
    normalised: Sequence[str]
    prompts: int = 0

    @property
    def share(self) -> float:
        return (len(self.exact) + len(self.normalised)) / max(1, self.rows)


def check_leakage(leakage: Leakage, max_leakage: float) -> None:
    """Raises DataError where more than ``max_leakage`` of the evaluation rows are training rows."""
    if leakage.share > max_leakage:
        listed = [*leakage.exact, *leakage.normalised][:SHOWN]
        raise DataError(
            f"{leakage.share:.1%} of the evaluation rows are training rows "
            f"({len(leakage.exact):,} exactly, {len(leakage.normalised):,} but for case and white space)",
            where="data.eval",
            got=", ".join(listed),
            fix="remove them, set data.duplicates=drop, or allow it by data.max_leakage",
        )


def are_among(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool, which of N digests are among others; one of zeros, which stands for nothing, is not."""
    found = np.isin(own[:, 0], others[:, 0]) & own.any(axis=1)  # by their first half, and then as a whole
    if found.any():
        known = set(map(tuple, others.tolist()))
        found[found] = [tuple(digest) in known for digest in own[found].tolist()]
    return found


def _digest(key: tuple[str, ...]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in key:
        text = part.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(text))
        content.update(text)
    return content.digest()


def _normalised(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.casefold().split()) for part in key)
