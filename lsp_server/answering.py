"""An action from being asked for to what it gives: an edit that the client can make, or words to show.

Owns: the order of things, which is the same whether an editor resolves a code action or runs a command: find, prepare, ask, check,
translate. What an editor is shown meanwhile is `activity`'s matter.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from lsprotocol import types

from lsp_server.actions import act, workspace_edit, writing_tests
from lsp_server.actions.act import Asked, Span, Task
from lsp_server.actions.explained import Explanation
from lsp_server.actions.guard import path_of
from lsp_server.actions.writing_tests import Plan, Watched
from lsp_server.activity import Activity
from lsp_server.connection import Connection, LastAction
from lsp_server.errors import Refusal, Stale
from lsp_server.session import Document
from model_host.generation import Cost, Engine
from prompts.library import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What an action gave: an edit, or words; and what to tell the user beside it."""

    title: str
    edit: types.WorkspaceEdit | None = None
    words: str = ""
    notes: tuple[str, ...] = ()
    cost: Cost | None = None


def find(server: Connection, name: str) -> Action:
    action = next((action for action in server.actions if action.name == name), None)
    if action is None:
        raise Refusal(f"There is no action {name!r}: there are {', '.join(action.name for action in server.actions)}.")
    return action


@contextlib.asynccontextmanager
async def engine_for(server: Connection) -> AsyncIterator[Engine]:
    """The engine for actions and chat: the second one where the user names a checkpoint for it. Raises Refusal."""
    if not server.settings.actions.enabled:
        raise Refusal("Actions are switched off: actions.enabled is false.")
    if server.settings.chat_model in ("", server.settings.model):
        yield first_engine(server)
        return
    second = server.second
    if second.host.engine is not None:
        async with second.engine(server.settings, lambda what, share: None) as engine:
            yield engine
        return
    loading = Activity(server, f"Loading {server.settings.chat_model}", "load", "")
    async with contextlib.AsyncExitStack() as stack:
        yield await loading.run(lambda: stack.enter_async_context(second.engine(server.settings, loading.inform)))


def first_engine(server: Connection) -> Engine:
    """The engine that completes. Raises Refusal while there is none."""
    if server.host.engine is None:
        raise Refusal(server.host.message)
    return server.host.engine


def folders(server: Connection) -> list[str]:
    return [folder.uri for folder in server.workspace.folders.values()]


def start_of(span: Span) -> types.Position:
    return types.Position(span.start.line, span.start.character)


async def perform(server: Connection, asked: Asked, stream: str | None = None) -> Done:
    """Does what was asked for, with progress, or told to the client's `stream`. Raises Refusal."""
    action = find(server, asked.action)
    try:
        document = server.session.find(asked.uri)
        limit = server.settings.inline.max_document_chars
        task = act.prepare(action, asked, document, server.shown_path(asked.uri), folders(server), limit)
        server.stop_ahead()
        async with engine_for(server) as engine:
            activity = Activity(server, task.title, action.name, asked.uri, stream)
            found = await activity.run(lambda: done(server, engine, task, activity))
    except Refusal as refusal:
        server.last_action = LastAction(title=action.title(""), reason=str(refusal))
        raise
    server.last_action = LastAction(title=found.title, cost=found.cost)
    return found


async def done(server: Connection, engine: Engine, task: Task, activity: Activity) -> Done:
    head, settings = task.action.head, server.settings.actions
    if head.answer == "new_file":
        return await tests_written(server, engine, task, activity)
    chat, context = act.prompt(task, engine, settings, [], {})
    document = server.session.find(task.asked.uri)
    bound = None if head.answer == "show" else document
    words = await act.answer(engine, chat, head.max_new_tokens, settings, activity.heard, bound)
    notes = act.notes_of(engine, words, context.dropped)
    if head.answer == "show":
        text, region = act.shown(task, words), task.region
        server.explained.keep(Explanation(task.asked.uri, region.lines[region.first : region.last + 1], text))
        return Done(title=task.title, words=text, notes=notes, cost=words.cost)
    changes = await asyncio.to_thread(act.changes, task, words)  # a long file takes long to parse
    if document is None or server.session.find(task.asked.uri) is not document or document.version != task.snapshot.version:
        raise Stale("The document changed or was closed while the model answered, so nothing is changed. Ask again.")
    edits = workspace_edit.text_edits(task.snapshot, changes)
    edit = workspace_edit.edit_of(server.client_capabilities, task.snapshot, edits, task.title, confirm=head.confirm)
    return Done(title=task.title, edit=edit, notes=notes, cost=words.cost)


async def tests_written(server: Connection, engine: Engine, task: Task, activity: Activity) -> Done:
    """Tests for a symbol as an edit of the file they belong in; one that does not work is mended once."""
    settings = server.settings.actions
    plan = await asyncio.to_thread(writing_tests.plan, task, folders(server))
    target = next((document for document in map(server.session.find, server.session.uris) if document and is_file(document, plan)), None)
    if target is not None:
        plan = replace(plan, existing=target.text)
    watched = Watched(heard=activity.heard, start_over=activity.start_over)
    code, notes = await writing_tests.write(engine, task, plan, settings, server.settings.tests_python, watched)
    edit = tests_edit(server, task, plan, target, code)
    return Done(title=task.title, edit=edit, notes=notes)


def is_file(document: Document, plan: Plan) -> bool:
    return path_of(document.uri) == plan.suite.file


def tests_edit(server: Connection, task: Task, plan: Plan, target: Document | None, code: str) -> types.WorkspaceEdit:
    """A new file, or an addition to the one that is there, open or not. Raises Refusal when it changed meanwhile."""
    uri = target.uri if target else plan.suite.file.as_uri()
    if target is None and not plan.existing:
        if plan.suite.file.exists():
            raise Stale(f"{plan.suite.file.name} appeared while the model answered, so nothing is written. Ask again.")
        return workspace_edit.new_file(server.client_capabilities, uri, code.rstrip("\n") + "\n", task.title)
    if target is not None and target.text != plan.existing:
        raise Stale(f"{plan.suite.file.name} changed while the model answered, so nothing is added. Ask again.")
    item = types.TextDocumentItem(uri, task.snapshot.language, 0, plan.existing)
    document = target or Document(item, server.session.encoding)
    snapshot = document.snapshot(types.Position(0, 0))
    if target is None:
        snapshot = replace(snapshot, version=None)
    added = writing_tests.addition(plan, task.snapshot.language, code)
    edits = workspace_edit.text_edits(snapshot, writing_tests.changes(snapshot.lines, snapshot.newline, added))
    return workspace_edit.edit_of(server.client_capabilities, snapshot, edits, task.title, confirm=True)
