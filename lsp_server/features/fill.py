"""The command `deepseek-lsp.fill`: fills the cursor's place, or the holes marked in a selection, by fill-in-the-middle."""

import asyncio
from typing import Any

from pydantic import ValidationError

from lsp_server import answering, ask, editing, workspace
from lsp_server.actions import filling, guard, workspace_edit
from lsp_server.actions.filling import ToFill
from lsp_server.activity import Activity, plain, refused, stop_with_request
from lsp_server.connection import Connection
from lsp_server.errors import Refusal, Stale

FILL = "deepseek-lsp.fill"


def register(server: Connection) -> None:
    @server.command(FILL)
    async def fill(asked: Any) -> dict[str, Any]:
        stop_with_request(server)
        try:
            return {"filled": await done(server, understood(asked))}
        except Refusal as refusal:
            raise refused(refusal) from refusal


def understood(asked: Any) -> ToFill:
    try:
        return ToFill.model_validate(plain(asked))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise Refusal(f"The request to fill is not understood: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error


async def done(server: Connection, asked: ToFill) -> int:
    """Has the client make the edits, and says how many holes they fill. Raises Refusal."""
    engine, document = answering.first_engine(server), server.session.find(asked.uri)
    if document is None:
        raise Refusal("The document is not open: the editor has to send textDocument/didOpen first.")
    if reason := guard.refusal(asked.uri, server.folders(), is_open=True):
        raise Refusal(reason)
    snapshot = document.snapshot(answering.start_of(asked.range))
    if not server.settings.inline.ignored_files and (reason := await asyncio.to_thread(workspace.why_ignored, asked.uri)):
        raise Refusal(reason)
    server.stop_ahead()
    activity = Activity(server, "Filling in", "fill", asked.uri)
    path = server.shown_path(asked.uri)
    repository = server.memory.repository.block(ask.repository_tokens(engine, server.settings.inline))
    edits = await activity.run(lambda: filling.filled(engine, document, asked, path, server.settings, activity.heard, repository))
    if server.session.find(asked.uri) is not document or document.version != snapshot.version:
        raise Stale("The document changed while the model answered, so nothing is filled. Ask again.")
    edit = workspace_edit.edit_of(server.client_capabilities, snapshot, edits, "Fill in", confirm=False)
    await editing.make(server, "Fill in", edit)
    return len(edits)
