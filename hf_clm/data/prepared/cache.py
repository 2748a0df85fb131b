"""Finds the prepared set of a recipe. Its key depends on content only, never on file names or times."""

import datetime
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import hf_clm.schema
from hf_clm.data.prepared.prepare import write_prepared
from hf_clm.data.prepared.sets import read_examples, to_head
from hf_clm.data.prepared.store import StoredSet, open_store
from hf_clm.data.read.formats import custom_modules
from hf_clm.data.read.readers import ReadReport, compression, suffix
from hf_clm.data.read.sources import find_files
from hf_clm.data.split import Split, settle_splits
from hf_clm.errors import UserError
from hf_clm.hashing import fingerprint, hash_file
from hf_clm.machine import version_of
from hf_clm.recipe.recipe import Data, Recipe, Source
from hf_clm.recipe.sections import cache_folder
from hf_clm.text.tokenizer import fix_date, prints_date

COMMIT = re.compile("[0-9a-f]{40}")
KEY_LETTERS = 32  # hex digits of the sha256 in the folder's name
HASHES = ".hashes"  # subfolder of the cache with the sha256 of large data files
MIN_CACHED_BYTES = 1 << 20
SETTLED_NS = 10 * 10**9
LIBRARIES = ("tokenizers", "transformers")  # they render and encode
LABELLING = ("schema.py", "template.py", "text", "data")  # the code that makes and proves labels


@dataclass(frozen=True)
class Place:
    """The location of a recipe's prepared set, whether it exists or not.

    files: the data files, in reading order.
    notes: which files of a folder are read and which are not; not part of the key.
    why_not: why the set is not kept for other runs; empty if it is.
    """

    folder: Path
    files: list[str]
    notes: list[str] = field(default_factory=list)
    why_not: str = ""

    @property
    def key(self) -> str:
        return self.folder.name


def find_place(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int, aside: Path, launch: str = ""
) -> Place:
    """Finds the place of a recipe's prepared set.

    Args:
        seed: seed for holding out records.
        aside: folder for a set that is not cached: a stream, data.cache_dir null, or data on the Hub without
            a commit as revision.
        launch: used in the key in place of the content of such data.

    Raises DataError if the data do not exist.
    """
    data = recipe.data
    report = ReadReport()
    folder = cache_folder(data.cache_dir) if data.cache_dir else aside
    contents = [_source_content(source, report, folder=folder) for source in (*data.train, *data.eval)]
    why_not = "data.cache_dir is null" if data.cache_dir is None else ""
    if data.streaming:
        contents, why_not = [launch], "a stream"
    elif None in contents:
        contents, why_not = [launch], "data on the Hub without a commit as their revision"
    options = data.model_dump(include=Data.deciding())
    options |= {"overflow": recipe.resolved_overflow, "packing": recipe.resolved_packing}
    parts = {
        "code": _code_content([source.format for source in (*data.train, *data.eval)]),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "stage": recipe.stage,
        "data": options,
        "seed": seed if data.eval_fraction else None,
        "sources": [contents, len(data.train)],
        "tokenizer": _tokenizer_content(tokenizer),
    }
    key = fingerprint([parts])[:KEY_LETTERS]
    return Place((aside if why_not else folder) / key, report.files, report.to_lines(), why_not)


def data_content(data: Data) -> str:
    """Returns a digest of what the files of all sources contain, without their paths.

    It is empty if the content is not known: for missing files, and for a branch on the Hub.
    """
    folder = cache_folder(data.cache_dir) if data.cache_dir else Path(tempfile.gettempdir())
    try:
        contents = [
            _source_content(source, ReadReport(), folder=folder) for source in (*data.train, *data.eval)
        ]
    except UserError:
        return ""
    return "" if None in contents else fingerprint([contents])


def open_place(place: Place, recipe: Recipe) -> StoredSet | None:
    """Opens the prepared set of a recipe; returns None if it does not exist."""
    recipe = to_head(recipe)
    load = partial(_load_examples, recipe)
    return open_store(place.folder, recipe, files=place.files, load_examples=load)


def read_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> dict[str, Split]:
    """Returns the splits, with the training split mixed: from the cache, else from a temporary folder.

    Nothing is added to the cache. Fixes the date that the tokenizer's template prints to the date of the set.
    """
    with tempfile.TemporaryDirectory() as folder:  # open files stay readable after their removal
        place = find_place(recipe, tokenizer, seed=seed, aside=Path(folder))
        stored = open_place(place, recipe)
        if stored is None:
            place = replace(place, folder=Path(folder) / place.key)
            write_prepared(place.folder, to_head(recipe), tokenizer, seed=seed, date=today(tokenizer))
            stored = open_place(place, recipe)
        assert stored is not None, "the set was just written"
        if stored.date:
            fix_date(tokenizer, stored.date)
        return settle_splits(stored.splits, recipe, seed=seed)


def today(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns today's date if the chat template prints it, otherwise an empty string."""
    return datetime.date.today().isoformat() if prints_date(tokenizer) else ""


def _load_examples(recipe: Recipe, name: str) -> list[Any]:
    return list(read_examples(recipe.data, name))


def _source_content(source: Source, report: ReadReport, *, folder: Path) -> dict[str, Any] | None:
    """Returns the content of a source without its path, or None if unknown. Adds its files to the report."""
    options = source.model_dump(include=Source.deciding())
    files = find_files(source.path, split=source.split, report=report)
    if files is None:  # on the Hub, where a branch or a tag may move
        report.files.append(source.path)
        is_pinned = COMMIT.fullmatch(source.revision or "") is not None
        return {**options, "hub": source.path} if is_pinned else None
    report.files += files
    try:
        return {**options, "files": [(_file_type(file), _hash_once(file, folder)) for file in files]}
    except OSError:  # reading the file will report the error
        return None


def _code_content(formats: list[str | None]) -> str:
    """Returns a digest of the source code that makes labels, including custom formats."""
    package = Path(hf_clm.schema.__file__).parent
    paths = [path for name in LABELLING for path in (package / name, *sorted((package / name).rglob("*.py")))]
    sources = [path.read_bytes() for path in paths if path.is_file()]
    return fingerprint([*sources, custom_modules(formats)])


def _tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokenizer("", add_special_tokens=False)  # a call sets the backend's padding and truncation
    return {
        "class": type(tokenizer).__name__,
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }


def _file_type(file: str) -> str:
    """Returns the suffixes that decide how a file is read: ".jsonl.gz" for "poems.v2.jsonl.gz"."""
    return suffix(file) + compression(file)


def _hash_once(file: str, folder: Path) -> str:
    """Does the same as ``hash_file``, but caches the digest of a large file (20 GB take a minute).

    The digest of a file that has just changed is not cached, since a coarse clock can hide another change.
    """
    state = _file_state(file)
    if state["size"] < MIN_CACHED_BYTES:
        return hash_file(file)
    note = folder / HASHES / fingerprint([state["path"].encode("utf-8", "surrogateescape")])
    with suppress(OSError, ValueError, KeyError):
        cached = json.loads(note.read_text(encoding="utf-8"))
        if cached["file"] == state:
            return cached["sha256"]
    digest = hash_file(file)
    if _file_state(file) == state and time.time_ns() - max(state["modified"], state["changed"]) > SETTLED_NS:
        with suppress(OSError):  # without a note, the file is hashed again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            fresh = note.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({"file": state, "sha256": digest}), encoding="utf-8")
            fresh.replace(note)
    return digest


def _file_state(file: str) -> dict[str, Any]:
    """Returns the identity, size and times of a file. Every write updates ``changed`` (ctime)."""
    status = os.stat(file)
    times = {"modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    path = os.path.realpath(file)
    return {"path": path, "size": status.st_size, "inode": [status.st_dev, status.st_ino], **times}
