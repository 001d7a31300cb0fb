"""What the model is told of a workspace's other files: their outlines, one block of text in front of every completion prompt.

Owns: which files are in the block, and when it changes. It is the same for every file of the workspace, so that its latents are one trunk
which all of them share; and it only grows at its end, while the user rests, until it is too long and is made anew from the files used last.
Typing never changes it. In it are the files that open documents import and the documents that were left for another; of the document being
completed the model sees the text itself. Files of the workspace only, of those none that hold secrets or are ignored; no folder is
searched. Knows nothing of engines.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path

from lsprotocol import types

from lsp_server import neighbours, workspace
from lsp_server.anchors import CHARS_PER_TOKEN
from lsp_server.context import is_secret
from lsp_server.errors import Refusal
from lsp_server.languages import language_of
from lsp_server.session import Session, split_lines
from lsp_server.symbols import outline
from prompts.comments import path_comment

MAX_BYTES = 200_000
"""Larger files, and documents of more characters, have no outline here."""
MAX_FILES = 64
"""So many files are looked at, and so many documents."""
FULL_SHARE = 0.75
"""Made anew, the block has so much of its length; the rest is for what changes until the next time."""
FILE_SHARE = 0.125
"""No file takes more of it."""
UNREADABLE = (OSError, ValueError, Refusal)
"""A name that no file can have, a file that may not be read, a .gitignore that makes no sense: what that would hide is not known."""
NEAR_DOCUMENTS = 5
"""So many of the documents used last have the same claim to it."""


@dataclass(frozen=True, slots=True)
class Open:
    """A document at one moment."""

    path: Path
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """A file of the workspace, as it is in the editor or on disk. Paths are real ones."""

    path: Path
    root: Path
    language: str
    lines: tuple[str, ...]

    @property
    def name(self) -> str:
        """As the model and the user see it."""
        return self.path.relative_to(self.root).as_posix()


@dataclass(frozen=True, slots=True)
class Piece:
    """The outline of a file, below a comment that names it."""

    file: Path
    name: str
    text: str


class Repository:
    """The block of one connection. Used on the event loop, but for the reading of files, which has a thread."""

    def __init__(self, session: Session | None = None, folders: Callable[[], list[str]] = list) -> None:
        self._session, self._folders = session or Session(), folders
        self._used: dict[str, None] = {}
        """URIs of documents that were completed, the last one last."""
        self.pieces: tuple[Piece, ...] = ()

    def block(self, max_tokens: int) -> str:
        """What goes in front of a prompt; nothing where no tokens are meant for it."""
        return text_of(self.pieces) if max_tokens else ""

    def use(self, uri: str) -> None:
        """A document is being completed."""
        self._used.pop(uri, None)
        self._used[uri] = None

    async def grown(self, max_tokens: int) -> tuple[Piece, ...]:
        """The block as it should be now that the user rests. Nothing changes before it is kept."""
        if not max_tokens:
            return ()
        self._used = {uri: None for uri in self._used if self._session.find(uri)}
        max_chars = max_tokens * CHARS_PER_TOKEN
        wanted = await asyncio.to_thread(gathered, list(self._documents()), self._folders(), max_chars)
        return grown(self.pieces, wanted, max_chars)

    def keep(self, pieces: tuple[Piece, ...]) -> None:
        self.pieces = pieces

    def _documents(self) -> Iterator[Open]:
        """The documents that were completed, the last one first."""
        for uri in list(self._used)[: -MAX_FILES - 1 : -1]:
            document, path = self._session.find(uri), workspace.path_of(uri)
            if document and path and document.chars <= MAX_BYTES:
                yield Open(path, document.language, document.snapshot(types.Position(0, 0)).lines)


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def grown(pieces: tuple[Piece, ...], wanted: Sequence[Piece], max_chars: int) -> tuple[Piece, ...]:
    """The block with what is new in `wanted` at its end; made anew from those alone once it is longer than `max_chars`. What is still true
    stays in front then."""
    newest = {piece.file: piece for piece in pieces}
    longer = (*pieces, *(piece for piece in wanted if newest.get(piece.file) != piece))
    if len(text_of(longer)) <= max_chars:
        return longer
    return tuple(sorted(wanted, key=lambda piece: pieces.index(piece) if piece in pieces else len(pieces)))


def gathered(documents: Sequence[Open], folders: list[str], max_chars: int) -> list[Piece]:
    """The pieces to have in a block of `max_chars`, the most wanted first, as many as have room. The first of `documents`, those used last,
    is being completed: there is room for its piece, but no need. Reads files: not for the event loop."""
    current, room = documents[0].path.resolve() if documents else None, int(max_chars * FULL_SHARE)
    met, found = set[Path](), list[Piece]()
    for file in wanted([file for document in documents if (file := own(document, folders))], folders):
        if file.path in met:
            continue
        if len(met) == MAX_FILES:
            break
        met.add(file.path)
        if piece := piece_of(file, int(max_chars * FILE_SHARE)):
            room -= len(piece.text)
            if room < 0:
                break
            if file.path != current:
                found.append(piece)
    return found


def wanted(opened: Sequence[File], folders: list[str]) -> Iterator[File]:
    """Documents, and the files they import. Those used last take turns, in an order that does not depend on which of them was the last one:
    who goes back and forth between them has one block."""
    known = {file.path: file for file in opened}
    near = sorted(opened[:NEAR_DOCUMENTS], key=lambda file: file.path)
    for turn in zip_longest(*(chain([file], imports(file, known, folders)) for file in near)):
        yield from (file for file in turn if file)
    for file in opened[NEAR_DOCUMENTS:]:
        yield file
        yield from imports(file, known, folders)


def piece_of(file: File, max_chars: int) -> Piece | None:
    """None for a file that has no outline."""
    text = path_comment(file.name, file.language)
    lines = outlined(file.lines, file.language)
    for line in lines:
        if len(text) + len(line) + 2 > max_chars:
            break
        text += line + "\n"
    return Piece(file.path, file.name, text + "\n") if lines else None


def own(document: Open, folders: list[str]) -> File | None:
    """A document that is one of the project's own files."""
    try:
        root, real = workspace.root_of(document.path, folders), document.path.resolve()
        if root is None or is_secret(document.path.name) or not workspace.is_own(real, root):
            return None
    except UNREADABLE:
        return None
    return File(real, root, document.language, document.lines)


def imports(file: File, opened: dict[Path, File], folders: list[str]) -> Iterator[File]:
    """The project's own files that a file imports."""
    for places in neighbours.imported("".join(file.lines), file.language, file.path, file.root):
        try:
            real = next((place.resolve() for place in places if place.is_file()), None)
            if real in opened:
                yield opened[real]
            elif real and (root := workspace.root_of(real, folders)) and workspace.is_own(real, root):
                yield File(real, root, language_of(real), lines_of(real, real.stat().st_mtime_ns, tuple(folders)))
        except UNREADABLE:
            continue


@lru_cache(MAX_FILES)
def lines_of(path: Path, written_ns: int, folders: tuple[str, ...]) -> tuple[str, ...]:
    """A file's lines, as it was written then. Raises Refusal."""
    text = workspace.read(path, folders, MAX_BYTES)
    if "\0" in text:
        raise Refusal(f"{path.name} is no text, so it is not read.")
    return tuple(split_lines(text))


@lru_cache(MAX_FILES)
def outlined(lines: tuple[str, ...], language: str) -> tuple[str, ...]:
    return tuple(outline(lines, language))
