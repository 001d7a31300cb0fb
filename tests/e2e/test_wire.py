"""Bytes as they may come: written by hand, sent to the real process."""

import asyncio
import json
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import psutil
import pytest

from tests.wire import URI, Wire, wire


def scripted(*pieces: str | None) -> AbstractAsyncContextManager[Wire]:
    return wire(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": pieces}))


async def test_a_trigger_kind_of_an_old_draft_still_gets_an_answer():
    async with scripted("return 1") as server:
        await server.start()
        await server.open("def f():\n    ")
        await server.ghost(2, 1, 4, trigger_kind=0)
        assert (await server.answer(2))["result"]["items"][0]["insertText"] == "return 1"


async def test_malformed_messages_do_not_end_the_server():
    async with scripted("return 1") as server:
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
    async with scripted("ret", None) as server:
        await server.start()
        await server.open("def f():\n    ")
        await server.ghost(2, 1, 4)
        await server.send(id=3, method="deepseek/status", params=None)
        await server.answer(3)
        server.process.stdin.close()
        async with asyncio.timeout(15):
            await server.process.wait()
        assert not psutil.pid_exists(server.process.pid)


async def test_a_document_that_was_never_opened_is_answered_with_nothing_and_the_reason_in_the_status():
    async with scripted("return 1") as server:
        await server.start()
        await server.ghost(2, 0, 0)
        assert (await server.answer(2))["result"] == {"items": []}
        await server.send(id=3, method="deepseek/status", params=None)
        assert "not open" in (await server.answer(3))["result"]["last"]["reason"]


async def test_a_request_of_our_own_without_parameters_is_answered():
    async with scripted("return 1") as server:
        await server.start()
        await server.send(id=2, method="deepseek/status")
        assert (await server.answer(2))["result"]["settings"]["model"] == "starter"


async def test_nothing_to_show_is_an_empty_list_and_not_null():
    """Neovim takes null for no answer at all, and goes on showing the last suggestion."""
    async with scripted("return 1") as server:
        await server.send(id=1, method="initialize", params={"capabilities": {}, "initializationOptions": {"inline": {"enabled": False}}})
        await server.answer(1)
        await server.send(method="initialized", params={})
        await server.open("x = \n")
        await server.ghost(2, 0, 4)
        assert (await server.answer(2))["result"] == {"items": []}


@pytest.mark.parametrize("identifier", [{"version": None}, {}])
async def test_changes_of_a_document_without_a_version_are_not_lost(identifier: dict[str, None]):
    async with scripted("return 1") as server:
        await server.start()
        item = {"uri": URI, "languageId": "python", "text": "x = 1\n", **identifier}
        await server.send(method="textDocument/didOpen", params={"textDocument": item})
        end = {"line": 1, "character": 0}
        change = {"range": {"start": end, "end": end}, "text": "def f():\n    "}
        params = {"textDocument": {"uri": URI, **identifier}, "contentChanges": [change]}
        await server.send(method="textDocument/didChange", params=params)
        await server.ghost(3, 2, 4)
        assert (await server.answer(3))["result"]["items"][0]["insertText"] == "return 1"
        stale = {"action": "docstring", "uri": URI, "range": {"start": end, "end": end}, "version": -1}
        await server.send(id=4, method="workspace/executeCommand", params={"command": "deepseek-lsp.run", "arguments": [stale]})
        assert "changed since" in (await server.answer(4))["error"]["message"]


async def test_a_request_that_is_not_understood_is_answered_with_what_is_wrong():
    async with scripted("return 1") as server:
        await server.start()
        await server.send(id=2, method="textDocument/inlineCompletion", params={"position": "nowhere"})
        error = (await server.answer(2))["error"]
        assert error["code"] == -32602 and "textDocument/inlineCompletion" in error["message"]


async def test_an_answer_of_the_editors_that_is_not_understood_ends_what_waits_for_it():
    async with scripted("return 1") as server:
        await server.start()
        await server.open("def f():\n    ")
        here = {"line": 1, "character": 4}
        fill = {"command": "deepseek-lsp.fill", "arguments": [{"uri": URI, "range": {"start": here, "end": here}}]}
        await server.send(id=2, method="workspace/executeCommand", params=fill)
        async with asyncio.timeout(10):
            while (message := await server.receive()).get("method") != "workspace/applyEdit":
                pass
        await server.send(id=message["id"], result={"nothing": "of this"})
        assert "did not make the change" in (await server.answer(2))["error"]["message"]


@pytest.mark.parametrize(("level", "problems"), [("debug", 0), ("loud", 1)])
async def test_how_much_is_logged_is_no_setting_and_a_word_for_it_that_is_not_known_is_told(
    monkeypatch: pytest.MonkeyPatch, level: str, problems: int
):
    monkeypatch.setenv("DEEPSEEK_LSP_LOG", level)
    async with wire(sys.executable, "-m", "lsp_server") as server:
        await server.send(id=1, method="initialize", params={"capabilities": {}})
        await server.answer(1)
        await server.send(id=2, method="deepseek/status")
        found = (await server.answer(2))["result"]["problems"]
        assert len(found) == problems and all("DEEPSEEK_LSP_LOG=LOUD" in problem for problem in found)


@pytest.mark.parametrize("answers", [True, False], ids=["refuses", "is silent"])
async def test_the_model_is_loaded_also_for_a_client_that_refuses_what_it_is_asked_or_says_nothing_to_it(answers: bool):
    can = {
        "window": {"workDoneProgress": True},
        "workspace": {"configuration": True, "didChangeConfiguration": {"dynamicRegistration": True}},
    }
    async with wire(sys.executable, "-m", "lsp_server") as server:
        options = {"model": "/nowhere"}
        await server.send(id=1, method="initialize", params={"capabilities": can, "initializationOptions": options})
        await server.answer(1)
        await server.send(method="initialized", params={})
        async with asyncio.timeout(30):
            while (message := await server.receive()).get("method") != "window/showMessage":
                if answers and "id" in message:
                    await server.send(id=message["id"], error={"code": -32601, "message": "no"})
        assert "/nowhere" in message["params"]["message"]


async def test_a_client_with_one_root_and_no_list_of_folders_has_that_folder(tmp_path: Path):
    text = "def add(a, b):\n    return a + b\n"
    (tmp_path / "shop.py").write_text(text)
    here = {"line": 0, "character": 4}
    document = {"uri": (tmp_path / "shop.py").as_uri()}
    async with scripted("```python\nfrom shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n```") as server:
        can = {"workspace": {"workspaceEdit": {"documentChanges": True, "resourceOperations": ["create"]}}}
        await server.send(id=1, method="initialize", params={"rootUri": tmp_path.as_uri(), "workspaceFolders": None, "capabilities": can})
        await server.answer(1)
        await server.send(method="initialized", params={})
        item = {**document, "languageId": "python", "version": 1, "text": text}
        await server.send(method="textDocument/didOpen", params={"textDocument": item})
        asked = {"action": "tests", **document, "range": {"start": here, "end": here}}
        await server.send(id=2, method="workspace/executeCommand", params={"command": "deepseek-lsp.run", "arguments": [asked]})
        async with asyncio.timeout(20):
            while (message := await server.receive()).get("method") != "workspace/applyEdit":
                assert "error" not in message, message
        assert message["params"]["edit"]["documentChanges"][0]["uri"] == (tmp_path / "tests/test_shop.py").as_uri()


async def test_whoever_asks_for_actions_of_the_empty_kind_gets_all_of_them():
    async with scripted("x") as server:
        await server.start()
        await server.open("def f():\n    return 1\n")
        titles = []
        for id, only in ((2, None), (3, [""]), (4, ["refactor"])):
            here = {"line": 0, "character": 0}
            params = {"textDocument": {"uri": URI}, "range": {"start": here, "end": here}, "context": {"diagnostics": [], "only": only}}
            await server.send(id=id, method="textDocument/codeAction", params=params)
            titles.append([action["title"] for action in (await server.answer(id))["result"]])
        assert titles[0] == titles[1] and set(titles[2]) < set(titles[0])
