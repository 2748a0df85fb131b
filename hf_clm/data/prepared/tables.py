"""Arrow tables on disk, written in batches and memory-mapped; ``datasets.load_from_disk`` opens them too.

    train/                  a folder that datasets can open
      data-00000-of-00001.arrow
      state.json  dataset_info.json

The tokens of a row are a view of the file, so a row takes only 12 bytes of memory.
"""

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow
from pyarrow import ipc

from hf_clm.data.label.datasets import UNREADABLE, TokenizedRows, Views
from hf_clm.data.label.labels import Fate
from hf_clm.data.prepared.block import LEDGER_SCHEMA, WEIGHTED_ROW_SCHEMA
from hf_clm.schema import TokenizedExample

FATE = ("fate", "reason", "cut_tokens", "tokens", "target_tokens")
DUPLICATE = "duplicate"  # the fate of a record that equals an earlier one
OF = "of "  # its reason: "of a.jsonl:1"
TAIL_BYTES = 1 << 20  # bytes at the end of a table that identify it
SLICE_RECORDS = 1 << 13  # records of a ledger converted to Python at once
DATA, STATE_JSON, INFO, DICT = (
    "data-00000-of-00001.arrow",
    "state.json",
    "dataset_info.json",
    "dataset_dict.json",
)
TOKEN_BYTES = 4  # size of an id, a label or a weight


class TableWriter:
    """Writes a folder that ``datasets.load_from_disk`` opens, batch by batch.

    When the first batch with weights arrives, the earlier batches are rewritten with an empty weights column.
    """

    def __init__(self, folder: Path, schema: pyarrow.Schema):
        folder.mkdir(parents=True)
        self.folder, self.schema = folder, schema
        self.path = folder / DATA
        self._writer = ipc.new_stream(self.path, schema)
        self.rows = 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if error is None:
            self._describe()

    def write(self, batch: pyarrow.RecordBatch) -> None:
        """Appends the rows of a batch."""
        if batch.schema == WEIGHTED_ROW_SCHEMA and self.schema != WEIGHTED_ROW_SCHEMA:
            self._add_weights()
        self._writer.write_batch(_fit_schema(batch, self.schema))
        self.rows += batch.num_rows

    def _add_weights(self) -> None:
        self._writer.close()
        old = self.path.rename(self.path.with_suffix(".old"))
        self.schema = WEIGHTED_ROW_SCHEMA
        self._writer = ipc.new_stream(self.path, self.schema)
        for batch in read_batches(old):
            self._writer.write_batch(_fit_schema(batch, self.schema))
        old.unlink()

    def _describe(self) -> None:
        (self.folder / INFO).write_text("{}", encoding="utf-8")  # the Arrow file has the schema
        state = {
            "_data_files": [{"filename": DATA}],
            "_fingerprint": _fingerprint(self.path),
            **dict.fromkeys(("_format_columns", "_format_type", "_split")),
            "_format_kwargs": {},
            "_output_all_columns": False,
        }
        (self.folder / STATE_JSON).write_text(json.dumps(state), encoding="utf-8")


def _fingerprint(path: Path) -> str:
    """Returns the fingerprint of a table for datasets; equal tables have equal fingerprints."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        return sha256(file.read() + str(size).encode()).hexdigest()[:16]


def write_dict(folder: Path, names: Sequence[str]) -> None:
    """Lists the tables of a folder, so that datasets opens it as a DatasetDict."""
    (folder / DICT).write_text(json.dumps({"splits": list(names)}), encoding="utf-8")


def read_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yields the batches of a memory-mapped file."""
    mapped = _map(path)
    for batch in ipc.open_stream(pyarrow.py_buffer(mapped)):
        yield batch
        forget(mapped)


class StoredLedger:
    """The fate of each of E records.

    ``names`` maps the file names from when the set was prepared to the current ones.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]):
        self.folder, self.names = folder, names
        self.batches = list(read_batches(folder / DATA))
        self.table = pyarrow.Table.from_batches(self.batches, LEDGER_SCHEMA)
        self.rename = _Renaming(names)
        self.places = _Lines(self.table, ("place",), self.rename)
        self.fates = _Lines(self.table, FATE, lambda kind, reason, *counts: Fate(kind, reason, *counts))

    def __reduce__(self) -> tuple[Any, ...]:  # a worker that is spawned, as on macOS, opens the file again
        return StoredLedger, (self.folder, self.names)

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> np.ndarray:
        """Returns a numeric column, (E,)."""
        return self.table.column(column).to_numpy()

    @cached_property
    def totals(self) -> dict[tuple[str, str], int]:
        """Number of records by fate and reason; without the reasons of unreadable records and duplicates."""
        totals: Counter[tuple[str, str]] = Counter()
        groups = self.table.group_by(["fate", "reason"]).aggregate([([], "count_all")]).to_pylist()
        for group in groups:
            has_reason = group["fate"] not in (UNREADABLE, DUPLICATE)
            totals[group["fate"], group["reason"] if has_reason else ""] += group["count_all"]
        return dict(totals)

    def where(self, fate: str) -> np.ndarray:
        """Returns the numbers of the records with a fate."""
        return np.flatnonzero(self._are(fate))

    def reasons(self, fate: str) -> list[str]:
        """Returns the reason of each record with a fate."""
        reasons = self.table.column("reason").filter(pyarrow.array(self._are(fate)))
        return list(map(self.rename, reasons.to_pylist()))

    @property
    def unreadable(self) -> list[str]:
        """Place and reason of each unusable record."""
        places = (self.places[number] for number in self.where(UNREADABLE).tolist())
        return [f"{place}: {why}" for place, why in zip(places, self.reasons(UNREADABLE), strict=True)]

    def _are(self, fate: str) -> np.ndarray:
        return np.array([kind == fate for kind in self.table.column("fate").to_pylist()], dtype=bool)

    @cached_property
    def spelled(self) -> Counter[str]:
        """Number of occurrences of each control token in the records' text."""
        column = self.table.column("spelled").drop_null()
        return Counter(text for texts in column.to_pylist() for text in texts)


class _Lines(Sequence[Any]):
    """Items made on demand from the columns of a table."""

    def __init__(self, table: pyarrow.Table, columns: Sequence[str], make: Callable[..., Any]):
        self.table, self.make = table.select(list(columns)), make

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return next(self._make(self.table.slice(numbers, 1)))
        return list(self._make(self.table.slice(numbers.start, len(numbers))))

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), SLICE_RECORDS):
            yield from self._make(self.table.slice(first, SLICE_RECORDS))

    def _make(self, part: pyarrow.Table) -> Iterator[Any]:
        return map(self.make, *(column.to_pylist() for column in part.columns))


class StoredRows:
    """The rows of a memory-mapped file, with the interface of ``TokenizedRows``. N = rows.

    ids_at   (N,) int64, start of each row's ids in ``tokens``, the complete file as int32
    lengths  (N,) int32
    """

    def __init__(self, folder: Path, ledger: StoredLedger):
        self.folder, self.ledger = folder, ledger
        self._sources: np.ndarray | None = None
        self._mapped = mapped = _map(folder / DATA)
        self.batches = list(ipc.open_stream(pyarrow.py_buffer(mapped)))
        self.tokens = np.frombuffer(mapped, np.int32, count=len(mapped) // TOKEN_BYTES)
        self._floats = self.tokens.view(np.float32)
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])  # of each batch
        self.ids_at = np.zeros(self._firsts[-1], dtype=np.int64)
        self.lengths = np.zeros(self._firsts[-1], dtype=np.int32)
        self._shifts = np.zeros((len(self.batches), 2), dtype=np.int64)  # from ids to labels, weights
        self._weighs = np.zeros(len(self.batches), dtype=bool)
        for number, batch in enumerate(self.batches):
            if not batch.num_rows:  # an empty batch has no buffers in the file
                continue
            rows = slice(*self._firsts[number : number + 2])
            offsets = batch.column("input_ids").offsets.to_numpy().astype(np.int64)
            ids, labels = (self._place(batch.column(name)) for name in ("input_ids", "labels"))
            self.ids_at[rows], self.lengths[rows] = ids + offsets[:-1], np.diff(offsets)
            self._shifts[number, 0] = labels - ids
            if "weights" in batch.schema.names and batch.column("weights").null_count == 0:
                self._weighs[number] = True
                self._shifts[number, 1] = self._place(batch.column("weights")) - ids

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.folder, self.ledger)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        number = range(len(self))[index]
        ids, labels, weights = self.views(np.array([number]), np.zeros(1, int), self.lengths[[number]])
        row: TokenizedExample = {"input_ids": ids[0].tolist(), "labels": labels[0].tolist()}
        if weights is not None:
            row["weights"] = weights[0].tolist()
        return row

    @property
    def fates(self) -> Sequence[Fate]:
        """Fate of each record."""
        return self.ledger.fates

    @property
    def control_texts(self) -> Counter[str]:
        """Number of occurrences of each control token in the records' text."""
        return self.ledger.spelled

    @property
    def sources(self) -> np.ndarray:
        """(N,) int64, the record that each row came from."""
        if self._sources is None:
            self._sources = np.repeat(np.arange(len(self.ledger)), self.ledger.numbers("rows"))
        return self._sources

    def views(self, numbers: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Views:
        """See ``TokenizedRows.views``."""
        begins, sizes = self.ids_at[numbers] + starts, stops - starts
        batches = np.searchsorted(self._firsts, numbers, side="right") - 1
        shifts = self._shifts[batches]
        ids, labels = _cut(self.tokens, begins, sizes), _cut(self.tokens, begins + shifts[:, 0], sizes)
        if not self._weighs.any():
            return ids, labels, None
        weights = _cut(self._floats, begins + shifts[:, 1], sizes)
        for at in np.flatnonzero(~self._weighs[batches]).tolist():
            weights[at] = np.ones(int(sizes[at]), dtype=np.float32)
        return ids, labels, weights

    def blocks(self) -> Iterator[TokenizedRows]:
        """Yields the rows in the blocks in which they were written, without ``sources`` and ``fates``."""
        for batch in self.batches:
            if batch.num_rows:
                yield to_rows(batch)
                forget(self._mapped)

    def digest(self) -> str:
        """Returns the sha256 of all rows."""
        total = sha256()
        for block in self.blocks():
            enter_rows(total.update, block)
        return total.hexdigest()

    def _place(self, column: pyarrow.Array) -> int:
        """Returns the start of a column's values in ``tokens``; 0 if the column has no values."""
        if not len(column.values):
            return 0
        return (column.values.buffers()[1].address - self.tokens.ctypes.data) // TOKEN_BYTES


@dataclass(frozen=True)
class _Renaming:
    """Replaces the old file name at the start of a text ("FILE: ..." or "of FILE: ...") with the new one.

    Looks names up instead of trying each one, since a folder may have a million files.
    """

    names: Mapping[str, str]

    def __call__(self, text: str) -> str:
        if text.startswith(OF):
            return OF + self(text.removeprefix(OF))
        old = text
        while old not in self.names and old:
            old = old.rpartition(":")[0]
        return self.names.get(old, "") + text.removeprefix(old)


def to_rows(batch: pyarrow.RecordBatch) -> TokenizedRows:
    """Returns the rows of a batch without copying them; ``sources`` and ``fates`` are empty."""
    offsets = batch.column("input_ids").offsets.to_numpy().astype(np.int64)
    ids, labels = (batch.column(name).values.to_numpy() for name in ("input_ids", "labels"))
    weights = None
    if "weights" in batch.schema.names and not batch.column("weights").null_count:
        weights = batch.column("weights").values.to_numpy()
    return TokenizedRows(ids, labels, offsets, np.zeros(0, np.int64), weights=weights)


def enter_rows(update: Callable[[Any], None], block: TokenizedRows) -> None:
    """Updates the digest of all rows with a block of them. ``update``: of a hashlib object."""
    for values in (block.input_ids, block.labels, block.lengths, block.weights):
        update(b"" if values is None else np.ascontiguousarray(values).data)


def forget(mapped: mmap.mmap) -> None:
    """Releases the memory of the pages read from a memory-mapped file."""
    mapped.madvise(mmap.MADV_DONTNEED)


def _cut(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    spans = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
    return [values[first:last] for first, last in spans]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _fit_schema(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Returns the batch with the columns of the schema; columns that the batch lacks are null."""
    columns = []
    for field in schema:
        has = field.name in batch.schema.names
        columns.append(batch.column(field.name) if has else pyarrow.nulls(batch.num_rows, field.type))
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)
