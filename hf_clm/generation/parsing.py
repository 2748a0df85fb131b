"""Parses answers into messages: reasoning, content and tool calls.

    <think>\\nEasy.\\n</think>\\n\\n | Let me look. | \\n<tool_call>\\n{"name": "look", ...}\\n</tool_call>
    reasoning                     | content      | tool_calls

The parser of transformers reads an answer while it is generated, according to the tokenizer's response
template. Few tokenizers have one. For the others, it is derived here from the marks in the chat template.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from hf_clm.schema import Json, Message, ToolCall
from hf_clm.text.chat import CLOSING_MARKS
from hf_clm.text.tokenizer import special_tokens

PartKind = Literal["reasoning", "content"]
PART_KINDS: dict[str, PartKind] = {  # text fields of response templates
    "content": "content",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
}
CALLS = "tool_calls"
# A string in the chat templates of a model family -> its syntax for calls, as a field of a response template.
CALL_SYNTAXES: dict[str, dict[str, Json]] = {
    # Hermes, Qwen: <tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>, any number of them
    "<tool_call>": {"open_pattern": r"\s*<tool_call>\s*", "close_pattern": r"\s*</tool_call>\s*"},
    # Mistral: [TOOL_CALLS] [{"name": "look", "arguments": {}}], to the end of the answer
    "[TOOL_CALLS]": {"open_pattern": r"\s*\[TOOL_CALLS\]\s*"},
    # Llama 3.1: {"name": "look", "parameters": {}}, the whole answer
    '"parameters": ': {"open_pattern": r"\A\s*(?=\{)"},
}
# These marks are part of an answer's text even if the vocabulary declares them special.
MARKS = {*CLOSING_MARKS, *CLOSING_MARKS.values(), "<tool_call>", "</tool_call>", "[TOOL_CALLS]"}


class MessagePart(NamedTuple):
    """A piece of a message while it is being generated."""

    kind: PartKind
    text: str


@dataclass(frozen=True)
class AnswerSyntax:
    """How a model writes reasoning and tool calls.

    hidden_ids: the special tokens that are not part of an answer's text; None means all of them.
    """

    response_template: Mapping[str, Any]
    hidden_ids: frozenset[int] | None = None


def find_syntax(tokenizer: PreTrainedTokenizerFast) -> AnswerSyntax:
    """Returns the syntax of the tokenizer's response template or, if it has none, of its chat template."""
    vocabulary = tokenizer.get_added_vocab()
    special = {token: vocabulary[token] for token in special_tokens(tokenizer)}
    response_template = getattr(tokenizer, "response_template", None)
    if response_template:
        return AnswerSyntax(response_template, hidden_ids=frozenset())
    hidden = None
    if not MARKS.isdisjoint(special):
        hidden = frozenset(number for token, number in special.items() if token not in MARKS)
    source = str(tokenizer.chat_template or "")
    marks = {begin: end for begin, end in CLOSING_MARKS.items() if begin in source or end in source}
    calls = next((calls for mark, calls in CALL_SYNTAXES.items() if mark in source), None)
    return AnswerSyntax(_to_response_template(marks, calls), hidden)


class AnswerReader:
    """Parses one answer piece by piece. Text after the first tool call is held back until the end.

    Args:
        prompt: the model's input, whose end may open the reasoning.
        tools: the tools offered in the prompt. Without tools, nothing is parsed as a call.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        syntax: AnswerSyntax,
        *,
        prompt: str,
        tools: Sequence[dict[str, Json]],
    ):
        self._tokenizer, self._syntax, self._prompt, self._tools = tokenizer, syntax, prompt, list(tools)
        self._text, self._is_broken, self._has_call = "", False, False
        self._values: list[Json] = []  # calls, as returned by the parser
        self._texts: dict[PartKind, str] = {"reasoning": "", "content": ""}
        self._returned = dict(self._texts)  # the texts that ``feed`` and ``finish`` have returned so far
        self.tool_calls: list[ToolCall] = []
        template = dict(syntax.response_template)
        if not tools:
            template["fields"] = {name: field for name, field in template["fields"].items() if name != CALLS}
        self._parser = tokenizer.get_response_parser(template, prefix=prompt, tools=[*tools])

    def feed(self, text: str) -> list[MessagePart]:
        """Adds text and returns the new parts of the message that can no longer change."""
        self._text += text
        try:
            self._take([] if self._is_broken else self._parser.feed(text))
        except ValueError:  # a call that does not match the tokenizer's response template
            self._is_broken = True
        return [] if self._is_broken or self._has_call else self._take_parts()

    def finish(self) -> list[MessagePart]:
        """Ends the answer and returns the text held back, including calls that cannot be parsed."""
        try:
            if not self._is_broken:
                self._take(self._parser.finalize()[1])
                self.tool_calls = _to_calls(self._values)
        except ValueError:
            self._is_broken = True
        if self._is_broken:
            self._texts = self._without_calls()
        return self._take_parts()

    @property
    def message(self) -> Message:
        """The complete message; call ``finish`` first."""
        reasoning, content = self._texts["reasoning"].strip(), self._texts["content"]
        message: Message = {"role": "assistant"}
        if self._texts["reasoning"]:
            content = content.lstrip()
        if content or not self.tool_calls:
            message["content"] = content
        if reasoning:
            message["reasoning"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def _take(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            kind = PART_KINDS.get(event["field"])
            if kind and event["type"] == "region_chunk":
                self._texts[kind] += event["text"]
            elif event["field"] == CALLS:
                self._has_call = True
                self._values += [event["value"]] if event["type"] == "region_close" else []

    def _take_parts(self) -> list[MessagePart]:
        parts = [MessagePart(kind, text[len(self._returned[kind]) :]) for kind, text in self._texts.items()]
        self._returned = dict(self._texts)
        return [part for part in parts if part.text]

    def _without_calls(self) -> dict[PartKind, str]:
        if not self._tools:
            return {"reasoning": "", "content": self._text}
        reader = AnswerReader(self._tokenizer, self._syntax, prompt=self._prompt, tools=[])
        reader.feed(self._text)
        reader.finish()
        return reader._texts


def _to_calls(values: list[Json]) -> list[ToolCall]:
    """Converts parsed values to tool calls. Raises ValueError for a value that is not a call."""
    calls = [call for value in values for call in (value if isinstance(value, list) else [value])]
    if values and not calls:
        raise ValueError("the list of calls is empty")
    return [_to_call(call) for call in calls]


def _to_call(value: Json) -> ToolCall:
    call = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("not a call")
    arguments = call.get("arguments", call.get("parameters"))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    call_id = value.get("id")
    return {
        "id": call_id if isinstance(call_id, str) else f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def _to_response_template(marks: Mapping[str, str], calls: Mapping[str, Json] | None) -> dict[str, Json]:
    """Builds a response template: reasoning between marks at the start, calls, and content.

    White space around a mark belongs to the mark. The anchor skips the prompt, except for a mark at its end
    that opens the reasoning.
    """
    fields: dict[str, Json] = {"content": {"content": "text"}}
    anchor = r"\A.*"
    if marks:
        begin, end = ("|".join(map(re.escape, words)) for words in (marks, marks.values()))
        fields["reasoning"] = {"open_pattern": rf"\A\s*(?:{begin})\s*", "close_pattern": rf"\s*(?:{end})\s*"}
        anchor = rf"\A(?:.*(?=(?:{begin})\s*\Z)|.*)"
    if calls:
        fields[CALLS] = {**calls, "content": "json", "content_args": {"allow_non_json": True}}
    return {"start_anchor_pattern": anchor, "fields": fields}
