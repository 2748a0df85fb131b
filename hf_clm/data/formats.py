"""Records to Examples: one function per format, and every check of a record's shape.

    record --fields--> Row --one function per format--> Example | TokenizedExample

``to_example`` (training) and ``to_prompt`` (inference) run the same functions, so the two renderings
of a prompt cannot drift apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_clm.errors import DataError, RecipeError, did_you_mean
from hf_clm.schema import (
    IGNORE_INDEX,
    ChatExample,
    Example,
    Format,
    Message,
    PromptExample,
    Role,
    Segment,
    SegmentsExample,
    TextExample,
    TokenizedExample,
)

Fields = Mapping[str, str] | None  # a format's key -> its column in the record, where they differ
FirstSeen = dict[str, tuple[Format, str]]  # file -> format and place of its first record

# Stanford Alpaca's prompt without its preamble, as most instruction data sets use it.
ALPACA_HEAD, ALPACA_INPUT, ALPACA_TAIL = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"

# The roles by each format's names for them; the first four are the ones to advise.
OPENAI_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "system",
}  # fmt: skip
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "gpt": "assistant", "tool": "tool",
    "user": "user", "assistant": "assistant",
}  # fmt: skip
MAY_FOLLOW: dict[str, tuple[Role, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


@dataclass(frozen=True)
class Row:
    """A record seen through its format's keys; the methods raise ``DataError`` with place and column."""

    record: Mapping[str, Any]
    where: str
    fields: Mapping[str, str]
    allow_empty_prompt: bool = False
    is_prompt: bool = False  # inference: the target side may be missing

    def column(self, key: str) -> str:
        return self.fields.get(key, key)

    def name(self, key: str) -> str:
        return f"key {self.column(key)!r}"

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
        return (
            self.expect(str, self.value(key), what=self.name(key))
            if self.allow_empty_prompt
            else self.text(key)
        )

    def target(self, key: str) -> str:
        """Text to be learned; nothing at inference."""
        return "" if self.is_prompt else self.text(key)

    def optional(self, key: str) -> str:
        """Text that may be left out: null, blank and (unless ``fields`` names it) missing count as empty."""
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

    def expect(self, kind: type, value: Any, *, what: str) -> Any:
        if not isinstance(value, kind):
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
    """The function that reads a format, and its keys."""

    read: Callable[[Row], Example | TokenizedExample]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional


def to_example(
    record: Mapping[str, Any],
    *,
    format: Format,
    fields: Fields = None,
    where: str = "",
    allow_empty_prompt: bool = False,
    strict: bool = False,
) -> Example | TokenizedExample:
    """Checks a record and turns it into what is learned from it.

    Raises ``DataError`` for a record that is not of the format (with ``strict``, also for a key that it
    does not read), and ``RecipeError`` for an unknown format or ``fields`` key.
    """
    row = Row(record, where, _checked_fields(format, fields), allow_empty_prompt)
    row.expect(Mapping, record, what="record")
    unknown = unknown_keys(record, format, fields=fields) if strict else []
    if unknown:
        hint = did_you_mean(unknown[0], FORMATS[format].keys)
        fix = f"format {format} reads {_listed(FORMATS[format].keys)}; remove the others, or leave strict off"
        raise row.error(f"unknown keys {_listed(unknown)}{hint}", fix=fix)
    return FORMATS[format].read(row)


def to_prompt(
    record: Mapping[str, Any],
    *,
    format: Format,
    fields: Fields = None,
    where: str = "",
    allow_empty_prompt: bool = False,
) -> PromptExample | ChatExample | TextExample:
    """The prompt of a record as training renders it, for generation and evaluation.

    The target side may be missing and is left out: ``completion`` is empty, a last assistant turn is gone.
    """
    row = Row(record, where, _checked_fields(format, fields), allow_empty_prompt, is_prompt=True)
    row.expect(Mapping, record, what="record")
    example = None if format in ("segments", "tokenized") else FORMATS[format].read(row)
    if isinstance(example, PromptExample | ChatExample | TextExample):
        return example
    fix = "use text, prompt_completion, instruct, alpaca, messages or sharegpt"
    raise row.error(f"a record of format {format} cannot be used as a prompt", fix=fix)


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


def check_same_schema(record: Mapping[str, Any], where: str, *, first: FirstSeen) -> Format:
    """The format told from a record's keys; raises where the first record of the same file had another one.

    For sources whose format is not named. ``first`` is filled in.
    """
    found = detect_format(record, where)
    known, first_where = first.setdefault(where.rpartition(":")[0], (found, where))
    if found != known:
        what = f"a record of format {found} in a file of format {known} ({first_where})"
        raise DataError(what, where=where, got=f"keys {_listed(record)}", fix="one format a file: split it")
    return found


def unknown_keys(record: Mapping[str, Any], format: Format, *, fields: Fields = None) -> list[str]:
    """The columns that a record's format does not read."""
    known = {(fields or {}).get(key, key) for key in FORMATS[format].keys}
    return [str(column) for column in record if column not in known]


def _read_text(row: Row) -> TextExample:
    return TextExample(row.text("text"))


def _read_prompt_completion(row: Row) -> PromptExample:
    return PromptExample(row.prompt("prompt"), row.target("completion"))


def _read_instruct(row: Row) -> PromptExample:
    given = row.optional("input")
    return PromptExample(row.prompt("instruct") + (f"\n{given}\n" if given else "\n"), row.target("label"))


def _read_alpaca(row: Row) -> PromptExample:
    given = row.optional("input")
    prompt = ALPACA_HEAD + row.prompt("instruction") + (ALPACA_INPUT + given if given else "") + ALPACA_TAIL
    return PromptExample(prompt, row.target("output"))


def _read_messages(row: Row) -> ChatExample:
    turns = enumerate(row.items("messages"), start=1)
    return _checked_chat([_to_message(turn, row, number=n, roles=OPENAI_ROLES) for n, turn in turns], row)


def _read_sharegpt(row: Row) -> ChatExample:
    system = row.optional("system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(row.items("conversations"), start=1):
        row.expect(Mapping, turn, what=f"message {number}")
        renamed = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
        messages.append(_to_message(renamed, row, number=number, roles=SHAREGPT_ROLES))
    return _checked_chat(messages, row, first=0 if system else 1)


def _read_segments(row: Row) -> SegmentsExample:
    segments = []
    for number, item in enumerate(row.items("segments"), start=1):
        what = f"segment {number}"
        row.expect(Mapping, item, what=what)
        text = row.expect(str, item.get("text"), what=f"{what}: 'text'")
        segments.append(Segment(text, is_target=row.expect(bool, item.get("train"), what=f"{what}: 'train'")))
    learned = "".join(segment.text for segment in segments if segment.is_target)
    row.not_blank(learned, 'the text with "train": true')
    return SegmentsExample(segments)


def _read_tokenized(row: Row) -> TokenizedExample:
    ids = _ids("input_ids", row)
    if "labels" not in row.fields and row.record.get("labels") is None:
        return {"input_ids": ids, "labels": list(ids)}
    labels = _ids("labels", row, may_be=(IGNORE_INDEX,))
    if len(labels) != len(ids):
        raise row.error("input_ids and labels differ in length", got=f"{len(ids)} and {len(labels)}")
    return {"input_ids": ids, "labels": labels}


FORMATS: dict[Format, RecordFormat] = {
    "text": RecordFormat(_read_text, ("text",)),
    "prompt_completion": RecordFormat(_read_prompt_completion, ("prompt", "completion")),
    "instruct": RecordFormat(_read_instruct, ("instruct", "label"), ("input",)),
    "alpaca": RecordFormat(_read_alpaca, ("instruction", "output"), ("input",)),
    "messages": RecordFormat(_read_messages, ("messages",)),
    "sharegpt": RecordFormat(_read_sharegpt, ("conversations",), ("system",)),
    "segments": RecordFormat(_read_segments, ("segments",)),
    "tokenized": RecordFormat(_read_tokenized, ("input_ids",), ("labels",)),
}


def _checked_fields(format: Format, fields: Fields) -> Mapping[str, str]:
    if format not in FORMATS:
        hint = did_you_mean(str(format), FORMATS)
        raise RecipeError(f"unknown format {format!r}{hint}", fix=f"one of {', '.join(FORMATS)}")
    for key in fields or {}:
        if key not in FORMATS[format].keys:
            hint = did_you_mean(key, FORMATS[format].keys)
            fix = f"fields maps {_listed(FORMATS[format].keys)} to columns"
            raise RecipeError(f"fields: format {format} has no key {key!r}{hint}", fix=fix)
    return fields or {}


def _to_message(turn: Any, row: Row, *, number: int, roles: Mapping[str, Role]) -> Message:
    """One turn, checked; a null entry counts as missing, since parquet fills every key of a struct."""
    what = f"message {number}"
    given = {key: value for key, value in row.expect(Mapping, turn, what=what).items() if value is not None}
    for key in ("role", "content"):
        if key not in given:
            raise row.error(f"{what} has no {key}", got=f"keys {_listed(given)}")
    for key in ("tool_calls", "function_call"):
        if given.get(key):
            raise row.error(f"{what}: {key} is not supported", fix="write the call into the content as text")
    if given.get("weight", 1) != 1:  # OpenAI's spelling; ignored, it would be learned in silence
        raise row.error(f"{what}: weight is not supported", fix='use "train": false')
    role = _role(given["role"], row, what=what, roles=roles)
    content = _content(given["content"], row, what=what)
    if role == "assistant" or (role == "user" and not row.allow_empty_prompt):
        row.not_blank(content, f"{what} (role {role})")
    if "train" not in given:
        return {"role": role, "content": content}
    if role != "assistant":
        raise row.error(f"{what}: 'train' on a turn of role {role!r}", fix="only assistant turns are learned")
    return {
        "role": role,
        "content": content,
        "train": row.expect(bool, given["train"], what=f"{what}: 'train'"),
    }


def _role(name: Any, row: Row, *, what: str, roles: Mapping[str, Role]) -> Role:
    if row.expect(str, name, what=f"{what}: role") not in roles:
        hint = did_you_mean(name, roles).removeprefix("; ")
        advised = ", ".join(list(roles)[:4])
        raise row.error(f"{what} has role {name!r}", fix=f"one of {advised}" + (f" ({hint})" if hint else ""))
    return roles[name]


def _content(content: Any, row: Row, *, what: str) -> str:
    """The text of a turn, given as such or as OpenAI's list of text parts."""
    if not isinstance(content, list):
        return row.expect(str, content, what=f"{what}: content")
    for part in content:
        kind = row.expect(Mapping, part, what=f"{what}: content part").get("type")
        if kind != "text":
            raise row.error(f"{what}: content of type {kind!r} is not supported", fix="only text is")
    return "".join(
        row.expect(str, part.get("text"), what=f"{what}: text of a content part") for part in content
    )


def _checked_chat(messages: list[Message], row: Row, *, first: int = 1) -> ChatExample:
    previous = ""
    for number, message in enumerate(messages, start=first):
        role = message["role"]
        if role not in MAY_FOLLOW[previous]:
            place = f"after role {previous!r}" if previous else "at the start"
            fix = "at most one system turn, first; then user and assistant in turns; tool after assistant"
            raise row.error(f"message {number} has role {role!r} {place}", fix=fix)
        previous = role
    if row.is_prompt and previous == "assistant":
        messages = messages[:-1]
    needed = "user" if row.is_prompt else "assistant"
    if all(message["role"] != needed for message in messages):
        raise row.error(f"no turn of role {needed!r}", got=f"{len(messages)} message(s)")
    return ChatExample(messages)


def _ids(key: str, row: Row, *, may_be: tuple[int, ...] = ()) -> list[int]:
    """Integers from 0 up, or one of ``may_be``."""
    ids = row.items(key)
    for position, token in enumerate(ids):
        if type(token) is not int:  # a bool is an int by isinstance
            raise row.error(f"{row.name(key)}, position {position}: expected int", got=_kind(type(token)))
        if token < 0 and token not in may_be:
            raise row.error(f"{row.name(key)}, position {position}: not a token id", got=str(token))
    return list(ids)


def _kind(kind: type) -> str:
    return {"Mapping": "object", "dict": "object", "NoneType": "null"}.get(kind.__name__, kind.__name__)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
