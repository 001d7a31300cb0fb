"""Words for the user to read: as a Markdown file that the editor shows, or as a message where it cannot.

Owns: a folder of temporary files that only the user can read, gone with the connection. Clients of our own show the stream instead.
"""

import re
import tempfile
from pathlib import Path

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server.activity import own_capabilities
from lsp_server.connection import Connection

MESSAGE_CHARS = 2000


async def show(server: Connection, title: str, words: str) -> None:
    """Shows `words`, which are Markdown, unless the client showed them as they came."""
    if own_capabilities(server).get("stream"):
        return
    window = server.client_capabilities.window
    if window and window.show_document and window.show_document.support:
        file = written(server, title, words)
        try:
            if (await server.window_show_document_async(types.ShowDocumentParams(uri=file.as_uri(), take_focus=False))).success:
                return
        except JsonRpcException as error:
            server.tell(f"The editor could not show {file.name}: {error.message}")
    shown = words if len(words) <= MESSAGE_CHARS else words[:MESSAGE_CHARS] + " …"
    server.window_show_message(types.ShowMessageParams(type=types.MessageType.Info, message=f"{title}\n\n{shown}"))


def written(server: Connection, title: str, words: str) -> Path:
    """A new file with the words, in the connection's own folder (mode 0700)."""
    if server.shown_files is None:
        server.shown_files = tempfile.TemporaryDirectory(prefix="deepseek-lsp-", ignore_cleanup_errors=True)
    folder = Path(server.shown_files.name)
    stem = re.sub(r"\W+", "-", title).strip("-") or "answer"
    file = folder / f"{stem}-{len(list(folder.iterdir())) + 1}.md"
    file.write_text(f"# {title}\n\n{words}\n", "utf-8")
    return file
