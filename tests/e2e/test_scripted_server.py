"""The real process over stdio, with an engine whose words are known exactly."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from lsprotocol import types
from pygls.exceptions import JsonRpcException

from tests.editor import URI, Editor, editor


def scripted(*pieces: str | None) -> list[str]:
    return [sys.executable, "-m", "tests.scripted", json.dumps({"pieces": pieces})]


@pytest.fixture
async def speaking():
    async with editor(*scripted("return self", ".name\n", "    # deeper\n", "x = 1\n")) as running:
        yield running


@pytest.fixture
async def thinking():
    async with editor(*scripted("ret", None)) as running:
        yield running


async def test_inline_completion_is_advertised_with_options_and_sync_is_incremental(speaking: Editor):
    result = await speaking.start()
    assert result.capabilities.inline_completion_provider == types.InlineCompletionOptions()
    sync = result.capabilities.text_document_sync
    assert isinstance(sync, types.TextDocumentSyncOptions) and sync.change is types.TextDocumentSyncKind.Incremental
    assert "deepseek-lsp.accepted" in result.capabilities.execute_command_provider.commands


async def test_ghost_text_has_a_range_on_the_cursors_line_and_a_command_that_counts(speaking: Editor):
    await speaking.start()
    speaking.open("class A:\n    def f(self):\n        ")
    item = await speaking.ghost(2, 8)
    assert item.insert_text == "return self.name"
    assert item.range == types.Range(types.Position(2, 8), types.Position(2, 8))
    await speaking.client.workspace_execute_command_async(types.ExecuteCommandParams(item.command.command, item.command.arguments))
    assert (await speaking.status())["requests"] == {"asked": 1, "shown": 1, "accepted": 1}


async def test_a_suggestion_that_is_found_written_counts_as_accepted_where_no_command_is_run_and_never_twice(speaking: Editor):
    await speaking.start()
    speaking.open("class A:\n    def f(self):\n        ")
    await speaking.ghost(2, 8)
    speaking.type(2, 8, "r")
    speaking.type(2, 9, "x")
    assert (await speaking.status())["requests"]["accepted"] == 0
    speaking.type(2, 9, "eturn self.name")
    assert (await speaking.status())["requests"]["accepted"] == 1
    await speaking.client.workspace_execute_command_async(types.ExecuteCommandParams("deepseek-lsp.accepted", [15]))
    assert (await speaking.status())["requests"]["accepted"] == 1


async def test_typing_what_is_suggested_shows_the_rest_of_it_at_once(speaking: Editor):
    await speaking.start()
    speaking.open("class A:\n    def f(self):\n        ")
    assert (await speaking.ghost(2, 8)).insert_text == "return self.name"
    speaking.type(2, 8, "return se")
    assert (await speaking.ghost(2, 17)).insert_text == "lf.name"


async def test_the_next_suggestion_is_thought_of_ahead_and_given_up_when_the_user_asks_for_something_else(thinking: Editor):
    await thinking.start({"inline": {"deadline_s": 0.2}})
    thinking.open("a = \nb = ")
    for line in (0, 1, 0, 1):  # a thought that held the engine or the turn would never let these be answered
        assert (await thinking.ghost(line, 4)).insert_text == "ret"


async def test_beside_a_menu_ghost_text_goes_on_behind_the_selected_item_since_editors_show_no_other():
    async with editor(*scripted("_of(x)")) as running:
        await running.start()
        running.open('show("🙂", self.na)\n')

        async def ghost(start: int, end: int, text: str) -> types.InlineCompletionItem:
            word = types.Range(types.Position(0, start), types.Position(0, end))
            context = types.InlineCompletionContext(
                types.InlineCompletionTriggerKind.Automatic, types.SelectedCompletionInfo(range=word, text=text)
            )
            params = types.InlineCompletionParams(context, types.TextDocumentIdentifier(URI), types.Position(0, 18))
            (item,) = (await running.client.text_document_inline_completion_async(params)).items
            return item

        (own,) = await running.menu(0, 18)
        assert own.text_edit.new_text == "na_of(x)"
        assert (await ghost(16, 18, own.text_edit.new_text)).insert_text == "_of(x)"
        item = await ghost(16, 18, "name")
        assert item.insert_text == "name_of(x)"
        assert item.range == types.Range(types.Position(0, 16), types.Position(0, 18))
        running.type(0, 18, "me")
        assert (await running.ghost(0, 20)).insert_text == "_of(x)"
        item = await ghost(3, 5, "of elsewhere")  # which is not the word at the cursor
        assert item.insert_text == "_of(x)" and item.range.start == types.Position(0, 18)


@pytest.mark.parametrize(("encoding", "character"), [("utf-8", 22), ("utf-16", 18), ("utf-32", 16)])
async def test_positions_count_in_the_negotiated_encoding(speaking: Editor, encoding: str, character: int):
    result = await speaking.start(encodings=[encoding])
    assert result.capabilities.position_encoding == encoding
    speaking.open('x = ("🙂", "🙂", )\n')
    item = await speaking.ghost(0, character)
    assert item.range.start == types.Position(0, character)
    assert item.range.end == types.Position(0, character)


async def test_closing_characters_the_completion_brings_itself_are_replaced(speaking: Editor):
    await speaking.start()
    speaking.open("print(self.name)\n")
    item = await speaking.ghost(0, 6)
    assert item is None or item.range.start.line == item.range.end.line == 0


async def test_line_endings_of_the_document_are_kept(speaking: Editor):
    await speaking.start()
    speaking.open("class A:\r\n    def f(self):\r\n")
    item = await speaking.ghost(2, 0)
    assert item.insert_text.startswith("return self.name\r\n") and "\n" not in item.insert_text.replace("\r\n", "")


async def test_completion_offers_the_same_text_over_the_word_being_typed(speaking: Editor):
    await speaking.start()
    speaking.open("class A:\n    def f(self):\n        foo")
    (item,) = await speaking.menu(2, 11)
    assert item.text_edit.new_text == "fooreturn self.name"
    assert item.text_edit.range.start == types.Position(2, 8)
    assert item.filter_text == "foo"


async def test_an_item_stands_over_the_word_it_was_asked_for_also_when_the_document_changed_meanwhile(thinking: Editor):
    await thinking.start({"inline": {"deadline_s": 0.5}})
    thinking.open('"🙂" foo')
    asking = asyncio.ensure_future(thinking.menu(0, 8))
    await thinking.status()  # answered behind the request, which is running by then
    thinking.client.text_document_did_change(
        types.DidChangeTextDocumentParams(
            types.VersionedTextDocumentIdentifier(version=1, uri=URI), [types.TextDocumentContentChangeWholeDocument(text="")]
        )
    )
    (item,) = await asking
    assert item.text_edit.range == types.Range(types.Position(0, 5), types.Position(0, 8)) and item.text_edit.new_text == "fooret"


async def test_a_newer_request_cancels_the_older_which_is_answered_null(thinking: Editor):
    await thinking.start()
    thinking.open("x = \n")
    older = asyncio.ensure_future(thinking.ghost(0, 4))
    await thinking.status()  # answered behind the request, which is running by then
    thinking.type(0, 4, "1")
    newer = asyncio.ensure_future(thinking.ghost(0, 5))
    async with asyncio.timeout(5):
        assert await older is None
    assert not newer.done()
    newer.cancel()


async def test_a_request_the_client_cancels_ends_with_request_cancelled(thinking: Editor):
    await thinking.start()
    thinking.open("x = \n")
    params = types.InlineCompletionParams(
        text_document=types.TextDocumentIdentifier(URI),
        position=types.Position(0, 4),
        context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Automatic),
    )
    answer = thinking.client.protocol.send_request("textDocument/inlineCompletion", params, msg_id="one")
    await thinking.status()
    thinking.client.cancel_request(types.CancelParams(id="one"))
    with pytest.raises(JsonRpcException) as error:
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)
    assert error.value.code == types.LSPErrorCodes.RequestCancelled


async def test_a_deadline_shows_what_came_until_then(thinking: Editor):
    await thinking.start({"inline": {"deadline_s": 0.2}})
    thinking.open("x = \n")
    item = await thinking.ghost(0, 4)
    assert item.insert_text == "ret"


async def test_a_bad_setting_is_reported_by_name_and_the_rest_applies(speaking: Editor):
    speaking.client.set_configuration({"deepseek-lsp": {"inline": {"max_lines": "many", "max_new_tokens": 7}, "model": "/evil"}})
    await speaking.start({"inline": {"deadline_s": 3}, "nonsense": 1})
    while len(speaking.client.messages) < 3:
        await speaking.client.wait_for_notification("window/showMessage")
    told = "\n".join(message.message for message in speaking.client.messages)
    assert "inline.max_lines" in told and "nonsense" in told and "model in the editor's workspace configuration" in told
    settings = (await speaking.status())["settings"]
    assert settings["inline"]["max_new_tokens"] == 7 and settings["inline"]["deadline_s"] == 3
    assert settings["inline"]["max_lines"] == 12 and settings["model"] == "starter"


async def test_a_bad_setting_that_was_put_right_is_no_problem_any_more_and_is_told_again_when_it_comes_back(speaking: Editor):
    await speaking.start({"nonsense": 1})
    for max_lines, problems, told in (("many", 2, 2), (3, 1, 2), ("many", 2, 3)):
        speaking.client.set_configuration({"deepseek-lsp": {"inline": {"max_lines": max_lines}}})
        speaking.client.workspace_did_change_configuration(types.DidChangeConfigurationParams(settings=None))
        async with asyncio.timeout(5):
            while len((await speaking.status())["problems"]) != problems or len(speaking.client.messages) != told:
                await asyncio.sleep(0.01)


async def test_changed_configuration_is_read_again(speaking: Editor):
    await speaking.start()
    speaking.open("def f():\n    ")
    assert await speaking.ghost(1, 4) is not None
    speaking.client.set_configuration({"deepseek-lsp": {"inline": {"enabled": False}}})
    speaking.client.workspace_did_change_configuration(types.DidChangeConfigurationParams(settings=None))
    async with asyncio.timeout(5):
        while (await speaking.status())["state"] != "disabled":
            pass
    assert await speaking.ghost(1, 4) is None
    assert "inline.enabled" in (await speaking.status())["last"]["reason"]


@pytest.mark.parametrize("way", ["ghost", "menu"])
async def test_a_name_that_only_another_file_has_is_seen_by_the_engine_once_the_user_rested(tmp_path: Path, way: str):
    (tmp_path / "prices.py").write_text("def total_price(items, tax):\n    return 1\n")
    (tmp_path / "shop.py").write_text("from prices import *\n\n\n")
    (tmp_path / ".env.py").write_text("def total_price_of_secrets(): pass\n")
    async with editor(sys.executable, "-m", "tests.scripted", '{"sees": "total_price"}') as running:
        await running.start(folder=tmp_path.as_uri())
        uri = (tmp_path / "shop.py").as_uri()
        running.open((tmp_path / "shop.py").read_text(), uri)
        assert await getattr(running, way)(1, 0, uri)
        while not (status := await running.status())["repository"]["files"]:
            await asyncio.sleep(0.02)
        running.type(1, 0, "x = 1", uri)
        assert (await running.ghost(2, 0, uri)).insert_text == "def total_price(items, tax):"
    assert status["repository"]["files"] == ["prices.py"] and status["repository"]["tokens"] > 0


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_document_that_git_ignores_is_completed_only_if_the_user_says_so(tmp_path: Path, allowed: bool):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("local_*\n")
    ignored, other = ((tmp_path / name).as_uri() for name in ("local_a.py", "b.py"))
    async with editor(sys.executable, "-m", "tests.scripted", '{"pieces": ["x = 1"]}') as running:
        await running.start({"inline": {"ignored_files": allowed}}, folder=tmp_path.as_uri())
        running.open("\n", ignored)
        running.open("\n", other)
        found = await running.ghost(0, 0, ignored)
        assert (found is not None) == allowed
        if not allowed:
            reason = (await running.status())["last"]["reason"]
            assert reason.startswith("git ignores local_a.py, and such files are not completed unless inline.ignored_files")
            here = {"line": 0, "character": 0}
            fill = types.ExecuteCommandParams("deepseek-lsp.fill", [{"uri": ignored, "range": {"start": here, "end": here}}])
            with pytest.raises(JsonRpcException, match=r"git ignores local_a\.py"):
                await running.client.workspace_execute_command_async(fill)
        assert (await running.ghost(0, 0, other)).insert_text == "x = 1"
