"""workspace/configuration: asked for at the start and whenever the client says that it changed."""

from collections.abc import Mapping

from lsprotocol import types

from lsp_server.connection import Connection
from lsp_server.settings import SECTION


def register(server: Connection) -> None:
    @server.feature(types.WORKSPACE_DID_CHANGE_CONFIGURATION)
    async def changed(params: types.DidChangeConfigurationParams) -> None:
        sent = params.settings
        pushed = sent.get(SECTION) if isinstance(sent, Mapping) else None
        await server.read_configuration(pushed)
