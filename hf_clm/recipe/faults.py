"""The faults of a recipe: those that checks find, and pydantic's errors in the terms of a recipe."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from hf_clm.errors import did_you_mean
from hf_clm.recipe.other_names import advise

OUT = "remove it"
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
TYPING_ERROR = 0.8  # difflib's cutoff; "max_seq_len" and "max_steps" have a similarity of 0.7
MAX_WORDS = 16  # of the accepted values, in a message
# What is expected, by the type of pydantic's error.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
# Parts of the location of a pydantic error that name the member of a union rather than a key.
MEMBER = re.compile(r"\w[\w-]*\[.*\]|bool|int|float|str|[A-Z]\w*")


@dataclass(frozen=True)
class Fault:
    """A fault of a recipe, at a dotted key, whose line is only known to the reader of the recipe."""

    key: str
    problem: str
    fix: str = ""
    got: str = ""

    @property
    def what(self) -> str:
        """The key and its problem: ``data.window needs ...``, or ``data.window: expected ...``."""
        return f"{self.key}{'' if self.problem.startswith(':') else ' '}{self.problem}"


class RecipeFaults(ValueError):
    """Raised by a validator that found faults."""

    def __init__(self, faults: list[Fault]):
        self.faults = faults
        super().__init__(faults[0].what)


def to_faults(error: ValidationError, keys: Iterable[str], *, removed: Mapping[str, str]) -> Iterator[Fault]:
    """Converts pydantic's errors to faults.

    Args:
        keys: all keys, to suggest the nearest one.
        removed: keys of earlier versions, and how to replace them.
    """
    by_key: dict[str, list[Any]] = {}
    for key, details in _flatten(error):
        by_key.setdefault(key, []).append(details)
    for key, errors in by_key.items():
        cause = errors[0].get("ctx", {}).get("error")
        if isinstance(cause, RecipeFaults):
            yield from cause.faults
        elif not any(other.startswith(f"{key}.") for other in by_key):  # of another union member
            yield _to_fault(key, errors, keys, removed)


def suggest_key(key: str, keys: Iterable[str]) -> str:
    """Suggests the nearest key of the same section, or the key of another section with exactly this name.

    For a key without a section, searches all sections, but only for a typing error.
    """
    parent, _, name = key.rpartition(".")
    places = [other.rpartition(".") for other in keys]
    siblings = [word for section, _, word in places if section == parent]
    longer = [
        word for word in siblings if len(name) > 2 and word.startswith(f"{name}_")
    ]  # name -> name_or_path
    near = longer[:1] or get_close_matches(
        name.lower(), siblings, n=1, cutoff=0.6 if parent else TYPING_ERROR
    )
    elsewhere = {word: f"{section}.{word}" for section, _, word in places if section and section != parent}
    if not near:
        likeness = 1.0 if parent else TYPING_ERROR
        near = [elsewhere[word] for word in get_close_matches(name.lower(), elsewhere, n=1, cutoff=likeness)]
    return f"; did you mean {near[0]!r}?" if near else ""


def shorten(value: Any) -> str:
    """Formats a value for a message, in at most 60 characters, with null, true and false as in YAML."""
    is_word = value is None or isinstance(value, bool)
    text = str(value).lower().replace("none", "null") if is_word else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flatten(error: ValidationError, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for details in error.errors():
        cause = details.get("ctx", {}).get("error")
        key = prefix + ".".join(str(name) for name in details["loc"] if not MEMBER.fullmatch(str(name)))
        if isinstance(cause, ValidationError):  # from a validator that calls another model
            yield from _flatten(cause, f"{key}.")
        else:
            yield key, details


def _to_fault(key: str, errors: list[Any], keys: Iterable[str], removed: Mapping[str, str]) -> Fault:
    """Combines the errors of all members of a union into one fault."""
    kinds = {details["type"]: details for details in errors}
    details = errors[0]
    value = details["input"]
    if "extra_forbidden" in kinds and key in removed:
        return Fault(key, "is a key of version 0.4", removed[key])
    if "extra_forbidden" in kinds and (advice := advise(key)):
        return Fault(key, f"is a name of {advice[0]}", advice[1])
    if "extra_forbidden" in kinds:
        of = "a field of transformers.TrainingArguments" if key.startswith("train.") else "a key of a recipe"
        return Fault(key, f"is not {of}{suggest_key(key, keys)}")
    if "missing" in kinds:
        return Fault(key, "is missing")
    expected = [EXPECTED[kind] for kind in kinds if kind in EXPECTED]
    if "literal_error" in kinds:
        words = re.findall("'(.*?)'", kinds["literal_error"]["ctx"]["expected"])
        longer = [word for word in words if value and word.startswith(str(value))]
        near = f"; did you mean {longer[0]!r}?" if longer else did_you_mean(str(value), words)
        choices = [*words[:MAX_WORDS], "..."][: len(words)]
        others = "".join(f", or {word}" for word in expected)
        return Fault(key, f": expected one of {', '.join(choices)}{others}", got=f"{shorten(value)}{near}")
    if not expected:
        message = re.sub("^Input should be (?=greater|less)", "expected a number ", details["msg"])
        message = message.replace("Input should be", "expected")
        return Fault(key, f": {message}", got="" if "; got " in message else shorten(value))
    return Fault(key, f": expected {' or '.join(expected)}", _drop_quotes(value, kinds), shorten(value))


def _drop_quotes(value: Any, kinds: Iterable[str]) -> str:
    """Returns the fix for text such as "2e-5" or "true ", if a number or a boolean is expected."""
    text = value.strip() if isinstance(value, str) else ""
    is_number = {"int_type", "float_type"} & {*kinds} and re.fullmatch(NUMBER, text)
    return (
        "remove the quotes"
        if is_number or ("bool_type" in kinds and text.lower() in ("true", "false"))
        else ""
    )
