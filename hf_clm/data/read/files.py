"""Finds the files of a path: a file, the matches of a glob, or the data files of a split in a folder.

d/train.jsonl  d/test.jsonl  d/part-00001   ->  d/train.jsonl, and notes on the other two
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from hf_clm.data.read.opening import is_remote, naming, naming_remote, open_filesystem, open_raw
from hf_clm.data.read.readers import (
    KNOWN_TYPES,
    READERS,
    TEXTS,
    ReadReport,
    compression,
    or_raise,
    suffix,
)
from hf_clm.errors import DataError, did_you_mean

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# The names by which datasets.load_dataset assigns the files of a folder to splits.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BREAK = "[-._ 0-9]"
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# Other files in a data folder: metadata of datasets, notes, caches.
DESCRIPTION = re.compile(r"(dataset_infos?|dataset_dict|state)\.json")
NO_DATA = re.compile(
    r"(readme|licen[cs]e|notice|changelog)(\.[a-z]+)?|config\.json|(cache-|tmp).*\.arrow", re.IGNORECASE
)


def find_files(path: str, *, split: str = "train", report: ReadReport | None = None) -> list[str] | None:
    """Returns the files of a path, sorted, or None for a name on the Hub.

    ``split`` selects files in a folder by their names. Other files of the folder are added to the report.
    """
    report = report or ReadReport()
    if is_remote(path):
        return _find_remote(path, split, report)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        with naming(path):
            names = [os.path.relpath(file, path) for file in _walk(path)]
        return _once(_select(path, names, split=split, report=report), report)
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    files = sorted(file for file in matches if not os.path.isdir(file))
    is_local = path.startswith((".", "/")) or path.count("/") > 1 or suffix(path) in READERS
    if files or (not is_local and HUB_NAME.fullmatch(path)):
        return _once(files, report) or None
    from hf_clm.recipe.shipped import how_to_make

    what = "no file matches" if glob.has_magic(path) else "no such file" + nearest(path)
    fix = how_to_make(path) or "check the name and the working directory"
    raise DataError(what, where=path, fix=fix)


def nearest(path: str) -> str:
    """Returns ``; did you mean 'poems.jsonl'?`` if the folder has a file with a similar name."""
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""


def sort_into_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Assigns files to splits by their names, with the rules of ``datasets.load_dataset``.

    Returns an empty dict if no name refers to a split. Text files must be named exactly after a split, since
    "the train.txt" may be one of many texts.
    """
    names = list(names)
    shards: dict[str, list[str]] = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for belongs_to in (_is_in_split_folder, _is_named_as_split):
        splits = {split: [name for name in names if belongs_to(name, split)] for split in SPLITS}
        if any(splits.values()):
            return {split: files for split, files in splits.items() if files}
    return {}


def _is_in_split_folder(name: str, split: str) -> bool:
    words = "|".join(SPLITS[split])
    pattern = re.compile(f"(.*{BREAK})?({words})({BREAK}.*)?", re.DOTALL)
    return any(pattern.fullmatch(folder) for folder in name.split("/")[:-1])


def _is_named_as_split(name: str, split: str) -> bool:
    words, name = "|".join(SPLITS[split]), os.path.basename(name)
    if suffix(name) in TEXTS:
        return re.fullmatch(f"({words})({BREAK}|of)*", name[: name.lower().index(suffix(name))]) is not None
    return re.fullmatch(f"(.*{BREAK})?({words}){BREAK}.*", name, re.DOTALL) is not None


def _walk(folder: str) -> Iterator[str]:
    """Yields every file below a folder; follows links, but visits each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=or_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (os.path.join(root, name) for name in names)


def _find_remote(path: str, split: str, report: ReadReport) -> list[str]:
    fs, inner = open_filesystem(path)
    with naming_remote(path):
        if any(sign in inner for sign in "*[") and not fs.isfile(inner):
            if files := sorted(fs.unstrip_protocol(file) for file in fs.glob(inner) if not fs.isdir(file)):
                return files
            raise DataError("no file matches", where=path, fix="check the URL")
        if fs.info(inner)["type"] != "directory" and not path.endswith("/"):
            return [path]
        root = inner.rstrip("/") + "/"
        names = [file.removeprefix(root) for file in fs.find(inner)]
    return _select(path, names, split=split, report=report)


def _select(folder: str, names: Iterable[str], *, split: str, report: ReadReport) -> list[str]:
    """Returns the data files of a split among the files in a folder."""
    names = sorted(name for name in names if "/." not in f"/{name}")
    saved = {os.path.dirname(name): files for name in names if (files := _read_state(folder, name))}
    data = [name for name in names if _is_data(name, saved)]
    if not data:
        got = ", ".join([*names[:5], f"{len(names)} files in all"])
        raise DataError("no data file in this folder", where=folder, got=got, fix=KNOWN_TYPES)
    if "dataset_dict.json" in names:
        saved_splits = _read_json(os.path.join(folder, "dataset_dict.json"))["splits"]
        splits = {name: [file for file in data if file.startswith(f"{name}/")] for name in saved_splits}
    else:
        splits = {} if "" in saved else sort_into_splits(data)
    selection = data if "" in saved else _of_split(folder, data, splits, split=split)
    others = [name for name, files in splits.items() if files != selection]
    if others:
        report.note(f"{folder}: read split {split} ({_some(selection)}); not read: {', '.join(others)}")
    sorted_names = {name for files in splits.values() for name in files} or set(data)
    report.left_out += [
        os.path.join(folder, name)
        for name in names
        if name not in sorted_names and not DESCRIPTION.fullmatch(os.path.basename(name))
    ]
    return [os.path.join(folder, name) for name in selection]


def _is_data(name: str, saved: dict[str, list[str]]) -> bool:
    """Whether a file is data, by its type or, for a saved dataset, by the dataset's state."""
    home, base = os.path.split(name)
    if home in saved:
        return base in saved[home]
    return suffix(name) in READERS and not (NO_DATA.fullmatch(base) or DESCRIPTION.fullmatch(base))


def _of_split(folder: str, data: list[str], splits: dict[str, list[str]], *, split: str) -> list[str]:
    usual_name = next((name for name, words in SPLITS.items() if split in words), split)
    if not splits and usual_name == "train":
        return data
    for name in (split, usual_name):
        if splits.get(name):
            return splits[name]
    rest = [name for name in data if not any(name in files for files in splits.values())]
    listing = [f"{name} ({_some(files)})" for name, files in splits.items()]
    listing += [f"no split of {_some(rest)}"] if rest else []
    fix = f"set split: {next(iter(splits))}, or " if splits else ""
    fix += f"use a glob to read all matching files: {os.path.join(folder, '**', '*' + suffix(data[0]))}"
    raise DataError(f"no split {split!r} in this folder", where=folder, got=", ".join(listing), fix=fix)


def _read_state(folder: str, name: str) -> list[str]:
    """Returns the files that ``Dataset.save_to_disk`` lists in ``state.json``; none for any other file."""
    if os.path.basename(name) != "state.json":
        return []
    file = os.path.join(folder, name)
    state = _read_json(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        fix = "load it with the version of datasets that wrote it, and save it after flatten_indices()"
        raise DataError("a saved dataset with an indices mapping", where=file, fix=fix)
    return [item["filename"] for item in state.get("_data_files", [])]


def _read_json(file: str) -> dict[str, Any]:
    with naming(file), open_raw(file) as raw:
        content = json.load(raw)
    return content if isinstance(content, dict) else {}


def _once(files: list[str], report: ReadReport) -> list[str]:
    """Removes links to the same file. Raises DataError if two names seem to be the same file."""
    plain: dict[str, str] = {}
    for file in files:
        name = file.removesuffix(file[len(file) - len(compression(file)) :])
        if (first := plain.setdefault(name, file)) != file:
            fix = "remove one of them, or list the files to read"
            raise DataError("the same file twice, by name", where=first, got=file, fix=fix)
    unique: dict[tuple[int, int], str] = {}
    for file in files:
        status = os.stat(file)
        if stat.S_ISFIFO(status.st_mode):
            raise DataError("a pipe, which can be read only once", where=file, fix="write it to a file")
        first = unique.setdefault((status.st_dev, status.st_ino), file)
        if first != file:
            report.note(f"{file} is a link to the same file as {first}; read once")
    return list(unique.values())


def _some(names: list[str]) -> str:
    """Formats names as ``a, b, c and 3 more``."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
