"""The OpenAI-compatible API in Python: what may be asked, and how it is refused."""

import inspect
import json
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerFast

from hf_clm.data.read.formats import to_prompt
from hf_clm.errors import did_you_mean
from hf_clm.generation.generate import to_prompt_example, to_text
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.stream import Sampling, to_sampling
from hf_clm.schema import Chat, Example, Json, Message

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
# No variables of a template: transformers' own options, of which one (chat_template) would replace it.
RENDERING_OPTIONS = {"messages", *inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters}


class ApiError(Exception):
    """A refusal, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body: dict[str, Json] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


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
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt holds: with ``tool_choice`` none the model is told of none."""
        return [] if self.tool_choice == "none" else self.tools or []

    def to_example(self, run: LoadedRun) -> Example:
        """The conversation; for a run that learned none, its one message as ``hf-clm generate`` takes it."""
        if self.messages[-1].get("role") == "assistant":
            raise ApiError(
                400, "the last message is an answer already", code="invalid_value", param="messages"
            )
        chat = self._to_chat()
        if run.has_turns:
            return chat
        what = f"the model learned no conversations (its format is {run.format})"
        if chat.tools:
            raise ApiError(400, f"{what}: it takes no tools", code="invalid_value", param="tools")
        if len(chat.messages) > 1:
            raise ApiError(400, f"{what}: send one user message", code="invalid_value", param="messages")
        return to_prompt_example(chat.messages[0].get("content", ""), run.format, template=run.template)

    def _to_chat(self) -> Chat:
        """The conversation, read as a record.

        A record may have no empty answer, but the model can have given one: it is put in afterwards.
        """
        for name in self.chat_template_kwargs or {}:
            if name in RENDERING_OPTIONS:
                what = f"chat_template_kwargs: {name!r} is no variable of a template"
                raise ApiError(400, what, code="invalid_value", param="chat_template_kwargs")
        record = {
            "messages": [{**turn, "content": "-"} if _is_empty(turn) else turn for turn in self.messages],
            "tools": self.offered_tools,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        chat = to_prompt(record, format="messages")
        assert isinstance(chat, Chat)
        turns: list[Message] = [
            {**turn, "content": ""} if _is_empty(given) else turn
            for turn, given in zip(chat.messages, self.messages, strict=True)
        ]
        return replace(chat, messages=turns)


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether it is an answer that says and calls nothing; it may hold reasoning."""
    content = turn.get("content") or ""
    is_blank = isinstance(content, str) and not content.strip()
    return turn.get("role") == "assistant" and is_blank and not turn.get("tool_calls")


class CompletionBody(Body):
    """``POST /v1/completions``: the text is continued as it is."""

    prompt: Annotated[list[str], BeforeValidator(_listed)]

    def to_example(self, run: LoadedRun) -> Example:
        """The text. Raises ApiError for several."""
        if len(self.prompt) != 1:
            what = f"one prompt a request is served; got {len(self.prompt)}"
            raise ApiError(400, what, code="unsupported_value", param="prompt")
        return to_text(self.prompt[0])


class GenerateBody(Body):
    """``/generate``: the prompt as ``hf-clm generate`` takes it."""

    prompt: str
    input: str = ""

    def to_example(self, run: LoadedRun) -> Example:
        """The prompt in the run's own format. Raises ApiError for a stream."""
        if self.stream:
            what = "/generate does not stream; /v1/completions and /v1/chat/completions do"
            raise ApiError(400, what, code="unsupported_value", param="stream")
        return to_prompt_example(
            self.prompt,
            run.format,
            input_text=self.input,
            template=run.template,
            has_turns=run.has_turns,
        )


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
