"""The same suggestion for editors and users of menus: textDocument/completion, one item beside those of other servers."""

import re

from lsprotocol import types

from lsp_server import ask
from lsp_server.connection import ACCEPTED, Connection
from lsp_server.session import units
from model_host.generation import Priority

WORD = re.compile(r"(?:\w[\w-]*)?\Z")
"""With hyphens, since blink.cmp takes them for a part of a word in every language."""
LABEL_CHARS = 60


def register(server: Connection) -> None:
    @server.feature(types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=[".", "(", " "]))
    async def completion(params: types.CompletionParams) -> types.CompletionList | None:
        uri = params.text_document.uri
        document = server.session.find(uri)
        path, settings = server.shown_path(uri), server.settings.inline
        work = ask.complete(server.host, document, params.position, path, settings, server.memory, Priority.MENU)
        answer = await server.take_turn(f"menu {uri}", work)
        if answer is None:
            return None
        server.explain(answer)
        if settings.ahead and not server.is_ahead:  # ghost text's thoughts go on beside a menu
            server.run_ahead(ask.rest(server.host, answer, path, settings, server.memory))
        if not answer.text or document is None or answer.range is None:
            return types.CompletionList(is_incomplete=True, items=[])
        # clients match and replace from the start of the word, so the item brings the typed part of it along
        word = (WORD.search(answer.before) or [""])[0]
        here = answer.range.start
        start = types.Position(here.line, here.character - units(word, server.session.encoding))
        whole = word + answer.text
        first_line = whole.strip().splitlines()[0]
        item = types.CompletionItem(
            label=first_line if len(first_line) <= LABEL_CHARS else first_line[: LABEL_CHARS - 1] + "…",
            kind=types.CompletionItemKind.Text,
            detail="deepseek-lsp",
            documentation=types.MarkupContent(types.MarkupKind.Markdown, f"```{document.language}\n{whole}\n```"),
            filter_text=word or first_line,
            sort_text="0",
            insert_text_format=types.InsertTextFormat.PlainText,
            text_edit=types.TextEdit(range=types.Range(start, answer.range.end), new_text=whole),
            command=types.Command(title="Report that a suggestion was accepted", command=ACCEPTED, arguments=[len(answer.text)]),
        )
        return types.CompletionList(is_incomplete=True, items=[item])
