"""The keys of a recipe: their names, types and places, and the words that override them."""

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hf_clm.errors import RecipeError
from hf_clm.recipe.faults import Fault

COMMAND_LINE = "command line"


def to_options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (name, text) for ``--name value``, ``--name=value`` and ``--flag``, which has no text."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise RecipeError(f"unexpected word {word!r}", where=COMMAND_LINE, fix="--section.key VALUE")
        if equals:
            yield name, text
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def override(
    tree: dict[str, Any], places: dict[str, str], *, key: str, value: Any, place: str = COMMAND_LINE
) -> None:
    """Sets a dotted key in ``tree``, and in ``places`` that it was given at ``place``."""
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents, start=1):
        whole = ".".join(parents[:depth])
        if node.get(parent) is None:
            node[parent], places[whole] = {}, place
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"--{key}: {whole} is not a mapping", where=place, fix=f"use --{whole}")
    node[last] = value
    for old in [old for old in places if old == key or old.startswith(f"{key}.")]:
        del places[old]
    places |= dict.fromkeys([key, *(inner for inner, _ in leaves(value, key))], place)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each leaf of nested mappings and lists."""
    if isinstance(value, dict | list) and value:
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def place_of(key: str, places: dict[str, str], *, otherwise: str) -> str:
    """Returns the place of a key, or of the innermost enclosing section that has one."""
    while key:
        if key in places:
            return places[key]
        key = key.rpartition(".")[0]
    return otherwise


def text_faults(tree: dict[str, Any]) -> list[Fault]:
    """Returns faults for invalid characters, and for secrets, whose values are not shown.

    A recipe is copied to the folder of every run, so it must not contain secrets.
    """
    fix = "remove it and use the environment variable HF_TOKEN (WANDB_API_KEY, ...)"
    secrets = [key for key, value in leaves(tree) if value and _is_secret(key, value)]
    halves = [key for key, value in leaves(tree) if re.search("[\0\ud800-\udfff]", str(value))]
    what = ": text must not contain NUL characters or lone surrogates"
    faults = [Fault(key, what) for key in halves]
    return faults + [Fault(key, ": secrets do not belong in a recipe", fix) for key in secrets]


def list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields (dotted key, field) of a model and its nested models."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        if inner := model_of(info.annotation):
            yield from list_keys(inner, f"{prefix}{name}.")


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the model among the members of a type: ``Lora`` for ``Lora | None``."""
    classes = [item for item in _members(annotation) if isinstance(item, type) and get_origin(item) is None]
    return next((item for item in classes if issubclass(item, BaseModel)), None)


def accepted_types(info: FieldInfo | None) -> tuple[str, ...]:
    """Returns ("str", "None") for ``str | None``, ("str",) for a Literal, ("dict",) for a section."""
    items = _members(info.annotation) if info else ()
    types = [str if get_origin(item) is Literal else get_origin(item) or item for item in items]
    names = {type(None): "None"} | {item: "dict" for item in types if model_of(item)}
    return tuple(names.get(item, item.__name__) for item in types)


def to_type_text(annotation: Any) -> str:
    """Formats a type for help: ``none|best_fit|stream``, ``int``, ``list[str]``, ..."""
    texts = []
    for item in _members(annotation):
        if get_origin(item) is Literal:
            texts += get_args(item)
        elif item is not type(None):
            texts.append(re.sub(r"[\w.]+\.", "", str(item)) if get_origin(item) else item.__name__)
    return "|".join(texts)


def _is_secret(key: str, value: Any) -> bool:
    is_token = isinstance(value, str) and re.match("hf_[A-Za-z0-9]{20}", value)
    return bool(is_token or re.search(SECRET_KEY, key.lower()))


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


SECRET_KEY = r"(api_?key|wandb_key|(hub|hf|auth|access|api)_token|password|secret)$"
