"""``hf-clm serve``: one model behind the OpenAI-compatible API, with limits, a queue and a page.

request --> Gate (host, key, size) --> Service (prompt as in training, limits) --> Worker (queue) --> answer
"""

import asyncio
import base64
import hashlib
import ipaddress
import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from hf_clm.errors import EnvironmentFault, RecipeError
from hf_clm.generation.decoding import base_decoding
from hf_clm.generation.gate import Gate
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.service import Limits, Reply, Service
from hf_clm.generation.worker import Worker
from hf_clm.model.load import max_positions

PAGE = Path(__file__).with_name("page.html")
KEY_VARIABLE = "HF_CLM_API_KEY"
PROMPT_TOKENS = 4096  # unless the caller says otherwise, or the model has fewer positions
NOT_KEPT = {"Cache-Control": "no-store"}


def serve(options: Namespace, *, say: Callable[[str], None]) -> None:
    """Answers until Ctrl-C or SIGTERM, and then, for ``grace_seconds``, what is under way.

    Raises RecipeError for an address of other machines without a key; EnvironmentFault where the packages
    are missing or the address is taken.
    """
    check_packages()
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    check_key(options.host, key)
    with listen(options.host, options.port) as listener:
        run = load_run(options.run, attention=None, device=options.device)
        worker = Worker(run, batch_size=options.batch_size, max_waiting=options.max_waiting)
        app = build_app(options, key, worker=worker, run=run)
        url = to_url(listener)
        server = build_server(app, worker, grace_seconds=options.grace_seconds)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; uvicorn raises both at its end
        say(f"serving at {url} (Ctrl-C stops)")  # who connects from now on waits for the server's first turn
        if worker.batch_size < options.batch_size:
            say("one answer at a time: in a batch this model would answer otherwise")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    say("stopped")


def check_packages() -> None:
    """Raises EnvironmentFault where FastAPI or uvicorn is not installed."""
    try:
        import fastapi
        import uvicorn
    except ImportError as error:
        fix = "pip install 'hf_clm[serve]'"
        raise EnvironmentFault(f"serve needs the package {error.name}", fix=fix) from error
    assert fastapi and uvicorn


def check_key(host: str, key: str) -> None:
    """Raises RecipeError where other machines could connect and no key is asked of them."""
    if not key and not is_local(host):
        fix = f"set {KEY_VARIABLE} (or --api_key), or --host 127.0.0.1"
        raise RecipeError(
            "other machines can connect, so it needs an API key", where="--host", got=host, fix=fix
        )


def is_local(host: str) -> bool:
    """True for an address that only this machine can connect to."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Takes the address. Raises EnvironmentFault where another has it, or this machine has not."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise EnvironmentFault(f"cannot listen: {error.strerror}", where=where, fix="name others") from error


def to_url(listener: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build_server(app: Gate, worker: Worker, *, grace_seconds: float) -> Any:
    """A server that, when it is told to stop, lets answers end by themselves for ``grace_seconds``."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace_seconds, worker.close)
            await super().shutdown(sockets)

    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    return Server(uvicorn.Config(app, proxy_headers=False, **quiet))


def build_app(options: Namespace, key: str, *, worker: Worker, run: LoadedRun) -> Gate:
    """The ASGI app of a run."""
    positions = max_positions(run.model.config)
    prompt_tokens = options.max_prompt_tokens or min(PROMPT_TOKENS, (positions or PROMPT_TOKENS + 1) - 1)
    name = options.name or Path(options.run).resolve().name
    decoding = base_decoding(options.run, use_model_settings=options.use_model_settings)
    limits = Limits(prompt_tokens, options.max_new_tokens)
    service = Service(run, worker, name=name, limits=limits, decoding=decoding)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        running = asyncio.create_task(worker.run())
        yield
        worker.close()
        await running

    hosts = {"localhost", "127.0.0.1", "::1", options.host}
    routes = _build_routes(service, lifespan)
    return Gate(
        routes,
        api_key=key,
        hosts=hosts,
        max_body_bytes=options.max_body_bytes,
        metrics=worker.metrics,
    )


def _build_routes(service: Service, lifespan: Any) -> Any:
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    async def refused(request: Any, error: ApiError) -> Any:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    async def unknown(request: Any, error: HTTPException) -> Any:
        return await refused(request, ApiError(error.status_code, error.detail, code="no_such_url"))

    async def left(request: Any, error: ClientDisconnect) -> Any:
        return HTMLResponse("")  # nobody reads it

    page, headers = load_page()

    async def show_page(request: Any) -> Any:
        return HTMLResponse(page, headers=headers)

    handlers: dict[Any, Any] = {ApiError: refused, HTTPException: unknown, ClientDisconnect: left}
    # FastAPI's own pages would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, lifespan=lifespan, exception_handlers=handlers)
    app.add_route("/", show_page)
    for path, (methods, reply) in service.routes().items():
        app.add_route(path, _to_endpoint(reply), methods=methods.split())
    return app


def _to_endpoint(reply: Reply) -> Any:
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    async def endpoint(request: Any) -> Any:
        content = await reply(request)
        if isinstance(content, AsyncIterator):
            return StreamingResponse(content, media_type="text/event-stream", headers=NOT_KEPT)
        return PlainTextResponse(content) if isinstance(content, str) else JSONResponse(content)

    return endpoint


def load_page() -> tuple[str, dict[str, str]]:
    """The page and its headers: its own script and style run, and nothing else is loaded."""
    page = PAGE.read_text(encoding="utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{hashes['script']}'",
            f"style-src 'sha256-{hashes['style']}'",
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ]
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
