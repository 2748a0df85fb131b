"""Files, globs, folders and Hub names to records; every refusal names its file and line.

    path -> files -> decompressed stream -> one reader per file type -> (place, value) -> Record

A reader gives, in the place of a value that is refused, the ``DataError`` that says why.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from hf_clm.errors import DataError, EnvironmentFault, did_you_mean

Items = Iterator[tuple[str, Any]]  # (place, value), or (place, why the value is refused)
BATCH_ROWS = 1024
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")
DOCUMENT_FIX = "one object a line; a JSON array or pretty-printed object belongs into a .json file"
HTML_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """A raw row; ``where`` is "poems.jsonl:17" (file and line), or "poems.csv: record 17"."""

    data: dict[str, Any]
    where: str


@dataclass(frozen=True)
class ReadOptions:
    """``max_line_bytes`` bounds a line of jsonl, csv and tsv; ``nul`` is about U+0000 in a text."""

    skip_bad_lines: bool = False
    max_line_bytes: int = 8 * 1024 * 1024
    nul: Literal["warn", "error"] = "warn"


@dataclass
class ReadReport:
    """What was read; filled while reading."""

    files: list[str] = field(default_factory=list)
    records: int = 0
    blank_lines: int = 0
    bad_lines: list[str] = field(default_factory=list)  # the messages of skipped lines
    nul_records: int = 0


class _Source(NamedTuple):
    file: str
    stream: io.BufferedReader
    options: ReadOptions
    report: ReadReport


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
        rows = _read_hub(path, split=split, name=name, revision=revision)
        yield from _to_records(rows, file=path, options=options, report=report)
    for file in files or []:
        report.files.append(file)
        if _suffix(file) not in READERS:
            raise DataError("unknown file type", where=file, got=repr(_suffix(file)), fix=KNOWN_TYPES)
        with _naming(file), _open(file) as stream:
            rows = READERS[_suffix(file)](_Source(file, stream, options, report))
            yield from _to_records(rows, file=file, options=options, report=report)


def find_files(path: str) -> list[str] | None:
    """The files that a path stands for, sorted; None for a Hub name."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _files_in_folder(path)
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    files = sorted(file for file in matches if not os.path.isdir(file))
    is_local = path.startswith((".", "/")) or path.count("/") > 1 or _suffix(path) in READERS
    if files or (not is_local and HUB_NAME.fullmatch(path)):
        return files or None
    what = "no file matches" if glob.has_magic(path) else "no such file" + _nearest(path)
    raise DataError(what, where=path, fix="check name and working directory")


def _files_in_folder(folder: str) -> list[str]:
    with _naming(folder):
        walk = list(os.walk(folder, onerror=_or_raise))
    found = sorted(os.path.relpath(f"{root}/{f}", folder) for root, _, names in walk for f in names)
    files = [os.path.join(folder, f) for f in found if _suffix(f) in READERS and "/." not in f"/{f}"]
    if not files:
        got = ", ".join([*found[:5], f"{len(found)} files in all"])
        raise DataError("no data file in this folder", where=folder, got=got, fix=KNOWN_TYPES)
    return files


def _to_records(items: Items, *, file: str, options: ReadOptions, report: ReadReport) -> Iterator[Record]:
    records, bad_lines = report.records, len(report.bad_lines)
    for where, value in items:
        try:
            has_nul = _check(value, where)
            if has_nul and options.nul == "error":
                raise DataError("U+0000 in a text", where=where, fix="remove it, or set nul to warn")
        except DataError as error:
            if not options.skip_bad_lines:
                raise
            report.bad_lines.append(str(error))
            continue
        report.records += 1
        report.nul_records += has_nul
        yield Record(value, where)
    if report.records == records:
        if bad := report.bad_lines[bad_lines:]:
            raise DataError(f"no usable record in {len(bad)} lines", where=file, got=bad[0])
        raise DataError("empty file (0 records)", where=file)


def _check(value: Any, where: str) -> bool:
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


def _read_json_lines(source: _Source) -> Items:
    for number, line in _lines(source):
        if isinstance(line, str) and not line.strip():
            source.report.blank_lines += 1
        else:
            value = _parse(line, source.file, line=number) if isinstance(line, str) else line
            yield f"{source.file}:{number}", value


def _read_json(source: _Source) -> Items:
    """An array of objects, one object, or (common under this name) an object per line."""
    data = source.stream.read()
    text = _or_raise(_decode(data, source.file))
    first_line = text.strip().split("\n", 1)[0]
    if first_line != text.strip() and isinstance(_parse(first_line, source.file), dict):
        yield from _read_json_lines(source._replace(stream=io.BufferedReader(io.BytesIO(data))))
        return
    value = _parse(text, source.file) if first_line else []
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{source.file}: record {number}", item


def _read_table(source: _Source, *, delimiter: str) -> Items:
    csv.field_size_limit(max(csv.field_size_limit(), source.options.max_line_bytes))  # else 128 KiB a cell
    lines = (_or_raise(line) for _, line in _lines(source))  # not skipped: it may be inside a quoted cell
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next((row for row in reader if row), [])
        _check_columns(header, f"{source.file}:{reader.line_num}")
        for row in reader:
            number += bool(row)
            if len(row) == len(header):
                yield f"{source.file}: record {number}", dict(zip(header, row, strict=True))
            elif row:
                where = f"{source.file}:{reader.line_num}"
                what = f"expected {len(header)} cells, as in the header"
                yield where, DataError(what, where=where, got=str(len(row)))
            else:
                source.report.blank_lines += 1
    except csv.Error as error:
        where = f"{source.file}:{reader.line_num}"
        raise DataError(f"not a valid table: {error}", where=where, fix="check the quotes") from None


def _read_columns(source: _Source) -> Items:
    """Parquet, and both kinds of Arrow file: with an index at its end, or a stream, as datasets writes it."""
    from pyarrow import ipc, parquet

    if _suffix(source.file) == ".parquet":
        table = parquet.ParquetFile(source.stream)
        schema, batches = table.schema_arrow, table.iter_batches(batch_size=BATCH_ROWS)
    elif source.stream.peek(6).startswith(b"ARROW1"):
        indexed = ipc.open_file(source.stream)
        schema, batches = indexed.schema, map(indexed.get_batch, range(indexed.num_record_batches))
    else:
        batches = ipc.open_stream(source.stream)
        schema = batches.schema
    _check_columns(schema.names, source.file)
    sound = (b for b in batches if b.validate(full=True) is None)  # a damaged batch crashes the interpreter
    slices = (b.slice(i, BATCH_ROWS) for b in sound for i in range(0, b.num_rows, BATCH_ROWS))
    for number, row in enumerate((row for rows in slices for row in rows.to_pylist()), start=1):
        yield f"{source.file}: record {number}", row


def _read_text(source: _Source) -> Items:
    """The whole file is one record; its lines end in a newline only, whatever system wrote it."""
    text = _or_raise(_decode(source.stream.read(), source.file)).replace("\r\n", "\n")
    if text.strip():
        yield f"{source.file}:1", {"text": text}


READERS: dict[str, Callable[[_Source], Items]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_columns,
    ".arrow": _read_columns,
    ".txt": _read_text,
}
KNOWN_TYPES = f"known are {', '.join(READERS)}, each also with .gz or .zst"


def _read_hub(path: str, *, split: str, name: str | None, revision: str | None) -> Items:
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):  # load_dataset then looks into its cache
            # One short question first: without a network load_dataset alone retries for 23 seconds.
            HfApi().dataset_info(path, revision=revision, timeout=10)
        rows = load_dataset(path, name, split=split, revision=revision)
    except Exception as error:  # no network is an error of the HTTP package, and those have changed
        what = f"no such file{_nearest(path)}; on the Hub: {_first_line(error)}"
        if isinstance(error, HfHubHTTPError | DatasetsError | ValueError):
            fix = "check name, split, configuration and revision; set HF_TOKEN if it is private or gated"
            raise DataError(what, where=path, fix=fix) from error
        fix = f"give a file; HF_HUB_OFFLINE=1 uses what is cached in {config.HF_DATASETS_CACHE}"
        raise EnvironmentFault(what, where=path, fix=fix) from error
    for number, row in enumerate(rows, start=1):
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
            is_whole = inner is raw or _suffix(file) not in (".parquet", ".arrow")  # those two seek
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
        raise DataError(what, where=file, got=_first_line(error), fix=fix) from error


def _lines(source: _Source) -> Iterator[tuple[int, str | DataError]]:
    """(number, line with its end); a line that is too long is passed over without being held."""
    limit, number = source.options.max_line_bytes, 0
    while raw := source.stream.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, _decode(raw, source.file, line=number)
            continue
        while raw and not raw.endswith(b"\n"):
            raw = source.stream.readline(limit + 1)
        where, got = f"{source.file}:{number}", f"over {limit:,} bytes"
        yield number, DataError("line too long", where=where, got=got, fix="raise max_line_bytes")


def _decode(data: bytes, file: str, *, line: int = 1) -> str | DataError:
    """The text of bytes that begin on ``line``, or why there is none."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        encoding = _guess_encoding(data[start:].split(b"\n", 1)[0])
        where = f"{file}:{line + data.count(bytes([10]), 0, error.start)}"
        what = f"invalid UTF-8 at byte {error.start - start + 1} of the line"
        fix = f"it looks like {encoding}: iconv -f {encoding} -t UTF-8"
        return DataError(what, where=where, got=f"0x{data[error.start]:02x}", fix=fix)
    return text.removeprefix("\ufeff") if line == 1 else text


def _guess_encoding(line: bytes) -> str:
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if re.sub(rb"[\xa1-\xfe]{2}", b"", line).isascii():  # its high bytes come in pairs
        return "gb18030"
    return "cp1252" if re.search(rb"[\x80-\x9f]", line) else "latin-1"


def _parse(text: str, file: str, *, line: int = 1) -> Any:
    """The JSON value of a text that begins on ``line``, or why there is none."""
    near = ""
    try:
        return JSON.decode(text.rstrip())  # an error at its end is on this line, not the next
    except RecursionError:
        what = "JSON nested too deeply"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        what, near = f"not valid JSON: {error.msg} (column {error.colno})", text[error.pos :].strip()[:20]
    except ValueError as error:  # an integer of thousands of digits
        what = f"not valid JSON: {_first_line(error)}"
    return DataError(what, where=f"{file}:{line}", got=near and repr(near), fix=_json_advice(text, file))


def _json_advice(text: str, file: str) -> str:
    if "\0" in text:
        return "it looks like utf-16: iconv -f utf-16 -t UTF-8"
    if not text.endswith(("\n", "}", "]")):
        return "the file ends inside this line: fetch or write it again, or skip_bad_lines"
    return "" if _suffix(file) == ".json" else DOCUMENT_FIX


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """An object, or, for ``_check`` to find in its place, the error where a key is given twice."""
    found = dict(pairs)
    got = f"keys {', '.join(key for key, _ in pairs)}" if len(found) < len(pairs) else ""
    return DataError("a key is given twice in an object", got=got) if got else found


JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=partial(DataError, fix="use null"))


def _check_columns(names: list[str], where: str) -> None:
    if bad := [name for name in names if not name.strip() or names.count(name) > 1]:
        what = f"{names.count(bad[0])} column(s) of the name {bad[0]!r}"
        raise DataError(what, where=where, fix="give each column a name of its own")


def _refuse_not_data(head: bytes, file: str) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise DataError("a Git-LFS pointer, not the data", where=file, fix="run git lfs pull")
    if HTML_PAGE.match(head):
        raise DataError("an HTML page, not data", where=file, fix="download the raw file")


def _suffix(file: str) -> str:  # ".jsonl" of "poems.jsonl.gz"
    return os.path.splitext(file.lower().removesuffix(".gz").removesuffix(".zst"))[1]


def _nearest(path: str) -> str:
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _or_raise(text: str | Exception) -> str:
    if isinstance(text, Exception):
        raise text
    return text
