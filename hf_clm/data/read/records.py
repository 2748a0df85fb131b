"""Records to checked examples, without torch: what a file says, and what is learned from it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from hf_clm.config import Data, Source
from hf_clm.data.read.formats import (
    FirstSeen,
    check_same_masks,
    check_same_schema,
    to_example,
    unknown_keys,
)
from hf_clm.data.read.sources import ReadOptions, ReadReport, Record
from hf_clm.data.read.templating import to_template_example
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample


@dataclass
class Examples:
    """Checked examples with the place each came from.

    ``origins`` (N,): the number of its source in ``sources``.
    """

    examples: Sequence[AnyExample] = field(default_factory=list)
    places: Sequence[str] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    formats: set[str] = field(default_factory=set)
    unknown_keys: set[str] = field(default_factory=set)
    duplicates: Sequence[str] = field(
        default_factory=list
    )  # rows left out because an earlier one is the same
    origins: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32), compare=False)
    sources: Sequence[Source] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.examples)

    def select(self, numbers: Iterable[int]) -> "Examples":
        """The examples with these numbers."""
        chosen = list(numbers)
        examples, places = [self.examples[i] for i in chosen], [self.places[i] for i in chosen]
        origins = self.origins[chosen] if len(self.origins) else self.origins
        return replace(self, examples=examples, places=places, origins=origins)


def read_options(data: Data, source: Source) -> ReadOptions:
    """How the recipe wants the files of a source to be read."""
    return ReadOptions(data.skip_bad_lines, data.max_line_bytes, data.nul, source.quoting)


def check_records(
    records: Iterable[Record], source: Source, *, data: Data, found: Examples, first: FirstSeen
) -> Iterator[tuple[str, AnyExample]]:
    """(place, example) of each record. ``found``: what is learned of them on the way is entered there."""
    for record in records:
        try:
            format, example = read_example(record, source, data=data, first=first)
            unknown = unknown_columns(record, source, format=format)
        except DataError as error:
            if not data.skip_bad_lines:
                raise
            found.report.bad_lines.append(str(error))
            continue
        found.formats.add(format)
        found.unknown_keys.update(unknown)
        yield record.where, example


def no_example(sources: Iterable[Source], report: ReadReport) -> DataError:
    """The error for sources that give nothing to learn."""
    got = f"{report.records} records read, {len(report.bad_lines)} skipped"
    return DataError("no example to train on", where=", ".join(source.path for source in sources), got=got)


def read_example(record: Record, source: Source, *, data: Data, first: FirstSeen) -> tuple[str, AnyExample]:
    """The format of a record and what is learned from it. ``first``: see check_same_schema."""
    if source.template:
        return "template", to_template_example(record.data, source.template, where=record.where)
    format = source.format or check_same_schema(record.data, record.where, first=first, fields=source.fields)
    if format == "tokenized":
        check_same_masks(record.data, record.where, first=first, fields=source.fields)
    example = to_example(
        record.data,
        format=format,
        fields=source.fields,
        where=record.where,
        render="chat" if data.render == "chat" else "plain",
        allow_empty_prompt=data.allow_empty_prompt,
        strict=data.strict,
    )
    return format, example


def unknown_columns(record: Record, source: Source, *, format: str) -> list[str]:
    """The columns of a record that nothing reads. A template takes those that it names."""
    if source.template:
        return []
    return unknown_keys(record.data, format, fields=source.fields)
