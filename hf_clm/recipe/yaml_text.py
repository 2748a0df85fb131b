"""Parses YAML 1.2 into plain values with their places, and writes it. Only this module imports ruamel.yaml.

It is imported where a text is parsed or written, so that everything else works without the package.
"""

import re
import warnings
from collections.abc import Iterator
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from hf_clm.errors import RecipeError
from hf_clm.recipe.faults import shorten
from hf_clm.recipe.text import COMMAND_LINE

MAX_BYTES = 256 * 1024  # which the parser takes seconds to read
MAX_VALUES = 50_000


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


def write_yaml(content: dict[str, Any]) -> str:
    """Returns the content as YAML, in its order."""
    text = StringIO()
    build_yaml().dump(content, text)
    return text.getvalue()


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
