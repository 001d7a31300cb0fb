"""The command `deepseek-lsp.run`: does an action, makes its edit or shows its words, for clients and users who ask by command."""

from typing import Any

from lsp_server import answering, editing, showing
from lsp_server.actions.tasks import Asked
from lsp_server.activity import plain, refused, stop_with_request
from lsp_server.connection import RUN, Connection
from lsp_server.errors import Refusal


def register(server: Connection) -> None:
    @server.command(RUN)
    async def run(asked: Any) -> dict[str, Any]:
        stop_with_request(server)
        try:
            done = await answering.perform(server, Asked.read(plain(asked)))
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
