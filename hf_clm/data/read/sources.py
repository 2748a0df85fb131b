"""Files, globs, folders and Hub names to records; every refusal names its file and line.

path -> files -> decompressed stream -> one reader per file type -> (place, value) -> Record
"""

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hf_clm.data.read.readers import (
    DOCUMENT_FIX,
    KNOWN_TYPES,
    READERS,
    Items,
    ReadOptions,
    ReadReport,
    Record,
    Stream,
    first_line,
    or_raise,
    suffix,
)
from hf_clm.errors import DataError, EnvironmentFault, did_you_mean

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")
HTML_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", re.IGNORECASE)


def read_records(
    path: str,
    options: ReadOptions,
    *,
    report: ReadReport,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
) -> Iterator[Record]:
    """Yields the records of a file, glob, folder or Hub dataset (the keywords are its)."""
    files = find_files(path)
    if files is None:
        report.files.append(path)
        rows = read_hub(path, split=split, name=name, revision=revision)
        yield from to_records(rows, file=path, options=options, report=report)
    for file in files or []:
        report.files.append(file)
        yield from read_file(file, options, report=report)


def read_file(file: str, options: ReadOptions, *, report: ReadReport) -> Iterator[Record]:
    """Yields the records of a file."""
    with open_stream(file, options, report=report) as source:
        rows = READERS[suffix(file)](source)
        yield from to_records(rows, file=file, options=options, report=report)


@contextmanager
def open_stream(file: str, options: ReadOptions, *, report: ReadReport) -> Iterator[Stream]:
    """A file of a known type, decompressed; what goes wrong with it is an error that names it."""
    if suffix(file) not in READERS:
        raise DataError("unknown file type", where=file, got=repr(suffix(file)), fix=KNOWN_TYPES)
    with _naming(file), _open(file) as stream:
        yield Stream(file, stream, options, report)


def find_files(path: str) -> list[str] | None:
    """The files that a path stands for, sorted; None for a Hub name."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _files_in_folder(path)
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    files = sorted(file for file in matches if not os.path.isdir(file))
    is_local = path.startswith((".", "/")) or path.count("/") > 1 or suffix(path) in READERS
    if files or (not is_local and HUB_NAME.fullmatch(path)):
        return files or None
    what = "no file matches" if glob.has_magic(path) else "no such file" + _nearest(path)
    raise DataError(what, where=path, fix="check name and working directory")


def _files_in_folder(folder: str) -> list[str]:
    with _naming(folder):
        walk = list(os.walk(folder, onerror=or_raise))
    found = sorted(os.path.relpath(f"{root}/{f}", folder) for root, _, names in walk for f in names)
    files = [os.path.join(folder, f) for f in found if suffix(f) in READERS and "/." not in f"/{f}"]
    if not files:
        got = ", ".join([*found[:5], f"{len(found)} files in all"])
        raise DataError("no data file in this folder", where=folder, got=got, fix=KNOWN_TYPES)
    return files


def to_records(items: Items, *, file: str, options: ReadOptions, report: ReadReport) -> Iterator[Record]:
    """Checks what a reader gives; nothing at all is an error too."""
    records = report.records
    for where, value in items:
        has_nul = check_value(value, where)
        if has_nul and options.nul == "error":
            raise DataError("U+0000 in a text", where=where, fix="remove it, or set nul to warn")
        report.records += 1
        report.nul_records += has_nul
        yield Record(value, where)
    if report.records == records:
        raise no_record(file, [])


def no_record(file: str, bad_lines: list[str]) -> DataError:
    """The error for a file that gives nothing."""
    if bad_lines:
        return DataError(f"no usable record in {len(bad_lines)} lines", where=file, got=bad_lines[0])
    return DataError("empty file (0 records)", where=file)


def check_value(value: Any, where: str) -> bool:
    """Whether a text in the value holds U+0000; raises for what no record may hold."""
    has_nul = False
    for leaf in _leaves(value):
        if isinstance(leaf, DataError):
            raise leaf if leaf.where else DataError(leaf.what, where=where, got=leaf.got, fix=leaf.fix)
        if isinstance(leaf, str) and not leaf.isascii() and (half := SURROGATE.search(leaf)):
            raise DataError(f"half a surrogate pair, {half[0]!a}, in a text", where=where, fix="remove it")
        has_nul = has_nul or (isinstance(leaf, str) and "\0" in leaf)
    if not isinstance(value, dict):
        got = "null" if value is None else type(value).__name__
        raise DataError("expected an object", where=where, got=got, fix=DOCUMENT_FIX)
    return has_nul


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values at any depth, without recursion; not the integers, of which there may be many."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += [inner for inner in item if type(inner) is not int]
        else:
            yield item


def read_hub(
    path: str, *, split: str, name: str | None, revision: str | None, first: int | None = None
) -> Items:
    """The rows of a dataset on the Hub, fetched whole and kept, or streamed from the row ``first`` on."""
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):  # load_dataset then looks into its cache
            # One short question first: without a network load_dataset alone retries for 23 seconds.
            HfApi().dataset_info(path, revision=revision, timeout=10)
        how: dict[str, Any] = {} if first is None else {"streaming": True}
        rows = load_dataset(path, name, split=split, revision=revision, **how)
    except Exception as error:  # no network is an error of the HTTP package, and those have changed
        what = f"no such file{_nearest(path)}; on the Hub: {first_line(error)}"
        if isinstance(error, HfHubHTTPError | DatasetsError | ValueError):
            fix = "check name, split, configuration and revision; set HF_TOKEN if it is private or gated"
            raise DataError(what, where=path, fix=fix) from error
        fix = f"give a file; HF_HUB_OFFLINE=1 uses what is cached in {config.HF_DATASETS_CACHE}"
        raise EnvironmentFault(what, where=path, fix=fix) from error
    for number, row in enumerate(rows.skip(first) if first else rows, start=(first or 0) + 1):
        yield f"{path}: record {number}", row


@contextmanager
def _open(file: str) -> Iterator[io.BufferedReader]:
    with open(file, "rb") as raw:
        _refuse_not_data(raw.peek(), file)
        inner: Any = raw
        if file.lower().endswith(".gz"):
            inner = gzip.GzipFile(fileobj=raw)
        elif file.lower().endswith(".zst"):
            import pyarrow  # and not zstandard, which takes a file that is cut off for a whole one

            inner = pyarrow.CompressedInputStream(raw, "zstd")
        with io.BufferedReader(inner) as stream:
            _refuse_not_data(stream.peek(), file)
            is_whole = inner is raw or suffix(file) not in (".parquet", ".arrow")  # those two seek
            yield stream if is_whole else io.BufferedReader(io.BytesIO(stream.read()))


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Turns what the system, a decompressor or pyarrow raises into an error that names the file."""
    try:
        yield
    except (ValueError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise EnvironmentFault("cannot be read", where=file, got=str(error.strerror)) from error
        what, fix = "damaged, cut off, or not of the type it is named as", "fetch or write it again"
        raise DataError(what, where=file, got=first_line(error), fix=fix) from error


def _refuse_not_data(head: bytes, file: str) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise DataError("a Git-LFS pointer, not the data", where=file, fix="run git lfs pull")
    if HTML_PAGE.match(head):
        raise DataError("an HTML page, not data", where=file, fix="download the raw file")


def _nearest(path: str) -> str:
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
