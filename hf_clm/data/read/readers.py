"""One reader a type of file: a stream of bytes to (place, value).

A reader gives, in the place of a value that is refused, the ``DataError`` that says why.
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

if TYPE_CHECKING:  # it takes a third of a second to import
    import pyarrow

Items = Iterator[tuple[str, Any]]  # (place, value), or (place, why the value is refused)
BATCH_ROWS = 1024
BATCH_BYTES = 1 << 22  # of columns, that are made records at once
READ_BYTES = 1 << 20
TEXTS = (".txt", ".md", ".markdown", ".rst")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
OLD_LINE_ENDS = "its lines end in a carriage return alone: tr '\\r' '\\n' < FILE > NEW_FILE"
INDEX = re.compile(r"Unnamed: \d+")
ENCLOSED = re.compile(r'"(""|[^"])*"')  # a cell as csv writes it
DOCUMENT_FIX = "one object a line; a JSON array or pretty-printed object belongs into a .json file"


@dataclass(frozen=True)
class Record:
    """A raw row; ``where`` is "poems.jsonl:17" (file and line), or "poems.csv: record 17"."""

    data: dict[str, Any]
    where: str


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Args:
        max_line_bytes: the longest line of jsonl, csv and tsv.
        quoting: whether quotes enclose the cells of a table; auto: those of csv, and not of tsv.
    """

    max_line_bytes: int = 8 * 1024 * 1024
    quoting: Literal["auto", "csv", "none"] = "auto"


@dataclass
class ReadReport:
    """What was read; filled while reading."""

    files: list[str] = field(default_factory=list)
    records: int = 0
    blank_lines: int = 0
    bad_lines: list[str] = field(default_factory=list)  # the messages of dropped records
    nul_records: int = 0
    left_out: list[str] = field(default_factory=list)  # files of a folder that are not read
    notes: list[str] = field(default_factory=list)  # whole sentences about what was read, and what not

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_lines(self) -> list[str]:
        """The notes, and which files were not read."""
        if not self.left_out:
            return self.notes
        what = "1 file" if len(self.left_out) == 1 else f"{len(self.left_out):,} files"
        some = ", ".join(self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
        return [*self.notes, f"{what} not read: {some}"]

    def add(self, other: "ReadReport") -> None:
        """Counts in what was read beside; not the files and bad lines."""
        for text in other.notes:
            self.note(text)
        self.records += other.records
        self.blank_lines += other.blank_lines
        self.nul_records += other.nul_records


@dataclass
class Stream:
    """A file that is read, decompressed; or some of its lines, with the number of those ``before`` them."""

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
    """An array of objects, one object, or (common under this name) an object per line."""
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
    csv.field_size_limit(max(csv.field_size_limit(), source.options.max_line_bytes))  # else 128 KiB a cell
    lines = (or_raise(line) for _, line in _lines(source))
    first = next(lines, "")
    # Excel's own first line, which the module csv is not given and does not count.
    named = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    is_quoted = source.options.quoting == "csv" or (source.options.quoting == "auto" and delimiter != "\t")
    delimiter, skipped = (named[1], 1) if named else (delimiter, 0)
    reader = csv.reader(
        lines if named else chain([first], lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        strict=True,
    )
    number = enclosed = 0
    try:
        header = next((row for row in reader if row), [])
        _check_header(header, delimiter, f"{source.file}:{reader.line_num + skipped}")
        for name in filter(INDEX.fullmatch, header):
            what = f"column {name!r} is an index of pandas, which to_csv(..., index=False) leaves out"
            source.report.note(f"{source.file}: {what}")
        for row in reader:
            number += bool(row)
            if len(row) == len(header):
                enclosed += not is_quoted and any(ENCLOSED.fullmatch(cell) for cell in row)
                yield f"{source.file}: record {number}", dict(zip(header, row, strict=True))
            elif row:
                where = f"{source.file}:{reader.line_num + skipped}"
                what = f"expected {len(header)} cells, as in the header"
                yield where, DataError(what, where=where, got=str(len(row)), fix=_cells_fix(row, is_quoted))
            else:
                source.report.blank_lines += 1
    except csv.Error as error:
        where = f"{source.file}:{reader.line_num + skipped}"
        fix = "check the quotes, or quoting: none where they are letters"
        fix = OLD_LINE_ENDS if "new-line" in str(error) else fix
        raise DataError(f"not a valid table: {error}", where=where, fix=fix) from None
    if enclosed:
        what = f"{enclosed:,} records with a cell in quotes, which were read as part of the text"
        source.report.note(f"{source.file}: {what}; if they are not, set quoting: csv on the source")


def _cells_fix(row: list[str], is_quoted: bool) -> str:
    is_open = not is_quoted and any('"' in (cell[:1], cell[-1:]) for cell in row)
    return "quoting: csv, if quotes enclose the cells" if is_open else ""


def _check_header(header: list[str], delimiter: str, where: str) -> None:
    """Raises for a header that shows that the table was written in another way than it is read."""
    other = next((sign for sign in ";\t,|" if sign != delimiter and sign in "".join(header)), "")
    if len(header) == 1 and other:
        fix = f"write it with {delimiter!r} between the cells, or begin it with a line sep={other}"
        fix = "name it .tsv" if other == "\t" else fix
        what = f"a single column, whose name holds {other!r}"
        raise DataError(what, where=where, got=repr(header[0]), fix=fix)
    if len(header) > 1 and not header[0].strip():
        fix = "leave out pandas' index (to_csv(..., index=False)), or give the column a name"
        raise DataError("the first column has no name", where=where, fix=fix)
    _check_columns(header, where)


def _read_columns(source: Stream) -> Items:
    rows = (row for batch in column_batches(source) for row in batch_rows(batch))
    for number, row in enumerate(rows, start=1):
        yield f"{source.file}: record {number}", row


def column_batches(source: Stream) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of Parquet or of an Arrow file (with an index at its end, or a stream, as datasets writes it).

    In batches of a few megabytes. Memory holds one: what was read of a mapped file is given back.
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
    """The rows of a batch; what datasets stores as JSON text, because rows differ in type, is decoded."""
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
    if isinstance(raw, io.FileIO):  # no more of it is in memory than what is looked at
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

    table = parquet.ParquetFile(source.stream, buffer_size=READ_BYTES)  # pages, not whole columns
    _check_columns(table.schema_arrow.names, source.file)
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    widest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest)))
    return table.iter_batches(batch_size=size), lambda: None


def _read_text(source: Stream) -> Items:
    """The whole file is one record; its lines end in a newline only, whatever system wrote it."""
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
    f"known are {', '.join(READERS)}, each also with {', '.join(COMPRESSED[:-1])} or {COMPRESSED[-1]}"
)


def _lines(source: Stream) -> Iterator[tuple[int, str | DataError]]:
    """(number, line with its end); a line that is too long is passed over without being held."""
    limit, number = source.options.max_line_bytes, source.before
    while raw := source.stream.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, _decode(raw, source.file, line=number)
            continue
        rest = raw
        while rest and not rest.endswith(b"\n"):
            rest = source.stream.readline(READ_BYTES)
        where, got = f"{source.file}:{number}", f"over {limit:,} bytes"
        fix = "raise max_line_bytes" if b"\r" not in raw[:-1] else OLD_LINE_ENDS
        yield number, DataError("line too long", where=where, got=got, fix=fix)


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
        what = f"not valid JSON: {first_line(error)}"
    return DataError(what, where=f"{file}:{line}", got=near and repr(near), fix=_json_advice(text, file))


def _json_advice(text: str, file: str) -> str:
    if "\0" in text:
        return "it looks like utf-16: iconv -f utf-16 -t UTF-8"
    if "\r" in text.strip():
        return OLD_LINE_ENDS
    if not text.endswith(("\n", "}", "]")):
        return "the file ends inside this line: fetch or write it again, or set on_bad_record: drop"
    return "" if suffix(file) == ".json" else DOCUMENT_FIX


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


def suffix(file: str) -> str:
    """``.jsonl`` of ``poems.jsonl.gz``."""
    return os.path.splitext(_name(file).removesuffix(compression(file)))[1]


def compression(file: str) -> str:
    """``.gz`` of ``poems.jsonl.gz``; nothing where the file is not compressed."""
    ending = os.path.splitext(_name(file))[1]
    return ending if ending in COMPRESSED else ""


def _name(file: str) -> str:
    """A file's name in small letters, of a URL without its query."""
    return (file.partition("?")[0] if "://" in file else file).lower()


def first_line(error: Exception) -> str:
    """What an error of a library says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def or_raise(text: str | Exception) -> str:
    """The text, unless it is why there is none."""
    if isinstance(text, Exception):
        raise text
    return text
