"""Ghost text: textDocument/inlineCompletion."""

from lsprotocol import types

from lsp_server import ask
from lsp_server.activity import own_capabilities
from lsp_server.anchors import with_newlines
from lsp_server.connection import ACCEPTED, Connection


def register(server: Connection) -> None:
    @server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())
    async def inline_completion(params: types.InlineCompletionParams) -> types.InlineCompletionList | None:
        uri = params.text_document.uri
        path, settings = server.shown_path(uri), server.settings.inline
        work = ask.complete(
            server.host,
            server.session.find(uri),
            params.position,
            path,
            settings,
            server.memory,
            selected=params.context.selected_completion_info,
        )
        answer = await server.take_turn(f"inline {uri}", work)
        if answer is None:
            return None
        server.explain(answer)
        if settings.ahead:
            server.run_ahead(ask.think_ahead(server.host, answer, path, settings, server.memory))
        if not answer.text:
            return types.InlineCompletionList(items=[])  # Neovim takes null for no answer and goes on showing the last one
        command = types.Command(title="Report that a suggestion was accepted", command=ACCEPTED, arguments=[len(answer.text)])
        text = with_newlines([answer.text]) if own_capabilities(server).get("newlines") else answer.text
        item = types.InlineCompletionItem(insert_text=text, range=answer.range, command=command)
        return types.InlineCompletionList(items=[item])
