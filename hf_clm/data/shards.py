"""A set that is tokenized and certified in blocks, and appended to files: memory holds one block.

    records --> block of examples --> tokenized rows --> certified --> train.input_ids.npy ...

The files of one shard are a *part*. Nothing in a part depends on another: numbers count from its own start,
and what the whole set decides (which rows are equal, held out, packed together) is left to ``joining.py``.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.data.arrays import ArrayWriter, map_array, to_fates, to_places
from hf_clm.data.division import Reading
from hf_clm.data.label.datasets import TokenizedRows, rare_collection
from hf_clm.data.proof.certificate import KEPT, Certificate
from hf_clm.data.proof.ledger import digest, loose_digest
from hf_clm.data.read.records import Examples
from hf_clm.schema import AnyExample, Tokens, whole_text

PART = "part.json"
FAULT = "HF_CLM_FAULT"  # in the environment, for tests: the point at which the process kills itself
BLOCK_ROWS, BLOCK_LETTERS = 1000, 4_000_000  # of a block of examples, which may be one longer one
COLUMNS = {
    "input_ids": ("<i4", 0),
    "labels": ("<i4", 0),
    "weights": ("<f4", 0),  # of the loss of each label; left out of a set where all are 1
    "lengths": ("<i8", 0),  # of each tokenized row
    "sources": ("<i8", 0),  # the example that it is of
    "encoded": ("|u1", 0),  # whether the certificate encoded it again
    "fates": ("<i8", 4),  # of each example; see arrays.Fates
    "places": ("<i8", 2),  # see arrays.Places
    "origins": ("<i4", 0),  # the source of each example, by its number in the recipe
    "controls": ("<i8", 2),  # example, control text: one it spells
    "exact": ("<u8", 2),  # digest of an example, where equal ones must be found
    "loose": ("<u8", 2),
}


@dataclass(frozen=True)
class Work:
    """What is made of each block. ``certify`` also gives the numbers of the rows that it encoded again.

    ``digests`` are those of exact and loose that are needed.
    """

    tokenize: Callable[[Examples], TokenizedRows]
    certify: Callable[[TokenizedRows, Examples], tuple[Certificate, list[int]]]
    control_texts: Callable[[AnyExample], list[str]]
    digests: tuple[str, ...] = ()


@rare_collection()
def write_part(folder: Path, readings: Mapping[str, Reading], *, work: Work) -> dict[str, Any]:
    """Writes the sets of a part into an empty folder; returns what ``part.json`` holds of them.

    Raises DataError for what cannot be read, spelled or certified.
    """
    return {name: _write_set(folder, name, reading=reading, work=work) for name, reading in readings.items()}


def reach(point: str) -> None:
    """Dies here, as by kill -9, where HF_CLM_FAULT of the environment names this point."""
    if os.environ.get(FAULT) == point:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class PartSet:
    """A set of a part, opened: ``content`` is what ``part.json`` says of it."""

    folder: Path
    name: str
    content: dict[str, Any]

    def __len__(self) -> int:
        return self.content["examples"]

    def path(self, column: str) -> Path:
        """The file of a column."""
        return self.folder / f"{self.name}.{column}.npy"

    def map(self, column: str) -> np.ndarray:
        """A column as a map of its file."""
        return map_array(self.path(column))

    def map_tokens(self, column: str) -> np.ndarray:
        """A column with a value for each token; ones for the weights of a part that has none."""
        if column == "weights" and not self.content["has_weights"]:
            return np.ones(int(self.map("lengths").sum()), dtype=np.float32)
        return self.map(column)


def open_part(folder: Path, sets: Mapping[str, dict[str, Any]]) -> dict[str, PartSet]:
    """The sets of a part by name; ``sets`` is what ``write_part`` gave."""
    return {name: PartSet(folder, name, content) for name, content in sets.items()}


def _write_set(folder: Path, name: str, *, reading: Reading, work: Work) -> dict[str, Any]:
    needed = {c: kind for c, kind in COLUMNS.items() if c in work.digests or c not in ("exact", "loose")}
    paths = {column: folder / f"{name}.{column}.npy" for column in needed}
    writers = {c: ArrayWriter(paths[c], kind, columns=wide) for c, (kind, wide) in needed.items()}
    written = _Written()
    for number, block in enumerate(_blocks(reading), start=1):
        rows = work.tokenize(block)
        certificate, again = work.certify(rows, block)
        written.enter(certificate)
        for column, values in written.to_columns(rows, block, again=again, work=work).items():
            writers[column].append(values)
        written.has_weights |= rows.weights is not None
        written.examples += len(block)
        reach(f"prepare.{name}.{number}")
    written.certificate.require()
    for writer in writers.values():
        writer.close()
    if not written.has_weights:
        paths["weights"].unlink()
    found = reading.found
    return {
        "examples": written.examples,
        "seconds": written.certificate.seconds,
        "has_weights": written.has_weights,
        "kinds": list(written.kinds),
        "prefixes": list(written.prefixes),
        "control_texts": list(written.texts),
        "report": asdict(found.report),
        "counted": reading.counted,
        "formats": sorted(found.formats),
        "unknown_keys": sorted(found.unknown_keys),
    }


def _blocks(reading: Reading) -> Iterator[Examples]:
    """The examples in blocks of a bounded size."""
    places, examples, origins, letters = [], [], [], 0
    for place, example, origin in reading.records:
        places.append(place)
        examples.append(example)
        origins.append(origin)
        letters += len(example.input_ids) if isinstance(example, Tokens) else len(whole_text(example))
        if len(examples) == BLOCK_ROWS or letters >= BLOCK_LETTERS:
            yield Examples(examples, places, origins=np.array(origins), sources=reading.found.sources)
            places, examples, origins, letters = [], [], [], 0
    if examples:
        yield Examples(examples, places, origins=np.array(origins), sources=reading.found.sources)


class _Written:
    """What was written so far: the tables that the numbers of its columns are of, and what was proved."""

    def __init__(self):
        self.examples = 0
        self.has_weights = False
        self.certificate = Certificate(0, "")
        self.kinds: dict[tuple[str, str], int] = {}
        self.prefixes: dict[str, int] = {}
        self.texts: dict[str, int] = {}

    def enter(self, block: Certificate) -> None:
        """Counts in what was found of a block; stops where enough is wrong to be shown."""
        whole = self.certificate
        for failure in block.failures:
            whole.enter(replace(failure, row=failure.row + whole.rows))
        whole.rows, whole.seconds = whole.rows + block.rows, whole.seconds + block.seconds
        if len(whole.failures) == KEPT:
            whole.require()

    def to_columns(
        self, rows: TokenizedRows, block: Examples, *, again: list[int], work: Work
    ) -> dict[str, Any]:
        """The columns of a block."""
        encoded = np.zeros(len(rows), dtype=np.uint8)
        encoded[again] = 1
        fates, places = to_fates(rows.fates), to_places(block.places)
        kinds = _numbers(map(tuple, fates.kinds), self.kinds)
        prefixes = _numbers(places.prefixes, self.prefixes)
        columns = {
            "input_ids": rows.input_ids,
            "labels": rows.labels,
            "weights": np.ones(len(rows.labels), np.float32) if rows.weights is None else rows.weights,
            "lengths": rows.lengths,
            "sources": rows.sources + self.examples,
            "encoded": encoded,
            "fates": np.column_stack([kinds[fates.array[:, 0]], fates.array[:, 1:]]),
            "places": np.column_stack([prefixes[places.array[:, 0]], places.array[:, 1]]),
            "origins": block.origins,
            "controls": self._controls(rows, block, work=work),
        }
        make = {"exact": digest, "loose": loose_digest}
        for column in work.digests:
            found = b"".join(map(make[column], block.examples))
            columns[column] = np.frombuffer(found, dtype="<u8").reshape(-1, 2)
        return columns

    def _controls(self, rows: TokenizedRows, block: Examples, *, work: Work) -> np.ndarray:
        if not rows.control_texts:
            return np.zeros((0, 2), dtype=np.int64)
        spelled = [
            (number + self.examples, text)
            for number, example in enumerate(block.examples)
            for text in work.control_texts(example)
        ]
        numbers = _numbers((text for _, text in spelled), self.texts)
        return np.column_stack([np.array([number for number, _ in spelled], dtype=np.int64), numbers])


def _numbers(items: Iterable[Any], known: dict[Any, int]) -> np.ndarray:
    """The number of each item in a table, which grows by those that are new."""
    return np.array([known.setdefault(item, len(known)) for item in items], dtype=np.int64)
