"""Records to examples: one function for each format, and every check of a record's shape.

    record -- fields --> Row -- the function of its format --> Chat | Document | Tokens

A new format is a function here, its entry in ``FORMATS`` and its name in ``schema.Format``. ``to_example``
(training) and ``to_prompt`` (inference) run the same function, so the two cannot differ.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

from hf_clm.errors import DataError, RecipeError, did_you_mean
from hf_clm.schema import (
    IGNORE_INDEX,
    AnyExample,
    Chat,
    Document,
    Example,
    Format,
    Json,
    Message,
    Render,
    Role,
    Segment,
    Tokens,
    ToolCall,
)

Record = Mapping[str, Any]
Fields = Mapping[str, str] | None  # a format's key -> its column in the record, where they differ
ReadRecord = Callable[[Record], Example]  # a format of the user's own
FirstSeen = dict[str, tuple[str, str]]  # file -> what its first record looks like, and its place

# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), in its two published forms.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_PREAMBLE = f"{ALPACA_TASK}. Write a response that appropriately completes the request."
ALPACA_PREAMBLE_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_HEAD, ALPACA_INPUT, ALPACA_TAIL = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"

# A format's names for the roles; the first four are the ones to advise.
OPENAI_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "gpt": "assistant", "tool": "tool", "user": "user",
    "assistant": "assistant", "function_call": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip

# The spellings of what other tools call a message's weight. ``masked`` says the opposite of the others.
SWITCHES = ("train", "training", "loss", "masked")
WEIGHTS = ("weight", "loss_weight", "loss")
REASONING = ("reasoning", "reasoning_content", "thinking")
MESSAGE_KEYS = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING)
MASKS = ("labels", "completion_mask", "assistant_masks", "attention_mask", "position_ids", "seq_lengths")
# Columns that would change what is learned: an error where the format does not read them.
DECISIVE = {
    *("tools", "chat_template_kwargs", "messages", "system", "history"),
    *(*WEIGHTS, *SWITCHES, *REASONING, *MASKS),
}
# Arguments of ``apply_chat_template`` that no variable of a template may be called.
RESERVED = {
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"),
}


@dataclass(frozen=True)
class Row:
    """A record seen through its format's keys. The methods raise ``DataError`` with place and column."""

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
        column = self.column(key)
        if column not in self.record:
            hint = did_you_mean(column, [str(name) for name in self.record])
            fix = f"add it, or name its column: fields: {{{key}: COLUMN}}"
            raise self.error(f"missing {self.name(key)}", got=f"keys {_listed(self.record)}{hint}", fix=fix)
        if self.record[column] is None:
            raise self.error(f"{self.name(key)} is null", fix="fill it in, or remove the record")
        return self.record[column]

    def text(self, key: str) -> str:
        """Text that must not be blank."""
        return self.not_blank(self.expect(str, self.value(key), what=self.name(key)), self.name(key))

    def prompt(self, key: str) -> str:
        """Text on the prompt side: blank only where that is allowed."""
        if not self.allow_empty_prompt:
            return self.text(key)
        return self.expect(str, self.value(key), what=self.name(key))

    def target(self, key: str) -> str:
        """Text to be learned; nothing at inference."""
        return "" if self.is_prompt else self.text(key)

    def optional(self, key: str) -> str:
        """Text that may be missing: null, blank and (unless ``fields`` names it) missing count as empty."""
        is_missing = self.column(key) not in self.record and key not in self.fields
        if is_missing or self.record.get(self.column(key), "") is None:
            return ""
        text = self.expect(str, self.value(key), what=self.name(key))
        return text if text.strip() else ""

    def items(self, key: str) -> list[Any]:
        items = self.expect(list, self.value(key), what=self.name(key))
        if not items:
            raise self.error(f"{self.name(key)} is an empty list", fix="remove the record")
        return items

    def parsed(self, key: str, kind: type) -> Any:
        """A list or an object that may be missing, or written as JSON text."""
        if not self.has(key):
            return kind()
        return self.from_json(self.value(key), kind, what=self.name(key))

    def from_json(self, value: Any, kind: type, *, what: str) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else kind()
            except ValueError as error:
                raise self.error(
                    f"{what}: expected {_kind(kind)} or its JSON text", got=value[:40]
                ) from error
        return self.expect(kind, value, what=what)

    def weight(self) -> float:
        """The record's weight; 1 where it has none."""
        weight = 1.0
        for key in ("weight", "loss_weight"):
            if self.has(key):
                weight *= self.number(self.value(key), what=self.name(key))
        return weight

    def number(self, value: Any, *, what: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value >= 0):
            raise self.error(f"{what}: expected a number from 0 up", got=repr(value))
        return float(value)

    def expect(self, kind: type, value: Any, *, what: str) -> Any:
        if not isinstance(value, Mapping if kind is dict else kind):
            raise self.error(f"{what}: expected {_kind(kind)}", got=_kind(type(value)))
        return value

    def not_blank(self, text: str, what: str) -> str:
        if not text.strip():
            raise self.error(f"{what} is empty", got=repr(text), fix="fill it in, or remove the record")
        return text

    def error(self, what: str, *, got: str = "", fix: str = "") -> DataError:
        return DataError(what, where=self.where, got=got, fix=fix)


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
    row = Row(record, where, fields or {}, render, allow_empty_prompt)
    row.expect(dict, record, what="record")
    known = find_format(format, fields)
    if not isinstance(known, RecordFormat):
        return _read_own(known, row)
    if not fields and known.key_set.issuperset(record):
        return known.read(row)
    for key in set(row.fields).intersection(known.optional):
        if row.column(key) not in record:
            row.value(key)  # raises: a column that is named must be there
    unknown = unknown_keys(record, known, fields=fields)
    decisive = [key for key in unknown if key in DECISIVE and record[key] not in (None, [], {}, "")]
    if decisive or (strict and unknown):
        hint = did_you_mean(unknown[0], known.keys) if not decisive else ""
        what = f"format {format} does not read {_listed(decisive or unknown)}"
        fix = f"it reads {_listed(known.keys)}; remove the others" + (
            "" if decisive else ", or strict: false"
        )
        raise row.error(f"{what}{hint}", fix=fix)
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
    row = Row(record, where, fields or {}, render, allow_empty_prompt, is_prompt=True)
    row.expect(dict, record, what="record")
    known = find_format(format, fields)
    example = known.read(row) if isinstance(known, RecordFormat) else _read_own(known, row)
    if isinstance(example, Tokens) or format == "segments":
        fix = "use text, prompt_completion, instruct, alpaca, messages or sharegpt"
        raise row.error(f"a record of format {format} cannot be used as a prompt", fix=fix)
    if isinstance(example, Document):
        last = max((n for n, s in enumerate(example.segments, start=1) if not s.is_target), default=None)
        return Document(example.segments[:last])
    messages = example.messages
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if all(message["role"] not in ("user", "tool") for message in messages):
        raise row.error("no turn of role 'user'", got=f"{len(messages)} message(s)")
    return replace(example, messages=messages)


def find_format(format: Format | str | ReadRecord, fields: Fields = None) -> RecordFormat | ReadRecord:
    """The format of a name, or the user's own function. Raises RecipeError for what is neither."""
    if callable(format):
        return format
    if ":" in format:
        return _import_function(format)
    known = FORMATS.get(cast(Format, format))
    if known is None:
        hint = did_you_mean(str(format), FORMATS)
        fix = f"one of {', '.join(FORMATS)}, or module:function"
        raise RecipeError(f"unknown format {format!r}{hint}", fix=fix)
    for key in fields or {}:
        if key not in known.keys:
            hint = did_you_mean(key, known.keys)
            fix = f"fields maps {_listed(known.keys)} to columns"
            raise RecipeError(f"fields: format {format} has no key {key!r}{hint}", fix=fix)
    return known


def detect_format(keys: Iterable[str], where: str = "") -> Format:
    """The one format whose required keys are all there; raises ``DataError`` for none and for several."""
    found = {str(key): None for key in keys}
    matches: list[Format] = [name for name, known in FORMATS.items() if found.keys() >= set(known.required)]
    if len(matches) == 1:
        return matches[0]
    what = f"the keys fit the formats {', '.join(matches)}" if matches else "the keys fit no format"
    needs = "; ".join(f"{name}: {_listed(known.required)}" for name, known in FORMATS.items())
    fix = f"name the format, and fields ({needs})"
    raise DataError(what, where=where, got=f"keys {_listed(found)}", fix=fix)


def check_same_schema(record: Record, where: str, *, first: FirstSeen) -> Format:
    """The format told from a record's keys; raises where the first record of its file has another one.

    For sources whose format is not named. ``first`` is filled in.
    """
    found = detect_format(record, where)
    _check_first(found, where, first=first, kind="format")
    return found


def check_same_masks(record: Record, where: str, *, first: FirstSeen, fields: Fields = None) -> None:
    """Raises where a tokenized record lacks a mask that the first record of its file has, or has one more.

    What is learned of the row would be decided by the gap.
    """
    found = _listed(key for key in MASKS if record.get((fields or {}).get(key, key)) is not None)
    _check_first(found, where, first=first, kind="tokenized with")


def _check_first(found: str, where: str, *, first: FirstSeen, kind: str) -> None:
    file = where.rpartition(":")[0]
    known, first_where = first.setdefault(f"{kind} {file}", (found, where))
    if found != known:
        what = f"a record of {kind} {found} in a file of {kind} {known} ({first_where})"
        raise DataError(what, where=where, fix="one kind of record a file: split it")


def unknown_keys(record: Record, format: RecordFormat | str, *, fields: Fields = None) -> list[str]:
    """The columns that a record's format does not read; none for a function of the user's own."""
    known = find_format(format) if isinstance(format, str) else format
    if not isinstance(known, RecordFormat):
        return []
    read = {(fields or {}).get(key, key) for key in known.keys}
    return [str(column) for column in record if column not in read]


def _import_function(name: str) -> ReadRecord:
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "module:function, with the module's folder in PYTHONPATH"
        raise RecipeError(f"no such format {name!r}: {error}", where="format", fix=fix) from error
    if not callable(found):
        raise RecipeError(f"{name} is not a function", where="format", got=type(found).__name__)
    return cast(ReadRecord, found)


def _read_own(read: ReadRecord, row: Row) -> Example:
    """A record by the user's own function; what it raises about the record is a fault of the data."""
    try:
        example = read(row.record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"the format's function raises {type(error).__name__}: {error}"
        raise row.error(what, got=f"keys {_listed(row.record)}") from error
    if not isinstance(example, Chat | Document):
        raise row.error("the format's function returned no Chat or Document", got=type(example).__name__)
    if isinstance(example, Document):
        if not any(segment.is_target and segment.text.strip() for segment in example.segments):
            raise row.error("the format's function returned a document with nothing to learn")
        return example
    plain = replace(row, record={}, fields={})  # the function has used what the record says
    return _checked_chat(_to_messages(example.messages, plain, OPENAI_ROLES), row, example)


def _read_text(row: Row) -> Document:
    return Document([Segment(row.text("text"), row.weight())])


def _read_prompt_completion(row: Row) -> Example:
    if isinstance(row.record.get(row.column("prompt")), list):
        return _read_conversation_parts(row)
    return _asked(row, row.prompt("prompt"), answer=row.target("completion"))


def _read_conversation_parts(row: Row) -> Chat:
    """TRL's prompt and completion as lists of messages: those of the prompt are only read."""
    prompt = _to_messages(row.items("prompt"), row, OPENAI_ROLES)
    read = [_weighted(turn, 0.0) if turn["role"] == "assistant" else turn for turn in prompt]
    answers = [] if row.is_prompt else _to_messages(row.items("completion"), row, OPENAI_ROLES)
    return _checked_chat([*read, *answers], row, _of_template(row))


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
    messages = _to_messages(row.items("messages"), row, OPENAI_ROLES)
    return _checked_chat(_with_system(messages, row), row, _of_template(row))


def _read_sharegpt(row: Row) -> Chat:
    turns = []
    for number, turn in enumerate(row.items("conversations"), start=1):
        row.expect(dict, turn, what=f"message {number}")
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
        if turn.get("role") == "function_call":
            calls = row.from_json(
                turn.pop("content", None) or "[]", object, what=f"message {number}: the call"
            )
            turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
        turns.append(turn)
    messages = _to_messages(turns, row, SHAREGPT_ROLES)
    return _checked_chat(_with_system(messages, row), row, _of_template(row))


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
        segments.append(Segment(text, counts * row.weight() if learned else 0.0))
    learned = "".join(segment.text for segment in segments if segment.is_target)
    row.not_blank(learned, 'the text with "train": true')
    return Document(segments)


def _read_tokenized(row: Row) -> Tokens:
    """Ids of the user's own, with every mask that is known: a place is learned where all of them allow it."""
    ids = _ids("input_ids", row)
    labels = list(ids)
    if row.column("labels") in row.record:
        labels = _of_length(_ids("labels", row, may_be=(IGNORE_INDEX,)), ids, "labels", row)
    mask = [1] * len(ids)
    for key in ("completion_mask", "assistant_masks"):
        if row.column(key) in row.record:
            mask = [old & new for old, new in zip(mask, _mask(key, ids, row), strict=True)]
    lengths = _document_lengths(row, len(ids))
    if row.column("attention_mask") in row.record:
        start, stop = _attended(_mask("attention_mask", ids, row), row)
        if (start, stop) != (0, len(ids)) and len(lengths) > 1:
            raise row.error("a packed row with padding", fix="remove the padding and its attention_mask")
        ids, labels, mask = ids[start:stop], labels[start:stop], mask[start:stop]
        lengths = [len(ids)] if len(lengths) == 1 else lengths
    return Tokens(ids, labels, lengths, row.weight(), [] if all(mask) else mask)


FORMATS: dict[Format, RecordFormat] = {
    "text": RecordFormat(_read_text, ("text",), ("weight", "loss_weight")),
    "prompt_completion": RecordFormat(
        _read_prompt_completion,
        ("prompt", "completion"),
        ("tools", "chat_template_kwargs", "weight", "loss_weight"),
        is_asked=True,
    ),
    "instruct": RecordFormat(
        _read_instruct, ("instruct", "label"), ("input", "weight", "loss_weight"), is_asked=True
    ),
    "alpaca": RecordFormat(
        _read_alpaca,
        ("instruction", "output"),
        ("input", "system", "history", "weight", "loss_weight"),
        is_asked=True,
    ),
    "messages": RecordFormat(
        _read_messages, ("messages",), ("system", "tools", "chat_template_kwargs", "weight", "loss_weight")
    ),
    "sharegpt": RecordFormat(
        _read_sharegpt,
        ("conversations",),
        ("system", "tools", "chat_template_kwargs", "weight", "loss_weight"),
    ),
    "segments": RecordFormat(_read_segments, ("segments",), ("weight", "loss_weight")),
    "tokenized": RecordFormat(_read_tokenized, ("input_ids",), (*MASKS, "weight", "loss_weight")),
}


def _asked(
    row: Row, prompt: str, *, answer: str, system: str = "", history: Sequence[Message] = ()
) -> Example:
    """A prompt and its completion: two segments, or turns of a chat."""
    weight = row.weight()
    if row.render == "plain":
        if row.has("tools") or row.has("chat_template_kwargs"):
            raise row.error("tools and chat_template_kwargs need turns, and the prompt is plain text")
        target = [] if row.is_prompt else [Segment(answer, weight)]
        return Document([Segment(prompt, 0.0), *target])
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [_weighted(turn, weight) for turn in history]
    messages.append({"role": "user", "content": prompt})
    if not row.is_prompt:
        messages.append(_weighted({"role": "assistant", "content": answer}, weight))
    return replace(_of_template(row), messages=messages)


def join_turn(instruction: str, given: str = "") -> str:
    """A user's turn: the instruction and, after one empty line, the input without line breaks around it."""
    if not given.strip():
        return instruction
    return instruction.rstrip("\n") + "\n\n" + given.strip("\n")


def _of_template(row: Row) -> Chat:
    """A chat without messages yet: the record's tools and template variables."""
    tools = [_to_tool(tool, row, number=n) for n, tool in enumerate(row.parsed("tools", list), start=1)]
    variables = dict(row.parsed("chat_template_kwargs", dict))
    if reserved := RESERVED.intersection(variables):
        what = f"{row.name('chat_template_kwargs')}: {_listed(reserved)} is not a variable of a template"
        raise row.error(what, fix="remove it")
    return Chat([], tools, variables)


def _to_tool(tool: Any, row: Row, *, number: int) -> dict[str, Json]:
    """A tool as templates expect it: ``{"type": "function", "function": {"name": ...}}``.

    Nulls are left out: a table fills in every key of a nested column.
    """
    given = _without_nulls(row.expect(dict, tool, what=f"tool {number}"))
    function = given.get("function", given)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.error(f"tool {number} has no name", got=f"keys {_listed(given)}")
    return given if "function" in given else {"type": "function", "function": given}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages after the system text that the record holds beside them."""
    system = row.optional("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise row.error(f"{row.name('system')} and a system turn", fix="remove one of them")
    return [{"role": "system", "content": system}, *messages]


def _to_messages(turns: Sequence[Any], row: Row, roles: Mapping[str, Role]) -> list[Message]:
    return [_to_message(turn, row, number=n, roles=roles) for n, turn in enumerate(turns, start=1)]


def _to_message(turn: Any, row: Row, *, number: int, roles: Mapping[str, Role]) -> Message:
    """One turn, checked. A null counts as missing, since a table fills in every key of a nested column.

    Raises DataError for an unknown key: a misspelt ``train`` would teach the model the very turn that it was
    meant to skip.
    """
    what = f"message {number}"
    given = {key: value for key, value in row.expect(dict, turn, what=what).items() if value is not None}
    known = (*MESSAGE_KEYS, *SWITCHES, *WEIGHTS)
    if unknown := [key for key in given if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise row.error(f"{what}: unknown key {unknown[0]!r}{hint}", fix=f"it may have {', '.join(known)}")
    if "role" not in given:
        raise row.error(f"{what} has no role", got=f"keys {_listed(given)}")
    role = _role(given["role"], row, what=what, roles=roles)
    message: Message = {"role": role}
    if "content" in given:
        message["content"] = _content(given["content"], row, what=what, role=role)
    if reasoning := _reasoning(given, row, what=what, role=role):
        message["reasoning"] = reasoning
    if calls := _tool_calls(given, row, what=what, role=role):
        message["tool_calls"] = calls
    if "name" in given:
        message["name"] = row.expect(str, given["name"], what=f"{what}: name")
    if "tool_call_id" in given:
        message["tool_call_id"] = row.expect(str, given["tool_call_id"], what=f"{what}: tool_call_id")
    _check_content(message, row, what=what)
    weight = _turn_weight(given, row, what=what, role=role)
    return _weighted(message, weight * row.weight()) if role == "assistant" else message


def _check_content(message: Message, row: Row, *, what: str) -> None:
    """Raises for a turn that says nothing."""
    role, content = message["role"], message.get("content")
    if "tool_calls" in message or (role in ("system", "tool") and content is not None):
        return
    if content is None:
        raise row.error(f"{what} has no content", got=f"role {role}")
    if role == "assistant" and row.is_prompt:  # an earlier answer may have been empty
        return
    if role == "assistant" or not row.allow_empty_prompt:
        row.not_blank(content, f"{what} (role {role})")


def _weighted(message: Message, weight: float) -> Message:
    return message if weight == 1 else {**message, "weight": weight * message.get("weight", 1.0)}


def _turn_weight(given: Record, row: Row, *, what: str, role: Role) -> float:
    """What the known spellings say of a turn together; they multiply."""
    weight = 1.0
    for key in dict.fromkeys((*SWITCHES, *WEIGHTS)):
        if key not in given:
            continue
        value, name = given[key], f"{what}: {key!r}"
        if isinstance(value, bool) and key in SWITCHES:
            weight *= float(value is not (key == "masked"))
        elif key in WEIGHTS:
            weight *= row.number(value, what=name)
        else:
            raise row.error(f"{name}: expected true or false", got=repr(value))
        if role != "assistant" and weight != 0:
            raise row.error(f"{name} on a turn of role {role!r}", fix="only assistant turns are learned")
    return weight


def _reasoning(given: Record, row: Row, *, what: str, role: Role) -> str:
    found = {key: row.expect(str, given[key], what=f"{what}: {key}") for key in REASONING if key in given}
    texts = {text for text in found.values() if text.strip()}
    if len(texts) > 1:
        raise row.error(f"{what}: {_listed(found)} differ", fix="keep one of them")
    if texts and role != "assistant":
        raise row.error(f"{what}: reasoning on a turn of role {role!r}", fix="only an assistant reasons")
    return texts.pop() if texts else ""


def _tool_calls(given: Record, row: Row, *, what: str, role: Role) -> list[ToolCall]:
    """The calls of a turn in OpenAI's form; ``function_call`` is its older spelling of a single one."""
    calls = given.get("tool_calls") or []
    calls = row.from_json(calls, list, what=f"{what}: tool_calls")
    if given.get("function_call"):
        calls = [*calls, row.from_json(given["function_call"], dict, what=f"{what}: function_call")]
    if calls and role != "assistant":
        raise row.error(f"{what}: tool_calls on a turn of role {role!r}", fix="only an assistant calls tools")
    return [_tool_call(call, row, what=f"{what}: tool call {n}") for n, call in enumerate(calls, start=1)]


def _tool_call(call: Any, row: Row, *, what: str) -> ToolCall:
    given = row.expect(dict, call, what=what)
    function = row.expect(dict, given.get("function") or given, what=f"{what}: function")
    name = row.expect(str, function.get("name"), what=f"{what}: name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments is None else arguments
    if isinstance(row.from_json(arguments, dict, what=f"{what}: arguments"), Mapping):
        arguments = arguments if isinstance(arguments, str) else dict(arguments)
    found: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**found, "id": given["id"]} if isinstance(given.get("id"), str) else found


def _role(name: Any, row: Row, *, what: str, roles: Mapping[str, Role]) -> Role:
    if row.expect(str, name, what=f"{what}: role") not in roles:
        hint = did_you_mean(name, roles).removeprefix("; ")
        advised = ", ".join(list(roles)[:4])
        raise row.error(f"{what} has role {name!r}", fix=f"one of {advised}" + (f" ({hint})" if hint else ""))
    return roles[name]


def _content(content: Any, row: Row, *, what: str, role: Role) -> str:
    """The text of a turn, given as such, as OpenAI's list of text parts, or (of a tool) as JSON."""
    if isinstance(content, Mapping) and role == "tool":
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        return row.expect(str, content, what=f"{what}: content")
    for part in content:
        kind = row.expect(dict, part, what=f"{what}: content part").get("type")
        if kind != "text":
            raise row.error(f"{what}: content of type {kind!r} is not supported", fix="only text is")
    return "".join(
        row.expect(str, part.get("text"), what=f"{what}: text of a content part") for part in content
    )


def _checked_chat(messages: list[Message], row: Row, chat: Chat) -> Chat:
    """The chat with these messages. The order of turns is for the template to judge."""
    if not row.is_prompt and all(message["role"] != "assistant" for message in messages):
        raise row.error("no turn of role 'assistant'", got=f"{len(messages)} message(s)")
    return replace(chat, messages=messages)


def _ids(key: str, row: Row, *, may_be: tuple[int, ...] = ()) -> list[int]:
    """Integers from 0 up to 2**31 - 1, or one of ``may_be``."""
    ids = row.items(key)
    for position, token in enumerate(ids):
        if type(token) is not int:  # a bool is an int by isinstance
            raise row.error(f"{row.name(key)}, position {position}: expected int", got=_kind(type(token)))
        if not 0 <= token < 2**31 and token not in may_be:
            raise row.error(f"{row.name(key)}, position {position}: not a token id", got=str(token))
    return list(ids)


def _of_length(values: list[int], ids: list[int], key: str, row: Row) -> list[int]:
    if len(values) != len(ids):
        raise row.error(f"input_ids and {key} differ in length", got=f"{len(ids)} and {len(values)}")
    return values


def _mask(key: str, ids: list[int], row: Row) -> list[int]:
    """A mask of zeros and ones, or booleans."""
    values = _of_length(row.items(key), ids, key, row)
    at = next((at for at, value in enumerate(values) if value not in (0, 1)), None)
    if at is not None:
        fix = "0 and 1; documents of a packed row are told by seq_lengths or position_ids"
        raise row.error(f"{row.name(key)}, position {at}: not a mask", got=repr(values[at]), fix=fix)
    return [int(value) for value in values]


def _attended(mask: list[int], row: Row) -> tuple[int, int]:
    """Where the tokens begin and end between the padding."""
    start = next((at for at, value in enumerate(mask) if value), len(mask))
    stop = start + sum(map(bool, mask))
    if not all(mask[start:stop]):
        fix = "a row for each document, or position_ids"
        raise row.error("attention_mask has a gap between tokens", got=f"at {start}", fix=fix)
    return start, stop


def _document_lengths(row: Row, length: int) -> list[int]:
    """The documents of a packed row, by ``seq_lengths`` or by ``position_ids`` that begin again at 0."""
    if row.column("seq_lengths") in row.record:
        lengths = _ids("seq_lengths", row)
        if sum(lengths) != length or 0 in lengths:
            raise row.error("seq_lengths do not add up to the row", got=f"{sum(lengths)} of {length} tokens")
        return lengths
    if row.column("position_ids") not in row.record:
        return [length]
    positions = _of_length(_ids("position_ids", row), [0] * length, "position_ids", row)
    starts = [at for at, position in enumerate(positions) if position == 0]
    lengths = [stop - start for start, stop in pairwise([*starts, length])]
    if not starts or starts[0] or positions != [at for size in lengths for at in range(size)]:
        raise row.error("position_ids do not count from 0 in each document", fix="correct or remove them")
    return lengths


def _kind(kind: type) -> str:
    return {"Mapping": "object", "dict": "object", "NoneType": "null"}.get(kind.__name__, kind.__name__)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
