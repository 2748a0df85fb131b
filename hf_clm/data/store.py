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
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.config import Recipe
from hf_clm.data.build import Examples, Split, pack_rows
from hf_clm.data.datasets import TokenizedDataset, TokenizedRows
from hf_clm.data.labels import Fate
from hf_clm.data.packing import PackedDataset, Pieces
from hf_clm.data.sources import ReadReport
from hf_clm.errors import DataError, EnvironmentFault
from hf_clm.schema import (
    ChatExample,
    Example,
    PromptExample,
    Segment,
    SegmentsExample,
    TextExample,
    TokenizedExample,
)

INDEX, LEDGER, PARTIAL = "prepared.json", "ledger.parquet", ".partial-"
HEAD = 200  # examples that are kept beside their tokens: what looks at a few need not read the files
PROBE_BYTES = 65_536  # of each end of a file, to tell that it is the one that was written
STALE_SECONDS = 86_400

AnyExample = Example | TokenizedExample
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

        table = parquet.read_table(self.folder / LEDGER)
        places = [place for split in self.splits.values() for place in split.examples.places]
        at = table.column_names.index("source")
        parquet.write_table(table.set_column(at, "source", pyarrow.array(places)), path)


def write_store(
    folder: Path, splits: Splits, *, files: Sequence[str], proof: Any, write_ledger: Callable[[Path], None]
) -> None:
    """Writes a folder whole or not at all; one that was written meanwhile stays.

    Args:
        files: the data files in the order of reading; places begin with their names.
        proof: of JSON.

    Raises EnvironmentFault where it cannot be written.
    """
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        try:
            index = {"files": list(files), "proof": proof, "splits": {}}
            for name, split in splits.items():
                index["splits"][name] = _split_json(split)
                for array, values in _to_arrays(split).items():
                    np.save(partial / f"{name}.{array}.npy", values)
            write_ledger(partial / LEDGER)
            index["contents"] = {path.name: _probe(path) for path in sorted(partial.iterdir())}
            (partial / INDEX).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
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
        load_examples: reads the examples by split, should one be asked for that is not stored.
    """
    index = _read_index(folder)
    if index is None:
        return None
    names = dict(zip(index["files"], files, strict=True))
    splits = {}
    for name, content in index["splits"].items():
        rows = _read_rows(folder, name, content=content)
        examples = _read_examples(folder, name, content=content, names=names)
        load = _Loader(load_examples, name)
        examples.examples = LazyList(len(examples.places), load, head=_to_examples(content["head"]))
        dataset = TokenizedDataset(rows)
        splits[name] = Split(dataset, pack_rows(dataset, recipe, pieces=_read_pieces(folder, name)), examples)
    return Stored(folder, splits, index["proof"], is_renamed=any(old != new for old, new in names.items()))


@dataclass(frozen=True)
class _Loader:
    load_examples: LoadExamples
    name: str

    def __call__(self) -> Sequence[AnyExample]:
        return self.load_examples()[self.name].examples


def _to_arrays(split: Split) -> dict[str, np.ndarray]:
    rows, places = split.rows.rows, split.examples.places
    kinds = {kind: number for number, kind in enumerate(_kinds(rows.fates))}
    fates = [(kinds[f.kind, f.reason], f.cut_tokens, f.tokens, f.target_tokens) for f in rows.fates]
    prefixes = {prefix: number for number, prefix in enumerate(_prefixes(places))}
    numbered = [(prefixes[prefix], number) for prefix, number in map(_cut_number, places)]
    arrays = {
        "input_ids": rows.input_ids.astype(np.int32, copy=False),
        "labels": rows.labels.astype(np.int32, copy=False),
        "offsets": rows.offsets,
        "sources": rows.sources,
        "fates": np.array(fates, dtype=np.int64),
        "places": np.array(numbered, dtype=np.int64),
    }
    if isinstance(split.dataset, PackedDataset):
        pieces = split.dataset.pieces
        packed = {"examples": pieces.examples, "starts": pieces.starts, "stops": pieces.stops}
        arrays |= {f"pieces.{name}": array for name, array in packed.items()}
        arrays["pieces.offsets"] = pieces.offsets
    return arrays


def _split_json(split: Split) -> dict[str, Any]:
    examples, rows = split.examples, split.rows.rows
    return {
        "kinds": _kinds(rows.fates),
        "prefixes": _prefixes(examples.places),
        "report": asdict(examples.report),
        "formats": sorted(examples.formats),
        "unknown_keys": sorted(examples.unknown_keys),
        "duplicates": examples.duplicates,
        "origins": _to_runs(examples.origins),
        "control_texts": rows.control_texts,
        "head": [e if isinstance(e, dict) else asdict(e) for e in examples.examples[:HEAD]],
    }


def _read_rows(folder: Path, name: str, *, content: dict[str, Any]) -> TokenizedRows:
    ids, labels, offsets, sources = (
        _map(folder / f"{name}.{array}.npy") for array in ("input_ids", "labels", "offsets", "sources")
    )
    fates, kinds = _map(folder / f"{name}.fates.npy"), content["kinds"]

    def to_fates() -> list[Fate]:
        return [
            Fate(kinds[at][0], kinds[at][1], cut, tokens, targets)
            for at, cut, tokens, targets in fates.tolist()
        ]

    stored: Any = LazyList(len(fates), to_fates)
    return TokenizedRows(ids, labels, offsets, sources, stored, Counter(content["control_texts"]))


def _read_examples(folder: Path, name: str, *, content: dict[str, Any], names: Mapping[str, str]) -> Examples:
    """All but the examples themselves."""
    rename = _Renaming(names)
    report = ReadReport(**content["report"])
    report.files = [names[file] for file in report.files]
    report.bad_lines = list(map(rename, report.bad_lines))
    prefixes, places = list(map(rename, content["prefixes"])), _map(folder / f"{name}.places.npy")

    def to_places() -> list[str]:
        return [f"{prefixes[prefix]}{number}" for prefix, number in places.tolist()]

    stored: Any = LazyList(len(places), to_places)
    found = Examples([], stored, report, set(content["formats"]), set(content["unknown_keys"]))
    found.duplicates = list(map(rename, content["duplicates"]))
    runs = np.array(content.get("origins", []), dtype=np.int32).reshape(-1, 2)
    found.origins = np.repeat(runs[:, 0], runs[:, 1])
    return found


def _to_runs(origins: np.ndarray) -> list[list[int]]:
    """[0, 0, 0, 1] as [[0, 3], [1, 1]]."""
    firsts = np.flatnonzero(np.diff(origins, prepend=-1))
    counts = np.diff(firsts, append=len(origins))
    return np.stack([origins[firsts], counts], axis=1).tolist()


def _read_pieces(folder: Path, name: str) -> Pieces | None:
    paths = [folder / f"{name}.pieces.{part}.npy" for part in ("examples", "starts", "stops", "offsets")]
    return Pieces(*map(_map, paths)) if paths[0].exists() else None


@dataclass(frozen=True)
class _Renaming:
    """A text that begins with the old name of a file, with its new one."""

    names: Mapping[str, str]

    def __call__(self, text: str) -> str:
        olds = [old for old in self.names if text.startswith(old)]
        old = max(olds, key=len, default="")
        return self.names.get(old, "") + text.removeprefix(old)


def _to_examples(contents: list[dict[str, Any]]) -> list[AnyExample]:
    return [_to_example(content) for content in contents]


def _to_example(content: dict[str, Any]) -> AnyExample:
    match content:
        case {"text": text}:
            return TextExample(text)
        case {"prompt": prompt, "completion": completion}:
            return PromptExample(prompt, completion)
        case {"messages": messages}:
            return ChatExample(messages)
        case {"segments": segments}:
            return SegmentsExample([Segment(**segment) for segment in segments])
    return {"input_ids": content["input_ids"], "labels": content["labels"]}


def _kinds(fates: Sequence[Fate]) -> list[tuple[str, str]]:
    return sorted({(fate.kind, fate.reason) for fate in fates})


def _prefixes(places: Sequence[str]) -> list[str]:
    return sorted({prefix for prefix, _ in map(_cut_number, places)})


def _cut_number(place: str) -> tuple[str, int]:
    """("poems.jsonl:", 17) of "poems.jsonl:17"."""
    prefix = place.rstrip("0123456789")
    return prefix, int(place[len(prefix) :])


def _map(path: Path) -> np.ndarray:
    """The array as a view of the file: as an np.memmap every slice of it would take microseconds more."""
    return np.asarray(np.load(path, mmap_mode="r"))


def _probe(path: Path) -> list[Any]:
    """Size, and sha256 of both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [size, digest.hexdigest()]


def _read_index(folder: Path) -> dict[str, Any] | None:
    """What prepared.json says; None unless every file is there as it was written."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        is_whole = all(_probe(folder / name) == known for name, known in index["contents"].items())
    except (OSError, ValueError):
        return None
    return index if is_whole else None


def _rename(partial: Path, folder: Path) -> None:
    """Gives the folder its name, unless another process was faster; replaces a damaged one."""
    partial.chmod(0o755)  # mkdtemp lets in the owner alone
    if folder.exists() and _read_index(folder) is None:
        folder.rename(Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent)) / folder.name)
    try:
        partial.rename(folder)
    except OSError:
        if _read_index(folder) is None:
            raise


def _remove_stale(folder: Path) -> None:
    """Removes what killed processes left unfinished."""
    for path in folder.glob(f"{PARTIAL}*"):
        try:
            is_stale = time.time() - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # finished just now
            continue
        if is_stale:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "name another data.cache_dir, or null to keep nothing"
        got = str(error.strerror or error)
        raise EnvironmentFault("cannot keep prepared data", where=str(folder), got=got, fix=fix) from error
