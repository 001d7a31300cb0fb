"""Where a document's prompt is cut, so that what was computed of it for one keystroke holds for the next.

Owns: the anchor of each document. The prompt is prefix, suffix, and then what was typed between them since the anchor was set; while the
text before the anchor and the text right of the cursor stay the same, typing only extends the end of the prompt, over as many lines
as one likes. The anchor moves to the cursor's line when either changed, when much was typed, or at rest, once the new prompt has been
computed. Knows nothing of engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lsp_server.session import Snapshot
from model_host.generation import Fim
from prompts.comments import path_comment

CHARS_PER_TOKEN = 3
SUFFIX_SHARE = 0.25
STEPS = 4
"""A window's end moves by a quarter of its size at a time."""
MAX_TYPED_CHARS = 1500
"""So much may be typed before the anchor moves without waiting for rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The prompt is cut at the start of line `line`; its window begins at line `first`."""

    first: int
    line: int
    prefix: str
    suffix: str

    def hole(self, snapshot: Snapshot, shown_path: str, repository: str = "") -> Fim:
        """The prompt at the snapshot's cursor, where the anchor holds, behind what the model is told of other files."""
        typed = [*snapshot.lines[self.line : snapshot.line], snapshot.before]
        prefix = path_comment(shown_path, snapshot.language) + self.prefix
        return Fim(repository=repository, prefix=prefix, suffix=self.suffix, middle=with_newlines(typed))


class Anchors:
    """The anchors of a connection's documents. Used on the event loop."""

    def __init__(self) -> None:
        self._by_uri: dict[str, Anchor] = {}

    def at(self, snapshot: Snapshot, context_tokens: int) -> Anchor:
        """The document's anchor where it holds at the snapshot's cursor, else a new one at the start of the cursor's line."""
        kept = self._by_uri.get(snapshot.uri)
        suffix = suffix_at(snapshot, context_tokens)
        if kept and kept.suffix == suffix and kept.line <= snapshot.line:
            typed = sum(map(len, snapshot.lines[kept.line : snapshot.line]))
            if typed <= MAX_TYPED_CHARS and with_newlines(snapshot.lines[kept.first : kept.line]) == kept.prefix:
                return kept
        return self.moved(snapshot, context_tokens)

    def moved(self, snapshot: Snapshot, context_tokens: int) -> Anchor:
        """A new anchor at the start of the cursor's line. Its window begins where the last one's did, while that is near enough."""
        kept = self._by_uri.get(snapshot.uri)
        max_chars = int(context_tokens * CHARS_PER_TOKEN * (1 - SUFFIX_SHARE))
        first = None
        if kept and kept.first < snapshot.line and kept.prefix.startswith(with_newlines(snapshot.lines[kept.first : kept.first + 1])):
            size = sum(map(len, snapshot.lines[kept.first : snapshot.line]))
            first = kept.first if (max_chars // STEPS if kept.first else 0) <= size <= max_chars else None
        first = window_start(snapshot.lines, snapshot.line, max_chars) if first is None else first
        prefix = with_newlines(snapshot.lines[first : snapshot.line])
        return Anchor(first=first, line=snapshot.line, prefix=prefix, suffix=suffix_at(snapshot, context_tokens))

    def keep(self, uri: str, anchor: Anchor) -> None:
        self._by_uri[uri] = anchor

    def forget(self, uri: str) -> None:
        self._by_uri.pop(uri, None)


def suffix_at(snapshot: Snapshot, context_tokens: int) -> str:
    """The text right of the cursor, as far as it is shown."""
    last = window_end(snapshot.lines, snapshot.line, int(context_tokens * CHARS_PER_TOKEN * SUFFIX_SHARE))
    rest = snapshot.lines[snapshot.line][snapshot.column :]
    return with_newlines([rest, *snapshot.lines[snapshot.line + 1 : last]])


def window_start(lines: Sequence[str], line: int, max_chars: int) -> int:
    """The first line shown: 0 while all fits, then the top-level line behind the last whole step."""
    step = max(max_chars // STEPS, 1)
    excess = sum(map(len, lines[:line])) - max_chars
    if excess <= 0:
        return 0
    cut = -(-excess // step) * step
    offset = 0
    for index in range(line):
        if offset >= cut and not lines[index][:1].isspace():
            return index
        if offset >= cut + step:  # no top-level line far and wide
            return index
        offset += len(lines[index])
    return line


def window_end(lines: Sequence[str], line: int, max_chars: int) -> int:
    """The line behind the last one shown; what is hidden is whole steps counted from the file's end, which typing does not move."""
    step = max(max_chars // STEPS, 1)
    excess = sum(map(len, lines[line + 1 :])) - max_chars
    hidden = -(-excess // step) * step if excess > 0 else 0
    for index in range(len(lines), line + 1, -1):
        if hidden <= 0:
            return index
        hidden -= len(lines[index - 1])
    return line + 1


def with_newlines(lines: Sequence[str]) -> str:
    return "".join(lines).replace("\r\n", "\n").replace("\r", "\n")
