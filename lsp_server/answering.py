"""An action from being asked for to what it gives: an edit that the client can make, or words to show.

Owns: the order of things, which is the same whether an editor resolves a code action or runs a command: find, prepare, ask, check,
translate. What an editor is shown meanwhile is `activity`'s matter.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from lsprotocol import types

from lsp_server.actions import joining_tests, prompting, reading, tasks, workspace_edit, writing_tests
from lsp_server.actions.explained import Explanation
from lsp_server.actions.regions import Change
from lsp_server.actions.suites import Plan
from lsp_server.actions.tasks import Asked, Span, Task
from lsp_server.actions.writing_tests import Watched
from lsp_server.activity import Activity
from lsp_server.connection import Connection, LastAction
from lsp_server.errors import Refusal, Stale
from lsp_server.session import Document
from lsp_server.workspace import path_of
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


def has_second(server: Connection) -> bool:
    """Whether the user names another checkpoint for actions and chat."""
    return server.settings.chat_model not in ("", server.settings.model)


@contextlib.asynccontextmanager
async def engine_for(server: Connection) -> AsyncIterator[tuple[Engine, tuple[str, ...]]]:
    """The engine for actions and chat, and notes about it: the second one where there is to be one, and the first where that cannot be
    loaded. Raises Refusal."""
    if not server.settings.actions.enabled:
        raise Refusal("Actions are switched off: actions.enabled is false.")
    async with contextlib.AsyncExitStack() as stack:
        engine = await second_engine(server, stack) if has_second(server) else None
        if engine is not None:
            yield engine, ()
        elif has_second(server):
            first = first_engine(server)
            yield first, (f"{server.settings.model} answers, since chat_model cannot be loaded. {server.second.host.message}",)
        else:
            yield first_engine(server), ()


async def second_engine(server: Connection, stack: contextlib.AsyncExitStack) -> Engine | None:
    """The second engine, held until `stack` ends, loaded with progress where it is not; None when that fails."""
    second, settings = server.second, server.settings
    if second.host.engine is not None:
        return await stack.enter_async_context(second.engine(settings, lambda what, share: None))
    if second.has_failed(settings):
        return None
    loading = Activity(server, f"Loading {settings.chat_model}", "load", "")
    try:
        return await loading.run(lambda: stack.enter_async_context(second.engine(settings, loading.inform)))
    except Refusal:
        if second.has_failed(settings):
            return None
        raise


def first_engine(server: Connection) -> Engine:
    """The engine that completes. Raises Refusal while there is none."""
    if server.host.engine is None:
        raise Refusal(server.host.message)
    return server.host.engine


def start_of(span: Span) -> types.Position:
    return types.Position(span.start.line, span.start.character)


async def perform(server: Connection, asked: Asked, stream: str | None = None) -> Done:
    """Does what was asked for, with progress, or told to the client's `stream`. Raises Refusal."""
    action = find(server, asked.action)
    try:
        document = server.session.find(asked.uri)
        limit = server.settings.inline.max_document_chars
        task = tasks.prepare(action, asked, document, server.shown_path(asked.uri), server.folders(), limit)
        server.stop_ahead()
        async with engine_for(server) as (engine, notes):
            activity = Activity(server, task.title, action.name, asked.uri, stream)
            found = await activity.run(lambda: done(server, engine, task, activity))
            found = replace(found, notes=(*notes, *found.notes))
    except Refusal as refusal:
        server.last_action = LastAction(title=action.title(""), reason=str(refusal))
        raise
    server.last_action = LastAction(title=found.title, cost=found.cost)
    return found


async def done(server: Connection, engine: Engine, task: Task, activity: Activity) -> Done:
    head, settings = task.action.head, server.settings.actions
    if head.answer == "new_file":
        return await tests_written(server, engine, task, activity)
    chat, context = prompting.prompt(task, engine, settings, [], {})
    document = server.session.find(task.asked.uri)
    bound = None if head.answer == "show" else document
    words = await reading.answer(engine, chat, head.max_new_tokens, settings, activity.heard, bound)
    notes = reading.notes_of(engine, words, context.dropped)
    if head.answer == "show":
        text, region = reading.shown(task, words), task.region
        server.explained.keep(Explanation(task.asked.uri, region.lines[region.first : region.last + 1], text))
        return Done(title=task.title, words=text, notes=notes, cost=words.cost)
    changes = await asyncio.to_thread(reading.changes, task, words)  # a long file takes long to parse
    if document is None or server.session.find(task.asked.uri) is not document or document.version != task.snapshot.version:
        raise Stale("The document changed or was closed while the model answered, so nothing is changed. Ask again.")
    edits = workspace_edit.text_edits(task.snapshot, changes)
    edit = workspace_edit.edit_of(server.client_capabilities, task.snapshot, edits, task.title, confirm=head.confirm)
    return Done(title=task.title, edit=edit, notes=notes, cost=words.cost)


async def tests_written(server: Connection, engine: Engine, task: Task, activity: Activity) -> Done:
    """Tests for a symbol as an edit of the file they belong in; one that does not work is mended once."""
    settings = server.settings.actions
    plan = await asyncio.to_thread(writing_tests.plan, task, server.folders())
    if (document := opened(server, plan)) is not None:
        plan = replace(plan, existing=document.text)
    watched = Watched(heard=activity.heard, start_over=activity.start_over)
    code, notes = await writing_tests.write(engine, task, plan, settings, server.settings.tests_python, watched)
    edit = await tests_edit(server, task, plan, code)
    return Done(title=task.title, edit=edit, notes=notes)


def opened(server: Connection, plan: Plan) -> Document | None:
    """The document of the file that the tests go into."""
    documents = map(server.session.find, server.session.uris)
    return next((document for document in documents if document and path_of(document.uri) == plan.suite.file), None)


async def tests_edit(server: Connection, task: Task, plan: Plan, code: str) -> types.WorkspaceEdit:
    """A new file, or an addition to the one that is there, open or not. Raises Refusal when it changed meanwhile."""
    file, text = plan.suite.file, code.rstrip("\n") + "\n"
    planned = Document(types.TextDocumentItem(file.as_uri(), task.snapshot.language, 0, plan.existing), server.session.encoding)
    start = types.Position(0, 0)
    before = planned.snapshot(start)
    if plan.existing.strip():
        changes = await asyncio.to_thread(joining_tests.changes, before.lines, before.newline, task.snapshot.language, code)
    else:
        changes = [Change(0, len(before.lines), text.replace("\n", before.newline))]
    on_disk = await asyncio.to_thread(writing_tests.text_of, file)
    document = opened(server, plan)
    if (document.text if document else on_disk or "") != plan.existing:
        raise Stale(f"{file.name} changed while the model answered, so nothing is added. Ask again.")
    if document is None and on_disk is None:
        return workspace_edit.new_file(server.client_capabilities, file.as_uri(), text, task.title)
    snapshot = document.snapshot(start) if document else replace(before, version=None)
    edits = workspace_edit.text_edits(snapshot, changes)
    return workspace_edit.edit_of(server.client_capabilities, snapshot, edits, task.title, confirm=True)
