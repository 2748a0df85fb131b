"""Parses YAML 1.2 and command-line words into the values of a recipe, with their places and types."""

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from hf_clm.errors import RecipeError
from hf_clm.recipe.faults import Fault, shorten

COMMAND_LINE = "command line"


def build_yaml() -> YAML:
    """Returns a reader and writer for YAML 1.2 with plain types, which preserves the order of keys."""
    yaml = YAML(typ="safe", pure=True)  # the C parser reads YAML 1.1
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.width = 4096
    return yaml


def load_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the file's content, and the place of each dotted key, such as "recipes/x.yaml:9"."""
    text = _load_text(path)
    try:
        node = _compose(text)
        tree = _to_plain(node, path)
        places = {key: f"{path}:{line}" for key, line in _lines(node)}
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        duplicate = re.match('found duplicate key "(.*?)"', error.problem or "")
        what = f"the key {duplicate[1]!r} is given twice" if duplicate else f"not valid YAML: {error.problem}"
        raise RecipeError(what, where=f"{path}:{line}") from None
    except YAMLError as error:  # a character that YAML forbids
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise RecipeError("not valid YAML: a control character", where=f"{path}:{line}") from None
    except RecursionError:
        raise RecipeError("not a recipe: its mappings and lists are nested too deeply", where=path) from None
    if tree is None:
        raise RecipeError("the recipe is empty", where=path)
    if not isinstance(tree, dict):
        is_data = isinstance(tree, list) and tree and isinstance(tree[0], dict)
        fix = f"hf-clm train --model MODEL --data {path}" if is_data else ""
        what = "this is data, not a recipe" if is_data else "expected a mapping such as stage: sft"
        raise RecipeError(what, where=path, got=type(tree).__name__, fix=fix)
    return tree, places


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


def to_value(key: str, text: str | None, *, types: tuple[str, ...]) -> Any:
    """Parses text as YAML, unless the key takes text. ``types``: of the key, or () if not known."""
    if text is None:
        if types and "bool" not in types:
            raise RecipeError(f"--{key} needs a value", where=COMMAND_LINE)
        return True
    if types == ("str",):
        return text
    try:
        value = _to_plain(_compose(text), f"{COMMAND_LINE}: --{key}")
    except (YAMLError, RecursionError):
        if "str" in types:
            return text
        raise RecipeError(f"--{key}: not valid YAML", where=COMMAND_LINE, got=shorten(text)) from None
    if "str" not in types or (value is None and text in ("null", "~")):
        return value
    return value if type(value).__name__ in set(types) - {"str"} else text


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


def _load_text(path: str) -> str:
    if Path(path).is_dir():
        raise RecipeError("is a folder, not a recipe", where=path)
    try:
        with open(path, "rb") as file:  # may be a pipe, or endless like /dev/zero
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError("no such recipe", where=path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"cannot be read: {reason}", where=path) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"not a recipe: it has more than {MAX_BYTES:,} bytes", where=path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8") from None


def _compose(text: str) -> Node | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReusedAnchorWarning)  # the later anchor applies
        return build_yaml().compose(text)


def _to_plain(node: Node | None, where: str) -> Any:
    """Returns the value of a YAML node. Raises RecipeError for too many or invalid values."""
    if node is None:
        return None
    if _count(node, {}) > MAX_VALUES:
        what = f"not a recipe: with its aliases it has more than {MAX_VALUES:,} values, or contains itself"
        raise RecipeError(what, where=where)
    try:
        return build_yaml().constructor.construct_document(node)
    except ValueError as error:  # a number with thousands of digits, or an invalid date
        raise RecipeError(f"not valid YAML: {error}", where=where) from None


def _count(node: Node, sizes: dict[int, int]) -> int:
    """Counts the values below a node with aliases expanded; a node that contains itself counts MAX_VALUES.

    A few lines of nested aliases can expand to billions of values. ``sizes``: by the id of a node.
    """
    if isinstance(node, ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES
        parts = chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_count(part, sizes) for part in parts)
    return sizes[id(node)]


def _lines(node: Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, MappingNode):
        children = [(key.value, key, child) for key, child in node.value]
    elif isinstance(node, SequenceNode):
        children = [(index, child, child) for index, child in enumerate(node.value)]
    else:
        return
    for name, start, child in children:
        yield f"{prefix}{name}", start.start_mark.line + 1
        yield from _lines(child, f"{prefix}{name}.")


def _is_secret(key: str, value: Any) -> bool:
    is_token = isinstance(value, str) and re.match("hf_[A-Za-z0-9]{20}", value)
    return bool(is_token or re.search(SECRET_KEY, key.lower()))


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


MAX_BYTES = 256 * 1024  # which the parser takes seconds to read
MAX_VALUES = 50_000
SECRET_KEY = r"(api_?key|wandb_key|(hub|hf|auth|access|api)_token|password|secret)$"
