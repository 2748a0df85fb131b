"""Arrow tables on disk: written in batches, opened by ``datasets.load_from_disk``, here as memory maps.

    train/                  a folder that datasets opens
      data-00000-of-00001.arrow
      state.json  dataset_info.json

The tokens of a row are a view of the file: nothing is copied, and a row takes 12 bytes of memory.
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
from hf_clm.data.prepared.block import LEDGER, WEIGHTED_ROWS
from hf_clm.schema import TokenizedExample

FATE = ("fate", "reason", "cut_tokens", "tokens", "target_tokens")
DUPLICATE = "duplicate"  # the fate of a record that equals an earlier one
OF = "of "  # its reason: "of a.jsonl:1"
ENDS_BYTES = 1 << 20  # of a table, by which it is told from others
LISTED = 1 << 13  # lines of a ledger in memory at once
DATA, STATE, INFO, DICT = (
    "data-00000-of-00001.arrow",
    "state.json",
    "dataset_info.json",
    "dataset_dict.json",
)
TOKEN_BYTES = 4  # of an id, a label or a weight


class TableWriter:
    """Writes a folder that ``datasets.load_from_disk`` opens, one batch after the other.

    A batch with weights may follow batches without: they are written again then, with an empty column.
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
        """Writes the rows behind those that are there."""
        if batch.schema == WEIGHTED_ROWS and self.schema != WEIGHTED_ROWS:
            self._add_weights()
        self._writer.write_batch(_fit_schema(batch, self.schema))
        self.rows += batch.num_rows

    def _add_weights(self) -> None:
        self._writer.close()
        old = self.path.rename(self.path.with_suffix(".old"))
        self.schema = WEIGHTED_ROWS
        self._writer = ipc.new_stream(self.path, self.schema)
        for batch in read_batches(old):
            self._writer.write_batch(_fit_schema(batch, self.schema))
        old.unlink()

    def _describe(self) -> None:
        (self.folder / INFO).write_text("{}", encoding="utf-8")  # the file has a schema of its own
        state = {
            "_data_files": [{"filename": DATA}],
            "_fingerprint": _fingerprint(self.path),
            **dict.fromkeys(("_format_columns", "_format_type", "_split")),
            "_format_kwargs": {},
            "_output_all_columns": False,
        }
        (self.folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def _fingerprint(path: Path) -> str:
    """Of a table, for datasets: the same for the same content."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ENDS_BYTES))
        return sha256(file.read() + str(size).encode()).hexdigest()[:16]


def write_dict(folder: Path, names: Sequence[str]) -> None:
    """Names the tables in a folder, so that datasets opens it as a DatasetDict."""
    (folder / DICT).write_text(json.dumps({"splits": list(names)}), encoding="utf-8")


def read_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """The batches of a file, mapped."""
    mapped = _map(path)
    for batch in ipc.open_stream(pyarrow.py_buffer(mapped)):
        yield batch
        forget(mapped)


class StoredLedger:
    """What became of each record; E of them.

    ``names``: the files as they were named when the set was prepared -> as they are named now.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]):
        self.batches = list(read_batches(folder / DATA))
        self.table = pyarrow.Table.from_batches(self.batches, LEDGER)
        self.rename = _Renaming(names)
        self.places = _Lines(self.table, ("place",), self.rename)
        self.fates = _Lines(self.table, FATE, lambda kind, reason, *counts: Fate(kind, reason, *counts))

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> np.ndarray:
        """(E,) a column of numbers."""
        return self.table.column(column).to_numpy()

    @cached_property
    def totals(self) -> dict[tuple[str, str], int]:
        """How many records have each fate and reason; an unreadable one has no reason here."""
        found: Counter[tuple[str, str]] = Counter()
        counted = self.table.group_by(["fate", "reason"]).aggregate([([], "count_all")]).to_pylist()
        for group in counted:
            has_reason = group["fate"] not in (UNREADABLE, DUPLICATE)
            found[group["fate"], group["reason"] if has_reason else ""] += group["count_all"]
        return dict(found)

    def where(self, fate: str) -> np.ndarray:
        """The numbers of the records of a fate."""
        return np.flatnonzero(self._are(fate))

    def reasons(self, fate: str) -> list[str]:
        """Why, for each record of a fate."""
        chosen = self.table.column("reason").filter(pyarrow.array(self._are(fate)))
        return list(map(self.rename, chosen.to_pylist()))

    @property
    def unreadable(self) -> list[str]:
        """Place and reason of each record that cannot be used."""
        places = (self.places[number] for number in self.where(UNREADABLE).tolist())
        return [f"{place}: {why}" for place, why in zip(places, self.reasons(UNREADABLE), strict=True)]

    def _are(self, fate: str) -> np.ndarray:
        return np.array([kind == fate for kind in self.table.column("fate").to_pylist()], dtype=bool)

    @cached_property
    def spelled(self) -> Counter[str]:
        """How often the records spell each control token."""
        column = self.table.column("spelled").drop_null()
        return Counter(text for texts in column.to_pylist() for text in texts)


class _Lines(Sequence[Any]):
    """Items that are made of columns of a table when they are asked for."""

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
        for first in range(0, len(self), LISTED):
            yield from self._make(self.table.slice(first, LISTED))

    def _make(self, part: pyarrow.Table) -> Iterator[Any]:
        return map(self.make, *(column.to_pylist() for column in part.columns))


class StoredRows:
    """The rows of a mapped file, with what ``TokenizedRows`` offers; N = rows.

    ids_at   (N,) int64: where the ids of a row begin in ``tokens``, the whole file as numbers
    lengths  (N,) int32
    """

    def __init__(self, folder: Path, ledger: StoredLedger):
        self.ledger = ledger
        self._sources: np.ndarray | None = None
        self._mapped = mapped = _map(folder / DATA)
        self.batches = list(ipc.open_stream(pyarrow.py_buffer(mapped)))
        self.tokens = np.frombuffer(mapped, np.int32, count=len(mapped) // TOKEN_BYTES)
        self._floats = self.tokens.view(np.float32)
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])  # of each batch
        self.ids_at = np.zeros(self._firsts[-1], dtype=np.int64)
        self.lengths = np.zeros(self._firsts[-1], dtype=np.int32)
        self._shifts = np.zeros((len(self.batches), 2), dtype=np.int64)  # from ids to labels and weights
        self._weighs = np.zeros(len(self.batches), dtype=bool)
        for number, batch in enumerate(self.batches):
            if not batch.num_rows:  # a block of which nothing is left: it has no place in the file
                continue
            rows = slice(*self._firsts[number : number + 2])
            offsets = batch.column("input_ids").offsets.to_numpy().astype(np.int64)
            ids, labels = (self._place(batch.column(name)) for name in ("input_ids", "labels"))
            self.ids_at[rows], self.lengths[rows] = ids + offsets[:-1], np.diff(offsets)
            self._shifts[number, 0] = labels - ids
            if "weights" in batch.schema.names and batch.column("weights").null_count == 0:
                self._weighs[number] = True
                self._shifts[number, 1] = self._place(batch.column("weights")) - ids

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
        """What became of each record."""
        return self.ledger.fates

    @property
    def control_texts(self) -> Counter[str]:
        """How often the records spell each control token."""
        return self.ledger.spelled

    @property
    def sources(self) -> np.ndarray:
        """(N,) int64: the record that each row came from."""
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
        """The rows as they were written, in blocks; ``sources`` and ``fates`` are left empty."""
        for batch in self.batches:
            if batch.num_rows:
                yield to_rows(batch)
                forget(self._mapped)

    def _place(self, column: pyarrow.Array) -> int:
        """Where the values of a column begin in ``tokens``; 0 where it has none."""
        if not len(column.values):
            return 0
        return (column.values.buffers()[1].address - self.tokens.ctypes.data) // TOKEN_BYTES


@dataclass(frozen=True)
class _Renaming:
    """A text that begins with the old name of a file and a colon, or with "of " and that, with its new one.

    The names are looked up, not tried: a folder may have a file for each of a million records.
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
    """The rows of a batch, not copied; their ``sources`` and ``fates`` are left empty."""
    offsets = batch.column("input_ids").offsets.to_numpy().astype(np.int64)
    ids, labels = (batch.column(name).values.to_numpy() for name in ("input_ids", "labels"))
    weights = None
    if "weights" in batch.schema.names and not batch.column("weights").null_count:
        weights = batch.column("weights").values.to_numpy()
    return TokenizedRows(ids, labels, offsets, np.zeros(0, np.int64), weights=weights)


def forget(mapped: mmap.mmap) -> None:
    """Gives back the memory that holds what was read of a mapped file."""
    mapped.madvise(mmap.MADV_DONTNEED)


def _cut(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    spans = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
    return [values[first:last] for first, last in spans]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _fit_schema(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """The batch with empty columns for those that it has not got, and buffers that hold nothing else."""
    columns = []
    for field in schema:
        has = field.name in batch.schema.names
        columns.append(batch.column(field.name) if has else pyarrow.nulls(batch.num_rows, field.type))
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)
