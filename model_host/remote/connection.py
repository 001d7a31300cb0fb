"""The connection to a server: which way it takes, that it closes whenever a request leaves it, and that nothing without end is read."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from model_host.errors import EngineError
from model_host.remote.endpoint import Endpoint, headers
from model_host.remote.refusals import MAX_BYTES, WITHOUT_END


def of_client(where: Endpoint, verify: ssl.SSLContext) -> dict[str, Any]:
    """How every client of httpx is made here. Proxies of the environment are for what is encrypted; what is not goes to its machine and
    nowhere else."""
    return {"headers": headers(where), "verify": verify, "follow_redirects": False, "trust_env": where.url.startswith("https:")}


@asynccontextmanager
async def closing_what_is_left() -> AsyncIterator[dict[str, Any]]:
    """Extensions for one request. httpcore closes what it has opened when a request is left, but for a connection that is left within
    its TLS handshake: that one would stay open until the server has enough of it."""
    opened: list[Any] = []

    async def heard(event: str, said: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            opened.append(said["return_value"])
        elif event == "http11.send_request_headers.started":  # now it is httpcore's to close or to keep
            opened.clear()

    try:
        yield {"trace": heard}
    finally:
        for stream in opened:
            await stream.aclose()


async def whole(response: httpx2.Response) -> bytes:
    """The body of a response that is no stream. Raises EngineError where it does not end."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BYTES:
            raise EngineError(WITHOUT_END)
    return bytes(body)
