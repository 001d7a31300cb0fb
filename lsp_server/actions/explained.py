"""Explanations that were asked for, kept for those who look again: each holds as long as its code stands in the document as it was.

Owns: the last few of a connection. Asks no model.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 32


@dataclass(frozen=True, slots=True)
class Explanation:
    uri: str
    code: tuple[str, ...]
    """The lines it is about, with their endings."""
    words: str

    def begins_at(self, lines: Sequence[str], line: int) -> bool:
        return tuple(lines[line : line + len(self.code)]) == self.code


class Explained:
    """Used on the event loop."""

    def __init__(self) -> None:
        self._found: deque[Explanation] = deque(maxlen=MOST)

    def keep(self, explanation: Explanation) -> None:
        self._found.append(explanation)

    def at(self, uri: str, lines: Sequence[str], line: int) -> str | None:
        """The newest explanation of the code whose first line this is."""
        return next((one.words for one in reversed(self._found) if one.uri == uri and one.begins_at(lines, line)), None)
