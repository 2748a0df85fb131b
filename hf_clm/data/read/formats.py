"""Converts records to examples, with one function per format.

    record -- fields --> RecordView -- the format's function --> Chat | Document | Tokens

A new format needs a function here, an entry in ``FORMATS`` and a name in ``schema.Format``. ``to_example``
(training) and ``to_prompt`` (inference) call the same function, so they cannot differ.
"""

import ast
import importlib.util
import inspect
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import cast

from hf_clm.data.read.messages import (
    OPENAI_ROLES,
    REASONING,
    SHAREGPT_ROLES,
    SWITCHES,
    WEIGHT_NAMES,
    checked_chat,
    to_empty_chat,
    to_messages,
    with_system,
)
from hf_clm.data.read.row import (
    Fields,
    Record,
    RecordView,
    is_missing,
    kind_name,
    listed,
    look_up,
    root_column,
)
from hf_clm.data.read.tokenized import MASKS, read_tokenized
from hf_clm.errors import DataError, RecipeError, did_you_mean
from hf_clm.schema import AnyExample, Chat, Document, Example, Format, Message, Render, Segment, Tokens

ReadRecord = Callable[[Record], Example | Record]  # a custom format
FirstSeen = dict[str, tuple[str, str]]  # property of a file -> its value in the first record, and the place
AFTER_BYTE = " (after byte "  # in a file's name if its lines are not counted from the beginning

# The two published forms of Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca).
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_PREAMBLE = f"{ALPACA_TASK}. Write a response that appropriately completes the request."
ALPACA_PREAMBLE_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_HEAD, ALPACA_INPUT, ALPACA_TAIL = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"

# Columns that affect the labels; it is an error if the format does not read them.
DECISIVE = {
    *("tools", "functions", "documents", "chat_template_kwargs", "enable_thinking"),
    *("messages", "system", "system_prompt", "history"),
    *(*WEIGHT_NAMES, *SWITCHES, *REASONING, *MASKS),
}
# Other outputs of tokenizers, which have no effect on training.
UNUSED_OUTPUTS = {"token_type_ids", "special_tokens_mask", "offset_mapping"}
WEIGHT_KEYS = ("weight", "loss_weight")
CHAT_KEYS = ("tools", "functions", "chat_template_kwargs", *WEIGHT_KEYS)


@dataclass(frozen=True)
class RecordFormat:
    """The function that reads a format, and the format's keys.

    ``has_prompt``: records have a prompt and a completion, which can be rendered as chat turns.
    """

    read: Callable[[RecordView], AnyExample]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    has_prompt: bool = False

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional

    @cached_property
    def key_set(self) -> frozenset[str]:
        return frozenset(self.keys)

    @cached_property
    def spellings(self) -> dict[str, str]:
        """Optional keys by normalized spelling, without masks, which are recognized by their length."""
        return {_spelling(key): key for key in self.optional if key not in MASKS}


def to_example(
    record: Record,
    *,
    format: Format | str | ReadRecord,
    fields: Fields = None,
    where: str = "",
    render: Render = "plain",
    allow_empty_prompt: bool = False,
    strict: bool = False,
) -> AnyExample:
    """Checks a record and converts it to an example.

    Args:
        format: a name, ``"module:function"``, or a function that converts a record to a ``Chat`` or a
            ``Document``.
        render: ``chat`` converts a prompt and its completion to user and assistant turns, ``plain`` to text.
        strict: raise an error for keys that the format does not read.

    Raises ``DataError`` if the record does not have the format, and ``RecipeError`` for an unknown format or
    an unknown key in ``fields``.
    """
    row = RecordView(with_parts(record, fields), where, fields or {}, render, allow_empty_prompt)
    row.expect(dict, record, what="record")
    record_format = find_format(format, fields)
    if not isinstance(record_format, RecordFormat):
        return _read_custom(record_format, row)
    if not fields and record_format.key_set.issuperset(record):
        return record_format.read(row)
    _check_format(row, record_format)
    for key in set(row.fields).intersection(record_format.optional):
        if row.column(key) not in row.record:
            row.value(key)  # raises, since a column listed in fields must exist
    unknown = unknown_keys(record, record_format, fields=fields)
    decisive = [key for key in unknown if _decides(key, record, format)]
    if decisive or (strict and unknown):
        hint = did_you_mean(unknown[0], record_format.keys) if not decisive else ""
        what = f"format {format} does not read {listed(decisive or unknown)}"
        fix = f"it reads {listed(record_format.keys)}; remove other keys"
        fix += "" if decisive else ", or set strict: false"
        raise row.error(f"{what}{hint}", fix=fix)
    _check_spelling(row, record_format, unknown=unknown)
    return record_format.read(row)


def to_prompt(
    record: Record,
    *,
    format: Format | str | ReadRecord,
    fields: Fields = None,
    where: str = "",
    render: Render = "plain",
    allow_empty_prompt: bool = False,
) -> Example:
    """Returns the prompt of a record, rendered as in training, for generation and evaluation.

    The target may be missing, and is removed otherwise: the completion, or an assistant turn at the end.
    """
    row = RecordView(
        with_parts(record, fields), where, fields or {}, render, allow_empty_prompt, is_prompt=True
    )
    row.expect(dict, record, what="record")
    record_format = find_format(format, fields)
    if isinstance(record_format, RecordFormat):
        _check_format(row, record_format)
        _check_spelling(row, record_format, unknown=unknown_keys(record, record_format, fields=fields))
    example = (
        record_format.read(row)
        if isinstance(record_format, RecordFormat)
        else _read_custom(record_format, row)
    )
    if isinstance(example, Tokens) or format == "segments":
        fix = "use text, prompt_completion, instruct, alpaca, messages or sharegpt"
        raise row.error(f"a record of format {format} cannot be used as a prompt", fix=fix)
    if isinstance(example, Document):
        last = max((n for n, s in enumerate(example.segments, start=1) if not s.is_target), default=None)
        return replace(example, segments=example.segments[:last])
    messages = example.messages
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if all(message["role"] not in ("user", "tool") for message in messages):
        raise row.error("no turn of role 'user'", got=f"{len(messages)} message(s)")
    return replace(example, messages=messages)


def with_parts(record: Record, fields: Fields) -> Record:
    """Adds a column for each nested value that ``fields`` refers to, such as ``meta.title``."""
    parts = {}
    for column in (fields or {}).values() if isinstance(record, Mapping) else ():
        if root_column(record, column) != column:
            with suppress(LookupError):
                parts[column] = look_up(record, column)
    return {**record, **parts} if parts else record


def _check_format(row: RecordView, record_format: RecordFormat) -> None:
    """Raises DataError if a record has no required key, but all required keys of another format."""
    needed = record_format.required[:1] if row.is_prompt else record_format.required
    if row.fields or any(key in row.record for key in needed):
        return
    matches = [name for name, other in FORMATS.items() if row.record.keys() >= set(other.required)]
    if matches:
        fix = f"set format: {matches[0]}, which matches these keys; or map the columns with fields"
        raise row.error(f"missing {row.name(needed[0])}", got=f"keys {listed(row.record)}", fix=fix)


def _check_spelling(row: RecordView, record_format: RecordFormat, *, unknown: Iterable[str]) -> None:
    """Raises DataError for an unread column whose name differs from an optional key only in spelling."""
    for column in unknown:
        key = record_format.spellings.get(_spelling(column))
        if key and not row.has(key) and _is_filled(row.record.get(column)):
            fix = f"rename it, or map it with fields: {{{key}: {column}}}"
            raise row.error(f"the format has no key {column!r}; did you mean {key!r}?", fix=fix)


def _is_filled(value: object) -> bool:
    return not (is_missing(value) or value in ([], {}, ""))


@cache
def _spelling(key: str) -> str:
    """Normalizes a key: ``Input``, ``inputs`` and ``in_put`` are equal."""
    return re.sub(r"[-_ ]", "", key.casefold()).removesuffix("s")


def _decides(key: str, record: Record, format: object) -> bool:
    """Whether an unread column would affect the labels; with token ids, any list of the same length may."""
    value, ids = record[key], record.get("input_ids")
    if not _is_filled(value):
        return False
    if format == "tokenized" and isinstance(value, list) and isinstance(ids, list):
        return len(value) == len(ids) and key not in UNUSED_OUTPUTS
    return key in DECISIVE


def find_format(format: Format | str | ReadRecord, fields: Fields = None) -> RecordFormat | ReadRecord:
    """Returns the format with a name, or a custom function. Raises RecipeError if there is neither."""
    if callable(format):
        return format
    if ":" in format:
        return cast(ReadRecord, import_function(format, kind="format", where="format"))
    record_format = FORMATS.get(cast(Format, format))
    if record_format is None:
        hint = did_you_mean(str(format), FORMATS)
        fix = f"use one of {', '.join(FORMATS)}, or module:function"
        raise RecipeError(f"unknown format {format!r}{hint}", fix=fix)
    for key in fields or {}:
        if key not in record_format.keys:
            hint = did_you_mean(key, record_format.keys)
            fix = f"use one of {listed(record_format.keys)}"
            raise RecipeError(f"fields: format {format} has no key {key!r}{hint}", fix=fix)
    return record_format


def detect_format(keys: Iterable[str], where: str = "", *, fields: Fields = None) -> Format:
    """Detects the format by its required keys; raises ``DataError`` for no match and for several.

    If ``fields`` maps a required key, the format is the one with this key.
    """
    columns, mapped = {str(key): None for key in keys}, dict(fields or {})
    able: dict[Format, RecordFormat] = {
        name: candidate for name, candidate in FORMATS.items() if candidate.key_set.issuperset(mapped)
    }
    if not able:
        raise RecipeError(f"fields: no format has all of the keys {listed(mapped)}", fix="set format")
    named: list[Format] = [
        name for name, candidate in able.items() if not mapped.keys().isdisjoint(candidate.required)
    ]
    if named:
        return named[0]  # no two formats require the same key
    matches: list[Format] = [
        name for name, candidate in able.items() if columns.keys() >= {*candidate.required}
    ]
    if len(matches) == 1:
        return matches[0]
    what = f"the keys match the formats {', '.join(matches)}" if matches else "the keys match no format"
    required = {key for candidate in able.values() for key in candidate.required}
    hints = (did_you_mean(key, required) for key in columns if key not in required)
    hint = "" if matches else next(filter(None, hints), "")
    needs = "; ".join(f"{name}: {listed(candidate.required)}" for name, candidate in FORMATS.items())
    fix = f"set format, and fields if needed ({needs})"
    raise DataError(what, where=where, got=f"keys {listed(columns)}{hint}", fix=fix)


def check_same_schema(record: Record, where: str, *, first: FirstSeen, fields: Fields = None) -> Format:
    """Detects a record's format; raises DataError if the first record of its file has another format.

    For sources without a format in the recipe. Fills in ``first``.
    """
    name = detect_format(record, where, fields=fields)
    _check_first(name, where, first=first, kind="format")
    return name


def check_same_masks(record: Record, where: str, *, first: FirstSeen, fields: Fields = None) -> None:
    """Raises DataError if a tokenized record has other masks than the first record of its file.

    The labels would otherwise depend on a mask that is missing by mistake.
    """
    row = RecordView(with_parts(record, fields), where, fields or {})
    masks = listed(key for key in MASKS if row.has(key))
    _check_first(masks, where, first=first, kind="masks")


def _check_first(value: str, where: str, *, first: FirstSeen, kind: str) -> None:
    file = where.rpartition(":")[0].partition(AFTER_BYTE)[0]
    expected, first_where = first.setdefault(f"{kind} {file}", (value, where))
    if value != expected:
        what = f"the record has {kind} {value}, but {first_where} has {kind} {expected}"
        raise DataError(what, where=where, fix="split the file by kind of record")


def unknown_keys(record: Record, format: RecordFormat | str, *, fields: Fields = None) -> list[str]:
    """Returns the columns that a record's format does not read; none for a custom format."""
    record_format = find_format(format) if isinstance(format, str) else format
    if not isinstance(record_format, RecordFormat):
        return []
    columns = record_format.key_set
    if fields:
        columns = {root_column(record, fields[key]) if key in fields else key for key in record_format.keys}
    return [str(column) for column in record if column not in columns]


def custom_modules(formats: Iterable[str | None]) -> dict[str, str]:
    """Returns the source code of the modules of custom formats, by name.

    Modules that they import come before them. Skips installed modules and modules without a source file.
    """
    sources: dict[str, str] = {}
    for format in [format for format in formats if format and ":" in format]:
        module, _, function = format.partition(":")
        if module == "__main__":  # in a script or a notebook, which cannot be imported
            sources[format] = _describe_function(getattr(import_module(module), function, None), set())
        else:
            _add_module(module, sources, seen=set())
    return sources


def _describe_function(value: object, seen: set[str]) -> str:
    """Describes what a function or class of a script or a notebook depends on, for the key of the cache.

    That is its source, and what it names of its module: other functions and classes, and plain values. Values
    of other types are described by their type alone, as their text may differ in every process.
    """
    if not isinstance(value, FunctionType | type):
        return _describe_value(value)
    module = vars(sys.modules[value.__module__]) if value.__module__ in sys.modules else {}
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):  # defined without a file, as by exec
        code = getattr(value, "__code__", None)
        source = f"{code.co_code.hex()} {code.co_names} {code.co_consts}" if code else value.__qualname__
    parts = [source]
    for name in sorted(set(re.findall(r"[A-Za-z_]\w*", source)) & module.keys() - seen):
        seen.add(name)
        is_local = getattr(module[name], "__module__", value.__module__) == value.__module__
        is_local = is_local and not isinstance(module[name], ModuleType)
        parts.append(f"{name}={_describe_function(module[name], seen) if is_local else name}")
    return "\n".join(parts)


def _describe_value(value: object) -> str:
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_describe_value, value)))}}}"
    if isinstance(value, dict):
        return str([(_describe_value(key), _describe_value(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return str([_describe_value(item) for item in value])
    is_plain = value is None or isinstance(value, str | bytes | bool | int | float | Path | re.Pattern)
    return repr(value) if is_plain else type(value).__qualname__


def _add_module(name: str, sources: dict[str, str], *, seen: set[str]) -> None:
    """Adds a module after its imports. A missing module is reported later, when records are read."""
    seen.add(name)
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name) if _is_custom(name.partition(".")[0]) else None
    if not spec or not spec.origin or not spec.origin.endswith(".py"):
        return
    source = Path(spec.origin).read_text(encoding="utf-8")
    with suppress(SyntaxError):
        for imported in _imports(source, package=spec.parent or ""):
            if imported not in seen:
                _add_module(imported, sources, seen=seen)
    sources[name] = source


def _is_custom(package: str) -> bool:
    """Whether a top-level module is neither installed nor part of hf_clm. Does not import it."""
    spec = importlib.util.find_spec(package)
    if not spec or package == __name__.partition(".")[0]:
        return False
    places = [*(spec.submodule_search_locations or []), spec.origin or ""]
    installed = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())
    return not any(Path(place).is_relative_to(folder) for place in places for folder in installed)


def _imports(source: str, *, package: str) -> Iterator[str]:
    """Yields the modules that a module may import: for ``from a import b``, both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            home = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (home, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def provide_modules(modules: Mapping[str, str]) -> None:
    """Creates modules from source code if they cannot be imported, as on another machine."""
    for name, source in modules.items():
        if (
            ":" not in name
            and name not in sys.modules
            and importlib.util.find_spec(name.partition(".")[0]) is None
        ):
            module = sys.modules[name] = ModuleType(name)
            exec(compile(source, f"{name}.py", "exec"), vars(module))


def import_function(name: str, *, kind: str, where: str) -> Callable[..., object]:
    """Imports a custom function, given as ``module:function``.

    Args:
        kind: its purpose for messages, such as "format".

    Raises RecipeError if it does not exist.
    """
    module, _, function = name.partition(":")
    try:
        imported = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "use module:function, with the module's folder in PYTHONPATH"
        raise RecipeError(f"no such {kind} {name!r}: {error}", where=where, fix=fix) from error
    if not callable(imported):
        raise RecipeError(f"{name} is not a function", where=where, got=type(imported).__name__)
    return imported


def _read_custom(read: ReadRecord, row: RecordView) -> Example:
    """Reads a record with a custom function. Its exceptions are reported as errors in the data."""
    try:
        example = read(row.record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"the format's function raises {type(error).__name__}: {error}"
        raise row.error(what, got=f"keys {listed(row.record)}") from error
    if isinstance(example, Mapping):  # a record of one of the formats
        format = detect_format(example, row.where)
        example = FORMATS[format].read(replace(row, record=dict(example), fields={}))
    elif isinstance(example, Chat):
        row.number(example.weight, what="the format's function: weight")
        plain = replace(row, record={}, fields={})  # the function has already read the record
        example = checked_chat(to_messages(example.messages, plain, OPENAI_ROLES), row, example)
    if not isinstance(example, Chat | Document):
        what, got = "the format's function must return a Chat, a Document or a record", type(example).__name__
        raise row.error(what, got=got, fix="from hf_clm import Chat, Document, Segment")
    if isinstance(example, Document) and not any(
        part.is_target and part.text.strip() for part in example.segments
    ):
        raise row.error("the format's function returned a document without a target")
    return example


def _read_text(row: RecordView) -> Document:
    return Document([Segment(row.text("text"), 1.0)], row.weight())


def _read_prompt_completion(row: RecordView) -> Example:
    if isinstance(row.record.get(row.column("prompt")), list):
        return _read_conversation_parts(row)
    return _prompted(row, row.prompt("prompt"), answer=row.target("completion"))


def _read_conversation_parts(row: RecordView) -> Chat:
    """Reads TRL's prompt and completion as lists of messages. The messages of the prompt are context only."""
    prompt = to_messages(row.items("prompt"), row, OPENAI_ROLES)
    context: list[Message] = [
        {**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in prompt
    ]
    completion = [] if row.is_prompt else row.value("completion")
    if not isinstance(completion, list):
        fix = "write it as a list of messages, like the prompt"
        raise row.error(f"{row.name('completion')}: expected list", got=kind_name(type(completion)), fix=fix)
    answers = to_messages(completion, row, OPENAI_ROLES)
    return checked_chat([*context, *answers], row, to_empty_chat(row))


def _read_instruct(row: RecordView) -> Example:
    """Reads instruct, input and label, which are concatenated without separators."""
    instruct, input_text = row.prompt("instruct"), row.optional("input")
    if row.render == "chat":
        return _prompted(row, join_turn(instruct, input_text), answer=row.target("label"))
    return _prompted(row, instruct + input_text, answer=row.target("label"))


def _read_alpaca(row: RecordView) -> Example:
    """Reads Stanford Alpaca's format. In a chat, the input follows the instruction after an empty line."""
    instruction, input_text, answer = row.prompt("instruction"), row.optional("input"), row.target("output")
    system, history = row.optional("system"), _read_history(row)
    if row.render == "chat":
        return _prompted(
            row, join_turn(instruction, input_text), answer=answer, system=system, history=history
        )
    if history:
        fix = "set a chat template (tokenizer.chat_template: chatml) and render: chat"
        raise row.error(f"{row.name('history')} needs chat turns, but the prompt is plain text", fix=fix)
    preamble = system or (ALPACA_PREAMBLE_WITH_INPUT if input_text else ALPACA_PREAMBLE)
    input_part = ALPACA_INPUT + input_text if input_text else ""
    prompt = f"{preamble}\n\n{ALPACA_HEAD}{instruction}{input_part}{ALPACA_TAIL}"
    return _prompted(row, prompt, answer=answer)


def _read_history(row: RecordView) -> list[Message]:
    """Reads LLaMA-Factory's ``history``: pairs of an earlier question and its answer."""
    turns: list[Message] = []
    for number, pair in enumerate(row.parsed("history", list), start=1):
        what = f"pair {number} of {row.name('history')}"
        if len(row.expect(list, pair, what=what)) != 2:
            raise row.error(f"{what}: expected a question and its answer", got=f"{len(pair)} items")
        question, answer = (row.not_blank(row.expect(str, text, what=what), what) for text in pair)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _read_messages(row: RecordView) -> Chat:
    messages = to_messages(row.items("messages"), row, OPENAI_ROLES)
    return checked_chat(with_system(messages, row), row, to_empty_chat(row))


def _read_sharegpt(row: RecordView) -> Chat:
    turns = []
    for number, turn in enumerate(row.items("conversations"), start=1):
        what = f"message {number}"
        turn = {key: value for key, value in row.expect(dict, turn, what=what).items() if value is not None}
        for key, other in (("from", "role"), ("value", "content")):
            if key in turn and other in turn:
                raise row.error(f"{what} has both {key!r} and {other!r}", fix="remove one of them")
            if key in turn:
                turn[other] = turn.pop(key)
        if turn.get("role") == "function_call":
            if "tool_calls" in turn:
                raise row.error(f"{what} is a function_call with tool_calls", fix="remove one of them")
            calls = row.from_json(turn.pop("content", None) or "[]", object, what=f"{what}: the call")
            turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
        turns.append(turn)
    messages = to_messages(turns, row, SHAREGPT_ROLES)
    return checked_chat(with_system(messages, row), row, to_empty_chat(row))


def _read_segments(row: RecordView) -> Document:
    segments = []
    for number, item in enumerate(row.items("segments"), start=1):
        what = f"segment {number}"
        fields = row.expect(dict, item, what=what)
        if unknown := [key for key in fields if key not in ("text", "train", "weight")]:
            hint = did_you_mean(unknown[0], ("text", "train", "weight"))
            raise row.error(
                f"{what}: unknown key {unknown[0]!r}{hint}", fix="allowed keys are text, train, weight"
            )
        text = row.expect(str, fields.get("text"), what=f"{what}: 'text'")
        is_target = row.expect(bool, fields.get("train"), what=f"{what}: 'train'")
        weight = fields.get("weight")
        factor = 1.0 if weight is None else row.number(weight, what=f"{what}: 'weight'")
        segments.append(Segment(text, factor if is_target else 0.0))
    target = "".join(segment.text for segment in segments if segment.is_target)
    row.not_blank(target, 'the text with "train": true')
    return Document(segments, row.weight())


FORMATS: dict[Format, RecordFormat] = {
    "text": RecordFormat(_read_text, ("text",), WEIGHT_KEYS),
    "prompt_completion": RecordFormat(
        _read_prompt_completion, ("prompt", "completion"), CHAT_KEYS, has_prompt=True
    ),
    "instruct": RecordFormat(_read_instruct, ("instruct", "label"), ("input", *WEIGHT_KEYS), has_prompt=True),
    "alpaca": RecordFormat(
        _read_alpaca, ("instruction", "output"), ("input", "system", "history", *WEIGHT_KEYS), has_prompt=True
    ),
    "messages": RecordFormat(_read_messages, ("messages",), ("system", *CHAT_KEYS)),
    "sharegpt": RecordFormat(_read_sharegpt, ("conversations",), ("system", *CHAT_KEYS)),
    "segments": RecordFormat(_read_segments, ("segments",), WEIGHT_KEYS),
    "tokenized": RecordFormat(read_tokenized, ("input_ids",), (*MASKS, *WEIGHT_KEYS)),
}


def join_turn(instruction: str, input_text: str = "") -> str:
    """Joins an instruction and its input, with one empty line in between, to the text of a user turn."""
    if not input_text.strip():
        return instruction
    return instruction.rstrip("\n") + "\n\n" + input_text.strip("\n")


def _prompted(
    row: RecordView, prompt: str, *, answer: str, system: str = "", history: Sequence[Message] = ()
) -> Example:
    """Converts a prompt and its completion to two segments or to turns of a chat."""
    if row.render == "plain":
        if chat_keys := [key for key in ("tools", "functions", "chat_template_kwargs") if row.has(key)]:
            raise row.error(f"{row.name(chat_keys[0])} needs chat turns, but the prompt is plain text")
        target = [] if row.is_prompt else [Segment(answer, 1.0)]
        return Document([Segment(prompt, 0.0), *target], row.weight())
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [*history, {"role": "user", "content": prompt}]
    if not row.is_prompt:
        messages.append({"role": "assistant", "content": answer})
    return replace(to_empty_chat(row), messages=messages)
