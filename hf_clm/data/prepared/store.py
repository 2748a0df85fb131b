"""Stores prepared sets on disk, so that data are labelled, packed and proved only once.

    <cache_dir>/<key>/            a DatasetDict for datasets.load_from_disk
      prepared.json               reports and proof; size and digest of each file
      train/  eval/               rows (see tables.py), with
        *.npy                     the number of occurrences of each id; which rows are packed together
      ledger/                     another DatasetDict: the fate of each record

A folder is renamed to its final name once it is complete. Truncated or damaged folders are not opened.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.prepared.tables import StoredLedger, StoredRows
from hf_clm.data.read.records import Examples
from hf_clm.data.read.sources import ReadReport
from hf_clm.data.split import Split, pack_rows
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.hashing import fingerprint
from hf_clm.machine import follow_umask
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import AnyExample, example_from_json

INDEX, LEDGER, PARTIAL = "prepared.json", "ledger", ".partial-"
HEAD = 200  # examples stored with the set, so that a few can be shown without reading the data files
RECORDS = "records.npy"  # numbers of the records of a split, if it is not the complete set
PIECES = ("examples", "starts", "stops", "offsets")
PROBE_BYTES = 65_536  # of both ends of a file, to check that it is unchanged
STALE_SECONDS = 86_400

LoadExamples = Callable[[str], Sequence[AnyExample]]  # reads the examples of a set, by its name


class LazyList(Sequence[Any]):
    """A list of known length. Items after its ``head`` are loaded all at once on first use."""

    def __init__(self, length: int, load: Callable[[], Sequence[Any]], *, head: Sequence[Any] = ()):
        self.length, self.load, self.head = length, load, head
        self.items: Sequence[Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        position = range(self.length)[index]
        numbers = position if isinstance(position, range) else [position]
        source = self.head if max(numbers, default=-1) < len(self.head) else self._all()
        return [source[number] for number in numbers] if isinstance(position, range) else source[position]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def _all(self) -> Sequence[Any]:
        if self.items is None:
            self.items = self.load()
            if len(self.items) != self.length:
                got = f"{len(self.items):,} records instead of {self.length:,}"
                raise DataError("the data changed during the run", where="data.train", got=got)
        return self.items


@dataclass
class StoredSet:
    """An opened folder.

    proof  the proof from when it was prepared
    date   the date that the chat template prints; "" if it prints none
    """

    folder: Path
    splits: dict[str, Split]
    proof: dict[str, Any]
    date: str = ""

    @property
    def size_bytes(self) -> int:
        """Total size of its files."""
        return sum(path.stat().st_size for path in _files(self.folder))


def keep_folder(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Writes a folder atomically. A folder that another process has written in the meantime is kept.

    Args:
        fill: writes files into a folder and returns the content of INDEX without the digests.

    Raises EnvironmentFault if the folder cannot be written.
    """
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        try:
            content = fill(partial)
            content["contents"] = {str(path.relative_to(partial)): _probe(path) for path in _files(partial)}
            content["digest"] = fingerprint([content])
            (partial / INDEX).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            _rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Raises EnvironmentFault if the folder is not writable; checked before the work, not after it."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def open_store(
    folder: Path, recipe: Recipe, *, files: Sequence[str], load_examples: LoadExamples
) -> StoredSet | None:
    """Opens a folder; returns None if it does not exist or has changed since it was written.

    Args:
        files: the current names of the data files, in reading order.
        load_examples: reads the examples of a set, if examples after HEAD are needed.
    """
    index = read_index(folder)
    if index is None:
        return None
    splits = open_splits(folder, index, recipe=recipe, files=files, load_examples=load_examples)
    return StoredSet(folder, splits, index["proof"], index["date"])


def open_splits(
    folder: Path, index: dict[str, Any], *, recipe: Recipe, files: Sequence[str], load_examples: LoadExamples
) -> dict[str, Split]:
    """Opens the splits of a folder with its index; see ``open_store``."""
    names = dict(zip(index["files"], files, strict=True))
    splits = {}
    for name, content in index["splits"].items():
        ledger = StoredLedger(folder / LEDGER / name, names)
        rows = StoredRows(folder / name, ledger)
        counts = [np.load(folder / name / f"{kind}.npy") for kind in ("id_counts", "label_counts")]
        report_json = content["report"]
        report = ReadReport(
            **{
                **report_json,
                "files": [names[file] for file in report_json["files"]],
                "notes": list(map(ledger.rename, report_json["notes"])),
                "bad_lines": ledger.unreadable,
            }
        )
        head = list(map(example_from_json, content["head"]))
        numbers = folder / name / RECORDS
        load = _Loader(load_examples, content["set"], np.load(numbers) if numbers.exists() else None)
        examples = Examples(
            LazyList(len(ledger), load, head=head),
            ledger.places,
            report,
            formats=set(content["formats"]),
            unknown_keys=set(content["unknown_keys"]),
            origins=ledger.numbers("source"),
        )
        packed = pack_rows(TokenizedDataset(rows), recipe, pieces=read_pieces(folder / name))
        splits[name] = Split(rows, packed, examples, ledger, *counts, least_id=content["least_id"])
    return splits


def write_pieces(folder: Path, packed: PackedDataset) -> None:
    """Stores the packing."""
    for name in PIECES:
        np.save(folder / f"packed_{name}.npy", getattr(packed.pieces, name))


def read_pieces(folder: Path) -> Pieces | None:
    """Opens the packing as memory maps; returns None if the rows are not packed."""
    paths = [folder / f"packed_{name}.npy" for name in PIECES]
    return Pieces(*map(map_array, paths)) if paths[0].exists() else None


def map_array(path: Path) -> np.ndarray:
    """Memory-maps an array, as a plain ndarray: slicing an np.memmap is microseconds slower."""
    return np.asarray(np.load(path, mmap_mode="r"))


@dataclass(frozen=True)
class _Loader:
    """Loads the examples of a split. ``numbers`` are its records in the set; None for all."""

    load_examples: LoadExamples
    name: str
    numbers: np.ndarray | None

    def __call__(self) -> Sequence[AnyExample]:
        examples = self.load_examples(self.name)
        return examples if self.numbers is None else [examples[number] for number in self.numbers.tolist()]


def split_json(examples: Examples, *, of: str, least_id: int, certified: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a split in ``prepared.json``. ``of`` is the name of the set."""
    report = asdict(examples.report)
    del report["bad_lines"]  # they are in the ledger
    return {
        "set": of,
        "report": report,
        "formats": sorted(examples.formats),
        "unknown_keys": sorted(examples.unknown_keys),
        "least_id": least_id,
        "certified": certified,
        "head": list(map(asdict, examples.examples)),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _probe(path: Path) -> list[Any]:
    """Returns the size of a file and the sha256 of both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [size, digest.hexdigest()]


def read_index(folder: Path) -> dict[str, Any] | None:
    """Reads the index of a folder; returns None if a file is missing or has changed."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        is_intact = content.pop("digest") == fingerprint([content])
        is_intact &= all(_probe(folder / name) == probe for name, probe in content["contents"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return content if is_intact else None


def _rename(partial: Path, folder: Path) -> None:
    """Renames the folder to its final name unless another process was faster; replaces a damaged folder."""
    follow_umask(partial)
    if folder.exists() and read_index(folder) is None:
        folder.rename(Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent)) / folder.name)
    try:
        partial.rename(folder)
    except OSError:
        if read_index(folder) is None:
            raise


def _remove_stale(folder: Path) -> None:
    """Removes unfinished folders of killed processes: those not written to for a day."""
    for path in folder.glob(f"{PARTIAL}*"):
        try:
            last_write = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
        except FileNotFoundError:  # another process is using it
            continue
        if time.time() - last_write > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "set data.cache_dir to another folder, or to null to disable the cache"
        got = str(error.strerror or error)
        raise EnvironmentFault("cannot store prepared data", where=str(folder), got=got, fix=fix) from error
