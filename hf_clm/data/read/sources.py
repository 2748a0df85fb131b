"""Reads the records of files, globs, folders and Hub datasets. Every error names the file and line.

path -> files -> decompressed stream -> reader of the file type -> (place, value) -> RawRecord
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hf_clm.data.read.files import find_files, nearest
from hf_clm.data.read.opening import open_stream
from hf_clm.data.read.readers import (
    DOCUMENT_FIX,
    READERS,
    Items,
    RawRecord,
    ReadOptions,
    ReadReport,
    first_line,
    suffix,
)
from hf_clm.errors import DataError, EnvironmentFault

SURROGATE = re.compile("[\ud800-\udfff]")


def read_records(
    path: str,
    options: ReadOptions,
    *,
    report: ReadReport,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
) -> Iterator[RawRecord]:
    """Yields the records of a file, glob, folder or Hub dataset.

    ``split`` applies to folders and Hub datasets, ``name`` and ``revision`` to Hub datasets only.
    """
    files = find_files(path, split=split, report=report)
    if files is None:
        report.files.append(path)
        rows = read_hub(path, split=split, name=name, revision=revision)
        yield from to_records(rows, file=path, options=options, report=report)
    for file in files or []:
        report.files.append(file)
        yield from read_file(file, options, report=report)


def read_file(file: str, options: ReadOptions, *, report: ReadReport) -> Iterator[RawRecord]:
    """Yields the records of a file."""
    with open_stream(file, options, report=report) as source:
        rows = READERS[suffix(file)](source)
        yield from to_records(rows, file=file, options=options, report=report)


def to_records(items: Items, *, file: str, options: ReadOptions, report: ReadReport) -> Iterator[RawRecord]:
    """Checks the values of a reader and yields records. Raises DataError if there are none."""
    records = report.records
    for where, value in items:
        report.nul_records += check_value(value, where)
        report.records += 1
        yield RawRecord(value, where)
    if report.records == records:
        raise no_record(file, [])


def no_record(file: str, bad_lines: list[str]) -> DataError:
    """Returns the error for a file without usable records."""
    if bad_lines:
        return DataError(f"no usable record in {len(bad_lines)} lines", where=file, got=bad_lines[0])
    return DataError("empty file (0 records)", where=file)


def check_value(value: Any, where: str) -> bool:
    """Returns whether a text in the value contains U+0000. Raises DataError for invalid values."""
    has_nul = False
    for leaf in _leaves(value):
        if isinstance(leaf, DataError):
            raise leaf if leaf.where else DataError(leaf.what, where=where, got=leaf.got, fix=leaf.fix)
        if isinstance(leaf, str) and not leaf.isascii() and (half := SURROGATE.search(leaf)):
            what = f"a text contains half a surrogate pair, {half[0]!a}"
            raise DataError(what, where=where, fix="remove it")
        has_nul = has_nul or (isinstance(leaf, str) and "\0" in leaf)
    if not isinstance(value, dict):
        got = "null" if value is None else type(value).__name__
        raise DataError("expected an object", where=where, got=got, fix=DOCUMENT_FIX)
    return has_nul


def _leaves(value: Any) -> Iterator[Any]:
    """Yields keys and values at any depth, without recursion; skips integers in lists for speed."""
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
    path: str, *, split: str, name: str | None, revision: str | None, streams: bool = False
) -> Items:
    """Yields the rows of a dataset on the Hub, which is downloaded and cached unless it ``streams``."""
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):  # load_dataset then uses its cache
            # Check first: without a network, load_dataset would retry for 23 seconds.
            HfApi().dataset_info(path, revision=revision, timeout=10)
        rows = load_dataset(path, name, split=split, revision=revision, streaming=streams)
    except Exception as error:  # network errors come from the HTTP package, which has changed before
        what = f"no such file{nearest(path)}; on the Hub: {first_line(error)}"
        if isinstance(error, HfHubHTTPError | DatasetsError | ValueError):
            fix = "check name, split, configuration and revision; set HF_TOKEN if it is private or gated"
            raise DataError(what, where=path, fix=fix) from error
        fix = f"use a local file; HF_HUB_OFFLINE=1 uses the cache in {config.HF_DATASETS_CACHE}"
        raise EnvironmentFault(what, where=path, fix=fix) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: record {number}", row
