"""The endpoints of the server: access control, prompts as in training, limits, and replies.

request --> gate (host, site, key, size) --> Service --> Worker (queue) --> Reply
"""

import asyncio
import base64
import copy
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_clm.errors import UserError
from hf_clm.generation.decoding import Decoding, update_decoding
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.parsing import AnswerReader, find_syntax
from hf_clm.generation.prompts import (
    cap_new_tokens,
    prompt_room,
    start_id,
    to_fitting_prompt,
    to_prompt_ids,
)
from hf_clm.generation.protocol import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    GenerateBody,
    bad_request,
    read_body,
)
from hf_clm.generation.replies import ChatWriter, Reply, TextWriter, Writer, to_usage
from hf_clm.generation.scores import TokenNames
from hf_clm.generation.worker import ServerMetrics, Ticket, Worker
from hf_clm.schema import Chat, Example

PAGE = Path(__file__).with_name("page.html")
PUBLIC_PATHS = {"/", "/health"}  # served without a key: neither reveals anything about the model
DISCONNECT_POLL_SECONDS = 0.2  # how often to check whether a client has disconnected
NO_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Access:
    """Access control and the limits of a request.

    Without a key, only this machine can connect. But that includes any web page in its browser: through DNS
    rebinding (which ``Host`` reveals), or with requests whose reply it cannot read (which ``Origin`` and
    ``Sec-Fetch-Site`` reveal).
    """

    key: str
    host: str
    body_bytes: int
    prompt_tokens: int
    new_tokens: int

    def check(self, request: Request) -> None:
        """Raises ApiError for another host name, a page of another site, a wrong key, or a large body."""
        path, headers = request.url.path, request.headers
        match = re.fullmatch(r"(?:\[(.*)\]|([^:\[\]]*))(?::\d*)?", headers.get("host", ""))
        name = (match[1] or match[2] or "").lower() if match else ""
        if not self.key and name not in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            what = f"wrong Host header {name!r}; set an API key to allow any host name"
            raise ApiError(403, what, code="wrong_host")
        origin, authorization = headers.get("origin", ""), headers.get("authorization", "")
        is_foreign = headers.get("sec-fetch-site") == "cross-site" and path != "/"
        if is_foreign or (origin and origin.partition("://")[2] != headers.get("host")):
            raise ApiError(403, "requests from pages of other sites are not allowed", code="cross_site")
        scheme, _, key = authorization.partition(" ")
        is_same = hmac.compare_digest(key.strip().encode(), self.key.encode())  # in constant time
        if self.key and path not in PUBLIC_PATHS and not (is_same and scheme.lower() == "bearer"):
            what = "missing or wrong API key; send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, what, code="invalid_api_key")
        if int(headers.get("content-length", 0)) > self.body_bytes:
            what = f"a request may have at most {self.body_bytes:,} bytes"
            raise ApiError(413, what, code="request_too_large")


class Gate:
    """ASGI middleware that checks requests and counts replies."""

    def __init__(self, app: ASGIApp, access: Access, metrics: ServerMetrics):
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count("replies_total", status=str(message["status"]))
            await send(message)

        app = self._app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self._access.check(request)
            except ApiError as error:
                app = await _refuse(request, error)
        await app(scope, receive, counted)


class Prompt(NamedTuple):
    """A prompt. ``dropped``: the number of a chat's oldest messages left out because they did not fit."""

    ids: list[int]
    text: str
    new_tokens: int
    dropped: int


class Service:
    """The endpoints of the server."""

    def __init__(
        self,
        run: LoadedRun,
        worker: Worker,
        *,
        name: str,
        access: Access,
        decoding: Decoding,
        prompts: Sequence[str] = (),
    ):
        self._run, self._worker, self._name, self._access = run, worker, name, access
        self._prompts = list(prompts)  # that the page offers
        self._decoding, self._syntax = decoding, find_syntax(run.tokenizer)
        self._names = TokenNames(copy.deepcopy(run.tokenizer))  # another thread uses the original
        self._reading = asyncio.Lock()  # prompts are tokenized in another thread, one request at a time

    def build_app(self) -> Starlette:
        """Builds the ASGI app, which starts and stops the worker."""
        page, headers = load_page()

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            running = asyncio.create_task(self._worker.run())
            yield
            self._worker.close()
            await running

        async def show_page(request: Request) -> Response:
            return HTMLResponse(page, headers=headers)

        routes = [
            Route("/", show_page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/generate", self.generate, methods=["GET", "POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        middleware = [
            Middleware(Gate, access=self._access, metrics=self._worker.metrics),
            Middleware(RequestBodyLimitMiddleware, max_body_size=self._access.body_bytes),
        ]
        handlers = {ApiError: _refuse, HTTPException: _refuse}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = read_body(ChatBody, await request.body())
        prompts = await self._read(body)
        tickets = self._queue(body, prompts, hidden_ids=self._syntax.hidden_ids)
        tokenizer, (prompt,) = self._run.tokenizer, prompts
        reader = AnswerReader(tokenizer, self._syntax, prompt=prompt.text, tools=body.offered_tools)
        writers = [ChatWriter(ticket, self._names, reader=reader) for ticket in tickets]
        return await self._reply(request, body, writers, dropped=prompt.dropped)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``: one answer per prompt."""
        body = read_body(CompletionBody, await request.body())
        prompts = await self._read(body)
        tickets = self._queue(body, prompts, scores_prompt=body.echo)
        texts = [
            original if isinstance(original, str) else prompt.text
            for original, prompt in zip(body.prompt, prompts, strict=True)
        ]
        writers = [
            TextWriter(ticket, self._names, prompt=text, echo=body.echo)
            for ticket, text in zip(tickets, texts, strict=True)
        ]
        return await self._reply(request, body, writers)

    async def generate(self, request: Request) -> Response:
        """``/generate``: keys in the query or, with POST, in a JSON body."""
        query = request.query_params
        keys = {**query, "stop": query.getlist("stop")}
        body = read_body(GenerateBody, await request.body() or keys)
        (ticket,) = tickets = self._queue(body, await self._read(body))
        await self._wait(request, tickets)
        return JSONResponse({"text": ticket.text, "finish_reason": ticket.finish, "usage": to_usage(tickets)})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models`` and ``/v1/models/NAME``: describes the model."""
        model = {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "hf_clm",
            "format": self._run.format,
            "has_turns": self._run.has_turns,
            "max_prompt_tokens": self._access.prompt_tokens,
            "max_new_tokens": self._access.new_tokens,
            "prompts": self._prompts,
        }
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_name(request.path_params["name"])
        return JSONResponse(model)

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 until the server stops."""
        self._worker.check_alive()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``, in the text format of Prometheus."""
        worker = self._worker
        gauges = {"waiting": len(worker.waiting), "generating": len(worker.batch)}
        return PlainTextResponse(worker.metrics.to_text(gauges))

    async def _read(self, body: Body) -> list[Prompt]:
        """Returns the prompts of a request. Raises ApiError for a request that cannot be answered."""
        self._check_name(body.model or self._name)
        self._worker.check_room()
        async with self._reading:
            return await asyncio.to_thread(self._to_prompts, body)

    def _to_prompts(self, body: Body) -> list[Prompt]:
        """Renders and tokenizes the prompts. Raises ApiError for a prompt where that fails."""
        try:
            return [self._to_prompt(prompt, body) for prompt in body.to_prompts(self._run)]
        except UserError as error:
            raise bad_request(str(error), body.text_key) from error

    def _to_prompt(self, prompt: Example | list[int], body: Body) -> Prompt:
        """Renders and tokenizes a prompt. Drops the oldest turns of a chat that is too long.

        Raises ApiError for a prompt over the limit.
        """
        run, tokenizer, most, dropped = self._run, self._run.tokenizer, self._access.prompt_tokens, 0
        new_tokens = body.max_new_tokens and min(body.max_new_tokens, self._access.new_tokens)
        if isinstance(prompt, list):
            self._check_ids(prompt)
            ids = prompt or [start_id(tokenizer)]
        elif isinstance(prompt, Chat):
            room = min(most, prompt_room(run.model, max_new_tokens=new_tokens) or most)
            ids, chat = to_fitting_prompt(prompt, tokenizer, rendering=run.rendering, most=room)
            dropped = len(prompt.messages) - len(chat.messages)
        else:
            (ids,) = to_prompt_ids([prompt], tokenizer, run.rendering)
        if len(ids) > most:
            what = f"the prompt has {len(ids):,} tokens, over the limit of {most:,}"
            if dropped:
                what += (
                    "; older messages were already dropped: shorten the last message or the system message"
                )
            raise bad_request(what, body.text_key, code="context_length_exceeded")
        new = min(cap_new_tokens(run.model, len(ids), max_new_tokens=new_tokens), self._access.new_tokens)
        return Prompt(ids, str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), new, dropped)

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raises ApiError for an id without an embedding."""
        size = self._run.model.get_input_embeddings().get_parameter("weight").shape[0]
        for id in ids:
            if not 0 <= id < size:
                raise bad_request(f"prompt: {id} is not a token id; expected 0 to {size - 1}", "prompt")

    def _queue(
        self,
        body: Body,
        prompts: Sequence[Prompt],
        *,
        hidden_ids: Collection[int] | None = None,
        scores_prompt: bool = False,
    ) -> list[Ticket]:
        """Queues an answer to each prompt. Raises ApiError for an invalid setting or a full queue."""
        try:
            decoding = update_decoding(self._decoding, body.extra)
        except UserError as error:
            raise bad_request(str(error), error.where.partition(".")[0]) from error
        tickets = [
            Ticket(
                prompt.ids,
                decoding.of_prompt(number),
                prompt.new_tokens,
                hidden_ids=hidden_ids,
                likeliest=body.likeliest,
                scores_prompt=scores_prompt,
            )
            for number, prompt in enumerate(prompts)
        ]
        self._worker.submit(tickets)
        return tickets

    async def _reply(
        self, request: Request, body: Body, writers: Sequence[Writer], *, dropped: int = 0
    ) -> Response:
        reply, tickets = Reply(self._name, writers, dropped=dropped), [writer.ticket for writer in writers]

        async def events() -> AsyncIterator[str]:
            try:
                async for event in reply.events(with_usage=body.stream_options.include_usage):
                    yield event
            finally:  # also if the client disconnects
                self._worker.cancel(tickets)

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream", headers=NO_STORE)
        await self._wait(request, tickets)
        return JSONResponse(reply.body())

    async def _wait(self, request: Request, tickets: Sequence[Ticket]) -> None:
        """Waits until all answers have ended or the client disconnects. Raises ApiError if one failed."""
        ends = asyncio.gather(*(ticket.wait() for ticket in tickets))
        try:
            while not ends.done() and not await request.is_disconnected():
                await asyncio.wait([ends], timeout=DISCONNECT_POLL_SECONDS)
        finally:
            self._worker.cancel(tickets)
        await ends

    def _check_name(self, name: str) -> None:
        if name != self._name:
            what = f"unknown model {name!r}; this server has {self._name!r}"
            raise ApiError(404, what, code="model_not_found", param="model")


def load_page() -> tuple[str, dict[str, str]]:
    """Returns the chat page and its headers, which allow only its own script and style."""
    page = PAGE.read_text(encoding="utf-8")

    def hash_of(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{hash_of('script')}'; "
        f"style-src 'sha256-{hash_of('style')}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


async def _refuse(request: Request, error: Exception) -> Response:
    """Converts an error of ours or of Starlette to a response in OpenAI's format."""
    if isinstance(error, HTTPException):
        code = "request_too_large" if error.status_code == 413 else "no_such_url"
        error = ApiError(error.status_code, error.detail, code=code)
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)
