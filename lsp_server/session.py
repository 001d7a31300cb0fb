"""The open documents of one connection, and frozen snapshots of them to work on.

Owns: text, lines and positions as LSP defines them (a line ends with \\n, \\r\\n or \\r and nothing else; characters are counted
in the negotiated encoding). An edit costs the lines it touches. Lives on the event loop; only `Snapshot` leaves it.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote, urlsplit

from lsprotocol import types

LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+\Z")
Encoding = types.PositionEncodingKind
UNNUMBERED = -1
"""The version of a document whose client gives it none: then changes are counted here."""


def split_lines(text: str) -> list[str]:
    """Lines with their endings; the last has none, and may be empty."""
    lines = LINE.findall(text)
    if not lines or lines[-1].endswith(("\n", "\r")):
        lines.append("")
    return lines


def units(text: str, encoding: Encoding) -> int:
    """Length of `text` in the encoding's units."""
    if encoding is Encoding.Utf32 or text.isascii():
        return len(text)
    if encoding is Encoding.Utf8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text) + sum(character > "\uffff" for character in text)


def offset_in(line: str, character: int, encoding: Encoding) -> int:
    """Index into `line` of a position's character; behind the end counts as the end, within a character as its start."""
    body = line.rstrip("\r\n")
    if encoding is Encoding.Utf32 or body.isascii():
        return min(character, len(body))
    taken = 0
    for index, letter in enumerate(body):
        taken += units(letter, encoding)
        if taken > character:
            return index
    return len(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A document at one moment, with a cursor in it."""

    uri: str
    version: int | None
    language: str
    lines: tuple[str, ...]
    line: int
    column: int
    """Index into the line's text, not in client units."""
    encoding: Encoding

    @property
    def before(self) -> str:
        """The cursor's line up to the cursor."""
        return self.lines[self.line][: self.column]

    @property
    def after(self) -> str:
        """The cursor's line behind the cursor, without its ending."""
        return self.lines[self.line][self.column :].rstrip("\r\n")

    @property
    def newline(self) -> str:
        """The line ending the document uses: that of its first line."""
        first = self.lines[0]
        return first[len(first.rstrip("\r\n")) :] or "\n"

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.uri).path)

    def with_text(self, text: str, replaced: int) -> Self:
        """As it is once `text` stands at the cursor instead of `replaced` characters, and the cursor behind it."""
        line = self.lines[self.line]
        new = split_lines(line[: self.column] + text + line[self.column + replaced :])
        if self.line < len(self.lines) - 1 and new[-1] == "":
            new.pop()
        written = split_lines(line[: self.column] + text)
        return dataclasses.replace(
            self,
            lines=(*self.lines[: self.line], *new, *self.lines[self.line + 1 :]),
            line=self.line + len(written) - 1,
            column=len(written[-1]),
        )

    def range(self, start_column: int, end_column: int) -> types.Range:
        """A range on the cursor's line, in client units."""
        text = self.lines[self.line]
        start, end = (types.Position(self.line, units(text[:column], self.encoding)) for column in (start_column, end_column))
        return types.Range(start, end)


class Document:
    """One open document. Every method runs on the event loop."""

    def __init__(self, item: types.TextDocumentItem, encoding: Encoding) -> None:
        self.uri, self.version, self.language = item.uri, item.version, item.language_id
        self._encoding = encoding
        self._lines = split_lines(item.text)
        self.chars = len(item.text)

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def change(self, change: types.TextDocumentContentChangeEvent) -> None:
        if isinstance(change, types.TextDocumentContentChangeWholeDocument):
            self._lines, self.chars = split_lines(change.text), len(change.text)
            return
        (first, start), (last, end) = self._place(change.range.start), self._place(change.range.end)
        head, tail = self._lines[first][:start], self._lines[last][end:]
        # one more line on either side, since a \r and a \n that meet become one line ending
        low, high = max(first - 1, 0), min(last + 1, len(self._lines) - 1)
        old = self._lines[low : high + 1]
        new_text = "".join(self._lines[low:first]) + head + change.text + tail + "".join(self._lines[last + 1 : high + 1])
        new = split_lines(new_text)
        if high < len(self._lines) - 1 and new[-1] == "":
            new.pop()
        self.chars += len(new_text) - sum(map(len, old))
        self._lines[low : high + 1] = new

    def _place(self, position: types.Position) -> tuple[int, int]:
        """Line and index; a position behind the document counts as its end."""
        if position.line >= len(self._lines):
            return len(self._lines) - 1, len(self._lines[-1])
        return position.line, offset_in(self._lines[position.line], position.character, self._encoding)

    @property
    def line_count(self) -> int:
        return len(self._lines)

    def contains(self, position: types.Position) -> bool:
        return position.line < len(self._lines)

    def snapshot(self, position: types.Position) -> Snapshot:
        line, column = self._place(position)
        return Snapshot(
            uri=self.uri,
            version=self.version,
            language=self.language,
            lines=tuple(self._lines),
            line=line,
            column=column,
            encoding=self._encoding,
        )


class Session:
    """The documents of one connection, by URI."""

    def __init__(self) -> None:
        self.encoding = Encoding.Utf16
        self._documents: dict[str, Document] = {}

    def open(self, item: types.TextDocumentItem) -> None:
        self._documents[item.uri] = Document(item, self.encoding)

    def change(self, params: types.DidChangeTextDocumentParams) -> None:
        document = self._documents.get(params.text_document.uri)
        if document is not None:
            for change in params.content_changes:
                document.change(change)
            version = params.text_document.version
            document.version = document.version + 1 if version == UNNUMBERED else version

    def close(self, uri: str) -> None:
        self._documents.pop(uri, None)

    def find(self, uri: str) -> Document | None:
        return self._documents.get(uri)

    @property
    def uris(self) -> list[str]:
        return list(self._documents)
