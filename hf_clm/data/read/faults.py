"""Finds all errors in the data in one pass, before preparing them and without importing torch.

9 errors in the data; data.on_bad_record: drop skips 8 of them, up to data.max_dropped
8 x key 'prompt' is null; fix: fill it in, or remove the record
  a.jsonl:2
  ...
1 x no such file; fix: check the name and the working directory
  b.jsonl
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from hf_clm.data.read.files import find_files
from hf_clm.data.read.formats import FirstSeen
from hf_clm.data.read.opening import is_remote, open_stream
from hf_clm.data.read.readers import READERS, ReadReport, compression, suffix
from hf_clm.data.read.records import check_record, read_options
from hf_clm.data.read.sources import no_record
from hf_clm.errors import DataError, EnvironmentFault, UserError
from hf_clm.machine import is_first_here
from hf_clm.recipe.recipe import Data, Recipe, Source

CHECKED_BYTES = 8 * 1024 * 1024  # of all files together; takes about half a second
EXPANSION = 5  # approximate ratio of text size to file size for compressed files and Parquet
MAX_KINDS, MAX_PLACES = 20, 20
NUMBER_PATTERN = re.compile(r"\b\d[\d,]*\b")


@dataclass
class _Kind:
    """Errors that differ only in place, offending value, and numbers in their text.

    ``places``: (place, offending value, numbers) of the first errors.
    """

    what: str  # with N in place of numbers that differ
    fix: str
    count: int = 0
    places: list[tuple[str, str, str]] = field(default_factory=list)

    def to_lines(self) -> Iterator[str]:
        """Yields the error and, below it, its places."""
        yield f"{self.count:,} x {self.what}" + (f"; fix: {self.fix}" if self.fix else "")
        for where, got, numbers in self.places:
            has_numbers = numbers and not NUMBER_PATTERN.search(self.what)
            notes = [f"N: {numbers}"] * bool(has_numbers) + [f"got {got}"] * bool(got)
            yield f"  {where}" + (f" ({', '.join(notes)})" if notes else "")
        if self.count > len(self.places):
            yield f"  and {self.count - len(self.places):,} more"


class Faults:
    """Errors grouped by kind, with the places of the first ones. Memory use is bounded."""

    def __init__(self) -> None:
        self.count = 0
        self.droppable = 0  # errors of records, as opposed to files
        self._first: UserError | None = None
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def __len__(self) -> int:
        return self.count

    def add(self, error: UserError, *, is_record: bool = False) -> None:
        """Adds an error. ``is_record``: whether it concerns a record, which could be dropped."""
        self.count += 1
        self.droppable += is_record
        self._first = self._first or error
        pattern = NUMBER_PATTERN.sub("N", error.what)
        key = (pattern, error.fix)
        if key not in self._kinds and len(self._kinds) == MAX_KINDS:
            return
        kind = self._kinds.setdefault(key, _Kind(error.what, error.fix))
        kind.count += 1
        kind.what = kind.what if kind.what == error.what else pattern
        if len(kind.places) < MAX_PLACES:
            kind.places.append((error.where, error.got, ", ".join(NUMBER_PATTERN.findall(error.what))))

    def to_error(self) -> UserError:
        """Returns the only error, or one DataError that lists all kinds with their places."""
        assert self._first is not None
        if self.count == 1:
            return self._first
        head = f"{self.count:,} errors in the data"
        if self.droppable:
            head += f"; data.on_bad_record: drop skips {self.droppable:,} of them, up to data.max_dropped"
        lines = [head, *(line for kind in self._kinds.values() for line in kind.to_lines())]
        if others := self.count - sum(kind.count for kind in self._kinds.values()):
            lines.append(f"{others:,} x other errors")
        return DataError("\n".join(lines))

    def raise_if_any(self) -> None:
        """Raises ``to_error()`` if there is an error."""
        if self.count:
            raise self.to_error()


def check_data(recipe: Recipe) -> None:
    """Reads and checks every record as data preparation does, as far as possible without a tokenizer.

    Skips sources on the Hub and sources that exceed CHECKED_BYTES. The processes of a run are not connected
    yet, so each one checks the data; the first one of each machine reports.

    Raises a UserError: the only error, or a DataError that lists all of them.
    """
    try:
        # A record that is invalid as plain text may be valid as chat turns, which depends on the tokenizer.
        check_sources(recipe.for_tokenizer(has_template=True).data)
    except UserError as error:
        error.is_own = is_first_here()
        raise


def check_sources(data: Data) -> None:
    """Does the same as ``check_data`` for a data section whose ``render`` is resolved."""
    faults, budget = Faults(), CHECKED_BYTES
    sources = [*data.train, *data.eval]
    for number, source in enumerate(sources):
        files = _find(source, faults) if source not in sources[:number] else []
        size = sum(map(_text_bytes, files))
        if size <= budget:
            budget -= size
            _check_files(files, source, data=data, faults=faults)
    faults.raise_if_any()


def _find(source: Source, faults: Faults) -> list[str]:
    """Returns the local files of a source."""
    if is_remote(source.path):
        return []
    try:
        return find_files(source.path, split=source.split) or []
    except (DataError, EnvironmentFault) as error:
        faults.add(error)
        return []


def _text_bytes(file: str) -> int:
    is_packed = compression(file) or suffix(file) == ".parquet"
    return os.path.getsize(file) * (EXPANSION if is_packed else 1)


def _check_files(files: Sequence[str], source: Source, *, data: Data, faults: Faults) -> None:
    """Checks the records of each file. If a file cannot be read further, continues with the next one."""
    first, remaining = FirstSeen(), source.limit
    for file in files:
        count = 0
        try:
            with open_stream(file, read_options(data, source), report=ReadReport()) as stream:
                for where, value in islice(READERS[suffix(file)](stream), remaining):
                    count += 1
                    _check(value, where, source, data=data, first=first, faults=faults)
            if not count and remaining != 0:
                raise no_record(file, [])
        except (DataError, EnvironmentFault) as error:
            faults.add(error)
        remaining = remaining if remaining is None else remaining - count


def _check(
    value: object, where: str, source: Source, *, data: Data, first: FirstSeen, faults: Faults
) -> None:
    try:
        check_record(value, where, source, data=data, first=first)
    except DataError as error:
        if data.on_bad_record == "error":
            faults.add(error, is_record=True)
