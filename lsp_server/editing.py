"""Edits that the server asks the client to make, for clients and commands that cannot take them as an answer."""

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server.connection import Connection
from lsp_server.errors import Refusal


async def make(server: Connection, title: str, edit: types.WorkspaceEdit) -> None:
    """Has the client make the edit. Raises Refusal when it does not."""
    try:
        answer = await server.workspace_apply_edit_async(types.ApplyWorkspaceEditParams(edit=edit, label=title))
    except JsonRpcException as error:
        raise Refusal(f"The editor did not make the change: {error.message}") from error
    if not answer.applied:
        raise Refusal(f"The editor did not make the change: {answer.failure_reason or 'it gave no reason; ask again'}")
