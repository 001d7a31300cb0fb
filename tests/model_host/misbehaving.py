"""An OpenAI-compatible server that answers by a script, in raw bytes, so that it can break every rule of HTTP and of the protocol.

Owns: a thread with an event loop, the requests it has read, and when a client went away.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    said = {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD = [
    event("a ="),
    event(" 1"),
    event("\n", "stop"),
    b'data: {"choices": [], "usage": ' + json.dumps(USAGE).encode() + b"}\n\n",
    b"data: [DONE]\n\n",
]


def says(*parts: bytes | float, head: bytes = HEAD) -> Behaviour:
    """Writes bytes and waits seconds, in turn, then closes the connection."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)

    return behave


def status(code: int, body: str = "{}", headers: str = "") -> Behaviour:
    content = body.encode()
    return says(content, head=f"HTTP/1.1 {code} X\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode())


async def hangs_up(writer: asyncio.StreamWriter) -> None:
    """Says nothing at all."""


async def speaks_forever(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while True:
        writer.write(event("x"))
        await writer.drain()
        await asyncio.sleep(0.01)


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Misbehaving:
    """Answers /models with `models`, llama-server's /props with `props`, every other request by the next of `script`; the last is
    repeated."""

    script: list[Behaviour] = field(default_factory=lambda: [says(*GOOD)])
    models: Behaviour | None = None
    props: Behaviour | None = None
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    was_left: threading.Event = field(default_factory=threading.Event)
    """A client closed the connection before its answer had ended."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, path, _ = first.split()
            asked = Asked(method, path, headers, json.loads(body) if body else {})
            if path.endswith("/models"):
                await (self.models or listing("served"))(writer)
                return
            if path == "/props":
                await (self.props or status(404))(writer)
                return
            self.asked.append(asked)
            behave = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            answering = asyncio.ensure_future(behave(writer))
            leaving = asyncio.ensure_future(reader.read())  # ends when the client is gone
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.was_left.set()
            for task in (answering, leaving):
                task.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.was_left.set()
        finally:
            writer.close()


def listing(*names: str, **more: Any) -> Behaviour:
    return status(200, json.dumps({"data": [{"id": name, **more} for name in names]}), "Content-Type: application/json\r\n")
