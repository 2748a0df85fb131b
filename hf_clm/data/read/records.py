"""Converts records to checked examples, without torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hf_clm.data.read.formats import (
    FirstSeen,
    check_same_masks,
    check_same_schema,
    to_example,
    unknown_keys,
)
from hf_clm.data.read.sources import RawRecord, ReadOptions, ReadReport, check_value
from hf_clm.data.read.templating import to_template_example
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Source
from hf_clm.schema import AnyExample

NONCHARACTER = re.compile("[\ufdd0\ufdd1]")  # the marks of hf_clm.text.encode


@dataclass
class Examples:
    """Checked examples and their places.

    ``origins`` (N,): number of each example's source in ``sources``.
    """

    examples: Sequence[AnyExample] = field(default_factory=list)
    places: Sequence[str] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    formats: set[str] = field(default_factory=set)
    unknown_keys: set[str] = field(default_factory=set)
    origins: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32), compare=False)
    sources: Sequence[Source] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.examples)


def read_options(data: Data, source: Source) -> ReadOptions:
    """Returns the recipe's options for reading the files of a source."""
    return ReadOptions(data.max_line_bytes, source.quoting)


class CheckedRecord(NamedTuple):
    """A usable record: its format, its example, its unused columns, and whether it has a NUL character."""

    format: str
    example: AnyExample
    unknown_keys: list[str]
    has_nul: bool


def check_record(value: Any, where: str, source: Source, *, data: Data, first: FirstSeen) -> CheckedRecord:
    """Checks a record and converts it to an example. For ``first`` see check_same_schema.

    Raises DataError if the record cannot be used.
    """
    has_nul = check_value(value, where)
    record = RawRecord(value, where)
    format, example = read_example(record, source, data=data, first=first)
    unknown = unknown_columns(record, source, format=format)
    if data.special_tokens_in_text != "allow":
        _check_marks(example, where)
    return CheckedRecord(format, example, unknown, has_nul)


def no_example(sources: Iterable[Source], report: ReadReport) -> DataError:
    """Returns the error for sources without usable records."""
    got = f"{report.records} records read, {len(report.bad_lines)} skipped"
    return DataError("no example to train on", where=", ".join(source.path for source in sources), got=got)


def read_example(
    record: RawRecord, source: Source, *, data: Data, first: FirstSeen
) -> tuple[str, AnyExample]:
    """Returns the format of a record and its example. For ``first`` see check_same_schema."""
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


def _check_marks(example: AnyExample, where: str) -> None:
    """Raises DataError if a text has one of the characters that mark control tokens."""
    if any(not text.isascii() and NONCHARACTER.search(text) for text in example.texts):
        fix = "remove it; no valid text contains one"
        raise DataError("the text contains a noncharacter (U+FDD0 or U+FDD1)", where=where, fix=fix)


def unknown_columns(record: RawRecord, source: Source, *, format: str) -> list[str]:
    """Returns the columns of a record that its format does not read; none if its source has a template."""
    if source.template:
        return []
    return unknown_keys(record.data, format, fields=source.fields)
