"""Which prepared set is a recipe's: its key is the content of all that decides it, never a name or a time."""

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.config import Data, Recipe, Source
from hf_clm.data.build import Split, build_split, load_splits, mix_splits
from hf_clm.data.read.readers import compression, suffix
from hf_clm.data.read.records import Examples
from hf_clm.data.read.sources import find_files
from hf_clm.data.store import Stored, open_store
from hf_clm.data.streaming import load_head
from hf_clm.hashing import fingerprint, hash_file

FORMAT_VERSION = 4  # raise it with every change of what is made of the same data: labels, packing, files
COMMIT = re.compile("[0-9a-f]{40}")
KEY_LETTERS = 32  # of the sha256, in the name of the folder
HASHES = ".hashes"  # in the cache: sha256 of large data files that were read before
REMEMBERED_BYTES = 1 << 20
SETTLED_NS = 10 * 10**9
OF_STREAMS = {"streaming", "shuffle_buffer"}  # they change nothing of what is prepared
OF_WHOLE = {"max_dropped", "max_leakage"}  # what the whole set is measured by, and none of its shards
LIBRARIES = ("tokenizers", "transformers")  # which render and encode


@dataclass(frozen=True)
class Place:
    """Where the prepared set of a recipe is, or would be, kept.

    ``files``: those of the data, as read. ``shards_key``: of what its shards are made of.
    """

    folder: Path
    files: list[str]
    shards_key: str

    @property
    def key(self) -> str:
        return self.folder.name


def find_place(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Place | None:
    """None where nothing is kept: a stream, cache_dir is null, or data on the Hub not pinned to a commit.

    ``seed`` decides what is held out. Raises DataError for data that are not there.
    """
    data = recipe.data
    if data.cache_dir is None or data.streaming:
        return None
    files: list[str] = []
    folder = cache_folder(data)
    contents = [_source_content(source, files, folder=folder) for source in (*data.train, *data.eval)]
    if None in contents:
        return None
    left_out = {"train", "eval", "cache_dir", "eval_train_rows", "mixing", *OF_STREAMS}
    options = data.model_dump(exclude=left_out)
    options |= {"overflow": recipe.resolved_overflow, "packing": recipe.resolved_packing}
    parts = {
        "format": FORMAT_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "stage": recipe.stage,
        "data": options,
        "seed": seed if data.eval_fraction else None,
        "train": contents[: len(data.train)],
        "eval": contents[len(data.train) :],
        "tokenizer": _tokenizer_content(tokenizer),
    }
    of_shards = {**parts, "data": {name: options[name] for name in options.keys() - OF_WHOLE}}
    return Place(folder / fingerprint([parts])[:KEY_LETTERS], files, fingerprint([of_shards])[:KEY_LETTERS])


def cache_folder(data: Data) -> Path:
    """``data.cache_dir``; where it is the default, HF_CLM_CACHE of the environment comes first."""
    assert data.cache_dir is not None
    is_default = data.cache_dir == Data.model_fields["cache_dir"].default
    moved = os.environ.get("HF_CLM_CACHE") if is_default else None
    return Path(moved or data.cache_dir).expanduser().absolute()


def open_place(place: Place, recipe: Recipe, *, seed: int) -> Stored | None:
    """The prepared set of a recipe, if it is kept there."""
    return open_store(
        place.folder, recipe, files=place.files, load_examples=partial(load_named, recipe, seed)
    )


def read_splits(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    loaded: Mapping[str, Examples] | None = None,
) -> dict[str, Split]:
    """Train, mixed, and, if there is one, eval: opened where they were prepared before, else made.

    Writes nothing.

    ``loaded``: the examples, if they were read already.
    """
    place = find_place(recipe, tokenizer, seed=seed)
    stored = open_place(place, recipe, seed=seed) if place else None
    splits = (
        stored.splits
        if stored
        else build_splits(recipe, tokenizer, loaded=loaded or load_named(recipe, seed))
    )
    return mix_splits(splits, recipe, seed=seed)


def load_early(recipe: Recipe, seed: int) -> dict[str, Examples]:
    """The examples, where the tokenizer is trained on them; else nothing: a prepared set needs none."""
    recipe = recipe.for_tokenizer(has_template=recipe.tokenizer.chat_template is not None)
    return load_named(recipe, seed) if recipe.tokenizer.train else {}


def load_named(recipe: Recipe, seed: int) -> dict[str, Examples]:
    """The examples by the name of their split: train (of a stream the first) and, if there is one, eval."""
    train, evaluation = load_head(recipe) if recipe.data.streaming else load_splits(recipe, seed)
    return {"train": train, "eval": evaluation} if evaluation else {"train": train}


def build_splits(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, loaded: Mapping[str, Examples]
) -> dict[str, Split]:
    """Tokenizes, fits and packs each set, every row once."""
    return {name: build_split(examples, recipe, tokenizer=tokenizer) for name, examples in loaded.items()}


def _source_content(source: Source, files: list[str], *, folder: Path) -> dict[str, Any] | None:
    """What a source is, without its path; its files are added to ``files``. None where that is not known."""
    options = source.model_dump(exclude={"path", "weight", "epochs"})
    found = find_files(source.path, split=source.split)
    if found is None:  # on the Hub, where a branch or a tag may move
        files.append(source.path)
        is_pinned = COMMIT.fullmatch(source.revision or "") is not None
        return {**options, "hub": source.path} if is_pinned else None
    files += found
    try:
        return {**options, "files": [(_file_type(file), _hash_once(file, folder)) for file in found]}
    except OSError:  # reading it tells what is wrong
        return None


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
    """``hash_file``, remembered for a large file as long as nobody writes to it: 20 GB take a minute.

    One that changed a moment ago is read again: the clock of its file system may not tell two changes apart.
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
    """What a system says of a file; every write to it changes ``changed``, which nobody can set."""
    found = os.stat(file)
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    path = os.path.realpath(file)
    return {"path": path, "size": found.st_size, "inode": [found.st_dev, found.st_ino], **times}
