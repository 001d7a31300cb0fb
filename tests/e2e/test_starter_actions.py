"""Every action with the real starter model, over stdio: it is small and says little that is true, but each comes to an edit, words or a
reason."""

from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from lsprotocol import types
from pygls.exceptions import JsonRpcException

from prompts import library
from tests.e2e.test_starter_server import COMMAND
from tests.e2e.test_starter_server import SHOP as CLASS
from tests.editor import Editor, capabilities, editor, plain

SHOP = """import math


def area(radius):
    # TODO: refuse a negative radius
    return math.pi * radius ** 2


def mean(values):
    return sum(values) / len(values)
"""
ACTIONS = {action.name: action for action in library.load()[0]}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("project"))
    (folder / "shop.py").write_text(SHOP)
    async with editor(*COMMAND) as started:
        found = capabilities()
        found.window.show_document = types.ShowDocumentClientCapabilities(support=True)
        folders = [types.WorkspaceFolder(uri=folder.as_uri(), name="project")]
        params = types.InitializeParams(
            capabilities=found, workspace_folders=folders, initialization_options={"actions": {"deadline_s": 60}}
        )
        await started.client.initialize_session(params)
        assert (await started.until_ready())["state"] == "ready"
        started.folder, started.applied = folder, []

        @started.client.feature(types.WORKSPACE_APPLY_EDIT)
        def apply(params: types.ApplyWorkspaceEditParams) -> types.ApplyWorkspaceEditResult:
            started.applied.append(params.edit)
            return types.ApplyWorkspaceEditResult(applied=True)

        started.open(SHOP, uri=(folder / "shop.py").as_uri())
        yield started


def asked(running: Editor, name: str) -> dict[str, Any]:
    return {
        "action": name,
        "uri": (running.folder / "shop.py").as_uri(),
        "range": {"start": {"line": 3, "character": 0}, "end": {"line": 5, "character": 30}},
        "diagnostics": ["line 6: the radius may be negative"],
        "instruction": "refuse a negative radius",
    }


async def run(running: Editor, argument: dict[str, Any], command: str = "deepseek-lsp.run") -> Any:
    params = types.ExecuteCommandParams(command=command, arguments=[argument])
    return plain(await running.client.workspace_execute_command_async(params))


@pytest.mark.parametrize("name", sorted(ACTIONS))
async def test_each_action_comes_to_an_edit_to_words_or_to_a_reason(running: Editor, name: str):
    running.applied.clear()
    try:
        done = await run(running, asked(running, name))
    except JsonRpcException as error:
        assert error.code in (types.LSPErrorCodes.RequestFailed, types.LSPErrorCodes.ContentModified)
        assert error.message.endswith((".", "again.", "it.")) and "Error" not in error.message, error.message
        assert not running.applied
        return
    assert done["text"] if ACTIONS[name].head.answer == "show" else done["applied"] and len(running.applied) == 1


async def test_a_docstring_by_the_starter_is_put_below_its_header(running: Editor):
    running.applied.clear()
    place = {"line": 9, "character": 4}
    await run(running, asked(running, "docstring") | {"range": {"start": place, "end": place}})
    (change,) = running.applied[0].document_changes
    (edit,) = change.edits
    assert edit.range == types.Range(types.Position(9, 0), types.Position(9, 0)) and edit.new_text.startswith('    """')


async def test_an_action_in_a_warm_file_computes_at_most_a_fifth_of_a_cold_one(running: Editor):
    code = "".join(f"def f{number}(a, b):\n    return a * {number} + b - {number * 7}\n\n\n" for number in range(120))
    uri = (running.folder / "long.py").as_uri()
    running.open(code, uri=uri)
    computed = []  # what it takes in time is benchmarks.actions's to say
    for line in (4, 40, 44):
        place = {"line": line, "character": 0}
        question = {"action": "explain", "uri": uri, "range": {"start": place, "end": {"line": line + 2, "character": 0}}}
        await run(running, question)
        computed.append((await running.status())["action"]["cost"]["computed_tokens"])
    cold, *warm = computed
    assert max(warm) <= 0.2 * cold, computed


async def test_a_conversation_goes_on_from_latents_that_are_there(running: Editor):
    async def chat(**params: Any) -> Any:
        return plain(await running.client.protocol.send_request_async("deepseek/chat", params))

    first = await chat(text="What does this compute?", references=[{"uri": (running.folder / "shop.py").as_uri()}])
    cold = (await running.status())["action"]["cost"]
    await chat(text="And why?", conversation=first["conversation"])
    warm = (await running.status())["action"]["cost"]
    assert warm["cached_tokens"] >= cold["computed_tokens"] + cold["cached_tokens"] - 1


async def test_the_cursors_place_is_filled(running: Editor):
    running.applied.clear()
    uri = (running.folder / "fill.py").as_uri()
    running.open(CLASS, uri=uri)
    place = {"line": 6, "character": 8}
    await run(running, {"uri": uri, "range": {"start": place, "end": place}}, "deepseek-lsp.fill")
    (change,) = running.applied[0].document_changes
    assert "self." in change.edits[0].new_text
