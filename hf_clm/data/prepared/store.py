"""Prepared sets on disk: what was labelled, packed and proved once is opened again, and not read.

    <cache_dir>/<key>/            a DatasetDict for datasets.load_from_disk
      prepared.json               reports and proof; size and digest of each file
      train/  eval/               rows: see tables.py; beside them
        *.npy                     how often each id occurs; which rows are packed together
      ledger/                     a DatasetDict too: what became of each record

A folder gets its name when it is whole. One that is cut off or damaged later is not opened.
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
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import AnyExample, example_from_json

INDEX, LEDGER, PARTIAL = "prepared.json", "ledger", ".partial-"
HEAD = 200  # examples that are kept beside their tokens: what looks at a few need not read the files
RECORDS = "records.npy"  # the numbers of the records of a split that is a part of a set
PIECES = ("examples", "starts", "stops", "offsets")
PROBE_BYTES = 65_536  # of each end of a file, to tell that it is the one that was written
STALE_SECONDS = 86_400

LoadExamples = Callable[[str], Sequence[AnyExample]]  # of a set that is read, by its name


class LazyList(Sequence[Any]):
    """A list of known length. Items past its ``head`` are loaded, all at once, on first use."""

    def __init__(self, length: int, load: Callable[[], Sequence[Any]], *, head: Sequence[Any] = ()):
        self.length, self.load, self.head = length, load, head
        self.items: Sequence[Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        wanted = range(self.length)[index]
        numbers = wanted if isinstance(wanted, range) else [wanted]
        source = self.head if max(numbers, default=-1) < len(self.head) else self._all()
        return [source[number] for number in numbers] if isinstance(wanted, range) else source[wanted]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def _all(self) -> Sequence[Any]:
        if self.items is None:
            self.items = self.load()
            if len(self.items) != self.length:
                got = f"{len(self.items):,} rows where there were {self.length:,}"
                raise DataError("the data changed during the run", where="data.train", got=got)
        return self.items


@dataclass
class Stored:
    """An opened folder.

    proof  what was proved when it was prepared
    date   what its chat template prints as today's, "" where it prints none
    """

    folder: Path
    splits: dict[str, Split]
    proof: dict[str, Any]
    date: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in _files(self.folder))


def keep_folder(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Writes a folder whole or not at all; one that was written meanwhile stays.

    Args:
        fill: writes files into a folder, and returns what INDEX says beside their digests.

    Raises EnvironmentFault where it cannot be written.
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
    """Raises EnvironmentFault where nothing can be kept: before the work, not after it."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def open_store(
    folder: Path, recipe: Recipe, *, files: Sequence[str], load_examples: LoadExamples
) -> Stored | None:
    """The sets of a folder; None where there is none, or one that is not as it was written.

    Args:
        files: the data files as they are named now, in the order of reading.
        load_examples: reads the examples of a split, should one be asked for that is not stored.
    """
    index = read_index(folder)
    if index is None:
        return None
    splits = open_splits(folder, index, recipe=recipe, files=files, load_examples=load_examples)
    return Stored(folder, splits, index["proof"], index["date"])


def open_splits(
    folder: Path, index: dict[str, Any], *, recipe: Recipe, files: Sequence[str], load_examples: LoadExamples
) -> dict[str, Split]:
    """The sets of a folder by what its index says of them; see ``open_store``."""
    names = dict(zip(index["files"], files, strict=True))
    splits = {}
    for name, content in index["splits"].items():
        ledger = StoredLedger(folder / LEDGER / name, names)
        rows = StoredRows(folder / name, ledger)
        counts = [np.load(folder / name / f"{counted}.npy") for counted in ("id_counts", "label_counts")]
        known = content["report"]
        report = ReadReport(
            **{
                **known,
                "files": [names[file] for file in known["files"]],
                "notes": list(map(ledger.rename, known["notes"])),
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
    """Keeps which rows are packed together."""
    for name in PIECES:
        np.save(folder / f"packed_{name}.npy", getattr(packed.pieces, name))


def read_pieces(folder: Path) -> Pieces | None:
    """What ``write_pieces`` wrote, mapped; None without packing."""
    paths = [folder / f"packed_{name}.npy" for name in PIECES]
    return Pieces(*map(map_array, paths)) if paths[0].exists() else None


def map_array(path: Path) -> np.ndarray:
    """The array as a view of the file: as an np.memmap every slice of it would take microseconds more."""
    return np.asarray(np.load(path, mmap_mode="r"))


@dataclass(frozen=True)
class _Loader:
    """``numbers``: of the records of the set that are in the split; None: all."""

    load_examples: LoadExamples
    name: str
    numbers: np.ndarray | None

    def __call__(self) -> Sequence[AnyExample]:
        every = self.load_examples(self.name)
        return every if self.numbers is None else [every[number] for number in self.numbers.tolist()]


def split_json(examples: Examples, *, of: str, least_id: int, certified: dict[str, Any]) -> dict[str, Any]:
    """What ``prepared.json`` holds of a split: all but its tables. ``of``: the set that it was read as."""
    report = asdict(examples.report)
    del report["bad_lines"]  # they stand in the ledger
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
    """Size, and sha256 of both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [size, digest.hexdigest()]


def read_index(folder: Path) -> dict[str, Any] | None:
    """What prepared.json of a folder says; None unless every file is there as it was written."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        is_whole = content.pop("digest") == fingerprint([content])
        is_whole &= all(_probe(folder / name) == known for name, known in content["contents"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return content if is_whole else None


def _rename(partial: Path, folder: Path) -> None:
    """Gives the folder its name, unless another process was faster; replaces a damaged one."""
    partial.chmod(0o755)  # mkdtemp lets in the owner alone
    if folder.exists() and read_index(folder) is None:
        folder.rename(Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent)) / folder.name)
    try:
        partial.rename(folder)
    except OSError:
        if read_index(folder) is None:
            raise


def _remove_stale(folder: Path) -> None:
    """Removes what killed processes left unfinished: nothing in it has been written for a day."""
    for path in folder.glob(f"{PARTIAL}*"):
        try:
            written = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
        except FileNotFoundError:  # it is being worked on
            continue
        if time.time() - written > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "name another data.cache_dir, or null to keep nothing"
        got = str(error.strerror or error)
        raise EnvironmentFault("cannot keep prepared data", where=str(folder), got=got, fix=fix) from error
