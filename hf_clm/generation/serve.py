"""``hf-clm serve``: one model with the OpenAI-compatible API, limits, a queue and a page."""

import asyncio
import ipaddress
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hf_clm.errors import EnvironmentFault, RecipeError
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.sampling import base_decoding
from hf_clm.generation.worker import Worker
from hf_clm.model.load import max_positions

if TYPE_CHECKING:  # an optional package
    from starlette.applications import Starlette

KEY_VARIABLE = "HF_CLM_API_KEY"
PROMPT_TOKENS = 4096  # unless the caller says otherwise, or the model has fewer positions


def serve(options: Namespace, *, say: Callable[[str], None]) -> None:
    """Answers until Ctrl-C or SIGTERM, and then, for ``grace_seconds``, what is under way.

    Raises RecipeError for an address of other machines without a key; EnvironmentFault where the packages
    are missing or the address is taken.
    """
    check_packages()
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    if not key and not is_local(options.host):
        fix = f"set {KEY_VARIABLE} (or --api_key), or --host 127.0.0.1"
        what = "other machines can connect, so it needs an API key"
        raise RecipeError(what, where="--host", got=options.host, fix=fix)
    with listen(options.host, options.port) as listener:
        run = load_run(options.run, attention=None, device=options.device)
        worker = Worker(run, batch_size=options.batch_size, max_waiting=options.max_waiting)
        app = build_app(options, key, worker=worker, run=run)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; uvicorn raises both at its end
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(
            f"serving at http://{address} (Ctrl-C stops)"
        )  # who connects from now on waits for the first turn
        if worker.batch_size < options.batch_size:
            say("one answer at a time: in a batch this model would answer otherwise")
        with suppress(KeyboardInterrupt):
            run_server(app, worker, listener=listener, grace_seconds=options.grace_seconds)
    say("stopped")


def check_packages() -> None:
    """Raises EnvironmentFault where Starlette or uvicorn is not installed."""
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        fix = "pip install 'hf_clm[serve]'"
        raise EnvironmentFault(f"serve needs the package {error.name}", fix=fix) from error
    assert starlette and uvicorn


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


def build_app(options: Namespace, key: str, *, worker: Worker, run: LoadedRun) -> "Starlette":
    """The ASGI app of a run."""
    from hf_clm.generation.service import Access, Service

    positions, asked = max_positions(run.model.config), options.max_prompt_tokens or PROMPT_TOKENS
    access = Access(
        key,
        host=options.host,
        body_bytes=options.max_body_bytes,
        prompt_tokens=asked if positions is None else min(asked, positions - 1),
        new_tokens=options.max_new_tokens,
    )
    name = options.name or Path(options.run).resolve().name
    decoding = base_decoding(options.run, use_model_settings=options.use_model_settings)
    return Service(run, worker, name=name, access=access, decoding=decoding).build_app()


def run_server(app: "Starlette", worker: Worker, *, listener: socket.socket, grace_seconds: float) -> None:
    """Serves; told to stop, lets answers end by themselves for ``grace_seconds``."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace_seconds, worker.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False
    )
    Server(config).run(sockets=[listener])
