"""Who may ask, and how much: the checks of a request before any of it is read."""

import hmac
import json
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from hf_clm.generation.monitoring import Metrics
from hf_clm.generation.protocol import ApiError

OPEN = {"/", "/health"}  # no key is needed: neither says anything that the model knows


class Gate:
    """Around an ASGI app: refuses pages of other sites, wrong keys and large bodies; counts the replies.

    Without a key only this machine can connect, and so can a page of any site that its browser shows: by
    naming this address its own (``Host`` tells), or by asking without reading (``Origin`` and
    ``Sec-Fetch-Site`` tell).
    """

    def __init__(
        self, app: Any, *, api_key: str, hosts: Collection[str], max_body_bytes: int, metrics: Metrics
    ):
        self._app, self._key, self._hosts = app, api_key.encode(), hosts
        self._max_bytes, self._metrics = max_body_bytes, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """ASGI: the app's reply, or a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count("hf_clm_replies_total", status=str(message["status"]))
            await send(message)

        try:
            self._check(scope["path"], {name.decode("latin-1"): value for name, value in scope["headers"]})
        except ApiError as error:
            await _refuse(counted, error)
        else:
            await self._app(scope, self._limited(receive), counted)

    def _check(self, path: str, headers: dict[str, bytes]) -> None:
        host, origin = (headers.get(name, b"").decode("latin-1") for name in ("host", "origin"))
        if not self._key and _hostname(host) not in self._hosts:
            what = f"this server is not called {host!r}; with an API key it answers to any name"
            raise ApiError(403, what, code="wrong_host")
        is_foreign = headers.get("sec-fetch-site") == b"cross-site" and path != "/"
        if is_foreign or (origin and origin.partition("://")[2] != host):
            raise ApiError(403, "pages of other sites may not ask", code="cross_site")
        if self._key and path not in OPEN and not self._is_known(headers.get("authorization", b"")):
            what = "no API key, or a wrong one; send 'Authorization: Bearer KEY'"
            raise ApiError(401, what, code="invalid_api_key")
        self._check_size(int(headers.get("content-length", b"0")))

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        is_same = hmac.compare_digest(key.strip(), self._key)  # takes as long for a key that is nearly right
        return is_same and scheme.lower() == b"bearer"

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            what = f"a request may have {self._max_bytes:,} bytes"
            raise ApiError(413, what, code="request_too_large")

    def _limited(self, receive: Any) -> Any:
        """``receive`` that raises ApiError where a body of no stated length grows too large."""
        size = 0

        async def limited() -> dict[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self._check_size(size)
            return message

        return limited


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # half of a pair of brackets
        return None


async def _refuse(send: Any, error: ApiError) -> None:
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
