"""Which prepared set is a recipe's: its key is the content of all that decides it, never a name or a time."""

import datetime
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import hf_clm.schema
from hf_clm.data.prepared.prepare import write_prepared
from hf_clm.data.prepared.sets import read_examples, to_head
from hf_clm.data.prepared.store import Stored, open_store
from hf_clm.data.read.formats import own_modules
from hf_clm.data.read.readers import ReadReport, compression, suffix
from hf_clm.data.read.sources import find_files
from hf_clm.data.split import Split, mix_splits
from hf_clm.hashing import fingerprint, hash_file
from hf_clm.recipe.recipe import Data, Recipe, Source
from hf_clm.recipe.sections import cache_folder
from hf_clm.text.tokenizer import fix_date, prints_date

COMMIT = re.compile("[0-9a-f]{40}")
KEY_LETTERS = 32  # of the sha256, in the name of the folder
HASHES = ".hashes"  # in the cache: sha256 of large data files that were read before
REMEMBERED_BYTES = 1 << 20
SETTLED_NS = 10 * 10**9
LIBRARIES = ("tokenizers", "transformers")  # which render and encode
LABELLING = ("schema.py", "recipe/template.py", "text", "data")  # where labels are made and proved


@dataclass(frozen=True)
class Place:
    """Where the prepared set of a recipe is, or would be.

    files: those of the data, in the order of reading.
    notes: which files of a folder they are, and which are left out: the key knows nothing of these.
    why_not: why it is not kept for other runs; empty: it is.
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
    """The place of a recipe's prepared set.

    Args:
        seed: decides what is held out.
        aside: the folder for a set that is not kept in the cache: of a stream, without data.cache_dir, of
            data on the Hub that are not pinned to a commit.
        launch: what stands for the content of data that no content is known of.

    Raises DataError for data that are not there.
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
        "libraries": {name: version(name) for name in LIBRARIES},
        "stage": recipe.stage,
        "data": options,
        "seed": seed if data.eval_fraction else None,
        "sources": [contents, len(data.train)],
        "tokenizer": _tokenizer_content(tokenizer),
    }
    key = fingerprint([parts])[:KEY_LETTERS]
    return Place((aside if why_not else folder) / key, report.files, report.to_lines(), why_not)


def open_place(place: Place, recipe: Recipe) -> Stored | None:
    """The prepared set of a recipe, if it is there."""
    recipe = to_head(recipe)
    load = partial(_load_examples, recipe)
    return open_store(place.folder, recipe, files=place.files, load_examples=load)


def read_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> dict[str, Split]:
    """Train, mixed, and, if there is one, eval: opened where they were prepared before, else made aside.

    Keeps nothing. The tokenizer's template prints the date of the set from then on.
    """
    with tempfile.TemporaryDirectory() as folder:  # what is open stays readable
        place = find_place(recipe, tokenizer, seed=seed, aside=Path(folder))
        stored = open_place(place, recipe)
        if stored is None:
            place = replace(place, folder=Path(folder) / place.key)
            write_prepared(place.folder, to_head(recipe), tokenizer, seed=seed, date=today(tokenizer))
            stored = open_place(place, recipe)
        assert stored is not None, "it was written a moment ago"
        if stored.date:
            fix_date(tokenizer, stored.date)
        return mix_splits(stored.splits, recipe, seed=seed)


def today(tokenizer: PreTrainedTokenizerFast) -> str:
    """The date, where the chat template prints it; else nothing."""
    return datetime.date.today().isoformat() if prints_date(tokenizer) else ""


def _load_examples(recipe: Recipe, name: str) -> list[Any]:
    return list(read_examples(recipe.data, name))


def _source_content(source: Source, report: ReadReport, *, folder: Path) -> dict[str, Any] | None:
    """What a source is, without its path; None where that is not known. Enters its files in the report."""
    options = source.model_dump(include=Source.deciding())
    found = find_files(source.path, split=source.split, report=report)
    if found is None:  # on the Hub, where a branch or a tag may move
        report.files.append(source.path)
        is_pinned = COMMIT.fullmatch(source.revision or "") is not None
        return {**options, "hub": source.path} if is_pinned else None
    report.files += found
    try:
        return {**options, "files": [(_file_type(file), _hash_once(file, folder)) for file in found]}
    except OSError:  # reading it tells what is wrong
        return None


def _code_content(formats: list[str | None]) -> str:
    """The sources of the code that makes labels, the user's own formats included."""
    package = Path(hf_clm.schema.__file__).parent
    found = [path for name in LABELLING for path in (package / name, *sorted((package / name).rglob("*.py")))]
    sources = [path.read_bytes() for path in found if path.is_file()]
    return fingerprint([*sources, own_modules(formats)])


def _tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokenizer("", add_special_tokens=False)  # its backend as it is when it encodes
    return {
        "class": type(tokenizer).__name__,
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }


def _file_type(file: str) -> str:
    """ ".jsonl.gz" of "poems.v2.jsonl.gz": what decides how it is read."""
    return suffix(file) + compression(file)


def _hash_once(file: str, folder: Path) -> str:
    """``hash_file``, with the digest of a large file cached until it changes: hashing 20 GB takes a minute.

    A file that changed a moment ago is always hashed again, because a coarse clock can hide a second change.
    """
    seen = _signs(file)
    if seen["size"] < REMEMBERED_BYTES:
        return hash_file(file)
    note = folder / HASHES / fingerprint([seen["path"].encode("utf-8", "surrogateescape")])
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == seen:
            return known["sha256"]
    digest = hash_file(file)
    if _signs(file) == seen and time.time_ns() - max(seen["modified"], seen["changed"]) > SETTLED_NS:
        with suppress(OSError):  # then it is read again
            note.parent.mkdir(parents=True, exist_ok=True)
            fresh = note.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({"file": seen, "sha256": digest}), encoding="utf-8")
            fresh.replace(note)
    return digest


def _signs(file: str) -> dict[str, Any]:
    """Identity, size and times of a file. Any write updates ``changed`` (ctime); no program can set it."""
    found = os.stat(file)
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    path = os.path.realpath(file)
    return {"path": path, "size": found.st_size, "inode": [found.st_dev, found.st_ino], **times}
