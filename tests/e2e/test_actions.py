"""Code actions over stdio, by an editor that can do much and by one that can do little, with an engine whose words are known."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lsprotocol import types
from pygls.exceptions import JsonRpcException

from prompts import library
from tests.editor import URI, Editor, capabilities, editor, plain

SHOP = """class Shop:
    def add(self, item):
        self.items.append(item)
        return None
"""
FIXED = "```python\ndef add(self, item):\n    self.items.append(item)\n```"
HERE = types.Position(2, 10)
DIAGNOSTIC = types.Diagnostic(range=types.Range(types.Position(3, 8), types.Position(3, 14)), message="useless return", source="lint")


def scripted(*pieces: str | None) -> list[str]:
    return [sys.executable, "-m", "tests.scripted", json.dumps({"pieces": pieces})]


def able(**experimental: bool) -> types.ClientCapabilities:
    """What VS Code can do."""
    found = capabilities()
    assert found.window and found.text_document
    found.window.show_document = types.ShowDocumentClientCapabilities(support=True)
    found.experimental = {"deepseekLsp": experimental}
    return found


def modest() -> types.ClientCapabilities:
    """An editor of 2016: commands and plain edits."""
    return types.ClientCapabilities(text_document=types.TextDocumentClientCapabilities(code_action=types.CodeActionClientCapabilities()))


async def begin(running: Editor, client: types.ClientCapabilities, text: str = SHOP, folder: str = "file:///project") -> Editor:
    folders = [types.WorkspaceFolder(uri=folder, name="project")]
    await running.client.initialize_session(types.InitializeParams(capabilities=client, workspace_folders=folders))
    running.applied = []
    running.stream = []

    @running.client.feature(types.WORKSPACE_APPLY_EDIT)
    def apply(params: types.ApplyWorkspaceEditParams) -> types.ApplyWorkspaceEditResult:
        running.applied.append(params.edit)
        return types.ApplyWorkspaceEditResult(applied=True)

    @running.client.feature("deepseek/stream")
    def streamed(params: Any) -> None:
        running.stream.append(plain(params))

    running.open(text)
    return running


async def listed(
    running: Editor, range: types.Range | None = None, diagnostics: tuple[types.Diagnostic, ...] = (), uri: str = URI
) -> dict[str, Any]:
    params = types.CodeActionParams(
        types.TextDocumentIdentifier(uri), range or types.Range(HERE, HERE), types.CodeActionContext(diagnostics=list(diagnostics))
    )
    found = await running.client.text_document_code_action_async(params)
    return {action.title: action for action in found or []}


async def run(running: Editor, command: types.Command) -> Any:
    params = types.ExecuteCommandParams(command.command, command.arguments)
    return plain(await running.client.workspace_execute_command_async(params))


async def until_begun(running: Editor, title: str) -> Any:
    """Waits until the work with this title has a progress bar, and gives its token."""
    async with asyncio.timeout(10):
        while True:
            for token, reports in running.client.progress_reports.items():
                if reports and getattr(reports[0], "title", "") == title:
                    return token
            await asyncio.sleep(0.005)


@pytest.fixture
async def fixing():
    async with editor(*scripted("Sure:\n", *FIXED.splitlines(keepends=True))) as running:
        yield running


@pytest.fixture
async def thinking():
    async with editor(*scripted("It adds", None)) as running:
        yield running


async def test_listing_asks_no_model_and_shows_what_fits_the_place(thinking: Editor):
    await begin(thinking, able())
    titles = set(await listed(thinking))
    assert titles == {"Explain add", "Document add", "Write tests for add"}
    selected = set(await listed(thinking, types.Range(types.Position(2, 0), types.Position(3, 0)), (DIAGNOSTIC,)))
    assert selected - titles == {
        "Explain the selection", "Review the selection", "Simplify the selection", "Make the selection faster", "Explain this error",
        "Fix this with the model", "Change the selection as I say …", "Convert the selection to another language …",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "\n\n", " \t\r\n\r\n"])
async def test_nothing_is_offered_where_there_is_no_code(thinking: Editor, text: str):
    await begin(thinking, able(input=True), text=text)
    assert await listed(thinking, types.Range(types.Position(0, 0), types.Position(9, 0))) == {}


async def test_a_client_that_can_ask_for_words_gets_the_actions_that_need_an_instruction(thinking: Editor):
    await begin(thinking, able(input=True))
    actions = await listed(thinking, types.Range(types.Position(2, 0), types.Position(3, 0)))
    command = actions["Change the selection as I say …"].command
    assert command.command == "deepseek-lsp.input" and command.arguments[1] == "What should change?"


SELECTED = types.Range(types.Position(1, 0), types.Position(4, 0))


@pytest.mark.parametrize("chosen", ["Use early returns", None])
async def test_an_editor_that_cannot_ask_for_words_lets_the_user_choose_among_instructions(fixing: Editor, chosen: str | None):
    await begin(fixing, modest())
    questions = []

    @fixing.client.feature(types.WINDOW_SHOW_MESSAGE_REQUEST)
    def choose(params: types.ShowMessageRequestParams) -> types.MessageActionItem | None:
        questions.append(params)
        return types.MessageActionItem(chosen) if chosen else None

    command = (await listed(fixing, SELECTED))["Change the selection as I say …"]
    assert command.command == "deepseek-lsp.run"
    if chosen:
        assert (await run(fixing, command))["applied"] and len(fixing.applied) == 1
    else:
        with pytest.raises(JsonRpcException, match=r"an instruction is needed.*write <do: what>"):
            await run(fixing, command)
    (question,) = questions
    assert "What should change?" in question.message and "Use early returns" in [choice.title for choice in question.actions]


async def test_an_editor_without_questions_is_told_what_to_do_instead(fixing: Editor):
    await begin(fixing, modest())
    with pytest.raises(JsonRpcException, match=r"an instruction is needed.*write <do: what>"):
        await run(fixing, (await listed(fixing, SELECTED))["Change the selection as I say …"])


@pytest.mark.parametrize("client", [modest(), able(), able(input=True)], ids=["modest", "able", "our own"])
async def test_an_instruction_in_the_selection_is_an_action_of_its_own_in_every_editor(fixing: Editor, client: types.ClientCapabilities):
    await begin(fixing, client, SHOP.replace("        return None", "        return None  # <do: no useless return>"))
    actions = await listed(fixing, SELECTED)
    action = actions["Change the selection as I say: no useless return"]
    if isinstance(action, types.Command):
        assert (await run(fixing, action))["applied"]
    else:
        assert action.command is None and (await fixing.client.code_action_resolve_async(action)).edit is not None


async def test_resolving_gives_the_smallest_edit_for_the_documents_version_with_a_label(fixing: Editor):
    await begin(fixing, able())
    action = (await listed(fixing, diagnostics=(DIAGNOSTIC,)))["Fix this with the model"]
    assert action.edit is None and action.kind == types.CodeActionKind.QuickFix and list(action.diagnostics) == [DIAGNOSTIC]
    resolved = await fixing.client.code_action_resolve_async(action)
    (change,) = resolved.edit.document_changes
    assert change.text_document == types.OptionalVersionedTextDocumentIdentifier(uri=URI, version=0)
    (edit,) = change.edits
    assert (edit.range, edit.new_text) == (types.Range(types.Position(3, 0), types.Position(4, 0)), "")
    assert resolved.edit.change_annotations["deepseek-lsp"].label == "Fix this with the model"


async def test_an_edit_for_a_version_that_is_gone_is_refused(fixing: Editor):
    await begin(fixing, able())
    action = (await listed(fixing, diagnostics=(DIAGNOSTIC,)))["Fix this with the model"]
    fixing.type(0, 0, "# typed\n")
    with pytest.raises(JsonRpcException, match="changed since") as error:
        await fixing.client.code_action_resolve_async(action)
    assert error.value.code == types.LSPErrorCodes.ContentModified


async def test_a_document_in_no_file_yet_is_changed_as_any_other(fixing: Editor):
    await begin(fixing, able())
    fixing.open(SHOP, uri="untitled:Untitled-1")
    found = await listed(fixing, diagnostics=(DIAGNOSTIC,), uri="untitled:Untitled-1")
    (change,) = (await fixing.client.code_action_resolve_async(found["Fix this with the model"])).edit.document_changes
    assert change.text_document.uri == "untitled:Untitled-1" and len(change.edits) == 1


async def test_typing_while_the_model_answers_ends_the_answer_and_changes_nothing():
    script = {"pieces": ["```python\n", *(f"x = {number}\n" for number in range(500))], "step_s": 0.01}
    async with editor(sys.executable, "-m", "tests.scripted", json.dumps(script)) as running:
        await begin(running, able())
        action = (await listed(running, diagnostics=(DIAGNOSTIC,)))["Fix this with the model"]
        resolving = asyncio.ensure_future(running.client.code_action_resolve_async(action))
        await until_begun(running, "Fix this with the model")
        running.type(0, 0, "# typed\n")
        with pytest.raises(JsonRpcException, match="changed while the model answered"):
            await asyncio.wait_for(resolving, 3)


async def test_a_modest_client_gets_commands_whose_edit_is_made_for_it(fixing: Editor):
    await begin(fixing, modest())
    command = (await listed(fixing, diagnostics=(DIAGNOSTIC,)))["Fix this with the model"]
    assert isinstance(command, types.Command)
    assert (await run(fixing, command))["applied"]
    (edit,) = fixing.applied
    assert edit.document_changes is None
    assert {uri: list(edits) for uri, edits in edit.changes.items()} == {
        URI: [types.TextEdit(types.Range(types.Position(3, 0), types.Position(4, 0)), "")]
    }


WHOLE = '```python\ndef add(self, item):\n    """Adds it."""\n    self.items.append(item)\n```'


@pytest.mark.parametrize("client", [able(), modest()], ids=["able", "modest"])
async def test_every_action_gives_an_edit_or_words_in_editors_that_can_do_much_or_little(client: types.ClientCapabilities):
    async with editor(*scripted(WHOLE)) as running:
        await begin(running, client, SHOP.replace("return None", "return None  # TODO"))

        @running.client.feature(types.WINDOW_SHOW_MESSAGE_REQUEST)
        def choose(params: types.ShowMessageRequestParams) -> types.MessageActionItem:
            return types.MessageActionItem(params.actions[0].title)

        actions = await listed(running, SELECTED, (DIAGNOSTIC,))
        assert len(actions) == len(library.load()[0])
        for title, action in actions.items():
            if title == "Write tests for add":  # into files, below
                continue
            running.applied.clear()
            if isinstance(action, types.Command) or action.command:
                done = await run(running, action if isinstance(action, types.Command) else action.command)
                assert bool(done["text"]) != bool(running.applied), title
            else:
                assert (await running.client.code_action_resolve_async(action)).edit is not None, title


async def test_an_explanation_is_shown_as_a_document_that_only_the_user_can_read(fixing: Editor):
    await begin(fixing, able())
    action = (await listed(fixing))["Explain add"]
    result = await run(fixing, action.command)
    assert result["text"].startswith("Sure:") and not result["applied"]
    (shown,) = fixing.client.shown_documents
    file = Path(shown.uri.removeprefix("file://"))
    assert file.read_text().startswith("# Explain add\n\nSure:") and file.parent.stat().st_mode & 0o077 == 0
    titles = [r.title for reports in fixing.client.progress_reports.values() for r in reports if isinstance(r, types.WorkDoneProgressBegin)]
    assert "Explain add" in titles


async def test_an_explanation_is_there_again_when_hovering_over_its_code_until_that_changes(fixing: Editor):
    await begin(fixing, able())

    async def hover(line: int) -> types.Hover | None:
        params = types.HoverParams(types.TextDocumentIdentifier(URI), types.Position(line, 8))
        return await fixing.client.text_document_hover_async(params)

    assert await hover(1) is None
    await run(fixing, (await listed(fixing))["Explain add"].command)
    assert (await hover(1)).contents.value.startswith("Sure:") and await hover(2) is None
    fixing.type(0, 0, "# moved down\n")
    assert await hover(1) is None and (await hover(2)).contents.value.startswith("Sure:")
    fixing.type(3, 8, "x = 1\n        ")
    assert await hover(2) is None


async def test_a_modest_client_is_told_the_explanation(fixing: Editor):
    await begin(fixing, modest())
    await run(fixing, (await listed(fixing))["Explain add"])
    assert any(message.message.startswith("Explain add\n\nSure:") for message in fixing.client.messages)


async def test_our_own_clients_get_the_words_as_they_come(fixing: Editor):
    await begin(fixing, able(stream=True))
    await run(fixing, (await listed(fixing))["Explain add"].command)
    while not fixing.stream or not fixing.stream[-1].get("done"):
        await asyncio.sleep(0.01)
    assert "".join(part.get("text", "") for part in fixing.stream) == "Sure:\n" + FIXED
    assert {part["title"] for part in fixing.stream} == {"Explain add"} and not fixing.client.shown_documents


async def test_a_client_that_answers_nothing_while_it_waits_gets_its_answer_all_the_same(fixing: Editor):
    """Helix blocks until codeAction/resolve is answered: who waited for its answer about the progress bar would wait for ever."""
    await begin(fixing, able())
    answered = asyncio.Event()

    async def when_answered(params: types.WorkDoneProgressCreateParams) -> None:
        await answered.wait()

    fixing.client.protocol.fm.features[types.WINDOW_WORK_DONE_PROGRESS_CREATE] = when_answered
    async with asyncio.timeout(20):
        answer = await run(fixing, (await listed(fixing))["Explain add"].command)
    assert answer["text"]
    answered.set()


async def test_the_cancel_button_stops_the_model_and_changes_nothing(thinking: Editor):
    await begin(thinking, able())
    action = (await listed(thinking))["Document add"]
    resolving = asyncio.ensure_future(thinking.client.code_action_resolve_async(action))
    token = await until_begun(thinking, "Document add")
    thinking.client.window_work_done_progress_cancel(types.WorkDoneProgressCancelParams(token=token))
    with pytest.raises(JsonRpcException, match="Stopped, and nothing was changed"):
        await asyncio.wait_for(resolving, 5)
    assert isinstance(thinking.client.progress_reports[token][-1], types.WorkDoneProgressEnd)


@pytest.mark.parametrize("id", ["one", 0])
async def test_cancelling_the_request_of_a_command_stops_its_work(thinking: Editor, id: str | int):
    await begin(thinking, able())
    command = (await listed(thinking))["Explain add"].command
    params = types.ExecuteCommandParams(command.command, command.arguments)
    answer = thinking.client.protocol.send_request("workspace/executeCommand", params, msg_id=id)
    token = await until_begun(thinking, "Explain add")
    thinking.client.cancel_request(types.CancelParams(id=id))
    with pytest.raises(JsonRpcException) as error:
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)
    assert error.value.code == types.LSPErrorCodes.RequestCancelled
    while not isinstance(thinking.client.progress_reports[token][-1], types.WorkDoneProgressEnd):
        await asyncio.sleep(0.01)


def asked(action: str, uri: str = URI) -> dict[str, Any]:
    here = {"line": 0, "character": 0}
    return {"action": action, "uri": uri, "range": {"start": here, "end": here}}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "is not understood: action: Field required"),
        ("nonsense", "is not understood"),
        (asked("no"), "no action 'no'"),
        (asked("refactor"), "instruction"),
        (asked("fix", "file:///project/no.py"), "not open"),
    ],
)
async def test_a_command_that_cannot_be_done_says_why(fixing: Editor, asked: Any, said: str):
    await begin(fixing, able())
    with pytest.raises(JsonRpcException, match=said):
        await run(fixing, types.Command(title="", command="deepseek-lsp.run", arguments=[asked]))
    assert not fixing.applied


TESTS = "```python\nfrom shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n```"
WRONG = "```python\nfrom shop import subtract\n\n\ndef test_add():\n    assert add(1, 2) == 3\n```"


async def with_project(running: Editor, folder: Path, client: types.ClientCapabilities) -> Any:
    """Opens shop.py of a project in `folder`; gives the code action that writes tests for `add`."""
    text = "def add(a, b):\n    return a + b\n"
    (folder / "shop.py").write_text(text)
    await begin(running, client, folder=folder.as_uri())
    uri = (folder / "shop.py").as_uri()
    running.open(text, uri=uri)
    place = types.Range(types.Position(1, 4), types.Position(1, 4))
    params = types.CodeActionParams(types.TextDocumentIdentifier(uri), place, types.CodeActionContext(diagnostics=[]))
    return {action.title: action for action in await running.client.text_document_code_action_async(params)}["Write tests for add"]


async def test_tests_become_a_new_file_that_the_editor_shows_before_it_makes_it(tmp_path: Path):
    async with editor(*scripted(TESTS)) as running:
        resolved = await running.client.code_action_resolve_async(await with_project(running, tmp_path, able()))
        create, write = resolved.edit.document_changes
        assert create.uri == write.text_document.uri == (tmp_path / "tests" / "test_shop.py").as_uri()
        assert create.options == types.CreateFileOptions(overwrite=False, ignore_if_exists=False)
        assert write.edits[0].new_text == "from shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
        assert resolved.edit.change_annotations["deepseek-lsp"].needs_confirmation


async def test_tests_are_added_to_the_file_that_is_there(tmp_path: Path):
    (tmp_path / "test_shop.py").write_text("import pytest\n\n\ndef test_old():\n    pass\n")
    async with editor(*scripted(TESTS)) as running:
        resolved = await running.client.code_action_resolve_async(await with_project(running, tmp_path, able()))
        (change,) = resolved.edit.document_changes
        assert change.text_document.uri == (tmp_path / "test_shop.py").as_uri() and change.text_document.version is None
        assert [(edit.range.start.line, edit.range.end.line) for edit in change.edits] == [(1, 1), (5, 5)]


@pytest.mark.parametrize("is_open", [False, True])
async def test_tests_are_written_into_a_file_that_is_there_and_empty(tmp_path: Path, is_open: bool):
    (tmp_path / "test_shop.py").write_text("")
    async with editor(*scripted(TESTS)) as running:
        action = await with_project(running, tmp_path, able())
        if is_open:
            running.open("", uri=(tmp_path / "test_shop.py").as_uri())
        resolved = await running.client.code_action_resolve_async(action)
        (change,) = resolved.edit.document_changes
        (edit,) = change.edits
        assert edit.new_text == "from shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
        assert edit.range == types.Range(types.Position(0, 0), types.Position(0, 0))


async def test_tests_are_added_to_a_class_that_is_there(tmp_path: Path):
    source, tests = tmp_path / "src/main/java/Cart.java", tmp_path / "src/test/java/CartTest.java"
    for file, text in ((source, "class Cart {\n    int total() {\n        return 0;\n    }\n}\n"), (tests, "class CartTest {\n}\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    answer = "```java\nclass CartTest {\n    @Test\n    void zero() {\n        new Cart().total();\n    }\n}\n```"
    async with editor(*scripted(answer)) as running:
        await begin(running, able(), folder=tmp_path.as_uri())
        running.open(source.read_text(), uri=source.as_uri(), language="java")
        question = asked("tests", source.as_uri()) | {"range": {"start": {"line": 2, "character": 0}, "end": {"line": 2, "character": 0}}}
        await run(running, types.Command(title="", command="deepseek-lsp.run", arguments=[question]))
        (change,) = running.applied[0].document_changes
        (edit,) = change.edits
        assert change.text_document.uri == tests.as_uri() and edit.range == types.Range(types.Position(1, 0), types.Position(1, 0))
        assert edit.new_text == "    @Test\n    void zero() {\n        new Cart().total();\n    }\n"


async def test_a_client_that_cannot_create_files_is_told_so(tmp_path: Path):
    async with editor(*scripted(TESTS)) as running:
        command = await with_project(running, tmp_path, modest())
        with pytest.raises(JsonRpcException, match=r"create test_shop.py by hand"):
            await run(running, command)


async def test_tests_that_cannot_work_twice_are_not_written(tmp_path: Path):
    async with editor(*scripted(WRONG)) as running:
        client = able(stream=True)
        with pytest.raises(JsonRpcException, match="shop has no subtract"):
            await running.client.code_action_resolve_async(await with_project(running, tmp_path, client))
        assert [part["message"] for part in running.stream if part.get("restart")] == ["shop has no subtract to import."]
