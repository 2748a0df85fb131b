"""Answers in OpenAI's format, complete or as chunks of server-sent events.

tickets --> a Writer for each --> Reply --> body | events
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

from hf_clm.generation.parsing import AnswerReader, MessagePart
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.scores import Score, TokenNames
from hf_clm.generation.stream import Answer, TextStream
from hf_clm.generation.worker import Ticket
from hf_clm.schema import ToolCall

JsonObject = dict[str, object]


class Writer(ABC):
    """Formats one answer as a choice, without its index and finish_reason."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    empty: ClassVar[JsonObject]  # the content of the last chunk, which brings the finish_reason

    def __init__(self, ticket: Ticket, names: TokenNames):
        self.ticket, self._names = ticket, names
        self._sent = 0  # the number of scores returned so far

    @property
    def finish(self) -> str:
        """The finish_reason."""
        return self.ticket.finish

    @abstractmethod
    def complete(self) -> JsonObject:
        """Returns the complete answer, once it has ended."""

    @abstractmethod
    def pieces(self) -> AsyncIterator[JsonObject]:
        """Yields an answer while it is generated. Raises ApiError if generation fails."""

    @abstractmethod
    def logprobs(self) -> JsonObject:
        """Returns the log-probabilities of the tokens generated since the last call."""

    def _take(self, scores: Sequence[Score]) -> Sequence[Score]:
        self._sent, new = len(scores), scores[self._sent :]
        return new


class TextWriter(Writer):
    """Formats an answer of ``/v1/completions``; with ``echo``, the prompt comes first."""

    prefix, kind, chunk_kind, empty = "cmpl", "text_completion", "text_completion", {"text": ""}

    def __init__(self, ticket: Ticket, names: TokenNames, *, prompt: str, echo: bool):
        super().__init__(ticket, names)
        self._echo, self._offset = (prompt, 0) if echo else ("", len(prompt))
        self._first = [Score(id, None, ()) for id in ticket.prompt_ids[:1] if echo]
        self._text = TextStream(names.tokenizer, hidden_ids=frozenset())

    def complete(self) -> JsonObject:
        return {"text": self._echo + self.ticket.text}

    async def pieces(self) -> AsyncIterator[JsonObject]:
        if self._echo:
            yield {"text": self._echo}
        async for piece in self.ticket:
            yield {"text": piece}

    def logprobs(self) -> JsonObject:
        """Returns OpenAI's format for completions: lists of equal length, None for a prompt's first token."""
        scores = self._take([*self._first, *self.ticket.prompt_scores, *self.ticket.scores])
        return {
            "tokens": [self._names.name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._names.by_name(score) for score in scores],
            "text_offset": [self._advance(score.token) for score in scores],
        }

    def _advance(self, token: int) -> int:
        """Returns where the token's text begins, in characters of prompt and answer."""
        offset = self._offset
        self._offset += len(self._text.push(token))
        return offset


class ChatWriter(Writer):
    """Formats an answer of ``/v1/chat/completions``, with separate reasoning, content and tool calls.

    In a stream, tool calls come last, and text that may be a call is held back until the end.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    empty: ClassVar[JsonObject] = {"delta": {}}

    def __init__(self, ticket: Ticket, names: TokenNames, *, reader: AnswerReader):
        super().__init__(ticket, names)
        self._reader = reader

    @property
    def finish(self) -> str:
        """The finish_reason. An answer cut off after a complete tool call still ends with "length"."""
        finish = self.ticket.finish
        return "tool_calls" if self._reader.tool_calls and finish == "stop" else finish

    def complete(self) -> JsonObject:
        self._reader.feed(self.ticket.text)
        self._reader.finish()
        answer = self._reader.message
        message: JsonObject = {"role": "assistant", "content": answer.get("content")}
        if "reasoning" in answer:
            message["reasoning_content"] = answer["reasoning"]
        if self._reader.tool_calls:
            message["tool_calls"] = [_to_api_call(call) for call in self._reader.tool_calls]
        return {"message": message}

    async def pieces(self) -> AsyncIterator[JsonObject]:
        yield {"delta": {"role": "assistant", "content": ""}}
        async for piece in self.ticket:
            for part in self._reader.feed(piece):
                yield _to_delta(part)
        for part in self._reader.finish():
            yield _to_delta(part)
        for number, call in enumerate(self._reader.tool_calls):
            yield {"delta": {"tool_calls": [{"index": number, **_to_api_call(call)}]}}

    def logprobs(self) -> JsonObject:
        content = [
            {
                **self._to_entry(score.token, score.logprob),
                "top_logprobs": [self._to_entry(*one) for one in score.likeliest],
            }
            for score in self._take(self.ticket.scores)
        ]
        return {"content": content, "refusal": None}

    def _to_entry(self, token: int, logprob: float | None) -> JsonObject:
        name = self._names.name(token)
        is_text = name != f"token_id:{token}"
        return {"token": name, "logprob": logprob, "bytes": [*name.encode()] if is_text else None}


class Reply:
    """The reply to one request. ``dropped``: the number of messages left out because they did not fit."""

    def __init__(self, model: str, writers: Sequence[Writer], *, dropped: int = 0):
        self._writers, first = writers, writers[0]
        self._head: JsonObject = {"id": f"{first.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head |= {"model": model, **({"dropped_messages": dropped} if dropped else {})}

    def body(self) -> JsonObject:
        """Returns the complete reply, once all answers have ended."""
        choices = [
            self._choice(index, writer.complete(), writer.finish)
            for index, writer in enumerate(self._writers)
        ]
        return {**self._head, "object": self._writers[0].kind, "choices": choices, "usage": self._usage}

    async def events(self, *, with_usage: bool) -> AsyncIterator[str]:
        """Yields the reply as server-sent events, one answer after another."""
        try:
            for index, writer in enumerate(self._writers):
                async for content in writer.pieces():
                    yield self._chunk([self._choice(index, content, None)])
                yield self._chunk([self._choice(index, writer.empty, writer.finish)])
            if with_usage:
                yield self._chunk([], usage=self._usage)
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the HTTP status has already been sent
            yield _to_event(error.body)

    @property
    def _usage(self) -> JsonObject:
        return to_usage([writer.ticket for writer in self._writers])

    def _choice(self, index: int, content: JsonObject, finish: str | None) -> JsonObject:
        writer = self._writers[index]
        logprobs = None if writer.ticket.likeliest is None else writer.logprobs()
        ended = {"finish_reason": finish, "stop_reason": writer.ticket.stop_text if finish else None}
        return {"index": index, **content, "logprobs": logprobs, **ended}

    def _chunk(self, choices: Sequence[JsonObject], **more: object) -> str:
        return _to_event({**self._head, "object": self._writers[0].chunk_kind, "choices": choices, **more})


def to_usage(answers: Sequence[Answer]) -> JsonObject:
    """Counts the tokens of the prompts, of the answers without stop tokens, and of both."""
    prompt_tokens = sum(len(answer.prompt_ids) for answer in answers)
    new_tokens = sum(len(answer.ids) for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def _to_event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _to_delta(part: MessagePart) -> JsonObject:
    return {"delta": {"reasoning_content" if part.kind == "reasoning" else "content": part.text}}


def _to_api_call(call: ToolCall) -> JsonObject:
    """Converts a call to OpenAI's format, with its arguments as a JSON string."""
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": function}
