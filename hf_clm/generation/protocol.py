"""The OpenAI-compatible API in Python: what may be asked, and how it is refused."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerFast

from hf_clm.data.read.formats import to_prompt
from hf_clm.errors import did_you_mean
from hf_clm.generation.generate import to_prompt_example, to_text
from hf_clm.generation.load import LoadedRun
from hf_clm.schema import Chat, Example, Json, Message

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
IGNORED = {
    "user",
    "metadata",
    "store",
    "parallel_tool_calls",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
# Parts of OpenAI's API, and of servers like vLLM's, that are not served: only what asks for nothing is taken.
UNSERVED: dict[str, tuple[Json, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "stop_token_ids": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (0, False),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
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


def _stops(value: Any) -> Any:
    """One text is a list of one; null and an empty text are none."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    return [text for text in texts if text != ""] if isinstance(texts, list) else texts


def _prompts(value: Any) -> Any:
    """A text, a list of texts, token ids, or a list of lists of token ids, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
        return [value]
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(one, str) or _is_ids(one) for one in value):
        raise PydanticCustomError(
            "prompt", "Input should be a text, a list of texts, token ids, or a list of lists of token ids"
        )
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count_or_none(value: Any) -> Any:
    """``false`` asks for none; it is not the number 0."""
    return None if value is False else value


StopText = Annotated[str, Field(max_length=200)]  # looked for at every token
Likeliest = Annotated[int | None, Field(ge=0, le=20)]


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
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """The likeliest tokens to name at each place, with log-probabilities; None asks for none of these."""
        return None

    @abstractmethod
    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """What the model is to continue, each with an answer of its own; ids are taken as they are."""

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
    logprobs: bool | None = None
    top_logprobs: Likeliest = None

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt holds: with ``tool_choice`` none the model is told of none."""
        return [] if self.tool_choice == "none" else self.tools or []

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The conversation; for a run that learned none, its one message as ``hf-clm generate`` takes it."""
        if self.messages[-1].get("role") == "assistant":
            raise ApiError(
                400, "the last message is an answer already", code="invalid_value", param="messages"
            )
        if self.top_logprobs and not self.logprobs:
            what = "top_logprobs needs logprobs: true"
            raise ApiError(400, what, code="invalid_value", param="top_logprobs")
        chat = self._to_chat()
        if run.has_turns:
            return [chat]
        what = f"the model learned no conversations (its format is {run.format})"
        if chat.tools:
            raise ApiError(400, f"{what}: it takes no tools", code="invalid_value", param="tools")
        if len(chat.messages) > 1:
            raise ApiError(400, f"{what}: send one user message", code="invalid_value", param="messages")
        return [to_prompt_example(chat.messages[0].get("content", ""), run.format, template=run.template)]

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
    """``POST /v1/completions``: texts, and token ids, are continued as they are.

    With ``echo`` a reply begins with the prompt, and ``logprobs`` are those of its tokens too.
    """

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: Annotated[Likeliest, BeforeValidator(_count_or_none)] = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The texts and ids. Raises ApiError where nothing is asked for."""
        if self.max_new_tokens == 0 and not self.echo:
            what = "max_tokens: Input should be greater than or equal to 1, or echo true"
            raise ApiError(400, what, code="invalid_value", param="max_tokens")
        return [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]


class GenerateBody(Body):
    """``/generate``: the prompt as ``hf-clm generate`` takes it."""

    prompt: str
    input: str = ""

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The prompt in the run's own format. Raises ApiError for a stream."""
        if self.stream:
            what = "/generate does not stream; /v1/completions and /v1/chat/completions do"
            raise ApiError(400, what, code="unsupported_value", param="stream")
        example = to_prompt_example(
            self.prompt,
            run.format,
            input_text=self.input,
            template=run.template,
            has_turns=run.has_turns,
        )
        return [example]


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
        if key in UNSERVED and value is not None and not any(_is_same(value, one) for one in UNSERVED[key]):
            known = " or ".join(json.dumps(one) for one in UNSERVED[key])
            message = f"{key}: {json.dumps(value)} is not served; leave it out" + (
                f", or give {known}" if known else ""
            )
            raise ApiError(400, message, code="unsupported_value", param=key)
        if key not in UNSERVED and key not in IGNORED:
            message = f"unknown key {key!r}{did_you_mean(key, type(body).model_fields)}"
            raise ApiError(400, message, code="unknown_parameter", param=key)


def _is_same(one: Json, other: Json) -> bool:
    """Whether two values of JSON are the same; 0 is 0.0, but not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
