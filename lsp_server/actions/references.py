"""What a question refers to, by URI: a file, lines of it, or what is reported there, as text for the prompt.

Owns: which files may be read for that: open documents, and files of the workspace that hold no secrets. Nothing is written.
"""

from lsprotocol import types
from pydantic import BaseModel, ConfigDict

from lsp_server import context, workspace
from lsp_server.actions.extraction import fence_language
from lsp_server.actions.surroundings import Part
from lsp_server.actions.tasks import Span
from lsp_server.anchors import with_newlines
from lsp_server.errors import Refusal
from lsp_server.languages import language_of
from lsp_server.session import Document, Session, split_lines


class Reference(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    uri: str
    range: Span | None = None
    """Whole lines of it; None: the whole file."""
    diagnostics: tuple[str, ...] = ()
    """What is reported there, in words."""


def part(session: Session, reference: Reference, shown_path: str, folders: list[str], order: int) -> Part:
    """The text of a reference. Raises Refusal."""
    document = session.find(reference.uri) or read(reference.uri, folders, session)
    if reason := context.refusal(document.snapshot(types.Position(0, 0)), document.chars, workspace.MAX_BYTES):
        raise Refusal(reason)
    lines, where = split_lines(document.text), shown_path
    if reference.range is not None and not reference.range.is_empty:
        first, last = reference.range.start.line, reference.range.end.line
        lines = lines[first : last + 1]
        where = f"{shown_path}, lines {first + 1} to {last + 1}"
    said = "".join(f"\n\n> {message[:1000]}" for message in reference.diagnostics)
    return Part(
        what=where,
        heading=f"{where}:{said}",
        language=fence_language(document.language),
        text=with_newlines(["".join(lines)]),
        importance=order,
        order=order,
    )


def read(uri: str, folders: list[str], session: Session) -> Document:
    """A file of the workspace that is not open. Raises Refusal."""
    path = workspace.path_of(uri)
    if path is None:
        raise Refusal(f"{uri.rsplit('/', 1)[-1]} is neither open nor in the workspace, so it is not read.")
    return Document(types.TextDocumentItem(uri, language_of(path), 0, workspace.read(path, folders)), session.encoding)
