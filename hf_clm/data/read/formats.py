"""Records to examples: one function for each format.

    record -- fields --> Row -- the function of its format --> Chat | Document | Tokens

A new format is a function here, its entry in ``FORMATS`` and its name in ``schema.Format``. ``to_example``
(training) and ``to_prompt`` (inference) run the same function, so the two cannot differ.
"""

import ast
import importlib.util
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
from types import CodeType, FunctionType, ModuleType
from typing import cast

from hf_clm.data.read.messages import (
    OPENAI_ROLES,
    REASONING,
    SHAREGPT_ROLES,
    SWITCHES,
    WEIGHTS,
    checked_chat,
    to_empty_chat,
    to_messages,
    with_system,
)
from hf_clm.data.read.row import (
    Fields,
    Record,
    Row,
    is_missing,
    kind_name,
    listed,
    look_up,
    root_column,
)
from hf_clm.data.read.tokenized import MASKS, read_tokenized
from hf_clm.errors import DataError, RecipeError, did_you_mean
from hf_clm.schema import AnyExample, Chat, Document, Example, Format, Message, Render, Segment, Tokens

ReadRecord = Callable[[Record], Example]  # a format of the user's own
FirstSeen = dict[str, tuple[str, str]]  # file -> what its first record looks like, and its place
BEHIND = " (behind byte "  # in the name of a file of which the lines are not counted from its beginning

# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), in its two published forms.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_PREAMBLE = f"{ALPACA_TASK}. Write a response that appropriately completes the request."
ALPACA_PREAMBLE_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_HEAD, ALPACA_INPUT, ALPACA_TAIL = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"

# Columns that would change what is learned: an error where the format does not read them.
DECISIVE = {
    *("tools", "functions", "documents", "chat_template_kwargs", "enable_thinking"),
    *("messages", "system", "system_prompt", "history"),
    *(*WEIGHTS, *SWITCHES, *REASONING, *MASKS),
}
# What tokenizers write for each token beside its id, and no trainer learns from.
BESIDE_IDS = {"token_type_ids", "special_tokens_mask", "offset_mapping"}
WEIGHT_KEYS = ("weight", "loss_weight")
CHAT_KEYS = ("tools", "functions", "chat_template_kwargs", *WEIGHT_KEYS)


@dataclass(frozen=True)
class RecordFormat:
    """The function that reads a format, and its keys.

    ``is_asked``: a prompt and its completion, which can be rendered as turns of a chat.
    """

    read: Callable[[Row], AnyExample]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    is_asked: bool = False

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional

    @cached_property
    def key_set(self) -> frozenset[str]:
        return frozenset(self.keys)

    @cached_property
    def spellings(self) -> dict[str, str]:
        """The optional keys by what other spellings of them share; a mask is told by its length."""
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
    """Checks a record and turns it into what is learned from it.

    Args:
        format: a name, ``"module:function"``, or a function from a record to a ``Chat`` or a ``Document``.
        render: ``chat`` makes user and assistant turns of a prompt and its completion, ``plain`` a text.
        strict: raise for a key that the format does not read.

    Raises ``DataError`` for a record that is not of the format, ``RecipeError`` for an unknown format or key
    of ``fields``.
    """
    row = Row(with_parts(record, fields), where, fields or {}, render, allow_empty_prompt)
    row.expect(dict, record, what="record")
    known = find_format(format, fields)
    if not isinstance(known, RecordFormat):
        return _read_own(known, row)
    if not fields and known.key_set.issuperset(record):
        return known.read(row)
    _check_format(row, known)
    for key in set(row.fields).intersection(known.optional):
        if row.column(key) not in row.record:
            row.value(key)  # raises: a column that is named must be there
    unknown = unknown_keys(record, known, fields=fields)
    decisive = [key for key in unknown if _decides(key, record, format)]
    if decisive or (strict and unknown):
        hint = did_you_mean(unknown[0], known.keys) if not decisive else ""
        what = f"format {format} does not read {listed(decisive or unknown)}"
        fix = f"it reads {listed(known.keys)}; remove the others" + ("" if decisive else ", or strict: false")
        raise row.error(f"{what}{hint}", fix=fix)
    _check_spelling(row, known, unknown=unknown)
    return known.read(row)


def to_prompt(
    record: Record,
    *,
    format: Format | str | ReadRecord,
    fields: Fields = None,
    where: str = "",
    render: Render = "plain",
    allow_empty_prompt: bool = False,
) -> Example:
    """The prompt of a record as training renders it, for generation and evaluation.

    The target side may be missing and is left out: there is no completion, a last assistant turn is gone.
    """
    row = Row(with_parts(record, fields), where, fields or {}, render, allow_empty_prompt, is_prompt=True)
    row.expect(dict, record, what="record")
    known = find_format(format, fields)
    if isinstance(known, RecordFormat):
        _check_format(row, known)
        _check_spelling(row, known, unknown=unknown_keys(record, known, fields=fields))
    example = known.read(row) if isinstance(known, RecordFormat) else _read_own(known, row)
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
    """The record, with a column for each part of one that ``fields`` names, such as ``meta.title``."""
    parts = {}
    for column in (fields or {}).values() if isinstance(record, Mapping) else ():
        if root_column(record, column) != column:
            with suppress(LookupError):
                parts[column] = look_up(record, column)
    return {**record, **parts} if parts else record


def _check_format(row: Row, known: RecordFormat) -> None:
    """Raises for a record that has none of the required keys, and those of another format."""
    needed = known.required[:1] if row.is_prompt else known.required
    if row.fields or any(key in row.record for key in needed):
        return
    fits = [name for name, other in FORMATS.items() if row.record.keys() >= set(other.required)]
    if fits:
        fix = f"format: {fits[0]}, which these keys fit; or name the columns with fields"
        raise row.error(f"missing {row.name(needed[0])}", got=f"keys {listed(row.record)}", fix=fix)


def _check_spelling(row: Row, known: RecordFormat, *, unknown: Iterable[str]) -> None:
    """Raises for a column that is an optional key but for its spelling, and would be left out."""
    for column in unknown:
        key = known.spellings.get(_spelling(column))
        if key and not row.has(key) and _is_filled(row.record.get(column)):
            fix = f"rename it, or map it with fields: {{{key}: {column}}}"
            raise row.error(f"no key of the format is {column!r}; did you mean {key!r}?", fix=fix)


def _is_filled(value: object) -> bool:
    return not (is_missing(value) or value in ([], {}, ""))


@cache
def _spelling(key: str) -> str:
    """What of a key does not differ between ``Input``, ``inputs`` and ``in_put``."""
    return re.sub(r"[-_ ]", "", key.casefold()).removesuffix("s")


def _decides(key: str, record: Record, format: object) -> bool:
    """Whether a column that is not read would change what is learned; beside ids any list of that length."""
    value, ids = record[key], record.get("input_ids")
    if not _is_filled(value):
        return False
    if format == "tokenized" and isinstance(value, list) and isinstance(ids, list):
        return len(value) == len(ids) and key not in BESIDE_IDS
    return key in DECISIVE


def find_format(format: Format | str | ReadRecord, fields: Fields = None) -> RecordFormat | ReadRecord:
    """The format of a name, or the user's own function. Raises RecipeError for what is neither."""
    if callable(format):
        return format
    if ":" in format:
        return cast(ReadRecord, import_function(format, kind="format", where="format"))
    known = FORMATS.get(cast(Format, format))
    if known is None:
        hint = did_you_mean(str(format), FORMATS)
        fix = f"one of {', '.join(FORMATS)}, or module:function"
        raise RecipeError(f"unknown format {format!r}{hint}", fix=fix)
    for key in fields or {}:
        if key not in known.keys:
            hint = did_you_mean(key, known.keys)
            fix = f"fields maps {listed(known.keys)} to columns"
            raise RecipeError(f"fields: format {format} has no key {key!r}{hint}", fix=fix)
    return known


def detect_format(keys: Iterable[str], where: str = "", *, fields: Fields = None) -> Format:
    """The one format whose required keys are all there; raises ``DataError`` for none and for several.

    Where ``fields`` names a column for a required key, it is the format that has this key.
    """
    found, columns = {str(key): None for key in keys}, dict(fields or {})
    able: dict[Format, RecordFormat] = {
        name: known for name, known in FORMATS.items() if known.key_set.issuperset(columns)
    }
    if not able:
        raise RecipeError(f"fields: no format has all of the keys {listed(columns)}", fix="name the format")
    named: list[Format] = [
        name for name, known in able.items() if not columns.keys().isdisjoint(known.required)
    ]
    if named:
        return named[0]  # no two formats require the same key
    matches: list[Format] = [name for name, known in able.items() if found.keys() >= {*known.required}]
    if len(matches) == 1:
        return matches[0]
    what = f"the keys fit the formats {', '.join(matches)}" if matches else "the keys fit no format"
    required = {key for known in able.values() for key in known.required}
    hints = (did_you_mean(key, required) for key in found if key not in required)
    hint = "" if matches else next(filter(None, hints), "")
    needs = "; ".join(f"{name}: {listed(known.required)}" for name, known in FORMATS.items())
    fix = f"name the format, and fields ({needs})"
    raise DataError(what, where=where, got=f"keys {listed(found)}{hint}", fix=fix)


def check_same_schema(record: Record, where: str, *, first: FirstSeen, fields: Fields = None) -> Format:
    """The format told from a record's keys; raises where the first record of its file has another one.

    For sources whose format is not named. ``first`` is filled in.
    """
    found = detect_format(record, where, fields=fields)
    _check_first(found, where, first=first, kind="format")
    return found


def check_same_masks(record: Record, where: str, *, first: FirstSeen, fields: Fields = None) -> None:
    """Raises where a tokenized record lacks a mask that the first record of its file has, or has one more.

    What is learned of the row would be decided by the gap.
    """
    row = Row(with_parts(record, fields), where, fields or {})
    found = listed(key for key in MASKS if row.has(key))
    _check_first(found, where, first=first, kind="tokenized with")


def _check_first(found: str, where: str, *, first: FirstSeen, kind: str) -> None:
    file = where.rpartition(":")[0].partition(BEHIND)[0]
    known, first_where = first.setdefault(f"{kind} {file}", (found, where))
    if found != known:
        what = f"a record of {kind} {found} in a file of {kind} {known} ({first_where})"
        raise DataError(what, where=where, fix="one kind of record a file: split it")


def unknown_keys(record: Record, format: RecordFormat | str, *, fields: Fields = None) -> list[str]:
    """The columns that a record's format does not read; none for a function of the user's own."""
    known = find_format(format) if isinstance(format, str) else format
    if not isinstance(known, RecordFormat):
        return []
    read = known.key_set
    if fields:
        read = {root_column(record, fields[key]) if key in fields else key for key in known.keys}
    return [str(column) for column in record if column not in read]


def own_modules(formats: Iterable[str | None]) -> dict[str, str]:
    """The sources of the modules of formats of the user's own, by name; of those that are files here.

    With the modules that these import, before them; not those that are installed.
    """
    found: dict[str, str] = {}
    named = [format for format in formats if format and ":" in format]
    for format in named:
        module, _, function = format.partition(":")
        if module == "__main__":  # a script's or a notebook's: there is no file that could be imported
            found[format] = _describe_function(getattr(import_module(module), function, None), set())
        else:
            _add_module(module, found, seen=set())
    return found


def _describe_function(function: object, seen: set[str]) -> str:
    """What a function computes with: its code, and the functions and values of its module that it names.

    For functions of a script or a notebook, whose module is more than what the function needs.
    """
    if not isinstance(function, FunctionType):
        return repr(function)
    parts, codes = [], [function.__code__]
    while codes:
        code = codes.pop()
        parts += [
            code.co_code.hex(),
            repr([item for item in code.co_consts if not isinstance(item, CodeType)]),
        ]
        codes += [item for item in code.co_consts if isinstance(item, CodeType)]
        for name in sorted({*code.co_names} & function.__globals__.keys() - seen):
            seen.add(name)
            value = function.__globals__[name]
            is_local = getattr(value, "__module__", function.__module__) == function.__module__
            if is_local and not isinstance(value, ModuleType):
                parts.append(f"{name}={_describe_function(value, seen)}")
    return "\n".join(parts)


def _add_module(name: str, found: dict[str, str], *, seen: set[str]) -> None:
    """Enters a module behind those that it imports. What cannot be found, reading a record tells."""
    seen.add(name)
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name) if _is_own(name.partition(".")[0]) else None
    if not spec or not spec.origin or not spec.origin.endswith(".py"):
        return
    source = Path(spec.origin).read_text(encoding="utf-8")
    with suppress(SyntaxError):
        for imported in _imports(source, package=spec.parent or ""):
            if imported not in seen:
                _add_module(imported, found, seen=seen)
    found[name] = source


def _is_own(package: str) -> bool:
    """Whether a module of the first level is neither installed nor ours; asking does not import it."""
    spec = importlib.util.find_spec(package)
    if not spec or package == __name__.partition(".")[0]:
        return False
    places = [*(spec.submodule_search_locations or []), spec.origin or ""]
    installed = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())
    return not any(Path(place).is_relative_to(folder) for place in places for folder in installed)


def _imports(source: str, *, package: str) -> Iterator[str]:
    """The modules that a module may import: of ``from a import b`` both a and a.b."""
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
    """Makes modules of their sources where they cannot be imported: on another machine."""
    for name, source in modules.items():
        if (
            ":" not in name
            and name not in sys.modules
            and importlib.util.find_spec(name.partition(".")[0]) is None
        ):
            module = sys.modules[name] = ModuleType(name)
            exec(compile(source, f"{name}.py", "exec"), vars(module))


def import_function(name: str, *, kind: str, where: str) -> Callable[..., object]:
    """A function of the user's own, named as ``module:function``.

    Args:
        kind: what it serves as, such as "format".

    Raises RecipeError where there is none.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "module:function, with the module's folder in PYTHONPATH"
        raise RecipeError(f"no such {kind} {name!r}: {error}", where=where, fix=fix) from error
    if not callable(found):
        raise RecipeError(f"{name} is not a function", where=where, got=type(found).__name__)
    return found


def _read_own(read: ReadRecord, row: Row) -> Example:
    """A record by the user's own function; what it raises about the record is a fault of the data."""
    try:
        example = read(row.record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"the format's function raises {type(error).__name__}: {error}"
        raise row.error(what, got=f"keys {listed(row.record)}") from error
    if not isinstance(example, Chat | Document):
        raise row.error("the format's function returned no Chat or Document", got=type(example).__name__)
    if isinstance(example, Document):
        if not any(segment.is_target and segment.text.strip() for segment in example.segments):
            raise row.error("the format's function returned a document with nothing to learn")
        return example
    row.number(example.weight, what="the format's function: weight")
    plain = replace(row, record={}, fields={})  # the function has used what the record says
    return checked_chat(to_messages(example.messages, plain, OPENAI_ROLES), row, example)


def _read_text(row: Row) -> Document:
    return Document([Segment(row.text("text"), 1.0)], row.weight())


def _read_prompt_completion(row: Row) -> Example:
    if isinstance(row.record.get(row.column("prompt")), list):
        return _read_conversation_parts(row)
    return _asked(row, row.prompt("prompt"), answer=row.target("completion"))


def _read_conversation_parts(row: Row) -> Chat:
    """TRL's prompt and completion as lists of messages: those of the prompt are only read."""
    prompt = to_messages(row.items("prompt"), row, OPENAI_ROLES)
    read: list[Message] = [
        {**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in prompt
    ]
    completion = [] if row.is_prompt else row.value("completion")
    if not isinstance(completion, list):
        fix = "write it as a list of messages, as the prompt is"
        raise row.error(f"{row.name('completion')}: expected list", got=kind_name(type(completion)), fix=fix)
    answers = to_messages(completion, row, OPENAI_ROLES)
    return checked_chat([*read, *answers], row, to_empty_chat(row))


def _read_instruct(row: Row) -> Example:
    """Instruct, input and label directly after one another, as the published system writes them."""
    instruct, given = row.prompt("instruct"), row.optional("input")
    if row.render == "chat":
        return _asked(row, join_turn(instruct, given), answer=row.target("label"))
    return _asked(row, instruct + given, answer=row.target("label"))


def _read_alpaca(row: Row) -> Example:
    """Stanford Alpaca's prompt; as a chat, the instruction and, after an empty line, the input."""
    instruction, given, answer = row.prompt("instruction"), row.optional("input"), row.target("output")
    system, history = row.optional("system"), _read_history(row)
    if row.render == "chat":
        return _asked(row, join_turn(instruction, given), answer=answer, system=system, history=history)
    if history:
        fix = "give the tokenizer a chat template (tokenizer.chat_template: chatml), and render: chat"
        raise row.error(f"{row.name('history')} needs turns, and the prompt is plain text", fix=fix)
    preamble = system or (ALPACA_PREAMBLE_WITH_INPUT if given else ALPACA_PREAMBLE)
    prompt = f"{preamble}\n\n{ALPACA_HEAD}{instruction}{ALPACA_INPUT + given if given else ''}{ALPACA_TAIL}"
    return _asked(row, prompt, answer=answer)


def _read_history(row: Row) -> list[Message]:
    """LLaMA-Factory's ``history``: pairs of an earlier question and its answer."""
    turns: list[Message] = []
    for number, pair in enumerate(row.parsed("history", list), start=1):
        what = f"pair {number} of {row.name('history')}"
        if len(row.expect(list, pair, what=what)) != 2:
            raise row.error(f"{what}: expected a question and its answer", got=f"{len(pair)} items")
        question, answer = (row.not_blank(row.expect(str, text, what=what), what) for text in pair)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _read_messages(row: Row) -> Chat:
    messages = to_messages(row.items("messages"), row, OPENAI_ROLES)
    return checked_chat(with_system(messages, row), row, to_empty_chat(row))


def _read_sharegpt(row: Row) -> Chat:
    turns = []
    for number, turn in enumerate(row.items("conversations"), start=1):
        what = f"message {number}"
        turn = {key: value for key, value in row.expect(dict, turn, what=what).items() if value is not None}
        for key, other in (("from", "role"), ("value", "content")):
            if key in turn and other in turn:
                raise row.error(f"{what} has {key!r} and {other!r}", fix="remove one of them")
            if key in turn:
                turn[other] = turn.pop(key)
        if turn.get("role") == "function_call":
            if "tool_calls" in turn:
                raise row.error(f"{what} is a function_call and has tool_calls", fix="remove one of them")
            calls = row.from_json(turn.pop("content", None) or "[]", object, what=f"{what}: the call")
            turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
        turns.append(turn)
    messages = to_messages(turns, row, SHAREGPT_ROLES)
    return checked_chat(with_system(messages, row), row, to_empty_chat(row))


def _read_segments(row: Row) -> Document:
    segments = []
    for number, item in enumerate(row.items("segments"), start=1):
        what = f"segment {number}"
        given = row.expect(dict, item, what=what)
        if unknown := [key for key in given if key not in ("text", "train", "weight")]:
            hint = did_you_mean(unknown[0], ("text", "train", "weight"))
            raise row.error(
                f"{what}: unknown key {unknown[0]!r}{hint}", fix="a segment has text, train, weight"
            )
        text = row.expect(str, given.get("text"), what=f"{what}: 'text'")
        learned = row.expect(bool, given.get("train"), what=f"{what}: 'train'")
        weight = given.get("weight")
        counts = 1.0 if weight is None else row.number(weight, what=f"{what}: 'weight'")
        segments.append(Segment(text, counts if learned else 0.0))
    learned = "".join(segment.text for segment in segments if segment.is_target)
    row.not_blank(learned, 'the text with "train": true')
    return Document(segments, row.weight())


FORMATS: dict[Format, RecordFormat] = {
    "text": RecordFormat(_read_text, ("text",), WEIGHT_KEYS),
    "prompt_completion": RecordFormat(
        _read_prompt_completion, ("prompt", "completion"), CHAT_KEYS, is_asked=True
    ),
    "instruct": RecordFormat(_read_instruct, ("instruct", "label"), ("input", *WEIGHT_KEYS), is_asked=True),
    "alpaca": RecordFormat(
        _read_alpaca, ("instruction", "output"), ("input", "system", "history", *WEIGHT_KEYS), is_asked=True
    ),
    "messages": RecordFormat(_read_messages, ("messages",), ("system", *CHAT_KEYS)),
    "sharegpt": RecordFormat(_read_sharegpt, ("conversations",), ("system", *CHAT_KEYS)),
    "segments": RecordFormat(_read_segments, ("segments",), WEIGHT_KEYS),
    "tokenized": RecordFormat(read_tokenized, ("input_ids",), (*MASKS, *WEIGHT_KEYS)),
}


def join_turn(instruction: str, given: str = "") -> str:
    """A user's turn: the instruction and, after one empty line, the input without line breaks around it."""
    if not given.strip():
        return instruction
    return instruction.rstrip("\n") + "\n\n" + given.strip("\n")


def _asked(
    row: Row, prompt: str, *, answer: str, system: str = "", history: Sequence[Message] = ()
) -> Example:
    """A prompt and its completion: two segments, or turns of a chat."""
    if row.render == "plain":
        if given := [key for key in ("tools", "functions", "chat_template_kwargs") if row.has(key)]:
            raise row.error(f"{row.name(given[0])} needs turns, and the prompt is plain text")
        target = [] if row.is_prompt else [Segment(answer, 1.0)]
        return Document([Segment(prompt, 0.0), *target], row.weight())
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [*history, {"role": "user", "content": prompt}]
    if not row.is_prompt:
        messages.append({"role": "assistant", "content": answer})
    return replace(to_empty_chat(row), messages=messages)
