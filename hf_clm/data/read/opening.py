"""Opens local and remote files as decompressed streams, and detects files that are not of their type.

poems.jsonl.gz, s3://bucket/poems.jsonl.gz -> bytes -> check first bytes -> decompress -> check again
"""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

from typing_extensions import Buffer

from hf_clm.data.read.readers import (
    COMPRESSED,
    KNOWN_TYPES,
    READERS,
    ReadOptions,
    ReadReport,
    Stream,
    compression,
    first_line,
    suffix,
)
from hf_clm.errors import DataError, EnvironmentFault, UserError


class Signature(NamedTuple):
    """A file type and its first bytes. Such a file needs the suffix ``ending``; otherwise see ``fix``."""

    head: re.Pattern[bytes]
    name: str
    ending: str = ""
    fix: str = ""


def _signature(head: bytes, name: str, *, ending: str = "", fix: str = "") -> Signature:
    return Signature(re.compile(head, re.DOTALL), name, ending, fix)


SAVE_TABLE = "save it as .csv, .jsonl or .parquet"
UNPACK = "unpack it"
HTML = rb"(\xef\xbb\xbf)?\s*<(?i:!doctype html|html)"
SIGNATURES = (
    _signature(rb"version https://git-lfs", "a Git-LFS pointer, not the data", fix="run git lfs pull"),
    _signature(HTML, "an HTML page, not data", fix="download the raw file"),
    _signature(rb"\x1f\x8b\x08", "gzip", ending=".gz"),
    _signature(rb"\x28\xb5\x2f\xfd", "zstd", ending=".zst"),
    _signature(rb"\xfd7zXZ\0", "xz", ending=".xz"),
    _signature(rb"BZh[1-9](1AY&SY|\x17\x72\x45)", "bzip2", ending=".bz2"),
    _signature(rb"\x04\x22\x4d\x18", "lz4", fix="decompress it"),
    _signature(rb"PAR1[^ -~]", "a Parquet file", ending=".parquet"),
    _signature(rb"ARROW1\0\0|\xff\xff\xff\xff.{4}", "an Arrow file", ending=".arrow"),
    _signature(rb"FEA1\0", "a Feather file of version 1", fix=SAVE_TABLE),
    _signature(rb"PK\x03\x04.{0,4000}?(xl/|word/|ppt/)", "an Excel or other Office file", fix=SAVE_TABLE),
    _signature(rb"PK\x03\x04.{26,300}\[Content_Types\]", "an Excel or other Office file", fix=SAVE_TABLE),
    _signature(rb"PK[\x03\x05]", "a zip archive", fix=UNPACK),
    _signature(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file", fix=SAVE_TABLE),
    _signature(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive", fix=UNPACK),
    _signature(rb".{257}ustar", "a tar archive", fix=UNPACK),
    _signature(rb"\x80[\x02-\x05]", "a Python pickle", fix=SAVE_TABLE),
    _signature(rb"\x93NUMPY", "a NumPy array", fix=SAVE_TABLE),
    _signature(rb"\x89HDF\r\n", "an HDF5 file", fix=SAVE_TABLE),
    _signature(rb"SQLite format 3\0", "an SQLite database", fix="export the table as .csv"),
    _signature(rb"Obj\x01|ORC[\0-\x1f]", "an Avro or ORC file", fix=SAVE_TABLE),
    _signature(rb"%PDF-", "a PDF", fix="extract its text into a .txt file"),
    _signature(rb"\{\\rtf", "an RTF document", fix="save it as plain text"),
    _signature(rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "an image", fix="remove it"),
    _signature(rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text, not UTF-8", fix="iconv -f UTF-32 -t UTF-8"),
    _signature(rb"\xff\xfe|\xfe\xff", "UTF-16 text, not UTF-8", fix="iconv -f UTF-16 -t UTF-8"),
)
BINARY = re.compile(rb"[\x00-\x08\x0e-\x1f]")
HEAD_BYTES = 1 << 13  # size of a reader's buffer; enough for the name of a zip file's first member
DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: _open_zstd(raw),  # imports pyarrow only when needed
    ".xz": lzma.open,
    ".bz2": bz2.open,
}


@contextmanager
def open_stream(file: str, options: ReadOptions, *, report: ReadReport) -> Iterator[Stream]:
    """Opens and decompresses a file of a supported type. All errors name the file."""
    with naming(file), open_raw(file) as raw:
        compression_suffix, ending = compression(file), suffix(file)
        _refuse(raw.peek(HEAD_BYTES), file, ending=compression_suffix or ending)
        if ending not in READERS:
            raise DataError("unknown file type", where=file, got=repr(ending), fix=KNOWN_TYPES)
        if not compression_suffix:
            has_columns = ending in (".parquet", ".arrow")
            yield Stream(file, raw if not has_columns or _can_seek(raw) else _load(raw), options, report)
            return
        with io.BufferedReader(DECOMPRESSORS[compression_suffix](raw)) as stream:
            _refuse(stream.peek(HEAD_BYTES), file, ending=ending)
            yield Stream(file, _load(stream) if ending in (".parquet", ".arrow") else stream, options, report)


@contextmanager
def open_raw(file: str) -> Iterator[io.BufferedReader]:
    """Opens a local or remote file without decompressing it."""
    if not is_remote(file):
        with open(file, "rb") as raw:
            yield raw
        return
    fs, path = open_filesystem(file)
    with naming_remote(file):
        remote = cast(io.RawIOBase, _Remote(fs.open(path, "rb"), file))
    with io.BufferedReader(remote, buffer_size=HEAD_BYTES) as raw:
        yield cast(Any, raw)


def file_size(file: str) -> int:
    """Returns the size of a local or remote file in bytes; 0 if its server does not report it."""
    if not is_remote(file):
        return os.path.getsize(file)
    fs, path = open_filesystem(file)
    with naming_remote(file):
        return int(fs.size(path) or 0)


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as ``s3://bucket/poems.jsonl``."""
    return "://" in path


def open_filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    with naming_remote(url):
        return url_to_fs(url)


@contextmanager
def naming_remote(url: str) -> Iterator[None]:
    """Converts the errors of a remote file system to errors that name the URL."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name or ""
        fix = f"pip install {package}"
        raise EnvironmentFault("needs another package to be read", where=url, fix=fix) from error
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # aiohttp raises this if there is no connection
            raise _unreachable(url, error.__cause__) from error
        raise DataError("no such file", where=url, fix="check the URL") from error
    except ValueError as error:
        raise DataError("not a supported URL", where=url, got=first_line(error)) from error
    except Exception as error:  # every service has its own exceptions
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> EnvironmentFault:
    fix = "check the network, the credentials and the permissions"
    return EnvironmentFault("cannot be read", where=url, got=first_line(error), fix=fix)


class _Remote(io.RawIOBase):
    """Wraps an fsspec file as a raw stream whose errors name the URL."""

    def __init__(self, file: Any, url: str):
        self.file, self.url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        with naming_remote(self.url):
            data = self.file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


def _load(stream: io.BufferedReader) -> io.BufferedReader:
    """Reads a complete stream into memory, since columnar files are read from their end."""
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(stream.read())))


def _can_seek(raw: io.BufferedReader) -> bool:
    """Whether a stream supports seeking; some web servers send files only from the start."""
    try:
        raw.seek(0, os.SEEK_END)
        raw.seek(0)
    except (ValueError, OSError):
        return False
    return True


def _open_zstd(raw: IO[bytes]) -> Any:
    import pyarrow  # zstandard would accept a truncated file as complete

    return pyarrow.CompressedInputStream(cast(Any, raw), "zstd")


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Converts the errors of the system, of decompressors and of pyarrow to errors that name the file."""
    try:
        yield
    except (ValueError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise EnvironmentFault("cannot be read", where=file, got=str(error.strerror)) from error
        what = "damaged, truncated, or not of the type that its name suggests"
        fix = "download or write it again"
        raise DataError(what, where=file, got=first_line(error), fix=fix) from error


def _refuse(head: bytes, file: str, *, ending: str) -> None:
    """Raises DataError if the first bytes of a file do not match its ``ending``."""
    kind = next((kind for kind in SIGNATURES if kind.head.match(head)), None)
    if kind is not None and not (kind.ending and kind.ending == ending):
        what = kind.name
        if ", not " not in what:
            is_known = ending in READERS or ending in COMPRESSED
            what = f"{what}, not {ending}" if is_known else f"unknown file type {ending!r}; it is {what}"
        raise DataError(what, where=file, fix=kind.fix or _new_name(file, kind.ending))
    is_packed = ending in COMPRESSED and suffix(file) in READERS
    if kind is None and is_packed and head and not BINARY.search(head):
        raise DataError(f"not compressed despite its suffix {ending}", where=file, fix=f"remove {ending}")


def _new_name(file: str, ending: str) -> str:
    """Returns advice such as ``rename it to poems.jsonl.gz``."""
    name, compression_suffix = os.path.basename(file), compression(file)
    if ending not in COMPRESSED:
        return f"rename it to {os.path.splitext(name[: len(name) - len(compression_suffix)])[0]}{ending}"
    if compression_suffix:  # with another program, or twice
        return f"decompress it, or rename it to {name[: -len(compression_suffix)]}{ending}"
    return f"rename it to {name}{ending}" if suffix(file) else f"rename it, e.g. to {name}.jsonl{ending}"
