"""The command an editor runs when a user accepts a suggestion. Counted for the status request; nothing leaves the machine."""

from lsp_server.connection import ACCEPTED, Connection


def register(server: Connection) -> None:
    @server.command(ACCEPTED)
    async def accepted(chars: int) -> None:
        server.accepted += 1
