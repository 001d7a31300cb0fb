"""A client of plain bytes: what a test or a benchmark needs to send what it wants and to time what comes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

URI = "file:///project/shop.py"


class Wire:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout
        self.process, self._in, self._out = process, process.stdin, process.stdout

    async def send_bytes(self, body: bytes) -> None:
        self._in.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await self._in.drain()

    async def send(self, **message: Any) -> None:
        await self.send_bytes(json.dumps({"jsonrpc": "2.0", **message}).encode())

    async def receive(self) -> Any:
        header = await self._out.readuntil(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return json.loads(await self._out.readexactly(length))

    async def answer(self, id: int) -> Any:
        async with asyncio.timeout(30):
            while (message := await self.receive()).get("id") != id or "method" in message:
                pass
            return message

    async def start(self) -> None:
        await self.send(id=1, method="initialize", params={"processId": None, "rootUri": None, "capabilities": {}})
        await self.answer(1)
        await self.send(method="initialized", params={})

    async def open(self, text: str) -> None:
        item = {"uri": URI, "languageId": "python", "version": 1, "text": text}
        await self.send(method="textDocument/didOpen", params={"textDocument": item})

    async def ghost(self, id: int, line: int, character: int, trigger_kind: int = 1) -> Any:
        params = {"textDocument": {"uri": URI}, "position": {"line": line, "character": character}}
        await self.send(id=id, method="textDocument/inlineCompletion", params=params | {"context": {"triggerKind": trigger_kind}})


@asynccontextmanager
async def wire(*command: str) -> AsyncIterator[Wire]:
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        yield Wire(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
