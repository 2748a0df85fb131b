"""Prepared sets on disk: what was tokenized, packed and proved once is opened again, and not read.

    <cache_dir>/<key>/
      prepared.json            places, reports and proof; size and digest of each file beside it
      ledger.parquet
      train.input_ids.npy  train.labels.npy  train.offsets.npy ...     opened as memory maps
      eval.input_ids.npy ...

A folder gets its name when it is whole. One that is cut off or damaged later is not opened.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.config import Recipe
from hf_clm.data.arrays import Fates, Places, map_array, to_fates, to_places
from hf_clm.data.batch.packing import PackedDataset, Pieces
from hf_clm.data.build import Split, pack_rows
from hf_clm.data.label.datasets import TokenizedDataset, TokenizedRows
from hf_clm.data.proof.ledger import Ledger, lost_rows
from hf_clm.data.read.records import Examples
from hf_clm.data.read.sources import ReadReport
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.hashing import fingerprint
from hf_clm.schema import AnyExample, example_from_json

INDEX, LEDGER, PARTIAL = "prepared.json", "ledger.parquet", ".partial-"
HEAD = 200  # examples that are kept beside their tokens: what looks at a few need not read the files
PROBE_BYTES = 65_536  # of each end of a file, to tell that it is the one that was written
STALE_SECONDS = 86_400

Splits = Mapping[str, Split]
LoadExamples = Callable[[], Mapping[str, Examples]]


class LazyList(Sequence[Any]):
    """A list of known length that is made when an item behind its ``head`` is asked for."""

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
    """An opened folder. ``proof`` is what was given to ``write_store``."""

    folder: Path
    splits: dict[str, Split]
    proof: dict[str, Any]
    is_renamed: bool = False  # the data lie under other names than when they were prepared

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def write_ledger(self, path: Path) -> None:
        """Writes the ledger that was stored, with the names that the data have now."""
        if not self.is_renamed:
            shutil.copyfile(self.folder / LEDGER, path)
            return
        import pyarrow
        from pyarrow import parquet

        places = chain.from_iterable(map(_all_places, self.splits.values()))
        with (
            parquet.ParquetFile(self.folder / LEDGER) as old,
            parquet.ParquetWriter(path, old.schema_arrow) as new,
        ):
            at = old.schema_arrow.get_field_index("source")
            for group in map(old.read_row_group, range(old.num_row_groups)):
                named = pyarrow.array(islice(places, group.num_rows), pyarrow.string())
                new.write_table(group.set_column(at, "source", named))


def write_store(
    folder: Path, splits: Splits, *, files: Sequence[str], proof: Any, write_ledger: Callable[[Path], None]
) -> None:
    """Writes sets that are in memory; see ``keep_folder``.

    Args:
        files: the data files in the order of reading; places begin with their names.
        proof: of JSON.
    """

    def fill(partial: Path) -> dict[str, Any]:
        contents = {}
        for name, split in splits.items():
            contents[name] = _split_json(split)
            for array, values in _to_arrays(split).items():
                np.save(partial / f"{name}.{array}.npy", values)
        write_ledger(partial / LEDGER)
        return {"files": list(files), "proof": proof, "splits": contents}

    keep_folder(folder, fill)


def keep_folder(folder: Path, fill: Callable[[Path], dict[str, Any]], *, index: str = INDEX) -> None:
    """Writes a folder whole or not at all; one that was written meanwhile stays.

    Args:
        fill: writes files into a folder, and returns what ``index`` (its name) says beside their digests.

    Raises EnvironmentFault where it cannot be written.
    """
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        try:
            content = fill(partial)
            content["contents"] = {path.name: _probe(path) for path in sorted(partial.iterdir())}
            content["digest"] = fingerprint([content])
            (partial / index).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            _rename(partial, folder, index=index)
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
        load_examples: reads the examples by split, should one be asked for that is not stored.
    """
    index = read_index(folder)
    if index is None:
        return None
    splits = open_splits(folder, index, recipe=recipe, files=files, load_examples=load_examples)
    return Stored(folder, splits, index["proof"], is_renamed=index["files"] != list(files))


def open_splits(
    folder: Path, index: dict[str, Any], *, recipe: Recipe, files: Sequence[str], load_examples: LoadExamples
) -> dict[str, Split]:
    """The sets of a folder by what its index says of them; see ``open_store``."""
    names = dict(zip(index["files"], files, strict=True))
    splits = {}
    for name, content in index["splits"].items():
        rows = _read_rows(folder, name, content=content)
        examples = _read_examples(folder, name, content=content, names=names)
        load = _Loader(load_examples, name)
        examples.examples = LazyList(
            len(examples.places), load, head=[example_from_json(example) for example in content["head"]]
        )
        dataset = TokenizedDataset(rows)
        packed = pack_rows(dataset, recipe, pieces=_read_pieces(folder, name))
        splits[name] = Split(dataset, packed, examples)
        vars(splits[name]).update(
            id_counts=map_array(folder / f"{name}.id_counts.npy"),
            label_counts=map_array(folder / f"{name}.label_counts.npy"),
            least_id=content["least_id"],
        )
    return splits


@dataclass(frozen=True)
class _Loader:
    load_examples: LoadExamples
    name: str

    def __call__(self) -> Sequence[AnyExample]:
        return self.load_examples()[self.name].examples


def split_json(
    examples: Examples,
    *,
    kinds: Sequence[Any],
    prefixes: Sequence[str],
    control_texts: Mapping[str, int],
    least_id: int,
) -> dict[str, Any]:
    """What ``prepared.json`` holds of a set: all but its arrays."""
    return {
        "kinds": list(kinds),
        "prefixes": list(prefixes),
        "report": asdict(examples.report),
        "formats": sorted(examples.formats),
        "unknown_keys": sorted(examples.unknown_keys),
        "control_texts": control_texts,
        "least_id": least_id,
        "head": [asdict(example) for example in examples.examples[:HEAD]],
    }


def _to_arrays(split: Split) -> dict[str, np.ndarray]:
    rows, examples = split.rows.rows, split.examples
    named = to_places([*examples.places, *examples.duplicates]).array
    arrays = {
        "input_ids": rows.input_ids.astype(np.int32, copy=False),
        "labels": rows.labels.astype(np.int32, copy=False),
        "offsets": rows.offsets,
        "sources": rows.sources,
        "fates": to_fates(rows.fates).array,
        "places": named[: len(examples.places)],
        "duplicates": named[len(examples.places) :],
        "origins": examples.origins,
        "id_counts": split.id_counts,
        "label_counts": split.label_counts,
    }
    if rows.weights is not None:
        arrays["weights"] = rows.weights
    if isinstance(split.dataset, PackedDataset):
        pieces = split.dataset.pieces
        packed = {"examples": pieces.examples, "starts": pieces.starts, "stops": pieces.stops}
        arrays |= {f"pieces.{name}": array for name, array in packed.items()}
        arrays["pieces.offsets"] = pieces.offsets
    return arrays


def _split_json(split: Split) -> dict[str, Any]:
    examples, rows = split.examples, split.rows.rows
    prefixes = to_places([*examples.places, *examples.duplicates]).prefixes
    told = {"control_texts": rows.control_texts, "least_id": split.least_id}
    return split_json(examples, kinds=to_fates(rows.fates).kinds, prefixes=prefixes, **told)


def _read_rows(folder: Path, name: str, *, content: dict[str, Any]) -> TokenizedRows:
    ids, labels, offsets, sources, fates = (
        map_array(folder / f"{name}.{array}.npy")
        for array in ("input_ids", "labels", "offsets", "sources", "fates")
    )
    stored = Fates(fates, content["kinds"])
    weights = folder / f"{name}.weights.npy"
    return TokenizedRows(
        ids,
        labels,
        offsets,
        sources,
        stored,
        Counter(content["control_texts"]),
        map_array(weights) if weights.exists() else None,
    )


def _read_examples(folder: Path, name: str, *, content: dict[str, Any], names: Mapping[str, str]) -> Examples:
    """All but the examples themselves."""
    rename = _Renaming(names)
    report = ReadReport(**content["report"])
    report.files = [names[file] for file in report.files]
    report.bad_lines = list(map(rename, report.bad_lines))
    prefixes = list(map(rename, content["prefixes"]))
    places, duplicates = (
        Places(map_array(folder / f"{name}.{array}.npy"), prefixes) for array in ("places", "duplicates")
    )
    found = Examples([], places, report, set(content["formats"]), set(content["unknown_keys"]))
    found.duplicates = duplicates
    found.origins = map_array(folder / f"{name}.origins.npy")
    return found


def _read_pieces(folder: Path, name: str) -> Pieces | None:
    paths = [folder / f"{name}.pieces.{part}.npy" for part in ("examples", "starts", "stops", "offsets")]
    return Pieces(*map(map_array, paths)) if paths[0].exists() else None


@dataclass(frozen=True)
class _Renaming:
    """A text that begins with the old name of a file, with its new one."""

    names: Mapping[str, str]

    def __call__(self, text: str) -> str:
        olds = [old for old in self.names if text.startswith(old)]
        old = max(olds, key=len, default="")
        return self.names.get(old, "") + text.removeprefix(old)


def _all_places(split: Split) -> Iterator[str]:
    """The places of a ledger, in its order."""
    examples = split.examples
    lost = Ledger([], examples.report.bad_lines, examples.duplicates)
    return chain(examples.places, (row.source for row in lost_rows(lost)))


def _probe(path: Path) -> list[Any]:
    """Size, and sha256 of both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [size, digest.hexdigest()]


def read_index(folder: Path, *, index: str = INDEX) -> dict[str, Any] | None:
    """What the index of a folder says; None unless every file is there as it was written."""
    try:
        content = json.loads((folder / index).read_text(encoding="utf-8"))
        is_whole = content.pop("digest") == fingerprint([content])
        is_whole &= all(_probe(folder / name) == known for name, known in content["contents"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return content if is_whole else None


def _rename(partial: Path, folder: Path, *, index: str) -> None:
    """Gives the folder its name, unless another process was faster; replaces a damaged one."""
    partial.chmod(0o755)  # mkdtemp lets in the owner alone
    if folder.exists() and read_index(folder, index=index) is None:
        folder.rename(Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent)) / folder.name)
    try:
        partial.rename(folder)
    except OSError:
        if read_index(folder, index=index) is None:
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
