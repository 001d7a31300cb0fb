"""textDocument/hover: an explanation that was asked for before, over the first line of its code. Hovering never asks the model."""

from lsprotocol import types

from lsp_server.connection import Connection


def register(server: Connection) -> None:
    @server.feature(types.TEXT_DOCUMENT_HOVER)
    async def hover(params: types.HoverParams) -> types.Hover | None:
        document = server.session.find(params.text_document.uri)
        if document is None or not document.contains(params.position):
            return None
        words = server.explained.at(document.uri, document.snapshot(params.position).lines, params.position.line)
        return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, words)) if words else None
