"""The requests of the OpenAI-compatible API, their validation, and the errors for invalid ones."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerFast

from hf_clm.data.read.formats import to_prompt
from hf_clm.errors import did_you_mean
from hf_clm.generation.decoding import SETTINGS, to_fault
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.prompts import to_prompt_example, to_text
from hf_clm.schema import Chat, Example, Json, Message

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REQUEST_SETTINGS = SETTINGS.keys() - {"max_new_tokens", "num_beams"}  # OpenAI's name: max_completion_tokens
IGNORED = {  # keys that are accepted and have no effect
    *("user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
# Unsupported keys of the APIs of OpenAI and vLLM -> values that are accepted, because they have no effect.
UNSUPPORTED_KEYS: dict[str, tuple[Json, ...]] = {
    **dict.fromkeys(("n", "best_of", "length_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "top_logprobs"), (0,)),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "include_stop_str_in_output", "echo"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("stop_token_ids", "tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logprobs", "prompt_logprobs"), (False, 0)),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "logit_bias": ({},),
    "suffix": ("",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
# Options of transformers, not variables of a template; chat_template would even replace it.
RENDERING_OPTIONS = {"messages", *inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters}


class ApiError(Exception):
    """An error response in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body: dict[str, Json] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def bad_request(what: str, param: str, *, code: str = "invalid_value") -> ApiError:
    """Returns the error for an invalid value of the key ``param``."""
    return ApiError(400, what, code=code, param=param)


def _prompts(value: object) -> object:
    """Converts a text, a list of texts, token ids, or a list of lists of token ids to a list of prompts."""
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _is_ids(one) for one in value):
        return value
    what = "expected a text, a list of texts, token ids, or a list of lists of token ids"
    raise PydanticCustomError("prompt", what)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


Likeliest = Annotated[int | None, Field(ge=0, le=20)]


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class Body(BaseModel, ABC):
    """The keys that all requests have in common. Decoding settings are in ``extra``."""

    model_config = ConfigDict(extra="allow")

    text_key: ClassVar[str] = "prompt"
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        """Treats null as a missing key."""
        is_object = isinstance(data, dict)
        return {key: value for key, value in data.items() if value is not None} if is_object else data

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def extra(self) -> dict[str, JsonValue]:
        """The keys that are not fields of the class; after ``read_body``, only decoding settings."""
        return self.model_extra or {}

    @property
    def likeliest(self) -> int | None:
        """The number of most likely tokens to list at each position; None for no log-probabilities at all."""
        return None

    @abstractmethod
    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """Returns the prompts, each of which is answered separately; token ids are used unchanged."""


class ChatBody(Body):
    """``POST /v1/chat/completions``."""

    text_key: ClassVar[str] = "messages"

    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    tools: list[dict[str, JsonValue]] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, JsonValue] = {}
    logprobs: bool = False
    top_logprobs: Likeliest = 0

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, JsonValue]]:
        """The tools that are put into the prompt: none with ``tool_choice: "none"``."""
        return [] if self.tool_choice == "none" else self.tools

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """Returns the conversation or, if the run has no turns, its only message as a prompt.

        Raises ApiError if the run cannot answer the conversation.
        """
        if self.messages[-1].get("role") == "assistant":
            raise bad_request("the last message must not be from the assistant", "messages")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs requires logprobs: true", "top_logprobs")
        chat = self._to_chat()
        if run.has_turns:
            return [chat]
        what = f"the model was not trained on conversations (its format is {run.format})"
        if chat.tools:
            raise bad_request(f"{what}: it does not support tools", "tools")
        if len(chat.messages) > 1:
            raise bad_request(f"{what}: send one user message", "messages")
        return [to_prompt_example(chat.messages[0].get("content", ""), run.format, template=run.template)]

    def _to_chat(self) -> Chat:
        """Parses the conversation as a record.

        Records may not have empty answers, but a model can generate one: it is filled in afterwards.
        """
        for name in self.chat_template_kwargs.keys() & RENDERING_OPTIONS:
            what = f"chat_template_kwargs: {name!r} is not a template variable"
            raise bad_request(what, "chat_template_kwargs")
        record = {
            "messages": [{**turn, "content": "-"} if _is_empty(turn) else turn for turn in self.messages],
            "tools": self.offered_tools,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        chat = to_prompt(record, format="messages")
        assert isinstance(chat, Chat)
        turns: list[Message] = [
            {**turn, "content": ""} if _is_empty(original) else turn
            for turn, original in zip(chat.messages, self.messages, strict=True)
        ]
        return replace(chat, messages=turns)


def _is_empty(turn: Mapping[str, JsonValue]) -> bool:
    """Returns whether a turn is an answer without content or tool calls (it may have reasoning)."""
    content = turn.get("content") or ""
    is_blank = isinstance(content, str) and not content.strip()
    return turn.get("role") == "assistant" and is_blank and not turn.get("tool_calls")


class CompletionBody(Body):
    """``POST /v1/completions``: continues texts or token ids verbatim.

    With ``echo``, the reply begins with the prompt, and ``logprobs`` include its tokens.
    """

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: Annotated[Likeliest, BeforeValidator(lambda value: None if value is False else value)] = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """Returns the texts and token ids. Raises ApiError if nothing would be returned."""
        if self.max_new_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: expected 1 or more, unless echo is true", "max_tokens")
        return [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]


class GenerateBody(Body):
    """``/generate``: the same prompt as ``hf-clm generate``."""

    prompt: str
    input: str = ""

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """Returns the prompt in the run's format. Raises ApiError if a stream is requested."""
        if self.stream:
            what = "/generate does not support streaming; use /v1/completions or /v1/chat/completions"
            raise bad_request(what, "stream", code="unsupported_value")
        shape = {"template": run.template, "has_turns": run.has_turns}
        return [to_prompt_example(self.prompt, run.format, input_text=self.input, **shape)]


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], content: bytes | Mapping[str, object]) -> AnyBody:
    """Parses and validates a request's JSON body or query.

    Raises ApiError for the first invalid value, for an unknown key, and for an unsupported value.
    """
    try:
        is_json = isinstance(content, bytes)
        body = kind.model_validate_json(content) if is_json else kind.model_validate(content)
    except ValidationError as error:
        fault = to_fault(error)
        raise bad_request(str(fault), fault.where.partition(".")[0]) from error
    for key in body.extra.keys() - REQUEST_SETTINGS:
        value, neutral = body.extra.pop(key), UNSUPPORTED_KEYS.get(key, ())
        if key in UNSUPPORTED_KEYS and not any(_is_same(value, one) for one in neutral):
            other = f" or set it to {' or '.join(map(json.dumps, neutral))}" if neutral else ""
            what = f"{key}: {json.dumps(value)} is not supported; remove the key{other}"
            raise bad_request(what, key, code="unsupported_value")
        if key not in UNSUPPORTED_KEYS and key not in IGNORED:
            near = did_you_mean(key, [*kind.model_fields, *REQUEST_SETTINGS])
            raise bad_request(f"unknown key {key!r}{near}", key, code="unknown_parameter")
    return body


def _is_same(one: Json, other: Json) -> bool:
    """Returns whether two JSON values are equal. Unlike in Python, 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
