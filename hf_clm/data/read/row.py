"""Access to a record by the keys of its format, and checks shared by all formats."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from hf_clm.errors import DataError, did_you_mean
from hf_clm.schema import Render

Record = Mapping[str, Any]
Fields = Mapping[str, str] | None  # maps keys of a format to columns of the record, where they differ
PATH_STEP = re.compile(r"\.?[^.\[\]]+|\[[^.\[\]]+\]")
PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[^.\[\]]+\])+")


@dataclass(frozen=True)
class RecordView:
    """A record accessed by the keys of its format. Methods raise ``DataError`` with place and column."""

    record: Record
    where: str
    fields: Mapping[str, str] = field(default_factory=dict)
    render: Render = "plain"
    allow_empty_prompt: bool = False
    is_prompt: bool = False  # inference: the target side may be missing

    def column(self, key: str) -> str:
        return self.fields.get(key, key)

    def name(self, key: str) -> str:
        return f"key {self.column(key)!r}"

    def has(self, key: str) -> bool:
        return self.record.get(self.column(key)) is not None

    def value(self, key: str) -> Any:
        try:
            value = look_up(self.record, self.column(key))
        except LookupError as error:
            fix = f"add it, or set its column with fields: {{{key}: COLUMN}}"
            raise self.error(f"missing {self.name(key)}", got=str(error), fix=fix) from None
        if is_missing(value):
            what = f"{self.name(key)} is {missing_name(value)}"
            raise self.error(what, fix="fill it in, or remove the record")
        return value

    def text(self, key: str) -> str:
        """Returns a text that must not be blank."""
        return self.not_blank(self.expect(str, self.value(key), what=self.name(key)), self.name(key))

    def prompt(self, key: str) -> str:
        """Returns a text of the prompt, which may be blank only with ``allow_empty_prompt``."""
        if not self.allow_empty_prompt:
            return self.text(key)
        return self.expect(str, self.value(key), what=self.name(key))

    def target(self, key: str) -> str:
        """Returns a target text; empty at inference."""
        return "" if self.is_prompt else self.text(key)

    def optional(self, key: str) -> str:
        """Returns an optional text: "" if it is null, blank or (unless ``fields`` maps it) missing."""
        column = self.column(key)
        if is_missing(self.record[column]) if column in self.record else key not in self.fields:
            return ""
        text = self.expect(str, self.value(key), what=self.name(key))
        return text if text.strip() else ""

    def items(self, key: str) -> list[Any]:
        items = self.expect(list, self.value(key), what=self.name(key))
        if not items:
            raise self.error(f"{self.name(key)} is an empty list", fix="remove the record")
        return items

    def parsed(self, key: str, kind: type) -> Any:
        """Returns an optional list or object, which may be given as JSON text."""
        if not self.has(key):
            return kind()
        return self.from_json(self.value(key), kind, what=self.name(key))

    def from_json(self, value: Any, kind: type, *, what: str) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else kind()
            except ValueError as error:
                raise self.error(
                    f"{what}: expected {kind_name(kind)} or its JSON text", got=value[:40]
                ) from error
        return self.expect(kind, value, what=what)

    def weight(self) -> float:
        """Returns the record's weight; default 1."""
        weight = 1.0
        for key in ("weight", "loss_weight"):
            if self.has(key):
                weight *= self.number(self.value(key), what=self.name(key))
        return weight

    def number(self, value: Any, *, what: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value >= 0):
            raise self.error(f"{what}: expected a number of at least 0", got=repr(value))
        return float(value)

    def expect(self, kind: type, value: Any, *, what: str) -> Any:
        if not isinstance(value, Mapping if kind is dict else kind):
            raise self.error(f"{what}: expected {kind_name(kind)}", got=kind_name(type(value)))
        return value

    def check_keys(self, keys: Mapping[str, Any], allowed: Sequence[str], *, what: str) -> None:
        """Raises DataError for an unknown key, since ignoring it could change the labels."""
        if unknown := [key for key in keys if key not in allowed]:
            hint = did_you_mean(unknown[0], allowed)
            fix = f"allowed keys are {', '.join(allowed)}"
            raise self.error(f"{what}: unknown key {unknown[0]!r}{hint}", fix=fix)

    def not_blank(self, text: str, what: str) -> str:
        if not text.strip():
            raise self.error(f"{what} is empty", got=repr(text), fix="fill it in, or remove the record")
        return text

    def error(self, what: str, *, got: str = "", fix: str = "") -> DataError:
        return DataError(what, where=self.where, got=got, fix=fix)


def is_missing(value: Any) -> bool:
    """Whether a value is null or one of the null values of tables: NaN, and pandas' NA and NaT."""
    if value is None or isinstance(value, str):
        return value is None
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, Number) and value != value)


def missing_name(value: Any) -> str:
    """Returns the name of a missing value for messages."""
    return "null" if value is None else "NaN" if isinstance(value, Number) else str(value)


def look_up(record: Record, column: str) -> Any:
    """Returns the value of a column or nested value, such as ``meta.title`` or ``instances[0].output``.

    A column with exactly this name comes first. Raises LookupError with the missing part.
    """
    if column in record:
        return record[column]
    value, path = record, ""
    for step in PATH_STEP.findall(column) if PATH.fullmatch(column) else [column]:
        name = step.strip(".[]")
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and step.startswith("[") and _is_index(name, len(value)):
            value = value[int(name)]
        elif not path:
            hint = did_you_mean(name, [str(key) for key in record])
            raise LookupError(f"keys {listed(record)}{hint}")
        elif isinstance(value, Mapping):
            hint = did_you_mean(name, [str(key) for key in value])
            raise LookupError(f"{path} without {name!r}, with keys {listed(value)}{hint}")
        else:
            got = f"a list of {len(value)}" if isinstance(value, list) else kind_name(type(value))
            raise LookupError(f"{path}, which is {got}, without {step!r}")
        path += step
    return value


def root_column(record: Record, column: str) -> str:
    """Returns the column of a record to which a name or path belongs."""
    if column in record or not PATH.fullmatch(column):
        return column
    return PATH_STEP.findall(column)[0]


def _is_index(name: str, length: int) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None and -length <= int(name) < length


def kind_name(kind: type) -> str:
    """Returns the JSON name of a type."""
    return {"Mapping": "object", "dict": "object", "NoneType": "null"}.get(kind.__name__, kind.__name__)


def listed(names: Iterable[Any]) -> str:
    """Formats the names of keys or columns for an error message."""
    return ", ".join(repr(str(name)) for name in names) or "none"
