"""Types of the data on its way from a file to a batch. Needs only the standard library.

    record (dict) -> Chat | Document | Tokens -> pieces of text -> row -> packed row -> batch

Glossary; each word has a single meaning throughout the package:

record      one entry of a data file: a JSON object or a row of a table
example     a record after parsing and validation: ``Chat``, ``Document`` or ``Tokens`` (already tokenized)
turn        one message of a chat
segment     a span of a document that is either trained on or context only
prompt      the context before a target, exactly as it is passed to ``generate``
target      the tokens that have a label
row         a tokenized example, or a part of one: a piece of a long document, a turn of a chat
packed row  several rows concatenated to one sequence
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
Render = Literal["chat", "plain"]  # how to render a prompt and its completion: as chat turns or as text
TokenizerKind = Literal["bpe", "unigram", "characters"]
Role = Literal["system", "user", "assistant", "tool"]
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class ToolCall(TypedDict):
    """A tool call of an assistant turn in OpenAI's format: ``function`` has ``name`` and ``arguments``.

    The arguments are an object or its JSON text. Templates differ in which they accept; see ``text/chat.py``.
    """

    type: str
    function: dict[str, Json]
    id: NotRequired[str]


class Message(TypedDict):
    """One turn of a chat. Only assistant turns are trained on.

    weight: factor of the turn's loss; 0 makes the turn context only. Default: 1.
    reasoning: the reasoning before the answer; each chat template has its own name for this key.
    """

    role: Role
    content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]


class TokenizedExample(TypedDict):
    """A row: token ids and their labels at the same positions (unshifted); -100 where there is no loss.

    weights: float32 factor of each label's loss; absent if all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: NotRequired[list[float]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of text. ``weight`` is the factor of its loss; 0 makes the text context only.

    ``is_own`` marks text that comes from the recipe, not from a record. Control tokens in such text are
    encoded as control tokens.
    """

    text: str
    weight: float
    is_own: bool = False

    @property
    def is_target(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True, slots=True)
class Document:
    """Text without turns: a complete document, a prompt with its completion, or marked segments.

    ``weight`` is the weight of the record; it multiplies the weights of all segments.
    """

    segments: list[Segment]
    weight: float = 1.0

    @property
    def texts(self) -> Iterator[str]:
        """Yields the text of each segment, in order."""
        return (segment.text for segment in self.segments)

    @property
    def identity(self) -> tuple[str, ...]:
        """Returns a key that is equal for equal examples."""
        weight = () if self.weight == 1 else (f"{self.weight:g}",)
        return ("document", *(f"{segment.weight:g} {segment.text}" for segment in self.segments), *weight)

    @property
    def is_text(self) -> bool:
        """Whether every segment is a target, so that there is no prompt."""
        return all(segment.is_target for segment in self.segments)

    @property
    def question(self) -> tuple[Document, str] | None:
        """Returns the context of the last target and the target's text, or None if either is empty."""
        context = [number for number, segment in enumerate(self.segments) if not segment.is_target]
        cut = context[-1] + 1 if context else 0
        answer = "".join(segment.text for segment in self.segments[cut:])
        has_prompt = any(segment.text for segment in self.segments[:cut])
        return (Document(self.segments[:cut]), answer) if has_prompt and answer else None

    @property
    def prompt_text(self) -> str:
        """Returns the text to print when this example is a prompt."""
        return "".join(self.texts).rstrip("\n")

    def as_targets(self) -> Document:
        """Returns the document as pretraining sees it: every segment is a target."""
        segments = [replace(segment, weight=segment.weight or 1.0) for segment in self.segments]
        return replace(self, segments=segments)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered with the tokenizer's chat template.

    ``tools`` are JSON schemas of functions and ``template_kwargs`` are variables of the template. ``weight``
    is the weight of the record; it multiplies the weights of all turns.
    """

    messages: list[Message]
    tools: list[dict[str, Json]] = field(default_factory=list)
    template_kwargs: dict[str, Json] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def texts(self) -> Iterator[str]:
        """Yields every text of the record, in order."""
        if self.tools:
            yield json.dumps(self.tools, ensure_ascii=False)
        for message in self.messages:
            yield message.get("reasoning", "")
            yield message.get("content", "")
            if "tool_calls" in message:
                yield json.dumps(message["tool_calls"], ensure_ascii=False)

    @property
    def identity(self) -> tuple[str, ...]:
        """Returns a key that is equal for equal examples."""
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
        """Returns the chat up to its last answer and the answer's text, or None if it ends otherwise."""
        last = self.messages[-1]
        if last["role"] != "assistant" or not last.get("content") or last.get("tool_calls"):
            return None
        return replace(self, messages=self.messages[:-1]), last.get("content", "")

    @property
    def prompt_text(self) -> str:
        """Returns the text to print when this example is a prompt: the last turn."""
        return self.messages[-1].get("content", "")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids that the user made, with their labels.

    ``lengths`` are the lengths of the documents in them. ``mask``, if given, is 0 where a label is ignored.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]
    weight: float = 1.0
    mask: list[int] = field(default_factory=list)

    @property
    def texts(self) -> Iterator[str]:
        """Returns an empty iterator: there is no text."""
        return iter(())

    @property
    def identity(self) -> tuple[str, ...]:
        """Returns a key that is equal for equal examples."""
        parts = (self.input_ids, self.labels, self.lengths, self.mask, self.weight)
        return ("tokens", *map(str, parts))

    @property
    def question(self) -> None:
        """Returns None: there is no text to prompt with."""
        return None


Example: TypeAlias = Chat | Document
AnyExample: TypeAlias = Chat | Document | Tokens


def short_call_id(name: str) -> str:
    """Returns the nine-character tool call id that some templates (Mistral's) require."""
    return sha256(name.encode()).hexdigest()[:9]


def whole_text(example: AnyExample) -> str:
    """Returns all text of an example."""
    separator = "\n" if isinstance(example, Chat) else ""
    return separator.join(example.texts)


def is_causal_class(name: str) -> bool:
    """Returns whether a class of transformers is a causal language model, by its name."""
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def example_from_json(content: dict[str, Any]) -> AnyExample:
    """Converts the output of ``dataclasses.asdict`` back to an example."""
    if "segments" in content:
        return Document([Segment(**segment) for segment in content["segments"]], content["weight"])
    return Chat(**content) if "messages" in content else Tokens(**content)
