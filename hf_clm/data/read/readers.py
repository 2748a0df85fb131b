"""Readers for each file type: a stream of bytes -> (place, value) pairs.

If a value cannot be parsed, the reader yields a ``DataError`` in its place.
"""

import csv
import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from hf_clm.errors import DataError

if TYPE_CHECKING:  # importing it takes a third of a second
    import pyarrow

Items = Iterator[tuple[str, Any]]  # (place, value) or (place, error)
BATCH_ROWS = 1024
BATCH_BYTES = 1 << 22  # of columns converted to records at once
BUFFER_BYTES = 1 << 20
TEXTS = (".txt", ".md", ".markdown", ".rst")
LINE_TYPES = (".jsonl", ".ndjson")
COLUMN_TYPES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
OLD_LINE_ENDS = "its lines end in a carriage return only: tr '\\r' '\\n' < FILE > NEW_FILE"
PANDAS_INDEX = re.compile(r"Unnamed: \d+")
QUOTED_CELL = re.compile(r'"(""|[^"])*"')
DOCUMENT_FIX = "write one object per line; put a JSON array or a pretty-printed object into a .json file"


@dataclass(frozen=True)
class RawRecord:
    """A record; ``where`` is "poems.jsonl:17" (file and line) or "poems.csv: record 17"."""

    data: dict[str, Any]
    where: str


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading files.

    Args:
        max_line_bytes: maximum length of a line in jsonl, csv and tsv files.
        quoting: whether cells of a table may be quoted: ``csv`` (yes), ``none`` or ``auto`` (in csv files,
            not in tsv files).
    """

    max_line_bytes: int = 8 * 1024 * 1024
    quoting: Literal["auto", "csv", "none"] = "auto"


@dataclass
class ReadReport:
    """Statistics and notes, filled in while reading."""

    files: list[str] = field(default_factory=list)
    records: int = 0
    blank_lines: int = 0
    bad_lines: list[str] = field(default_factory=list)  # messages of dropped records
    nul_records: int = 0
    left_out: list[str] = field(default_factory=list)  # files in a folder that are not read
    notes: list[str] = field(default_factory=list)  # sentences about what was read and what was not

    def note(self, text: str) -> None:
        """Adds a note unless it is already there."""
        if text not in self.notes:
            self.notes.append(text)

    def to_lines(self) -> list[str]:
        """Returns the notes and a line about files that were not read."""
        if not self.left_out:
            return self.notes
        what = "1 file" if len(self.left_out) == 1 else f"{len(self.left_out):,} files"
        examples = ", ".join(self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
        return [*self.notes, f"{what} not read: {examples}"]

    def add(self, other: "ReadReport") -> None:
        """Adds the notes and counts of another report, but not its files and bad lines."""
        for text in other.notes:
            self.note(text)
        self.records += other.records
        self.blank_lines += other.blank_lines
        self.nul_records += other.nul_records


@dataclass
class Stream:
    """A decompressed file, or some of its lines and the number of lines ``before`` them."""

    file: str
    stream: io.BufferedReader
    options: ReadOptions
    report: ReadReport
    before: int = 0


def _read_json_lines(source: Stream) -> Items:
    for number, line in _lines(source):
        if isinstance(line, str) and not line.strip():
            source.report.blank_lines += 1
        else:
            value = _parse(line, source.file, line=number) if isinstance(line, str) else line
            yield f"{source.file}:{number}", value


def _read_json(source: Stream) -> Items:
    """Reads an array of objects, a single object, or one object per line, which is common in .json files."""
    data = source.stream.read()
    text = or_raise(_decode(data, source.file))
    first_line = text.strip().split("\n", 1)[0]
    if first_line != text.strip() and isinstance(_parse(first_line, source.file), dict):
        yield from _read_json_lines(replace(source, stream=io.BufferedReader(io.BytesIO(data))))
        return
    value = _parse(text, source.file) if first_line else []
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{source.file}: record {number}", item


def _read_table(source: Stream, *, delimiter: str) -> Items:
    csv.field_size_limit(max(csv.field_size_limit(), source.options.max_line_bytes))  # default: 128 KiB
    lines = (or_raise(line) for _, line in _lines(source))
    first = next(lines, "")
    # Excel's delimiter line; the csv module does not see and count it.
    named = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    is_quoted = source.options.quoting == "csv" or (source.options.quoting == "auto" and delimiter != "\t")
    delimiter, skipped = (named[1], 1) if named else (delimiter, 0)
    reader = csv.reader(
        lines if named else chain([first], lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        strict=True,
    )
    number = quoted = 0
    try:
        header = next((row for row in reader if row), [])
        _check_header(header, delimiter, f"{source.file}:{reader.line_num + skipped}")
        for name in filter(PANDAS_INDEX.fullmatch, header):
            what = f"column {name!r} is a pandas index; to_csv(..., index=False) omits it"
            source.report.note(f"{source.file}: {what}")
        for row in reader:
            number += bool(row)
            if len(row) == len(header):
                quoted += not is_quoted and any(QUOTED_CELL.fullmatch(cell) for cell in row)
                yield f"{source.file}: record {number}", dict(zip(header, row, strict=True))
            elif row:
                where = f"{source.file}:{reader.line_num + skipped}"
                what = f"expected {len(header)} cells, as in the header"
                yield where, DataError(what, where=where, got=str(len(row)), fix=_cells_fix(row, is_quoted))
            else:
                source.report.blank_lines += 1
    except csv.Error as error:
        where = f"{source.file}:{reader.line_num + skipped}"
        fix = "check the quotes, or set quoting: none if they are part of the text"
        fix = OLD_LINE_ENDS if "new-line" in str(error) else fix
        raise DataError(f"not a valid table: {error}", where=where, fix=fix) from None
    if quoted:
        what = f"{quoted:,} records with a quoted cell, whose quotes were read as part of the text"
        source.report.note(f"{source.file}: {what}; to remove the quotes, set quoting: csv on the source")


def _cells_fix(row: list[str], is_quoted: bool) -> str:
    is_open = not is_quoted and any('"' in (cell[:1], cell[-1:]) for cell in row)
    return "set quoting: csv if cells are quoted" if is_open else ""


def _check_header(header: list[str], delimiter: str, where: str) -> None:
    """Raises DataError if the header shows that the table has another delimiter or a pandas index."""
    other = next((sign for sign in ";\t,|" if sign != delimiter and sign in "".join(header)), "")
    if len(header) == 1 and other:
        fix = f"separate the cells with {delimiter!r}, or add a first line sep={other}"
        fix = "rename it to .tsv" if other == "\t" else fix
        what = f"a single column, whose name contains {other!r}"
        raise DataError(what, where=where, got=repr(header[0]), fix=fix)
    if len(header) > 1 and not header[0].strip():
        fix = "omit pandas' index (to_csv(..., index=False)), or give the column a name"
        raise DataError("the first column has no name", where=where, fix=fix)
    _check_columns(header, where)


def _read_columns(source: Stream) -> Items:
    rows = (row for batch in column_batches(source) for row in batch_rows(batch))
    for number, row in enumerate(rows, start=1):
        yield f"{source.file}: record {number}", row


def column_batches(source: Stream) -> Iterator["pyarrow.RecordBatch"]:
    """Yields the rows of a Parquet or Arrow file (random-access or stream format) in batches.

    Batches have a few megabytes, and only one is in memory: pages of a memory-mapped file are released.
    """
    batches, forget = _open_parquet(source) if suffix(source.file) == ".parquet" else _open_arrow(source)
    for batch in batches:
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, size):
            rows = batch.slice(start, size)
            rows.validate(full=True)  # a damaged batch crashes the interpreter
            yield rows
            forget()


def batch_rows(batch: "pyarrow.RecordBatch") -> list[dict[str, Any]]:
    """Returns the rows of a batch. Decodes values that datasets stores as JSON text because types differ."""
    rows = batch.to_pylist()
    if "arrow.json" not in str(batch.schema):
        return rows
    from datasets import Features

    return list(map(Features.from_arrow_schema(batch.schema).decode_example, rows))


def _open_arrow(source: Stream) -> tuple[Iterable["pyarrow.RecordBatch"], Callable[[], None]]:
    import pyarrow
    from pyarrow import ipc

    is_indexed = source.stream.peek(6).startswith(b"ARROW1")
    raw: Any = source.stream.raw
    if isinstance(raw, io.FileIO):  # memory-mapped, so that only the pages in use are in memory
        content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        buffer, forget = pyarrow.py_buffer(content), partial(content.madvise, mmap.MADV_DONTNEED)
    else:
        buffer, forget = pyarrow.py_buffer(source.stream.read()), lambda: None
    if is_indexed:
        indexed = ipc.open_file(buffer)
        schema, batches = indexed.schema, map(indexed.get_batch, range(indexed.num_record_batches))
    else:
        batches = ipc.open_stream(buffer)
        schema = batches.schema
    _check_columns(schema.names, source.file)
    return batches, forget


def _open_parquet(source: Stream) -> tuple[Iterable["pyarrow.RecordBatch"], Callable[[], None]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(source.stream, buffer_size=BUFFER_BYTES)  # reads pages, not complete columns
    _check_columns(table.schema_arrow.names, source.file)
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    widest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest)))
    return table.iter_batches(batch_size=size), lambda: None


def _read_text(source: Stream) -> Items:
    """Reads the complete file as one record, with line ends normalized to newlines."""
    text = or_raise(_decode(source.stream.read(), source.file)).replace("\r\n", "\n")
    text = text if "\n" in text else text.replace("\r", "\n")
    if text.strip():
        yield f"{source.file}:1", {"text": text}


READERS: dict[str, Callable[[Stream], Items]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_columns,
    ".arrow": _read_columns,
    **dict.fromkeys(TEXTS, _read_text),
}
KNOWN_TYPES = (
    f"supported types are {', '.join(READERS)}, each also with {', '.join(COMPRESSED[:-1])} or "
    f"{COMPRESSED[-1]}"
)


def _lines(source: Stream) -> Iterator[tuple[int, str | DataError]]:
    """Yields (number, line with its end). A line that is too long is skipped without loading it."""
    limit, number = source.options.max_line_bytes, source.before
    while raw := source.stream.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, _decode(raw, source.file, line=number)
            continue
        rest = raw
        while rest and not rest.endswith(b"\n"):
            rest = source.stream.readline(BUFFER_BYTES)
        where, got = f"{source.file}:{number}", f"over {limit:,} bytes"
        fix = "raise max_line_bytes" if b"\r" not in raw[:-1] else OLD_LINE_ENDS
        yield number, DataError("line too long", where=where, got=got, fix=fix)


def _decode(data: bytes, file: str, *, line: int = 1) -> str | DataError:
    """Decodes bytes that begin on ``line``; returns the error if they are not UTF-8."""
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
    if re.sub(rb"[\xa1-\xfe]{2}", b"", line).isascii():  # high bytes come in pairs
        return "gb18030"
    return "cp1252" if re.search(rb"[\x80-\x9f]", line) else "latin-1"


def _parse(text: str, file: str, *, line: int = 1) -> Any:
    """Parses a JSON text that begins on ``line``; returns the error if it is not valid."""
    near = ""
    try:
        return JSON.decode(text.rstrip())  # an error at the end must be on this line, not the next
    except RecursionError:
        what = "JSON nested too deeply"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        what, near = f"not valid JSON: {error.msg} (column {error.colno})", text[error.pos :].strip()[:20]
    except ValueError as error:  # an integer of thousands of digits
        what = f"not valid JSON: {first_line(error)}"
    return DataError(what, where=f"{file}:{line}", got=near and repr(near), fix=_json_advice(text, file))


def _json_advice(text: str, file: str) -> str:
    if "\0" in text:
        return "it looks like utf-16: iconv -f utf-16 -t UTF-8"
    if "\r" in text.strip():
        return OLD_LINE_ENDS
    if not text.endswith(("\n", "}", "]")):
        return "the file ends in this line: download or write it again, or set on_bad_record: drop"
    return "" if suffix(file) == ".json" else DOCUMENT_FIX


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """Returns an object, or an error in its place if a key occurs twice; ``check_value`` raises it."""
    value = dict(pairs)
    got = f"keys {', '.join(key for key, _ in pairs)}" if len(value) < len(pairs) else ""
    return DataError("a key occurs twice in an object", got=got) if got else value


JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=partial(DataError, fix="use null"))


def _check_columns(names: list[str], where: str) -> None:
    if bad := [name for name in names if not name.strip() or names.count(name) > 1]:
        what = f"{names.count(bad[0])} column(s) named {bad[0]!r}"
        raise DataError(what, where=where, fix="give each column a unique name")


def suffix(file: str) -> str:
    """Returns the file type: ``.jsonl`` for ``poems.jsonl.gz``."""
    return os.path.splitext(_name(file).removesuffix(compression(file)))[1]


def compression(file: str) -> str:
    """Returns the compression suffix: ``.gz`` for ``poems.jsonl.gz``, "" if there is none."""
    ending = os.path.splitext(_name(file))[1]
    return ending if ending in COMPRESSED else ""


def is_parted(file: str) -> bool:
    """Whether the chunks of a file can be read without parsing the chunks before them."""
    return suffix(file) in (*LINE_TYPES, *COLUMN_TYPES)


def _name(file: str) -> str:
    """Returns a file name in lower case; for a URL, without its query."""
    return (file.partition("?")[0] if "://" in file else file).lower()


def first_line(error: Exception) -> str:
    """Returns the first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def or_raise(text: str | Exception) -> str:
    """Returns the text, or raises it if it is an error."""
    if isinstance(text, Exception):
        raise text
    return text
