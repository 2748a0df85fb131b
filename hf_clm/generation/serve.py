"""``hf-clm serve``: serves one model with an OpenAI-compatible API, limits, a queue and a chat page."""

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
from hf_clm.generation.prompts import first_prompts
from hf_clm.generation.sampling import base_decoding
from hf_clm.generation.worker import Worker
from hf_clm.model.load import max_positions

if TYPE_CHECKING:  # an optional package
    from starlette.applications import Starlette

KEY_VARIABLE = "HF_CLM_API_KEY"
MAX_PROMPT_TOKENS = 4096  # default limit of a prompt


def serve(options: Namespace, *, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or SIGTERM, then gives pending answers ``grace_seconds`` to finish.

    Raises RecipeError if other machines can connect and there is no API key; EnvironmentFault if packages are
    missing or the address is in use.
    """
    check_packages()
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    if not key and not is_local(options.host):
        fix = f"set {KEY_VARIABLE} (or --api_key), or use --host 127.0.0.1"
        what = "an API key is required because other machines can connect"
        raise RecipeError(what, where="--host", got=options.host, fix=fix)
    with listen(options.host, options.port) as listener:
        run = load_run(options.run, attention=None, device=options.device, dtype=options.dtype)
        worker = Worker(run, batch_size=options.batch_size, max_waiting=options.max_waiting)
        app = build_app(options, key, worker=worker, run=run)
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # SIGTERM acts like Ctrl-C: uvicorn raises both again when it stops
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(f"serving at http://{address} (press Ctrl-C to stop)")  # clients can connect now
        if worker.batch_size < options.batch_size:
            say("generating one answer at a time: batching would change this model's answers")
        with suppress(KeyboardInterrupt):
            run_server(app, worker, listener=listener, grace_seconds=options.grace_seconds)
    say("stopped")


def check_packages() -> None:
    """Raises EnvironmentFault if Starlette or uvicorn is not installed."""
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        fix = "pip install 'hf_clm[serve]'"
        raise EnvironmentFault(f"serve needs the package {error.name}", fix=fix) from error
    assert starlette and uvicorn


def is_local(host: str) -> bool:
    """Returns whether only this machine can connect to an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket. Raises EnvironmentFault if the address is in use or not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"--host {host} --port {port}"
        fix = "choose another host or port"
        raise EnvironmentFault(f"cannot listen: {error.strerror}", where=where, fix=fix) from error


def build_app(options: Namespace, key: str, *, worker: Worker, run: LoadedRun) -> "Starlette":
    """Builds the ASGI app of a run."""
    from hf_clm.generation.service import Access, Service

    positions, limit = max_positions(run.model.config), options.max_prompt_tokens or MAX_PROMPT_TOKENS
    access = Access(
        key,
        host=options.host,
        body_bytes=options.max_body_bytes,
        prompt_tokens=limit if positions is None else min(limit, positions - 1),
        new_tokens=options.max_new_tokens,
    )
    name = options.name or Path(options.run).resolve().name
    decoding = base_decoding(options.run, use_model_settings=options.use_model_settings)
    prompts = first_prompts(options.run)
    return Service(run, worker, name=name, access=access, decoding=decoding, prompts=prompts).build_app()


def run_server(app: "Starlette", worker: Worker, *, listener: socket.socket, grace_seconds: float) -> None:
    """Runs the server. When it is asked to stop, answers have ``grace_seconds`` to finish."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace_seconds, worker.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False
    )
    Server(config).run(sockets=[listener])
