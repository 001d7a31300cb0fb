"""Suggestions that need no model: what was suggested is remembered, and served again while the user types it or comes back to it.

Owns: when a suggestion still holds. It does where the lines above, the line's beginning and the lines below are those it was made for, what
stands between is its own beginning, and the text right of the cursor is the same but for brackets and quotes that the editor closed.
Knows nothing of models or of LSP's messages.
"""

from collections import deque
from dataclasses import dataclass
from typing import Self

from lsp_server.session import Snapshot

NEAR_LINES = 20
"""So many lines on either side have to be the same; what is farther away may change without making a suggestion wrong."""
MOST = 64
AUTO_CLOSED = ")]}\"'`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A cursor and what stands around it, without line endings."""

    uri: str
    above: tuple[str, ...]
    before: str
    after: str
    below: tuple[str, ...]

    @classmethod
    def of(cls, snapshot: Snapshot, lines_up: int = 0) -> Self:
        """The cursor's place; or, `lines_up` lines above it, what one would find there had the lines between not been written."""
        line = snapshot.line - lines_up
        lines = snapshot.lines
        return cls(
            uri=snapshot.uri,
            above=_bare(lines[max(line - NEAR_LINES, 0) : line]),
            before=snapshot.before if not lines_up else lines[line].rstrip("\r\n"),
            after=snapshot.after,
            below=_bare(lines[snapshot.line + 1 : snapshot.line + 1 + NEAR_LINES]),
        )


def _bare(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(line.rstrip("\r\n") for line in lines)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """`text` was suggested at `place`."""

    place: Place
    text: str

    def rest(self, snapshot: Snapshot) -> str:
        """What of the text is still to be written at the snapshot's cursor; nothing when the suggestion does not hold there."""
        for lines_up in range(min(self.text.count("\n"), snapshot.line) + 1):
            here = Place.of(snapshot, lines_up)
            if not (here.uri == self.place.uri and here.above == self.place.above and here.below == self.place.below):
                continue
            written = "\n".join([here.before, *_bare(snapshot.lines[snapshot.line - lines_up + 1 : snapshot.line]), snapshot.before])
            if not lines_up:
                written = snapshot.before
            whole = self.place.before + self.text
            if len(written) >= len(self.place.before) and whole.startswith(written) and self._is_same_behind(here.after):
                return whole[len(written) :]
        return ""

    def _is_same_behind(self, after: str) -> bool:
        added = after.removesuffix(self.place.after)
        return after.endswith(self.place.after) and not added.strip(AUTO_CLOSED)


class Remembered:
    """The last suggestions of a connection. Used on the event loop."""

    def __init__(self) -> None:
        self._suggestions: deque[Suggestion] = deque(maxlen=MOST)

    def keep(self, snapshot: Snapshot, text: str) -> None:
        """`text`, with \\n for line endings, was suggested at the snapshot's cursor."""
        self._suggestions.append(Suggestion(Place.of(snapshot), text))

    def rest(self, snapshot: Snapshot) -> str:
        """What the newest suggestion that holds at the cursor has still to say; nothing when there is none."""
        return next((rest for suggestion in reversed(self._suggestions) if (rest := suggestion.rest(snapshot))), "")

    def forget(self) -> None:
        """What was suggested under other settings or by another model counts no more."""
        self._suggestions.clear()
