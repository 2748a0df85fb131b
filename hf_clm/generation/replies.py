"""Answers in OpenAI's shape: whole, or in chunks of server-sent events."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from typing import ClassVar

from hf_clm.generation.parsing import AnswerReader, Part
from hf_clm.generation.stream import Answer
from hf_clm.schema import Json, ToolCall

JsonObject = dict[str, Json]


class Writer(ABC):
    """Writes one answer."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, answer: Answer):
        self._answer = answer
        self._head: JsonObject = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole(self) -> JsonObject:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def opening(self) -> str:
        """The events before the text."""

    @abstractmethod
    def piece(self, text: str) -> str:
        """The events of a piece of text."""

    @abstractmethod
    def closing(self, *, with_usage: bool) -> str:
        """The events after the text: why it ended, the tokens if they were asked for, and the end."""

    def _whole(self, content: JsonObject, finish: str) -> JsonObject:
        choices: list[Json] = [_choice(content, finish=finish)]
        usage: JsonObject = {**to_usage(self._answer)}
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def _event(self, content: JsonObject, *, finish: str | None = None) -> str:
        return to_event(
            {**self._head, "object": self.chunk_kind, "choices": [_choice(content, finish=finish)]}
        )

    def _end(self, content: JsonObject, finish: str, *, with_usage: bool) -> str:
        events = self._event(content, finish=finish)
        if with_usage:
            usage: JsonObject = {**to_usage(self._answer)}
            events += to_event({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage})
        return events + "data: [DONE]\n\n"


class TextWriter(Writer):
    """Writes an answer of ``/v1/completions``."""

    id_prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self) -> JsonObject:
        """The body of an answer that is not streamed."""
        return self._whole({"text": self._answer.text}, self._answer.finish)

    def opening(self) -> str:
        """Nothing."""
        return ""

    def piece(self, text: str) -> str:
        """The event of a piece of text."""
        return self._event({"text": text})

    def closing(self, *, with_usage: bool) -> str:
        """The last event, the usage if it was asked for, and the end."""
        return self._end({"text": ""}, self._answer.finish, with_usage=with_usage)


class ChatWriter(Writer):
    """Writes an answer of ``/v1/chat/completions``: reasoning, content and tool calls apart.

    In a stream the tool calls come last; a text that may be one is held back until the end.
    """

    id_prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, answer: Answer, reader: AnswerReader):
        super().__init__(model, answer)
        self._reader = reader

    def whole(self) -> JsonObject:
        """The body of an answer that is not streamed."""
        self._reader.feed(self._answer.text)
        self._reader.finish()
        said = self._reader.message
        message: JsonObject = {"role": "assistant", "content": said.get("content")}
        if "reasoning" in said:
            message["reasoning_content"] = said["reasoning"]
        if self._reader.tool_calls:
            message["tool_calls"] = [_to_api_call(call) for call in self._reader.tool_calls]
        return self._whole({"message": message}, self._finish)

    def opening(self) -> str:
        """The event that says whose turn it is."""
        return self._event({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> str:
        """The events of what is certain with this piece of text; none where it is held back."""
        return self._events(self._reader.feed(text))

    def closing(self, *, with_usage: bool) -> str:
        """What was held back, the tool calls, the last event, the usage if it was asked for, and the end."""
        events = self._events(self._reader.finish())
        for number, call in enumerate(self._reader.tool_calls):
            calls: list[Json] = [{"index": number, **_to_api_call(call)}]
            events += self._event({"delta": {"tool_calls": calls}})
        return events + self._end({"delta": {}}, self._finish, with_usage=with_usage)

    @property
    def _finish(self) -> str:
        """A call that was cut after another one ended at the length, not at the calls."""
        finish = self._answer.finish
        return "tool_calls" if self._reader.tool_calls and finish == "stop" else finish

    def _events(self, parts: list[Part]) -> str:
        keys = {"reasoning": "reasoning_content", "content": "content"}
        return "".join(self._event({"delta": {keys[part.kind]: part.text}}) for part in parts)


def to_event(content: JsonObject) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def to_usage(answer: Answer) -> dict[str, int]:
    """The tokens of the prompt as it was read, of the answer without its stop token, and of both."""
    read = len(answer.prompt_ids)
    return {"prompt_tokens": read, "completion_tokens": answer.tokens, "total_tokens": read + answer.tokens}


def _choice(content: JsonObject, *, finish: str | None) -> JsonObject:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def _to_api_call(call: ToolCall) -> JsonObject:
    """A call as OpenAI writes it: its arguments are JSON text."""
    function: JsonObject = {
        "name": call["function"]["name"],
        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
    }
    return {"id": call.get("id"), "type": "function", "function": function}
