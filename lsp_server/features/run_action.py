"""The command `deepseek-lsp.run`: does an action, makes its edit or shows its words, for clients and users who ask by command."""

from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server import answering, editing, showing
from lsp_server.actions import tasks
from lsp_server.actions.tasks import Asked
from lsp_server.activity import own_capabilities, plain, refused, stop_with_request
from lsp_server.connection import RUN, Connection
from lsp_server.errors import Refusal


def register(server: Connection) -> None:
    @server.command(RUN)
    async def run(asked: Any) -> dict[str, Any]:
        stop_with_request(server)
        try:
            done = await answering.perform(server, await instructed(server, Asked.read(plain(asked))))
            if done.edit is not None:
                await editing.make(server, done.title, done.edit)
        except Refusal as refusal:
            server.tell(str(refusal))
            raise refused(refusal) from refusal
        for note in done.notes:
            server.tell(f"{done.title}: {note}")
        if done.words:
            await showing.show(server, done.title, done.words)
        return {"title": done.title, "text": done.words, "notes": list(done.notes), "applied": done.edit is not None}


async def instructed(server: Connection, asked: Asked) -> Asked:
    """What is asked for, with an instruction that the user chooses where it needs one and the editor cannot ask for words."""
    action = answering.find(server, asked.action)
    document = server.session.find(asked.uri)
    lines = document.snapshot(answering.start_of(asked.range)).lines[asked.range.start.line : asked.range.end.line + 1] if document else ()
    if not action.head.offers or asked.instruction.strip() or own_capabilities(server).get("input") or tasks.marked(action, lines):
        return asked
    choices = [types.MessageActionItem(offer) for offer in action.head.offers]
    question = types.ShowMessageRequestParams(
        type=types.MessageType.Info, message=f"{action.title('')} {action.head.asks}", actions=choices
    )
    try:
        chosen = await server.window_show_message_request_async(question)
    except JsonRpcException:  # an editor without such questions; then the refusal says what to do instead
        return asked
    return asked.model_copy(update={"instruction": chosen.title}) if chosen else asked
