"""Answers in OpenAI's shape: whole, or in chunks of server-sent events.

to_head --> a Writer for each answer --> to_body | opening, piece, piece, closing, to_end
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from hf_clm.generation.parsing import AnswerReader, Part
from hf_clm.generation.scores import Score, TokenNames
from hf_clm.generation.stream import Answer, TextStream
from hf_clm.schema import Json, ToolCall

JsonObject = dict[str, Json]


class Echo(NamedTuple):
    """The text of a prompt, and whether the reply is to begin with it."""

    text: str
    is_asked: bool


class Writer(ABC):
    """Writes one answer of a reply; ``index`` counts the answers from 0."""

    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, head: JsonObject, answer: Answer, names: TokenNames, *, index: int = 0):
        self.answer = answer
        self._head, self._names, self._index = head, names, index

    @abstractmethod
    def whole(self) -> JsonObject:
        """The choice of an answer that is not streamed."""

    @abstractmethod
    def opening(self) -> str:
        """The events before the text."""

    @abstractmethod
    def piece(self, text: str) -> str:
        """The events of a piece of text."""

    @abstractmethod
    def closing(self) -> str:
        """The events after the text; the last one says why it ended."""

    @abstractmethod
    def _logprobs(self) -> Json:
        """Of the tokens that have come since the last call; None where they were not asked for."""

    def _choice(self, content: JsonObject, *, finish: str | None) -> JsonObject:
        return {"index": self._index, **content, "logprobs": self._logprobs(), "finish_reason": finish}

    def _event(self, content: JsonObject, *, finish: str | None = None) -> str:
        choices: list[Json] = [self._choice(content, finish=finish)]
        return to_event({**self._head, "object": self.chunk_kind, "choices": choices})


class TextWriter(Writer):
    """Writes an answer of ``/v1/completions``; what is ``echoed``, the prompt or nothing, comes before it."""

    whole_kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, head: JsonObject, answer: Answer, names: TokenNames, *, index: int, prompt: Echo):
        super().__init__(head, answer, names, index=index)
        self._echoed = prompt.text if prompt.is_asked else ""
        self._first = answer.prompt_ids[:1] if prompt.is_asked else []
        self._text = TextStream(names.tokenizer, hidden_ids=frozenset())
        self._place = 0 if prompt.is_asked else len(prompt.text)
        self._sent = 0  # tokens

    def whole(self) -> JsonObject:
        """The choice of an answer that is not streamed."""
        return self._choice({"text": self._echoed + self.answer.text}, finish=self.answer.finish)

    def opening(self) -> str:
        """The prompt, if it was asked for."""
        return self._event({"text": self._echoed}) if self._echoed else ""

    def piece(self, text: str) -> str:
        """The event of a piece of text."""
        return self._event({"text": text})

    def closing(self) -> str:
        """The last event."""
        return self._event({"text": ""}, finish=self.answer.finish)

    def _logprobs(self) -> Json:
        """As OpenAI gives them here: lists of equal length, with nothing for the first token of a prompt."""
        if self.answer.likeliest is None:
            return None
        nothing: list[Score | None] = [None for _ in self._first]
        scores = [*nothing, *self.answer.prompt_scores, *self.answer.scores][self._sent :]
        self._sent += len(scores)
        ids = [score.token if score else self._first[0] for score in scores]
        tokens: list[Json] = [self._names.name(id) for id in ids]
        logprobs: list[Json] = [score.logprob if score else None for score in scores]
        likeliest: list[Json] = [{**self._names.by_name(score)} if score else None for score in scores]
        places: list[Json] = [self._advance(id) for id in ids]
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": likeliest,
            "text_offset": places,
        }

    def _advance(self, token: int) -> int:
        """Where the token's text begins, in characters of prompt and answer."""
        place = self._place
        self._place += len(self._text.push(token))
        return place


class ChatWriter(Writer):
    """Writes an answer of ``/v1/chat/completions``: reasoning, content and tool calls apart.

    In a stream the tool calls come last; a text that may be one is held back until the end.
    """

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: JsonObject, answer: Answer, names: TokenNames, *, reader: AnswerReader):
        super().__init__(head, answer, names)
        self._reader, self._sent = reader, 0

    def whole(self) -> JsonObject:
        """The choice of an answer that is not streamed."""
        self._reader.feed(self.answer.text)
        self._reader.finish()
        said = self._reader.message
        message: JsonObject = {"role": "assistant", "content": said.get("content")}
        if "reasoning" in said:
            message["reasoning_content"] = said["reasoning"]
        if self._reader.tool_calls:
            message["tool_calls"] = [_to_api_call(call) for call in self._reader.tool_calls]
        return self._choice({"message": message}, finish=self._finish)

    def opening(self) -> str:
        """The event that says whose turn it is."""
        return self._event({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> str:
        """The events of what is certain with this piece of text; none where it is held back."""
        return self._events(self._reader.feed(text))

    def closing(self) -> str:
        """What was held back, the tool calls, and the last event."""
        events = self._events(self._reader.finish())
        for number, call in enumerate(self._reader.tool_calls):
            calls: list[Json] = [{"index": number, **_to_api_call(call)}]
            events += self._event({"delta": {"tool_calls": calls}})
        return events + self._event({"delta": {}}, finish=self._finish)

    @property
    def _finish(self) -> str:
        """A call that was cut after another one ended at the length, not at the calls."""
        finish = self.answer.finish
        return "tool_calls" if self._reader.tool_calls and finish == "stop" else finish

    def _logprobs(self) -> Json:
        if self.answer.likeliest is None:
            return None
        scores = self.answer.scores[self._sent :]
        self._sent += len(scores)
        content: list[Json] = [
            {
                **self._to_entry(score.token, score.logprob),
                "top_logprobs": [self._to_entry(*one) for one in score.likeliest],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _to_entry(self, token: int, logprob: float) -> JsonObject:
        name = self._names.name(token)
        letters: list[Json] = [*name.encode()]
        is_text = name != f"token_id:{token}"
        return {"token": name, "logprob": logprob, "bytes": letters if is_text else None}

    def _events(self, parts: list[Part]) -> str:
        keys = {"reasoning": "reasoning_content", "content": "content"}
        return "".join(self._event({"delta": {keys[part.kind]: part.text}}) for part in parts)


def to_head(prefix: str, model: str, *, dropped: int = 0) -> JsonObject:
    """What a reply and all its chunks begin with; ``dropped``: the messages that there was no room for."""
    head: JsonObject = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    return {**head, "dropped_messages": dropped} if dropped else head


def to_body(head: JsonObject, writers: Sequence[Writer]) -> JsonObject:
    """The reply that is not streamed."""
    choices: list[Json] = [writer.whole() for writer in writers]
    usage = to_usage([writer.answer for writer in writers])
    return {**head, "object": writers[0].whole_kind, "choices": choices, "usage": usage}


def to_end(head: JsonObject, writers: Sequence[Writer], *, with_usage: bool) -> str:
    """The last events of a stream: the tokens if they were asked for, and the end."""
    done = "data: [DONE]\n\n"
    if not with_usage:
        return done
    usage = to_usage([writer.answer for writer in writers])
    return to_event({**head, "object": writers[0].chunk_kind, "choices": [], "usage": usage}) + done


def to_event(content: JsonObject) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def to_usage(answers: Sequence[Answer]) -> JsonObject:
    """The tokens of the prompts as they were read, of the answers without their stop tokens, and of both."""
    read = sum(len(answer.prompt_ids) for answer in answers)
    new = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _to_api_call(call: ToolCall) -> JsonObject:
    """A call as OpenAI writes it: its arguments are JSON text."""
    function: JsonObject = {
        "name": call["function"]["name"],
        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
    }
    return {"id": call.get("id"), "type": "function", "function": function}
