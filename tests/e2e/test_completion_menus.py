"""Neovim's completion plugins nvim-cmp (with cmp-nvim-lsp) and blink.cmp, neither of which could be had to run: what each announces, when
it shows an item and how it writes one, by its sources as of 2025, held against the server on the wire."""

import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lsp_server.connection import ACCEPTED
from tests.wire import URI, Wire, wire

MARKDOWN = ["markdown", "plaintext"]
ANNOUNCED: dict[str, dict[str, Any]] = {
    "nvim-cmp": {
        "dynamicRegistration": False,
        "contextSupport": True,
        "insertTextMode": 1,
        "completionList": {"itemDefaults": ["commitCharacters", "editRange", "insertTextFormat", "insertTextMode", "data"]},
        "completionItem": {
            "snippetSupport": True, "commitCharactersSupport": True, "deprecatedSupport": True, "preselectSupport": True,
            "insertReplaceSupport": True, "labelDetailsSupport": True, "tagSupport": {"valueSet": [1]},
            "insertTextModeSupport": {"valueSet": [1, 2]},
            "resolveSupport": {"properties": ["documentation", "additionalTextEdits", "insertTextFormat", "insertTextMode", "command"]},
        },
    },
    "blink.cmp": {
        "contextSupport": True,
        "insertTextMode": 1,
        "completionList": {"itemDefaults": ["commitCharacters", "editRange", "insertTextFormat", "insertTextMode", "data"]},
        "completionItem": {
            "snippetSupport": True, "commitCharactersSupport": False, "deprecatedSupport": True, "preselectSupport": False,
            "documentationFormat": MARKDOWN, "insertReplaceSupport": True, "labelDetailsSupport": True, "tagSupport": {"valueSet": [1]},
            "insertTextModeSupport": {"valueSet": [1]},
            "resolveSupport": {"properties": ["documentation", "detail", "additionalTextEdits", "command", "data"]},
        },
    },
}  # fmt: skip
INVOKED, INCOMPLETE = 1, 3


class Buffer:
    """Neovim with one of the plugins and one line at the cursor. Columns are bytes, as Neovim counts and asks the server to."""

    def __init__(self, server: Wire) -> None:
        self.server = server
        self.line, self.column = b"", 0
        self._version, self._id = 1, 1

    async def ask(self, method: str, params: Any) -> Any:
        self._id += 1
        await self.server.send(id=self._id, method=method, params=params)
        answer = await self.server.answer(self._id)
        assert "error" not in answer, answer
        return answer["result"]

    async def open(self, before: str, after: str = "") -> None:
        """A new text with the cursor between `before` and `after`."""
        self.line, self.column = (before + after).encode(), len(before.encode())
        self._version += 1
        item = {"uri": URI, "languageId": "python", "version": self._version, "text": f"import shop\n{before}{after}\nshop.end()\n"}
        await self.server.send(method="textDocument/didClose", params={"textDocument": {"uri": URI}})
        await self.server.send(method="textDocument/didOpen", params={"textDocument": item})

    async def replace(self, start: int, end: int, text: bytes) -> None:
        """Writes text between two columns; the cursor ends up behind it."""
        self.line = self.line[:start] + text + self.line[end:]
        self.column = start + len(text)
        self._version += 1
        place = {"start": {"line": 1, "character": start}, "end": {"line": 1, "character": end}}
        change = {"textDocument": {"uri": URI, "version": self._version}, "contentChanges": [{"range": place, "text": text.decode()}]}
        await self.server.send(method="textDocument/didChange", params=change)

    async def type(self, text: str) -> None:
        await self.replace(self.column, self.column, text.encode())

    async def complete(self, kind: int = INVOKED) -> Any:
        """The item for the cursor; the list says that it is to be asked for again when more is typed."""
        here = {"textDocument": {"uri": URI}, "position": {"line": 1, "character": self.column}, "context": {"triggerKind": kind}}
        found = await self.ask("textDocument/completion", here)
        (item,) = found["items"]
        assert found["isIncomplete"] and "itemDefaults" not in found
        return item

    async def accepted(self) -> int:
        count: int = (await self.ask("deepseek/status", None))["requests"]["accepted"]
        return count


class NvimCmp(Buffer):
    def shows(self, item: Any) -> bool:
        """Matches what stands between the start of the item's edit and the cursor."""
        start = item["textEdit"]["range"]["start"]["character"]
        while start < self.column and self.line[start : start + 1].isspace():
            start += 1
        return bool(item["filterText"].encode().startswith(self.line[start : self.column]))

    async def take(self, item: Any, asked_at: int) -> None:
        """Types the item's first line, so that `.` repeats it, takes that back up to where it asked, makes the edit there, and sends the
        whole command."""
        edit = item["textEdit"]
        start, end = (edit["range"][side]["character"] for side in ("start", "end"))
        word = edit["newText"].strip().splitlines()[0].encode()
        at_request = self.line[start:asked_at]
        await self.replace(start, self.column, word)
        await self.replace(start, self.column, at_request)
        await self.replace(self.column - (asked_at - start), self.column + (end - asked_at), edit["newText"].encode())
        await self.ask("workspace/executeCommand", item["command"])


class Blink(Buffer):
    def shows(self, item: Any) -> bool:
        """Matches the word before the cursor, hyphens within it included, wherever the item's edit starts."""
        keyword = re.search(r"(?:\w[\w-]*)?\Z", self.line[: self.column].decode())
        return keyword is not None and bool(item["filterText"].startswith(keyword[0]))

    async def take(self, item: Any, asked_at: int) -> None:
        """Makes the edit, which ends as much later as was typed since, and sends the command's name and arguments."""
        edit = item["textEdit"]
        start, end = (edit["range"][side]["character"] for side in ("start", "end"))
        await self.replace(start, end + self.column - asked_at, edit["newText"].encode())
        await self.ask("workspace/executeCommand", {key: item["command"][key] for key in ("command", "arguments")})


@asynccontextmanager
async def plugin(name: str, script: Path) -> AsyncIterator[NvimCmp | Blink]:
    """The plugin on a server whose model says what stands in `script`."""
    async with wire(sys.executable, "-m", "tests.scripted", json.dumps({"file": str(script)})) as server:
        buffer = {"nvim-cmp": NvimCmp, "blink.cmp": Blink}[name](server)
        capabilities = {"general": {"positionEncodings": ["utf-8"]}, "textDocument": {"completion": ANNOUNCED[name]}}
        offered = (await buffer.ask("initialize", {"processId": None, "rootUri": None, "capabilities": capabilities}))["capabilities"]
        assert offered["positionEncoding"] == "utf-8"
        assert not offered["completionProvider"].get("resolveProvider"), "an item comes whole"
        assert ACCEPTED in offered["executeCommandProvider"]["commands"], "else Neovim does not send an item's command"
        await server.send(method="initialized", params={})
        yield buffer


CASES = [
    ("    r", "", "eturn self.items[name]"),
    ("    ", "", "return self.items[name]"),
    ("print(", ")", "shop.name)"),
    ("    for item in sh", "", "op.items:\n        print(item)"),
    ("größe = pr", "", "eis + 'für'"),
    ("total = price-dis", "", "count"),
]
"""What stands before and behind the cursor, and what the model adds: a word begun, none, a bracket that is there, two lines, letters of two
bytes, a word with a hyphen in it."""


@pytest.mark.parametrize("name", ANNOUNCED)
async def test_the_item_is_shown_written_as_the_model_said_and_counted_once(tmp_path: Path, name: str):
    script = tmp_path / "script.json"
    async with plugin(name, script) as buffer:
        for count, (before, after, text) in enumerate(CASES, start=1):
            script.write_text(json.dumps({"pieces": [text]}))
            await buffer.open(before, after)
            item = await buffer.complete()
            assert buffer.shows(item), item["filterText"]
            assert "\n" not in item["label"] and text.strip() in item["documentation"]["value"]
            await buffer.take(item, buffer.column)
            assert buffer.line.decode() == before + text
            assert await buffer.accepted() == count


@pytest.mark.parametrize("name", ANNOUNCED)
async def test_what_is_typed_while_the_menu_is_open_is_not_written_twice_and_a_new_item_fits_it(tmp_path: Path, name: str):
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"pieces": ["eturn self.name"]}))
    async with plugin(name, script) as buffer:
        await buffer.open("    r")
        first, asked_at = await buffer.complete(), buffer.column
        await buffer.type("et")
        newer = await buffer.complete(INCOMPLETE)
        assert buffer.shows(newer) and newer["textEdit"]["newText"] == "return self.name"
        await buffer.take(first, asked_at)
        assert buffer.line == b"    return self.name"
        await buffer.open("    re")
        await buffer.type("t")
        await buffer.take(newer, buffer.column)
        assert buffer.line == b"    return self.name"
