"""Open, change, close: keeps the session's documents what the editor's are."""

from lsprotocol import types

from lsp_server.connection import Connection


def register(server: Connection) -> None:
    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    async def opened(params: types.DidOpenTextDocumentParams) -> None:
        server.session.open(params.text_document)

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    async def changed(params: types.DidChangeTextDocumentParams) -> None:
        if server.last is not server.found_written and server.last.is_taken_by(params.content_changes):
            server.written, server.found_written = server.written + 1, server.last
        server.session.change(params)

    @server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
    async def closed(params: types.DidCloseTextDocumentParams) -> None:
        server.session.close(params.text_document.uri)
        server.memory.anchors.forget(params.text_document.uri)
