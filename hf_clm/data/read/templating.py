"""Renders records as examples with the template of their source.

{title}<sep>{content}    a record    ->  title | <sep> | content      <sep> is a token here, but plain text
                                                                      if it occurs in a title
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from hf_clm.data.read.row import Record, is_missing, look_up, missing_name
from hf_clm.errors import DataError
from hf_clm.schema import Document, Segment
from hf_clm.template import Part, Template, split_template, to_cell


def to_template_example(record: Record, template: Template, *, where: str = "") -> Document:
    """Renders a record with its template. The prompt is context; the completion or text is the target.

    Raises DataError for a missing or empty column, and for a value without a label.
    """
    cells = with_title(record)
    if template.completion is None:
        return Document(_fill(template.shown, cells, where=where, weight=1.0))
    prompt = _fill(template.shown, cells, where=where, weight=0.0)
    target = _fill(template.completion, cells, where=where, weight=1.0, labels=template.labels)
    return Document(prompt + target)


def to_template_prompt(record: Record, template: Template, *, where: str = "") -> Document:
    """Renders the prompt of a record as in training.

    The prompt of a text ends before its first column without a value, e.g. after title and ``<sep>`` if only
    the title is given. If all columns have values, it ends after the last column.
    """
    cells = with_title(record)
    if template.completion is not None:
        return Document(_fill(template.shown, cells, where=where, weight=0.0))
    parts = split_template(template.shown)
    columns = [number for number, part in enumerate(parts) if part.is_column]
    missing = (number for number in columns if not _has(cells, parts[number].text))
    end = next(missing, columns[-1] + 1)
    segments = [_to_segment(part, cells, where=where) for part in parts[:end]]
    if end <= columns[0]:
        _to_segment(parts[columns[0]], cells, where=where)  # raises
    return Document([replace(segment, weight=0.0) for segment in segments])


def to_template_words(text: str, template: Template, *, input_text: str = "") -> Document:
    """Renders a prompt from the command line: ``text`` is the first column, ``input_text`` the second."""
    words = [text, *([input_text] if input_text else [])]
    return to_template_prompt(dict(zip(template.columns, words, strict=False)), template, where="--prompt")


def with_title(record: Record) -> Record:
    """Adds ``title`` (the first line) and ``content`` (the rest) to a record that has only a text."""
    if set(record) != {"text"} or not isinstance(record["text"], str):
        return record
    title, _, content = record["text"].strip().partition("\n")
    return {**record, "title": title.strip(), "content": content.strip()}


def _fill(
    text: str, cells: Record, *, where: str, weight: float, labels: Mapping[str, str] | None = None
) -> list[Segment]:
    segments = [_to_segment(part, cells, where=where, labels=labels) for part in split_template(text)]
    return [replace(segment, weight=weight) for segment in segments]


def _to_segment(part: Part, cells: Record, *, where: str, labels: Mapping[str, str] | None = None) -> Segment:
    """Returns the template's text or the record's value in a column."""
    text = part.text
    if not part.is_column:
        return Segment(text, weight=1.0, is_own=True)
    try:
        cell = look_up(cells, text)
    except LookupError as error:
        raise _missing_column(text, error, where=where) from None
    what = f"column {text!r}: expected text or a number"
    if is_missing(cell) or not isinstance(cell, str | int | float):
        got = missing_name(cell) if is_missing(cell) else type(cell).__name__
        raise DataError(what, where=where, got=got)
    if cell in (math.inf, -math.inf):
        raise DataError(what, where=where, got=str(cell))
    word = to_cell(cell)
    if labels and word not in labels:
        fix = f"add it to the template's labels, which are {', '.join(map(repr, labels))}"
        raise DataError(f"column {text!r} has a value without a label", where=where, got=repr(word), fix=fix)
    word = labels[word] if labels else word
    if not word.strip():
        what = f"column {text!r} is empty"
        raise DataError(what, where=where, got=repr(word), fix="fill it in, or remove the record")
    return Segment(word, weight=1.0)


def _has(cells: Record, column: str) -> bool:
    try:
        cell = look_up(cells, column)
    except LookupError:
        return False
    return not is_missing(cell) and bool(to_cell(cell or "").strip())


def _missing_column(column: str, error: LookupError, *, where: str) -> DataError:
    return DataError(f"missing column {column!r} of the template", where=where, got=str(error))
