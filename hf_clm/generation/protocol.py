"""The OpenAI-compatible API in Python: what may be asked, and how it is refused."""

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

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ASKABLE = SETTINGS.keys() - {"max_new_tokens", "num_beams"}  # OpenAI has other names for the first
IGNORED = {
    *("user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
# Parts of OpenAI's API, and of servers like vLLM's, that are not served: only what asks for nothing is taken.
UNSERVED: dict[str, tuple[Json, ...]] = {
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


def wrong(what: str, param: str, *, code: str = "invalid_value") -> ApiError:
    """The refusal of a request for the value of one of its keys."""
    return ApiError(400, what, code=code, param=param)


def _prompts(value: object) -> object:
    """A text, a list of texts, token ids, or a list of lists of token ids, as a list of prompts."""
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
    """What every request may hold, beside the settings of decoding (``asked``)."""

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
        """null asks for nothing."""
        is_object = isinstance(data, dict)
        return {key: value for key, value in data.items() if value is not None} if is_object else data

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def asked(self) -> dict[str, JsonValue]:
        """The keys that are not of this class; after ``read_body`` those that ``decoding.ask`` reads."""
        return self.model_extra or {}

    @property
    def likeliest(self) -> int | None:
        """The likeliest tokens to name at each place, with log-probabilities; None asks for none of these."""
        return None

    @abstractmethod
    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """What the model is to continue, each with an answer of its own; ids are taken as they are."""


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
        """The tools that the prompt holds: with ``tool_choice`` none the model is told of none."""
        return [] if self.tool_choice == "none" else self.tools

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The conversation; for a run that learned none, its one message as ``hf-clm generate`` takes it."""
        if self.messages[-1].get("role") == "assistant":
            raise wrong("the last message is an answer already", "messages")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
        chat = self._to_chat()
        if run.has_turns:
            return [chat]
        what = f"the model learned no conversations (its format is {run.format})"
        if chat.tools:
            raise wrong(f"{what}: it takes no tools", "tools")
        if len(chat.messages) > 1:
            raise wrong(f"{what}: send one user message", "messages")
        return [to_prompt_example(chat.messages[0].get("content", ""), run.format, template=run.template)]

    def _to_chat(self) -> Chat:
        """The conversation, read as a record.

        A record may have no empty answer, but the model can have given one: it is put in afterwards.
        """
        for name in self.chat_template_kwargs.keys() & RENDERING_OPTIONS:
            raise wrong(
                f"chat_template_kwargs: {name!r} is no variable of a template", "chat_template_kwargs"
            )
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


def _is_empty(turn: Mapping[str, JsonValue]) -> bool:
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
    logprobs: Annotated[Likeliest, BeforeValidator(lambda value: None if value is False else value)] = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The texts and ids. Raises ApiError where nothing is asked for."""
        if self.max_new_tokens == 0 and not self.echo:
            raise wrong("max_tokens: expected greater than or equal to 1, or echo true", "max_tokens")
        return [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]


class GenerateBody(Body):
    """``/generate``: the prompt as ``hf-clm generate`` takes it."""

    prompt: str
    input: str = ""

    def to_prompts(self, run: LoadedRun) -> Sequence[Example | list[int]]:
        """The prompt in the run's own format. Raises ApiError for a stream."""
        if self.stream:
            what = "/generate does not stream; /v1/completions and /v1/chat/completions do"
            raise wrong(what, "stream", code="unsupported_value")
        shape = {"template": run.template, "has_turns": run.has_turns}
        return [to_prompt_example(self.prompt, run.format, input_text=self.input, **shape)]


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], content: bytes | Mapping[str, object]) -> AnyBody:
    """The request's JSON or query, checked.

    Raises ApiError with the place of the first fault, for a key that is unknown, and for one that asks for
    what is not served.
    """
    try:
        is_json = isinstance(content, bytes)
        body = kind.model_validate_json(content) if is_json else kind.model_validate(content)
    except ValidationError as error:
        fault = to_fault(error)
        raise wrong(str(fault), fault.where.partition(".")[0]) from error
    for key in body.asked.keys() - ASKABLE:
        value, neutral = body.asked.pop(key), UNSERVED.get(key, ())
        if key in UNSERVED and not any(_is_same(value, one) for one in neutral):
            known = f", or give {' or '.join(map(json.dumps, neutral))}" if neutral else ""
            what = f"{key}: {json.dumps(value)} is not served; leave it out{known}"
            raise wrong(what, key, code="unsupported_value")
        if key not in UNSERVED and key not in IGNORED:
            near = did_you_mean(key, [*kind.model_fields, *ASKABLE])
            raise wrong(f"unknown key {key!r}{near}", key, code="unknown_parameter")
    return body


def _is_same(one: Json, other: Json) -> bool:
    """Whether two values of JSON are the same; 0 is 0.0, but not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
