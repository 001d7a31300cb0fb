"""Chat over stdio, with an engine whose words are known."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lsprotocol import types
from pygls.exceptions import JsonRpcException

from tests.editor import URI, Editor, editor, plain

SHOP = "class Shop:\n    def add(self, item):\n        return None\n"
HERE = {"start": {"line": 1, "character": 4}, "end": {"line": 2, "character": 0}}


@pytest.fixture
async def speaking():
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": ["It ", "adds", " **items**."]})) as running:
        await running.start()
        running.open(SHOP)
        yield running


async def chat(running: Editor, text: str, **more: Any) -> Any:
    return plain(await running.client.protocol.send_request_async("deepseek/chat", {"text": text, **more}))


async def test_an_answer_streams_as_partial_results_and_the_conversation_goes_on(speaking: Editor):
    pieces = []

    notified = speaking.client.protocol._handle_notification

    def heard(method: str, params: Any) -> None:
        if method == "$/progress" and params.token == "partial":
            pieces.append(plain(params.value))
        notified(method, params)

    speaking.client.protocol._handle_notification = heard
    first = await chat(speaking, "What does it do?", references=[{"uri": URI, "range": HERE}], partialResultToken="partial")
    assert first["text"] == "It adds **items**."
    while len(pieces) < 3:
        await asyncio.sleep(0.01)
    assert "".join(str(piece.get("text", piece)) for piece in map(dict, pieces)) == "It adds **items**."
    second = await chat(speaking, "Sure?", conversation=first["conversation"])
    assert second["conversation"] == first["conversation"]
    await speaking.client.protocol.send_request_async("deepseek/chat/end", {"conversation": first["conversation"]})
    with pytest.raises(JsonRpcException, match="begin a new one"):
        await chat(speaking, "Sure?", conversation=first["conversation"])


async def test_a_slash_form_is_the_action_at_the_first_reference(speaking: Editor):
    answer = await chat(speaking, "/explain_symbol", references=[{"uri": URI, "range": HERE}])
    assert answer["title"] == "Explain add" and answer["text"] == "It adds **items**."
    with pytest.raises(JsonRpcException, match="needs to know where"):
        await chat(speaking, "/explain")
    with pytest.raises(JsonRpcException, match="no action 'nothing'"):
        await chat(speaking, "/nothing at all")


async def test_a_slash_form_at_a_whole_file_means_its_last_line_too_when_that_has_no_ending():
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": ["```python\na = 1\nb = 3\n```"]})) as running:
        await running.start()
        running.open("a = 1\nb = 2")
        answer = await chat(running, "/simplify", references=[{"uri": URI}])
        (edit,) = answer["edit"]["documentChanges"][0]["edits"]
        assert edit["newText"] == "b = 3" and edit["range"]["start"] == {"line": 1, "character": 0}
        assert edit["range"]["end"] == {"line": 1, "character": 5}


async def test_a_question_can_follow_what_an_action_said(speaking: Editor):
    explained = await chat(speaking, "/explain_symbol", references=[{"uri": URI, "range": HERE}])
    second = await chat(speaking, "Sure?", conversation=explained["conversation"])
    assert explained["conversation"] and second["conversation"] == explained["conversation"]
    third = await chat(speaking, "/explain_symbol", references=[{"uri": URI, "range": HERE}], conversation="of a server before")
    assert third["text"] == "It adds **items**." and third["conversation"] is None


@pytest.mark.parametrize("text", ["What does it do?", "/explain_symbol"])
async def test_who_names_a_stream_gets_the_words_under_it_and_no_progress_bar(text: str):
    streamed: list[Any] = []
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": ["It ", "adds", " **items**."]})) as running:
        await running.start()
        running.open(SHOP)

        @running.client.feature("deepseek/stream")
        def heard(params: Any) -> None:
            streamed.append(plain(params))

        answer = await chat(running, text, references=[{"uri": URI, "range": HERE}], stream="mine")
        assert answer["text"] == "It adds **items**."
        while not streamed or not streamed[-1].get("done"):
            await asyncio.sleep(0.01)
        assert {part["id"] for part in streamed} == {"mine"}
        assert "".join(part.get("text", "") for part in streamed) == "It adds **items**."
        assert not running.client.progress_reports


async def test_cancelling_a_question_ends_its_work():
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": ["It ", None]})) as running:
        await running.start()
        running.open(SHOP)
        begun, ended = asyncio.Event(), asyncio.Event()

        @running.client.feature("deepseek/stream")
        def heard(params: Any) -> None:
            (ended if plain(params).get("done") else begun).set()

        answer = running.client.protocol.send_request("deepseek/chat", {"text": "What?", "stream": "mine"}, msg_id="one")
        await asyncio.wait_for(begun.wait(), 20)
        running.client.cancel_request(types.CancelParams(id="one"))
        with pytest.raises(JsonRpcException) as error:
            await asyncio.wait_for(asyncio.wrap_future(answer), 20)
        assert error.value.code == types.LSPErrorCodes.RequestCancelled
        await asyncio.wait_for(ended.wait(), 20)


async def test_the_actions_behind_a_slash_are_listed(speaking: Editor):
    found = {action["name"]: action for action in plain(await speaking.client.protocol.send_request_async("deepseek/chat/actions", None))}
    assert found["explain_symbol"]["answer"] == "show" and found["explain_symbol"]["title"] == "Explain the function"
    assert found["refactor"]["asks"] and found["fix"]["appliesTo"] == "diagnostic"


async def test_a_slash_form_that_edits_gives_the_edit():
    answer = "```python\ndef add(self, item):\n    return item\n```"
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": [answer]})) as running:
        await running.start()
        running.open(SHOP)
        done = await chat(
            running, "/refactor return the item", references=[{"uri": URI, "range": HERE | {"end": {"line": 3, "character": 0}}}]
        )
        (change,) = done["edit"]["documentChanges"]
        assert change["edits"][0]["newText"] == "        return item\n"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "text: Field required"),
        ({"text": ""}, "at least 1 character"),
        ({"text": "x", "references": [{"uri": "file:///etc/passwd"}]}, "neither open nor in the workspace"),
        ({"text": "x", "references": [{"uri": "file:///project/.env"}]}, "secrets"),
        ({"text": "x", "references": [{"uri": "file:///project/none.py"}]}, "cannot be read"),
        ({"text": "x", "conversation": "none"}, "begin a new one"),
    ],
)
async def test_what_cannot_be_answered_says_why(speaking: Editor, params: dict[str, Any], said: str):
    with pytest.raises(JsonRpcException, match=said):
        await speaking.client.protocol.send_request_async("deepseek/chat", params)


async def test_files_of_the_workspace_are_read_and_links_out_of_it_are_not(tmp_path: Path):
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps({"pieces": ["ok"]})) as running:
        folder = tmp_path / "project"
        folder.mkdir()
        (folder / "a.py").write_text("x = 1\n")
        (tmp_path / "secret.py").write_text("y = 1\n")
        (folder / "link.py").symlink_to(tmp_path / "secret.py")
        folders = [types.WorkspaceFolder(uri=folder.as_uri(), name="project")]
        await running.client.initialize_session(types.InitializeParams(capabilities=types.ClientCapabilities(), workspace_folders=folders))
        assert (await chat(running, "?", references=[{"uri": (folder / "a.py").as_uri()}]))["text"] == "ok"
        with pytest.raises(JsonRpcException, match="neither open nor in the workspace"):
            await chat(running, "?", references=[{"uri": (folder / "link.py").as_uri()}])
