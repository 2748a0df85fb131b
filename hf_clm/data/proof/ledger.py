"""The ledger of a run: what became of every record and where it sits."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from hf_clm.data.batch.mixing import DrawnDataset
from hf_clm.data.batch.packing import PackedDataset, stable_order
from hf_clm.data.prepared.tables import StoredLedger

GROUP_ROWS = 1 << 13  # of the file, which wait in memory
FATES = ("used", "cut", "split", "duplicate", "dropped", "unreadable")
COUNTS = ("tokens", "target_tokens", "kept_tokens", "kept_targets")


class Totals:
    """What a ledger sums up to."""

    def __init__(self, ledger: StoredLedger):
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


@dataclass(frozen=True)
class Entered:
    """The ledger of a split, and the rows of its records: ``packed``, or themselves; ``times`` if mixed."""

    ledger: StoredLedger
    packed: PackedDataset | DrawnDataset | None
    times: np.ndarray | None = None


def write_ledger(path: Path, splits: Mapping[str, Entered]) -> None:
    """Writes ledger.parquet: one line for each record, with the rows that hold it.

    Where one split is mixed there is also how many ``times`` each record was drawn.
    """
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


def _groups(name: str, split: Entered) -> Iterator[dict[str, Any]]:
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
