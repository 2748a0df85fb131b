"""What a server replies: the prompt as in training, the limits, the answer whole or piece by piece."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_clm.errors import RecipeError, UserError
from hf_clm.generation.generate import fit_new_tokens, prompt_room, to_fitting_prompt, to_prompt_ids
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.parsing import AnswerReader, find_syntax
from hf_clm.generation.protocol import ApiError, Body, ChatBody, CompletionBody, GenerateBody, read_body
from hf_clm.generation.replies import ChatWriter, TextWriter, Writer, to_event, to_usage
from hf_clm.generation.stream import Answer
from hf_clm.generation.worker import Ticket, Worker
from hf_clm.schema import Chat

Reply = Callable[[Any], Awaitable[Any]]  # of a starlette.requests.Request


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    prompt_tokens: int
    new_tokens: int


class Prompt(NamedTuple):
    """What the model is given."""

    ids: list[int]
    text: str


class Service:
    """The replies: a dictionary is JSON, an iterator a stream of server-sent events, a string plain text."""

    def __init__(self, run: LoadedRun, worker: Worker, *, name: str, limits: Limits):
        self._run, self._worker, self._name, self._limits = run, worker, name, limits
        self._syntax = find_syntax(run.tokenizer)
        self._reading = asyncio.Lock()  # one prompt is tokenized at a time, outside the event loop's thread

    def routes(self) -> dict[str, tuple[str, Reply]]:
        """path -> methods, what replies"""
        return {
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.complete),
            "/generate": ("GET POST", self.generate),
            "/v1/models": ("GET", self.models),
            "/v1/models/{name:path}": ("GET", self.model),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.metrics),
        }

    async def chat(self, request: Any) -> Any:
        """``POST /v1/chat/completions``."""
        body = read_body(ChatBody, await request.body())
        prompt = await self._read(body)
        ticket = self._queue(request, body, prompt, hidden_ids=self._syntax.hidden_ids)
        tools, tokenizer = body.offered_tools, self._run.tokenizer
        reader = AnswerReader(tokenizer, self._syntax, prompt=prompt.text, tools=tools)
        return await self._reply(ticket, ChatWriter(self._name, ticket.answer, reader), body)

    async def complete(self, request: Any) -> Any:
        """``POST /v1/completions``."""
        body = read_body(CompletionBody, await request.body())
        ticket = self._queue(request, body, await self._read(body))
        return await self._reply(ticket, TextWriter(self._name, ticket.answer), body)

    async def generate(self, request: Any) -> Any:
        """``/generate``: the keys in the query or, with POST, in a JSON body."""
        content: Any = await request.body()
        if not content:
            query = request.query_params
            content = {key: query[key] for key in query} | {"stop": query.getlist("stop")}
        body = read_body(GenerateBody, content)
        answer = await self._whole(self._queue(request, body, await self._read(body)))
        return {"text": answer.text, "finish_reason": answer.finish, "usage": to_usage(answer)}

    async def models(self, request: Any) -> Any:
        """``GET /v1/models``: the one model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, request: Any) -> Any:
        """``GET /v1/models/NAME``."""
        self._check_name(request.path_params["name"])
        return self._model()

    async def health(self, request: Any) -> Any:
        """``GET /health``: 200 until the server stops."""
        self._worker.check_alive()
        return {"status": "ok"}

    async def metrics(self, request: Any) -> str:
        """``GET /metrics``, as Prometheus reads it."""
        counts = dict(sorted(self._worker.counts.items()))
        lines, last = [], ""
        for name, value in counts.items():
            family = name.partition("{")[0]
            lines += [f"# TYPE {family} counter"] * (family != last) + [f"{name} {value}"]
            last = family
        for name, tickets in {"waiting": self._worker.waiting, "generating": self._worker.batch}.items():
            lines += [f"# TYPE hf_clm_{name} gauge", f"hf_clm_{name} {len(tickets)}"]
        return "\n".join(lines) + "\n"

    async def _reply(self, ticket: Ticket, writer: Writer, body: Body) -> Any:
        if body.stream:
            return self._events(ticket, writer, with_usage=body.reports_usage)
        await self._whole(ticket)
        return writer.whole()

    async def _read(self, body: Body) -> Prompt:
        """The prompt of a request. Raises ApiError for one that is refused."""
        self._check_name(body.model or self._name)
        self._worker.check_room()
        async with self._reading:
            return await asyncio.to_thread(self._to_prompt, body)

    def _queue(
        self, request: Any, body: Body, prompt: Prompt, *, hidden_ids: Collection[int] | None = None
    ) -> Ticket:
        """Queues the request's answer, which ends where the client leaves. Raises ApiError over a limit."""
        room = self._fit(prompt.ids, body.new_tokens)

        def to_answer(emit: Callable[[str], None], on_end: Callable[[], None]) -> Answer:
            return Answer(
                prompt.ids,
                body.sampling,
                max_new_tokens=room,
                stop=body.stop,
                hidden_ids=hidden_ids,
                emit=emit,
                on_end=on_end,
            )

        ticket = Ticket(to_answer)
        self._worker.submit(ticket)
        ticket.watch(self._leave_with(request, ticket))
        return ticket

    def _to_prompt(self, body: Body) -> Prompt:
        """A chat that is too long loses its oldest turns, as in ``hf-clm chat``."""
        run, most = self._run, self._limits.prompt_tokens
        try:
            example = body.to_example(run)
            if isinstance(example, Chat):
                room = prompt_room(run.model, max_new_tokens=body.new_tokens)
                most = most if room is None else min(most, room)
                ids, _ = to_fitting_prompt(example, run.tokenizer, rendering=run.rendering, most=most)
            else:
                ids = to_prompt_ids([example], run.tokenizer, run.rendering)[0]
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_value", param=body.text_key) from error
        return Prompt(ids, str(run.tokenizer.decode(ids)))

    def _fit(self, ids: list[int], asked: int | None) -> int:
        """How many tokens to generate at most."""
        limits = self._limits
        if len(ids) > limits.prompt_tokens:
            what = f"the prompt has {len(ids):,} tokens, and {limits.prompt_tokens:,} are allowed"
            raise ApiError(400, what, code="context_length_exceeded", param="prompt")
        if asked is not None and asked > limits.new_tokens:
            what = f"max_tokens may be {limits.new_tokens:,} at most; got {asked:,}"
            raise ApiError(400, what, code="invalid_value", param="max_tokens")
        try:
            return min(fit_new_tokens(self._run.model, len(ids), max_new_tokens=asked), limits.new_tokens)
        except RecipeError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="max_tokens") from error

    async def _leave_with(self, request: Any, ticket: Ticket) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._worker.cancel(ticket)

    async def _whole(self, ticket: Ticket) -> Answer:
        async for _ in ticket:
            pass
        return ticket.answer

    async def _events(self, ticket: Ticket, writer: Writer, *, with_usage: bool) -> AsyncIterator[str]:
        try:
            yield writer.opening()
            async for piece in ticket:
                yield writer.piece(piece)
            yield writer.closing(with_usage=with_usage)
        except ApiError as error:  # the status has been sent
            yield to_event(error.body)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            what = f"there is no model {name!r} here; the one model is {self._name!r}"
            raise ApiError(404, what, code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "hf_clm",
            "format": self._run.format,
            "has_turns": self._run.has_turns,
            "max_prompt_tokens": self._limits.prompt_tokens,
            "max_new_tokens": self._limits.new_tokens,
        }
