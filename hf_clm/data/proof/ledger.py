"""The ledger of a run: the fate of every record and the rows that contain it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from hf_clm.data.batch.left_out import LEFT_OUT
from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, stable_order
from hf_clm.data.prepared.tables import StoredLedger

GROUP_ROWS = 1 << 13  # rows of the file that are written at once
FATES = ("used", "cut", "split", LEFT_OUT, "duplicate", "dropped", "unreadable")
COUNTS = ("tokens", "target_tokens", "kept_tokens", "kept_targets")


class Totals:
    """The totals of a ledger. ``left_out``: the numbers of the records that are left out of training."""

    def __init__(self, ledger: StoredLedger, left_out: Sequence[int] = ()):
        self.by_fate: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        sums = [(name, "sum") for name in COUNTS]
        for group in ledger.table.group_by(["fate"]).aggregate([*sums, ([], "count_all")]).to_pylist():
            self.by_fate[group["fate"]] = Counter({name: group[f"{name}_sum"] for name in COUNTS})
            self.by_fate[group["fate"]]["rows"] = group["count_all"]
        for number in left_out:
            (row,) = ledger.table.slice(number, 1).select(["fate", *COUNTS]).to_pylist()
            counts = Counter({"rows": 1, **{name: row[name] for name in COUNTS}})
            self.by_fate[row["fate"]].subtract(counts)
            self.by_fate[LEFT_OUT].update(counts | {"kept_targets": 0})
        for (fate, reason), count in ledger.totals.items():
            if fate == "dropped":
                self.reasons[reason] += count

    def to_json(self) -> dict[str, dict[str, int]]:
        """Returns rows and ``COUNTS`` by fate, for the fates that occur."""
        return {fate: dict(self.by_fate[fate]) for fate in FATES if self.by_fate[fate]["rows"]}

    def to_lines(self) -> list[str]:
        """Formats a table of the totals, with the reasons for dropping records."""
        titles = ("rows", "tokens", "targets", "tokens kept", "targets kept")
        lines = [f"{'fate':<12}" + "".join(f"{title:>14}" for title in titles)]
        for fate, total in self.to_json().items():
            lines.append(f"{fate:<12}" + "".join(f"{total.get(key, 0):>14,}" for key in ("rows", *COUNTS)))
        return lines + [f"  dropped: {count:,} x {reason}" for reason, count in self.reasons.most_common()]


@dataclass(frozen=True)
class LedgerSplit:
    """The ledger of a split, and what training makes of its records.

    packed     the packed or drawn rows; None if each row is trained on as it is
    times      (E,) int64, how often each record was drawn, if the sources are mixed
    left_out   the numbers of the records that are left out
    """

    ledger: StoredLedger
    packed: PackedDataset | DrawnDataset | None
    times: np.ndarray | None = None
    left_out: Sequence[int] = ()


def write_ledger(path: Path, splits: Mapping[str, LedgerSplit]) -> None:
    """Writes ledger.parquet: one row for each record, with the training rows that contain it.

    If a split is mixed, there is a column ``times``: how often each record was drawn.
    """
    integer = pyarrow.int64()
    texts = dict.fromkeys(("source", "fate", "reason"), pyarrow.string())
    counts = dict.fromkeys(COUNTS, integer)
    columns = {"split": pyarrow.string(), "row": integer, **texts, **counts, "rows": pyarrow.list_(integer)}
    schema = pyarrow.schema(columns)
    if any(split.times is not None for split in splits.values()):
        schema = schema.append(pyarrow.field("times", integer))
    with parquet.ParquetWriter(path, schema) as writer:
        for name, split in splits.items():
            for group in _groups(name, split):
                writer.write_table(pyarrow.table({key: group[key] for key in schema.names}, schema=schema))


def _groups(name: str, split: LedgerSplit) -> Iterator[dict[str, Any]]:
    ledger = split.ledger
    first_rows = np.concatenate([[0], np.cumsum(ledger.numbers("rows"))])
    seats = Seats(split.packed, rows=int(first_rows[-1]))
    for first in range(0, len(ledger), GROUP_ROWS):
        last = min(first + GROUP_ROWS, len(ledger))
        part = ledger.table.slice(first, GROUP_ROWS)
        offsets, numbers = seats.of_rows(first_rows[first : last + 1])
        if split.times is not None:
            times = split.times[first:last]
        else:  # once, unless all its rows were dropped
            times = (part.column("rows").to_numpy() > 0).astype(np.int64)
        numbers_of = range(first, last)
        fates, kept = part.column("fate").to_pylist(), part.column("kept_targets").to_numpy().copy()
        for number in set(split.left_out).intersection(numbers_of):
            fates[number - first], kept[number - first] = LEFT_OUT, 0
        yield {
            "split": [name] * (last - first),
            "row": np.array(numbers_of),
            "source": ledger.places[first:last],
            "fate": fates,
            "reason": list(map(ledger.rename, part.column("reason").to_pylist())),
            **{count: part.column(count).to_numpy() for count in COUNTS},
            "kept_targets": kept,
            "rows": pyarrow.ListArray.from_arrays(offsets.astype(np.int32), numbers),
            "times": times,
        }


class Seats:
    """Maps tokenized rows to training rows: each to itself, or to the packed rows with its pieces."""

    def __init__(self, packed: PackedDataset | DrawnDataset | None, *, rows: int):
        if packed is None:
            self.examples = self.held_in = np.arange(rows)
            return
        pieces = packed.pieces
        order = stable_order(pieces.examples)  # by tokenized row, then by packed row
        self.examples = pieces.examples[order]
        self.held_in = np.searchsorted(pieces.offsets, order, side="right") - 1

    def of_rows(self, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns offsets and training row numbers for the records whose rows begin at ``firsts``."""
        places = np.searchsorted(self.examples, firsts)
        return places - places[0], self.held_in[places[0] : places[-1]]
