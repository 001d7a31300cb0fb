"""What of the project goes before an action's prompt: the file around the code, headers of what it calls, tests that are there already.

Owns: the room, and who gives way first when it is short: the least important, which the user is told. The file comes first in the prompt
and does not depend on the selection while it fits, so that its latents serve every action on it. Knows nothing of models beyond an
estimate of tokens.
"""

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

FENCES = re.compile(r"^[ \t]*(`{3,})", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a prompt's context. `order` is its place in the text, `importance` how late it gives way (0 is the last to go)."""

    what: str
    """For the user: "the rest of shop.py"."""
    lacks: str = ""
    """What it leaves out by itself, for the user."""
    heading: str
    language: str
    text: str
    importance: int
    order: int = 0

    def words(self) -> str:
        fence = fence_for(self.text)
        return f"{self.heading}\n\n{fence}{self.language}\n{self.text.rstrip()}\n{fence}\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    words: str = ""
    dropped: tuple[str, ...] = ()
    """What was left out for lack of room."""


def fence_for(*texts: str) -> str:
    """Back quotes that no line of `texts` begins with so many of."""
    longest = max((len(marks) for text in texts for marks in FENCES.findall(text)), default=0)
    return "`" * max(3, longest + 1)


def about_tokens(text: str) -> int:
    """An estimate that is rather too large: the exact number is the engine's to know."""
    plain = sum(map(str.isascii, text)) if not text.isascii() else len(text)
    return int(plain / 2.5 + 1.5 * (len(text) - plain)) + 1


def fitted(parts: Sequence[Part], max_tokens: int) -> Context:
    """The parts that fit, the most important first; a part that does not fit is left out, and named."""
    kept: list[Part] = []
    dropped: list[str] = []
    room = max_tokens
    for part in sorted(parts, key=lambda part: part.importance):
        if not part.text.strip():
            continue
        cost = about_tokens(part.words())
        if cost <= room:
            kept.append(part)
            dropped += [part.lacks] if part.lacks else []
            room -= cost
        else:
            dropped.append(part.what)
    return Context(words="".join(part.words() for part in sorted(kept, key=lambda part: part.order)), dropped=tuple(dropped))


def around(lines: Sequence[str], first: int, last: int, max_tokens: int) -> tuple[str, bool]:
    """The whole file where it fits, else a window with the lines `first` to `last` in it; and whether it is whole. The window moves in
    steps of half its size, so that selections near each other share it."""
    whole = "".join(lines)
    tokens = about_tokens(whole)
    if tokens <= max_tokens:
        return whole, True
    size = max(int(len(whole) * max_tokens / tokens), 2)
    offsets = [0, *itertools.accumulate(map(len, lines))]
    low = max(offsets[first] // (size // 2) * (size // 2) - size // 4, 0)
    start, end = bisect.bisect_left(offsets, low), bisect.bisect_right(offsets, low + size) - 1
    return "".join(lines[min(start, first) : max(end, last + 1)]), False
