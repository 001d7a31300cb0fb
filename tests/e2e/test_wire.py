"""Bytes as they may come: written by hand, sent to the real process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

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
async def wire(*pieces: str | None) -> AsyncIterator[Wire]:
    command = [sys.executable, "-m", "tests.scripted", json.dumps({"pieces": pieces})]
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        yield Wire(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_trigger_kind_of_an_old_draft_still_gets_an_answer():
    async with wire("return 1") as server:
        await server.start()
        await server.open("def f():\n    ")
        await server.ghost(2, 1, 4, trigger_kind=0)
        assert (await server.answer(2))["result"]["items"][0]["insertText"] == "return 1"


async def test_malformed_messages_do_not_end_the_server():
    async with wire("return 1") as server:
        await server.start()
        await server.open("def f():\n    ")
        await server.send_bytes(b"{ this is not JSON")
        await server.send_bytes(b"[]")
        await server.send_bytes(b'{"jsonrpc": "2.0", "id": 7}')
        await server.send(id=8, method="textDocument/inlineCompletion", params={"position": "nowhere"})
        await server.send(id=9, method="no/such/method", params={})
        assert (await server.answer(9))["error"]["code"] == -32601
        await server.ghost(2, 1, 4)
        assert (await server.answer(2))["result"]["items"][0]["insertText"] == "return 1"


async def test_the_process_ends_when_the_client_goes_away_in_the_middle_of_a_generation():
    async with wire("ret", None) as server:
        await server.start()
        await server.open("def f():\n    ")
        await server.ghost(2, 1, 4)
        await server.send(id=3, method="deepseek-lsp/status", params=None)
        await server.answer(3)
        server.process.stdin.close()
        async with asyncio.timeout(15):
            await server.process.wait()
        assert not psutil.pid_exists(server.process.pid)


async def test_a_document_that_was_never_opened_is_answered_null_with_the_reason_in_the_status():
    async with wire("return 1") as server:
        await server.start()
        await server.ghost(2, 0, 0)
        assert (await server.answer(2))["result"] is None
        await server.send(id=3, method="deepseek-lsp/status", params=None)
        assert "not open" in (await server.answer(3))["result"]["last"]["reason"]
