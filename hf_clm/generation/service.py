"""What a server replies: the prompt as in training, the limits, the answer whole or piece by piece."""

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hf_clm.errors import RecipeError, UserError
from hf_clm.generation.decoding import Decoding, ask
from hf_clm.generation.generate import (
    cap_new_tokens,
    prompt_room,
    start_id,
    to_fitting_prompt,
    to_prompt_ids,
)
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.parsing import AnswerReader, find_syntax
from hf_clm.generation.protocol import ApiError, Body, ChatBody, CompletionBody, GenerateBody, read_body
from hf_clm.generation.replies import (
    ChatWriter,
    Echo,
    JsonObject,
    TextWriter,
    Writer,
    to_body,
    to_end,
    to_event,
    to_head,
    to_usage,
)
from hf_clm.generation.scores import TokenNames
from hf_clm.generation.stream import Answer
from hf_clm.generation.worker import Ticket, Worker
from hf_clm.schema import Chat, Example

Reply = Callable[[Any], Awaitable[Any]]  # of a starlette.requests.Request


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    prompt_tokens: int
    new_tokens: int


class Prompt(NamedTuple):
    """What the model is given; ``dropped``: the oldest messages of a chat, which there was no room for."""

    ids: list[int]
    text: str
    dropped: int = 0


@dataclass(frozen=True)
class Order:
    """The places of a request in the queue, one for each of its answers."""

    tickets: Sequence[Ticket]
    worker: Worker
    watcher: asyncio.Task[None]  # cancels the answers where the client leaves

    async def end(self) -> None:
        """Waits for all the answers. Raises ApiError where one failed or was cancelled."""
        try:
            for ticket in self.tickets:
                async for _ in ticket:
                    pass
        finally:
            self.close()

    def close(self) -> None:
        """Nobody waits any more: answers that are under way are cancelled."""
        self.watcher.cancel()
        for ticket in self.tickets:
            self.worker.cancel(ticket)


class Service:
    """The replies: a dictionary is JSON, an iterator a stream of server-sent events, a string plain text."""

    def __init__(self, run: LoadedRun, worker: Worker, *, name: str, limits: Limits, decoding: Decoding):
        self._run, self._worker, self._name, self._limits = run, worker, name, limits
        self._decoding = decoding
        self._syntax = find_syntax(run.tokenizer)
        self._names = TokenNames(copy.deepcopy(run.tokenizer))  # another thread reads prompts with that
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
        prompts = await self._read(body)
        order = self._queue(request, body, prompts, hidden_ids=self._syntax.hidden_ids)
        answer, (prompt,) = order.tickets[0].answer, prompts
        tools, tokenizer = body.offered_tools, self._run.tokenizer
        reader = AnswerReader(tokenizer, self._syntax, prompt=prompt.text, tools=tools)
        head = to_head("chatcmpl", self._name, dropped=prompt.dropped)
        return await self._reply(order, head, [ChatWriter(head, answer, self._names, reader=reader)], body)

    async def complete(self, request: Any) -> Any:
        """``POST /v1/completions``: an answer for each prompt."""
        body = read_body(CompletionBody, await request.body())
        prompts = await self._read(body)
        order = self._queue(request, body, prompts, scores_prompt=body.echo)
        head = to_head("cmpl", self._name)
        texts = [
            given if isinstance(given, str) else prompt.text
            for given, prompt in zip(body.prompt, prompts, strict=True)
        ]
        writers = [
            TextWriter(head, ticket.answer, self._names, index=index, prompt=Echo(text, body.echo))
            for index, (ticket, text) in enumerate(zip(order.tickets, texts, strict=True))
        ]
        return await self._reply(order, head, writers, body)

    async def generate(self, request: Any) -> Any:
        """``/generate``: the keys in the query or, with POST, in a JSON body."""
        content: Any = await request.body()
        if not content:
            query = request.query_params
            content = {key: query[key] for key in query} | {"stop": query.getlist("stop")}
        body = read_body(GenerateBody, content)
        order = self._queue(request, body, await self._read(body))
        await order.end()
        answer = order.tickets[0].answer
        return {"text": answer.text, "finish_reason": answer.finish, "usage": to_usage([answer])}

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
        worker = self._worker
        return worker.metrics.to_text(
            {"hf_clm_waiting": len(worker.waiting), "hf_clm_generating": len(worker.batch)}
        )

    async def _reply(self, order: Order, head: JsonObject, writers: Sequence[Writer], body: Body) -> Any:
        if body.stream:
            return self._events(order, head, writers, with_usage=body.reports_usage)
        await order.end()
        return to_body(head, writers)

    async def _read(self, body: Body) -> list[Prompt]:
        """The prompts of a request. Raises ApiError for one that is refused."""
        self._check_name(body.model or self._name)
        self._worker.check_room()
        async with self._reading:
            return await asyncio.to_thread(self._to_prompts, body)

    def _queue(
        self,
        request: Any,
        body: Body,
        prompts: Sequence[Prompt],
        *,
        hidden_ids: Collection[int] | None = None,
        scores_prompt: bool = False,
    ) -> Order:
        """Queues an answer to each prompt; all end where the client leaves. Raises ApiError over a limit."""
        decoding = ask(self._decoding, body)
        tickets = [
            Ticket(
                partial(
                    Answer,
                    prompt.ids,
                    decoding.of_prompt(number),
                    max_new_tokens=self._fit(prompt, body),
                    hidden_ids=hidden_ids,
                    likeliest=body.likeliest,
                    scores_prompt=scores_prompt,
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        self._worker.submit(tickets)
        return Order(tickets, self._worker, asyncio.create_task(self._leave_with(request, tickets)))

    def _to_prompts(self, body: Body) -> list[Prompt]:
        """Raises ApiError for a prompt that cannot be spelled or rendered."""
        try:
            return [self._to_prompt(prompt, body) for prompt in body.to_prompts(self._run)]
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_value", param=body.text_key) from error

    def _to_prompt(self, prompt: Example | list[int], body: Body) -> Prompt:
        """A chat that is too long loses its oldest turns, as in ``hf-clm chat``."""
        run, tokenizer = self._run, self._run.tokenizer
        if isinstance(prompt, list):
            self._check_ids(prompt)
            ids = prompt or [start_id(tokenizer)]
        elif isinstance(prompt, Chat):
            room = prompt_room(run.model, max_new_tokens=self._cap(body))
            most = min(self._limits.prompt_tokens, room or self._limits.prompt_tokens)
            ids, kept = to_fitting_prompt(prompt, tokenizer, rendering=run.rendering, most=most)
            return Prompt(ids, str(tokenizer.decode(ids)), len(prompt.messages) - len(kept.messages))
        else:
            ids = to_prompt_ids([prompt], tokenizer, run.rendering)[0]
        return Prompt(ids, str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raises ApiError for an id that the model has no embedding of."""
        size = self._run.model.get_input_embeddings().get_parameter("weight").shape[0]
        for id in ids:
            if not 0 <= id < size:
                what = f"prompt: {id} is no token; ids are 0 to {size - 1}"
                raise ApiError(400, what, code="invalid_value", param="prompt")

    def _cap(self, body: Body) -> int | None:
        """How many tokens are asked for, as far as the limit goes."""
        asked = body.max_new_tokens
        return None if asked is None else min(asked, self._limits.new_tokens)

    def _fit(self, prompt: Prompt, body: Body) -> int:
        """How many tokens to generate at most: what is asked for, as far as limits and positions go."""
        tokens, most = len(prompt.ids), self._limits.prompt_tokens
        if tokens > most:
            what = f"the prompt has {tokens:,} tokens, and {most:,} are allowed"
            if prompt.dropped:
                what += "; older messages are left out already: shorten the last one, or the system message"
            raise ApiError(400, what, code="context_length_exceeded", param=body.text_key)
        try:
            room = cap_new_tokens(self._run.model, tokens, max_new_tokens=self._cap(body))
        except RecipeError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param=body.text_key) from error
        return min(room, self._limits.new_tokens)

    async def _leave_with(self, request: Any, tickets: Sequence[Ticket]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for ticket in tickets:
            self._worker.cancel(ticket)

    async def _events(
        self, order: Order, head: JsonObject, writers: Sequence[Writer], *, with_usage: bool
    ) -> AsyncIterator[str]:
        """One answer after the other."""
        try:
            for ticket, writer in zip(order.tickets, writers, strict=True):
                yield writer.opening()
                async for piece in ticket:
                    yield writer.piece(piece)
                yield writer.closing()
            yield to_end(head, writers, with_usage=with_usage)
        except ApiError as error:  # the status has been sent
            yield to_event(error.body)
        finally:
            order.close()

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
