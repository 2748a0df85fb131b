"""The types that flow from a file to a batch; uses nothing but the standard library.

    record (dict) -> Chat | Document | Tokens -> pieces of text -> row -> packed row -> batch

Glossary, one meaning for each word in the whole package:

record      what a file holds: one JSON object, one row of a table
example     a record that was read and checked: ``Chat``, ``Document``, or ``Tokens`` (ids of the user's own)
turn        one message of a chat
segment     a stretch of a document that is learned, or only read
prompt      what stands before a target, exactly as ``generate`` is given it
target      the tokens that have a label
row         a tokenized example (or one of several: pieces of a long document, turns of a chat)
packed row  several rows in one sequence
block       records that are prepared together
step        an optimizer step; a micro-step is one of its forward and backward passes
sample      generated text
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, TypeAlias, TypedDict

from typing_extensions import NotRequired  # typing has it from Python 3.11

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index

Format = Literal[
    "text", "prompt_completion", "instruct", "alpaca", "messages", "sharegpt", "segments", "tokenized"
]
Overflow = Literal["keep_target", "truncate", "drop", "error", "split"]
OnBadRecord = Literal["error", "drop"]
Render = Literal["chat", "plain"]  # of a prompt and its completion: turns of the chat template, or text
TokenizerKind = Literal["bpe", "unigram", "characters"]
Role = Literal["system", "user", "assistant", "tool"]
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class ToolCall(TypedDict):
    """A call that an assistant turn makes, in OpenAI's form: ``function`` holds ``name`` and ``arguments``.

    The arguments are an object, or its JSON text. Templates differ in which they take: see ``text/chat.py``.
    """

    type: str
    function: dict[str, Json]
    id: NotRequired[str]


class Message(TypedDict):
    """One turn of a chat. Only assistant turns are learned.

    weight: how much the turn's loss counts; 0 makes it read-only. Missing: 1.
    reasoning: what the model thinks before it answers; the template shows it under a name of its own.
    """

    role: Role
    content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]


class TokenizedExample(TypedDict):
    """A row: token ids and, at the same positions (unshifted), their labels; -100 where nothing is learned.

    weights: float32, how much the loss of each label counts; missing where every label counts 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: NotRequired[list[float]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text. ``weight`` is how much its loss counts; 0 is text that is only read.

    ``is_own`` marks text of the recipe, not of a record: a control token in it is that token.
    """

    text: str
    weight: float
    is_own: bool = False

    @property
    def is_target(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True, slots=True)
class Document:
    """Text without turns: a document that is learned whole, a prompt with its completion, marked segments.

    ``weight`` is that of the record: it multiplies all that is learned of it.
    """

    segments: list[Segment]
    weight: float = 1.0

    @property
    def texts(self) -> Iterator[str]:
        """Every text, in order."""
        return (segment.text for segment in self.segments)

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two examples the same."""
        weight = () if self.weight == 1 else (f"{self.weight:g}",)
        return ("document", *(f"{segment.weight:g} {segment.text}" for segment in self.segments), *weight)

    @property
    def is_text(self) -> bool:
        """Whether all of it is learned, so that there is no prompt."""
        return all(segment.is_target for segment in self.segments)

    @property
    def question(self) -> tuple[Document, str] | None:
        """What stands before the last target, and the target's text; None without a prompt and a target."""
        read = [number for number, segment in enumerate(self.segments) if not segment.is_target]
        cut = read[-1] + 1 if read else 0
        answer = "".join(segment.text for segment in self.segments[cut:])
        has_prompt = any(segment.text for segment in self.segments[:cut])
        return (Document(self.segments[:cut]), answer) if has_prompt and answer else None

    @property
    def shown(self) -> str:
        """The text to print for it as a prompt."""
        return "".join(self.texts).rstrip("\n")

    def learned_whole(self) -> Document:
        """The document as pretraining sees it: no part is only read."""
        segments = [replace(segment, weight=segment.weight or 1.0) for segment in self.segments]
        return replace(self, segments=segments)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the tokenizer's chat template renders.

    ``tools`` are JSON schemas of functions; ``template_kwargs`` are variables of the template. ``weight`` is
    that of the record: it multiplies all that is learned of it.
    """

    messages: list[Message]
    tools: list[dict[str, Json]] = field(default_factory=list)
    template_kwargs: dict[str, Json] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def texts(self) -> Iterator[str]:
        """Every text that a record wrote, in order."""
        if self.tools:
            yield json.dumps(self.tools, ensure_ascii=False)
        for message in self.messages:
            yield message.get("reasoning", "")
            yield message.get("content", "")
            if "tool_calls" in message:
                yield json.dumps(message["tool_calls"], ensure_ascii=False)

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two examples the same."""
        parts = ["chat"]
        for message in self.messages:
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            parts += [message["role"], message.get("content", "")]
            parts.append(json.dumps(others, sort_keys=True) if others else "")
        if self.tools or self.template_kwargs or self.weight != 1:
            parts.append(json.dumps([self.tools, self.template_kwargs, self.weight], sort_keys=True))
        return tuple(parts)

    @property
    def question(self) -> tuple[Chat, str] | None:
        """The chat up to its last answer, and the answer's text; None where it does not end in a text."""
        last = self.messages[-1]
        if last["role"] != "assistant" or not last.get("content") or last.get("tool_calls"):
            return None
        return replace(self, messages=self.messages[:-1]), last.get("content", "")

    @property
    def shown(self) -> str:
        """The text to print for it as a prompt: the last turn."""
        return self.messages[-1].get("content", "")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that the user tokenized, with their labels.

    ``lengths`` are those of the documents in them; ``mask`` is 0 where nothing is learned beside the labels.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]
    weight: float = 1.0
    mask: list[int] = field(default_factory=list)

    @property
    def texts(self) -> Iterator[str]:
        """None: nothing of it is text."""
        return iter(())

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two examples the same."""
        parts = (self.input_ids, self.labels, self.lengths, self.mask, self.weight)
        return ("tokens", *map(str, parts))

    @property
    def question(self) -> None:
        """None: there is no text to ask with."""
        return None


Example: TypeAlias = Chat | Document
AnyExample: TypeAlias = Chat | Document | Tokens


def short_call_id(name: str) -> str:
    """Nine letters for a tool call's id, where a template (Mistral's) takes no others."""
    return sha256(name.encode()).hexdigest()[:9]


def whole_text(example: AnyExample) -> str:
    """All of an example's own text."""
    separator = "\n" if isinstance(example, Chat) else ""
    return separator.join(example.texts)


def example_from_json(content: dict[str, Any]) -> AnyExample:
    """An example from what ``dataclasses.asdict`` made of it."""
    if "segments" in content:
        return Document([Segment(**segment) for segment in content["segments"]], content["weight"])
    return Chat(**content) if "messages" in content else Tokens(**content)
