"""Answers in OpenAI's shape: complete, or in chunks of server-sent events.

tickets --> a Writer for each --> Reply --> body | events
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

from hf_clm.generation.parsing import AnswerReader, Part
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.scores import Score, TokenNames
from hf_clm.generation.stream import Answer, TextStream
from hf_clm.generation.worker import Ticket
from hf_clm.schema import ToolCall

JsonObject = dict[str, object]


class Writer(ABC):
    """Writes the choice of one answer: what stands in it beside index, logprobs and finish_reason."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    nothing: ClassVar[JsonObject]  # of the last chunk, which comes with the finish_reason

    def __init__(self, ticket: Ticket, names: TokenNames):
        self.ticket, self._names = ticket, names
        self._sent = 0  # scores that were written

    @property
    def finish(self) -> str:
        """Why the answer ended."""
        return self.ticket.finish

    @abstractmethod
    def complete(self) -> JsonObject:
        """All of an answer that has ended."""

    @abstractmethod
    def pieces(self) -> AsyncIterator[JsonObject]:
        """An answer as it comes. Raises ApiError where it fails."""

    @abstractmethod
    def logprobs(self) -> JsonObject:
        """Of the tokens that have come since the last call."""

    def _take(self, scores: Sequence[Score]) -> Sequence[Score]:
        self._sent, new = len(scores), scores[self._sent :]
        return new


class TextWriter(Writer):
    """Writes an answer of ``/v1/completions``; with ``echo`` the prompt comes before it."""

    prefix, kind, chunk_kind, nothing = "cmpl", "text_completion", "text_completion", {"text": ""}

    def __init__(self, ticket: Ticket, names: TokenNames, *, prompt: str, echo: bool):
        super().__init__(ticket, names)
        self._echoed, self._offset = (prompt, 0) if echo else ("", len(prompt))
        self._first = [Score(id, None, ()) for id in ticket.prompt_ids[:1] if echo]
        self._text = TextStream(names.tokenizer, hidden_ids=frozenset())

    def complete(self) -> JsonObject:
        return {"text": self._echoed + self.ticket.text}

    async def pieces(self) -> AsyncIterator[JsonObject]:
        if self._echoed:
            yield {"text": self._echoed}
        async for piece in self.ticket:
            yield {"text": piece}

    def logprobs(self) -> JsonObject:
        """As OpenAI gives them here: lists of equal length, with nothing for the first token of a prompt."""
        scores = self._take([*self._first, *self.ticket.prompt_scores, *self.ticket.scores])
        return {
            "tokens": [self._names.name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._names.by_name(score) for score in scores],
            "text_offset": [self._advance(score.token) for score in scores],
        }

    def _advance(self, token: int) -> int:
        """Where the token's text begins, in characters of prompt and answer."""
        offset = self._offset
        self._offset += len(self._text.push(token))
        return offset


class ChatWriter(Writer):
    """Writes an answer of ``/v1/chat/completions``: reasoning, content and tool calls apart.

    In a stream the tool calls come last; a text that may be one is held back until the end.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    nothing: ClassVar[JsonObject] = {"delta": {}}

    def __init__(self, ticket: Ticket, names: TokenNames, *, reader: AnswerReader):
        super().__init__(ticket, names)
        self._reader = reader

    @property
    def finish(self) -> str:
        """A call that was cut after another one ended at the length, not at the calls."""
        finish = self.ticket.finish
        return "tool_calls" if self._reader.tool_calls and finish == "stop" else finish

    def complete(self) -> JsonObject:
        self._reader.feed(self.ticket.text)
        self._reader.finish()
        said = self._reader.message
        message: JsonObject = {"role": "assistant", "content": said.get("content")}
        if "reasoning" in said:
            message["reasoning_content"] = said["reasoning"]
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
    """The reply to one request; ``dropped``: the messages that there was no room for."""

    def __init__(self, model: str, writers: Sequence[Writer], *, dropped: int = 0):
        self._writers, first = writers, writers[0]
        self._head: JsonObject = {"id": f"{first.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head |= {"model": model, **({"dropped_messages": dropped} if dropped else {})}

    def body(self) -> JsonObject:
        """All of it, once the answers have ended."""
        choices = [
            self._choice(index, writer.complete(), writer.finish)
            for index, writer in enumerate(self._writers)
        ]
        return {**self._head, "object": self._writers[0].kind, "choices": choices, "usage": self._usage}

    async def events(self, *, with_usage: bool) -> AsyncIterator[str]:
        """It as a stream, one answer after the other."""
        try:
            for index, writer in enumerate(self._writers):
                async for content in writer.pieces():
                    yield self._chunk([self._choice(index, content, None)])
                yield self._chunk([self._choice(index, writer.nothing, writer.finish)])
            if with_usage:
                yield self._chunk([], usage=self._usage)
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent
            yield _to_event(error.body)

    @property
    def _usage(self) -> JsonObject:
        return to_usage([writer.ticket for writer in self._writers])

    def _choice(self, index: int, content: JsonObject, finish: str | None) -> JsonObject:
        writer = self._writers[index]
        logprobs = None if writer.ticket.likeliest is None else writer.logprobs()
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: Sequence[JsonObject], **more: object) -> str:
        return _to_event({**self._head, "object": self._writers[0].chunk_kind, "choices": choices, **more})


def to_usage(answers: Sequence[Answer]) -> JsonObject:
    """The tokens of the prompts as they were read, of the answers without their stop tokens, and of both."""
    read = sum(len(answer.prompt_ids) for answer in answers)
    new = sum(len(answer.ids) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _to_event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _to_delta(part: Part) -> JsonObject:
    return {"delta": {"reasoning_content" if part.kind == "reasoning" else "content": part.text}}


def _to_api_call(call: ToolCall) -> JsonObject:
    """A call as OpenAI writes it: its arguments are JSON text."""
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": function}
