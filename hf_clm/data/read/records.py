"""Records to checked examples, without torch: what a file says, and what is learned from it."""

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
from hf_clm.data.read.sources import ReadOptions, ReadReport, Record, check_value
from hf_clm.data.read.templating import to_template_example
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Source
from hf_clm.schema import AnyExample

NONCHARACTER = re.compile("[\ufdd0\ufdd1]")  # the marks of hf_clm.text.encode


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
    origins: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32), compare=False)
    sources: Sequence[Source] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.examples)


def read_options(data: Data, source: Source) -> ReadOptions:
    """How the recipe wants the files of a source to be read."""
    return ReadOptions(data.max_line_bytes, source.quoting)


class CheckedRecord(NamedTuple):
    """A record that can be used: its format, what is learned from it, and the columns that nothing reads."""

    format: str
    example: AnyExample
    unknown_keys: list[str]
    has_nul: bool


def check_record(value: Any, where: str, source: Source, *, data: Data, first: FirstSeen) -> CheckedRecord:
    """Checks what a reader gives, and makes an example of it. ``first``: see check_same_schema.

    Raises DataError for a record that cannot be used.
    """
    has_nul = check_value(value, where)
    record = Record(value, where)
    format, example = read_example(record, source, data=data, first=first)
    unknown = unknown_columns(record, source, format=format)
    if data.special_tokens_in_text != "allow":
        _check_marks(example, where)
    return CheckedRecord(format, example, unknown, has_nul)


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


def _check_marks(example: AnyExample, where: str) -> None:
    """Raises for a text with one of the characters by which control tokens in a text are marked."""
    if any(not text.isascii() and NONCHARACTER.search(text) for text in example.texts):
        what, fix = (
            "the text holds a noncharacter (U+FDD0 or U+FDD1)",
            "remove it; no valid text contains one",
        )
        raise DataError(what, where=where, fix=fix)


def unknown_columns(record: Record, source: Source, *, format: str) -> list[str]:
    """The columns of a record that nothing reads. A template takes those that it names."""
    if source.template:
        return []
    return unknown_keys(record.data, format, fields=source.fields)
