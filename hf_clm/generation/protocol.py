"""The OpenAI-compatible API in Python: what may be asked, what is answered, how it is refused."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_clm.data.formats import to_prompt
from hf_clm.errors import did_you_mean
from hf_clm.generation.generate import to_prompt_example
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.stream import Answer, Sampling, to_sampling
from hf_clm.schema import ChatExample, Example, TextExample

Counts = dict[str, float]  # a metric's name with its labels -> its value
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
IGNORED = {"user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"}
# Parts of OpenAI's API that are not served: only what asks for nothing is taken.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class ApiError(Exception):
    """A refusal, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _listed(value: Any) -> Any:
    """One text is a list of one; null is none."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=200)]  # looked for at every token


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class Body(BaseModel, ABC):
    """What every request may hold. ``model_extra`` has the rest, for ``check_extras``."""

    model_config = ConfigDict(extra="allow")

    text_key: ClassVar[str] = "prompt"
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_listed)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def sampling(self) -> Sampling:
        return to_sampling(self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)

    @abstractmethod
    def to_example(self, run: LoadedRun) -> Example:
        """What the model is to continue."""

    @property
    def reports_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Body):
    """``POST /v1/chat/completions``."""

    text_key: ClassVar[str] = "messages"

    messages: list[dict[str, Any]] = Field(min_length=1)

    def to_example(self, run: LoadedRun) -> Example:
        """The conversation; for a run that learned none, its one message as ``hf-clm generate`` takes it."""
        if self.messages[-1].get("role") == "assistant":
            raise ApiError(
                400, "the last message is an answer already", code="invalid_value", param="messages"
            )
        example = to_prompt({"messages": self.messages}, format="messages")
        assert isinstance(example, ChatExample)
        if run.has_turns:
            return example
        if len(self.messages) > 1:
            what = f"the model learned no conversations (its format is {run.format}): send one user message"
            raise ApiError(400, what, code="invalid_value", param="messages")
        return to_prompt_example(example.messages[0]["content"], run.format, template=run.template)


class CompletionBody(Body):
    """``POST /v1/completions``: the text is continued as it is."""

    prompt: Annotated[list[str], BeforeValidator(_listed)]

    def to_example(self, run: LoadedRun) -> Example:
        """The text. Raises ApiError for several."""
        if len(self.prompt) != 1:
            what = f"one prompt a request is served; got {len(self.prompt)}"
            raise ApiError(400, what, code="unsupported_value", param="prompt")
        return TextExample(self.prompt[0])


class GenerateBody(Body):
    """``/generate``: the prompt as ``hf-clm generate`` takes it."""

    prompt: str
    input: str = ""

    def to_example(self, run: LoadedRun) -> Example:
        """The prompt in the run's own format. Raises ApiError for a stream."""
        if self.stream:
            what = "/generate does not stream; /v1/completions and /v1/chat/completions do"
            raise ApiError(400, what, code="unsupported_value", param="stream")
        return to_prompt_example(self.prompt, run.format, input_text=self.input, template=run.template)


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], content: bytes | dict[str, Any]) -> AnyBody:
    """The request's JSON or query, checked. Raises ApiError with the place of the first fault."""
    try:
        body = (
            kind.model_validate_json(content) if isinstance(content, bytes) else kind.model_validate(content)
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, message, code="invalid_value", param=param) from error
    check_extras(body)
    return body


def check_extras(body: Body) -> None:
    """Raises ApiError for a key that is unknown, and for one that asks for what is not served."""
    for key, value in (body.model_extra or {}).items():
        if key in UNSERVED and value is not None and json.dumps(value) not in map(json.dumps, UNSERVED[key]):
            known = " or ".join(json.dumps(one) for one in UNSERVED[key])
            message = f"{key}: {json.dumps(value)} is not served; leave it out" + (
                f", or give {known}" if known else ""
            )
            raise ApiError(400, message, code="unsupported_value", param=key)
        if key not in UNSERVED and key not in IGNORED:
            message = f"unknown key {key!r}{did_you_mean(key, type(body).model_fields)}"
            raise ApiError(400, message, code="unknown_parameter", param=key)


class Writer:
    """Writes one answer as OpenAI does: whole, or in chunks of server-sent events."""

    def __init__(self, model: str, answer: Answer, *, is_chat: bool):
        self._answer, self._is_chat = answer, is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = self._answer.text
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self._answer.finish}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": to_usage(self._answer)}

    def opening(self) -> str:
        """The event before the text: in a chat, whose turn it is."""
        return self._event({"delta": {"role": "assistant", "content": ""}}) if self._is_chat else ""

    def piece(self, text: str) -> str:
        """The event of a piece of text."""
        return self._event({"delta": {"content": text}} if self._is_chat else {"text": text})

    def closing(self, *, with_usage: bool) -> str:
        """The events after the text: why it ended, the tokens if they were asked for, and the end."""
        events = self._event({"delta": {}} if self._is_chat else {"text": ""}, finish=self._answer.finish)
        if with_usage:
            events += to_event({**self._chunk(), "choices": [], "usage": to_usage(self._answer)})
        return events + "data: [DONE]\n\n"

    def _event(self, content: dict[str, Any], *, finish: str | None = None) -> str:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return to_event({**self._chunk(), "choices": [choice]})

    def _chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind}


def to_event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def to_usage(answer: Answer) -> dict[str, int]:
    """The tokens of the prompt, of the answer without its stop token, and of both."""
    read = len(answer.prompt_ids)
    return {"prompt_tokens": read, "completion_tokens": answer.tokens, "total_tokens": read + answer.tokens}
