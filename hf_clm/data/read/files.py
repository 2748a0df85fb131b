"""The files that a path stands for: one, a glob's, or those of a folder that are data of the wanted split.

d/train.jsonl  d/test.jsonl  d/part-00001   ->  d/train.jsonl, and notes on the two others
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
from hf_clm.recipe.shipped import how_to_make

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# The names by which datasets.load_dataset sorts the files of a folder into splits.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BREAK = "[-._ 0-9]"
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# What lies in a folder beside its data: what datasets writes about it, notes for people, caches.
DESCRIPTION = re.compile(r"(dataset_infos?|dataset_dict|state)\.json")
NO_DATA = re.compile(
    r"(readme|licen[cs]e|notice|changelog)(\.[a-z]+)?|config\.json|(cache-|tmp).*\.arrow", re.IGNORECASE
)


def find_files(path: str, *, split: str = "train", report: ReadReport | None = None) -> list[str] | None:
    """Returns the files that a path stands for, sorted; None for a Hub name.

    ``split`` is of a folder whose names tell splits. What a folder has besides is entered in the report.
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
    what = "no file matches" if glob.has_magic(path) else "no such file" + nearest(path)
    raise DataError(what, where=path, fix=how_to_make(path) or "check name and working directory")


def nearest(path: str) -> str:
    """``; did you mean 'poems.jsonl'?`` where a file of a similar name lies there."""
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""


def sort_into_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each split, by their names in a folder, as ``datasets.load_dataset`` tells them.

    Empty where no name tells a split. The name of a text must be that of a split alone: "the train.txt" is
    one of many texts.
    """
    names = list(names)
    shards: dict[str, list[str]] = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for tells in (_lies_in_split, _is_named_as_split):
        found = {split: [name for name in names if tells(name, split)] for split in SPLITS}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {}


def _lies_in_split(name: str, split: str) -> bool:
    words = "|".join(SPLITS[split])
    pattern = re.compile(f"(.*{BREAK})?({words})({BREAK}.*)?", re.DOTALL)
    return any(pattern.fullmatch(folder) for folder in name.split("/")[:-1])


def _is_named_as_split(name: str, split: str) -> bool:
    words, name = "|".join(SPLITS[split]), os.path.basename(name)
    if suffix(name) in TEXTS:
        return re.fullmatch(f"({words})({BREAK}|of)*", name[: name.lower().index(suffix(name))]) is not None
    return re.fullmatch(f"(.*{BREAK})?({words}){BREAK}.*", name, re.DOTALL) is not None


def _walk(folder: str) -> Iterator[str]:
    """Every file below a folder, also through links, each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=or_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = os.stat(root)
        if (found.st_dev, found.st_ino) in seen:  # a link back to where it comes from
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
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
    """The data files of a split among the names in a folder."""
    names = sorted(name for name in names if "/." not in f"/{name}")
    saved = {os.path.dirname(name): found for name in names if (found := _read_state(folder, name))}
    data = [name for name in names if _is_data(name, saved)]
    if not data:
        got = ", ".join([*names[:5], f"{len(names)} files in all"])
        raise DataError("no data file in this folder", where=folder, got=got, fix=KNOWN_TYPES)
    if "dataset_dict.json" in names:
        known = _read_json(os.path.join(folder, "dataset_dict.json"))["splits"]
        splits = {name: [file for file in data if file.startswith(f"{name}/")] for name in known}
    else:
        splits = {} if "" in saved else sort_into_splits(data)
    wanted = data if "" in saved else _of_split(folder, data, splits, split=split)
    others = [name for name, files in splits.items() if files != wanted]
    if others:
        report.note(f"{folder}: read split {split} ({_some(wanted)}); not read: {', '.join(others)}")
    sorted_names = {name for files in splits.values() for name in files} or set(data)
    report.left_out += [
        os.path.join(folder, name)
        for name in names
        if name not in sorted_names and not DESCRIPTION.fullmatch(os.path.basename(name))
    ]
    return [os.path.join(folder, name) for name in wanted]


def _is_data(name: str, saved: dict[str, list[str]]) -> bool:
    """Whether a file is data: by its type or, where a dataset was saved, by what that names."""
    home, base = os.path.split(name)
    if home in saved:
        return base in saved[home]
    return suffix(name) in READERS and not (NO_DATA.fullmatch(base) or DESCRIPTION.fullmatch(base))


def _of_split(folder: str, data: list[str], splits: dict[str, list[str]], *, split: str) -> list[str]:
    wanted = next((known for known, words in SPLITS.items() if split in words), split)
    if not splits and wanted == "train":
        return data
    for name in (split, wanted):
        if splits.get(name):
            return splits[name]
    rest = [name for name in data if not any(name in files for files in splits.values())]
    told = [f"{name} ({_some(files)})" for name, files in splits.items()]
    told += [f"no split of {_some(rest)}"] if rest else []
    fix = f"split: {next(iter(splits))}, or " if splits else ""
    fix += (
        f"a glob, which takes every file that it matches: {os.path.join(folder, '**', '*' + suffix(data[0]))}"
    )
    raise DataError(f"no split {split!r} in this folder", where=folder, got=", ".join(told), fix=fix)


def _read_state(folder: str, name: str) -> list[str]:
    """The files that ``Dataset.save_to_disk`` names in its ``state.json``; none for another file."""
    if os.path.basename(name) != "state.json":
        return []
    file = os.path.join(folder, name)
    state = _read_json(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        fix = "load it with the version of datasets that wrote it, and save it after flatten_indices()"
        raise DataError("a saved dataset of which indices select the rows", where=file, fix=fix)
    return [item["filename"] for item in state.get("_data_files", [])]


def _read_json(file: str) -> dict[str, Any]:
    with naming(file), open_raw(file) as raw:
        found = json.load(raw)
    return found if isinstance(found, dict) else {}


def _once(files: list[str], report: ReadReport) -> list[str]:
    """The files, each once: a link to another is not read again. Raises where two seem to be the same."""
    plain: dict[str, str] = {}
    for file in files:
        name = file.removesuffix(file[len(file) - len(compression(file)) :])
        if (first := plain.setdefault(name, file)) != file:
            fix = "remove one of them, or name the files that you mean"
            raise DataError("the same file twice, by its name", where=first, got=file, fix=fix)
    found: dict[tuple[int, int], str] = {}
    for file in files:
        status = os.stat(file)
        if stat.S_ISFIFO(status.st_mode):
            raise DataError("a pipe, which can be read only once", where=file, fix="write it into a file")
        first = found.setdefault((status.st_dev, status.st_ino), file)
        if first != file:
            report.note(f"{file} is a link to the same file as {first}: read once")
    return list(found.values())


def _some(names: list[str]) -> str:
    """``a, b and 3 more``."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
