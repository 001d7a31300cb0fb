"""The connection to a server: that it closes whenever a request leaves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


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
