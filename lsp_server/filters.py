"""What becomes of the model's words before a user sees them: an ordered tuple of pure filters, and when to stop reading.

Owns: taste. A filter takes the hole and the text so far and gives the text to show; an empty one is not shown. Knows
nothing of models or of LSP.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

CLOSERS = ")]}>\"'`,;:"
QUOTES = "\"'`"
CLOSED_BY = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Where the completion goes. `before` and `after` are the rest of the cursor's line, `following` the lines below it."""

    before: str
    after: str
    following: tuple[str, ...]
    max_lines: int

    @property
    def is_within_line(self) -> bool:
        """Whether something other than closing punctuation stands behind the cursor."""
        return bool(self.after.strip(CLOSERS + " \t"))

    @property
    def indentation(self) -> int:
        return indentation_of(self.before)


Filter = Callable[[Hole, str], str]


def indentation_of(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def one_line(hole: Hole, text: str) -> str:
    """With code behind the cursor only the line's own gap is filled."""
    return text.split("\n", 1)[0] if hole.is_within_line or hole.after.strip() else text


def within_block(hole: Hole, text: str) -> str:
    """Ends where the block of the cursor's line ends: before the first line indented less, or at two blank lines."""
    first, *rest = text.split("\n")
    kept, blank = [first], 0
    for line in rest:
        blank = blank + 1 if not line.strip() else 0
        if blank >= 2 or (line.strip() and indentation_of(line) < hole.indentation):
            break
        kept.append(line)
    return "\n".join(kept)


def bounded(hole: Hole, text: str) -> str:
    return "\n".join(text.split("\n")[: hole.max_lines])


def no_repeat_below(hole: Hole, text: str) -> str:
    """Ends before a line that the document already has right below the cursor."""
    below = next((line.strip() for line in hole.following if line.strip()), None)
    if below is None:
        return text
    lines = text.split("\n")
    for index, line in enumerate(lines):
        whole = hole.before + line if index == 0 else line
        if whole.strip() == below and len(below) > 2:
            return "\n".join(lines[:index])
    return text


def no_trailing_blanks(hole: Hole, text: str) -> str:
    return text.rstrip() if not hole.is_within_line else text.rstrip("\r\n")


def something(hole: Hole, text: str) -> str:
    """Blanks are no suggestion, and neither is what stands behind the cursor already."""
    return "" if not text.strip() or text.strip() == hole.after.strip() else text


FILTERS: tuple[Filter, ...] = (one_line, within_block, bounded, no_repeat_below, no_trailing_blanks, something)


def shown(hole: Hole, text: str) -> str:
    for apply in FILTERS:
        text = apply(hole, text)
    return text


def brought(text: str, after: str) -> int:
    """How many of the characters behind the cursor the text brings along, so that they make room for it: all of them where it ends with
    them, else the brackets and quotes there that it closes. A bracket that the text opens itself is its own to close."""
    closing = list(itertools.takewhile(lambda letter: letter in QUOTES or letter in CLOSED_BY.values(), after))
    rest = after[len(closing) :]
    if not closing:
        return len(after) if after and text.endswith(after) else 0
    open_outside, open_within = closing[::-1], list[str]()
    at = 0
    while at < len(text) and open_outside:
        letter, closer = text[at], (open_within or open_outside)[-1]
        at += 1
        if not open_within and closer in QUOTES:  # the cursor is in a string
            if letter == closer:
                open_outside.pop()
            at += letter == "\\"
        elif letter in QUOTES:
            at = end_of_string(text, at, letter)
        elif letter in CLOSED_BY:
            open_within.append(CLOSED_BY[letter])
        elif letter == closer:
            (open_within or open_outside).pop()
    if not open_outside and text.endswith(rest):
        return len(after)
    return len(closing) - len(open_outside)


def end_of_string(text: str, at: int, quote: str) -> int:
    """Behind the string that begins at `at`; `at` itself where none ends on its line, as behind an apostrophe."""
    ends = re.compile(rf"(?:[^\\\n{quote}]|\\.)*{quote}").match(text, at)
    return ends.end() if ends else at


def is_complete(hole: Hole, text: str) -> bool:
    """Whether more words could not change what is shown: the block, the line or the limit is already passed."""
    if text.count("\n") > 0 and (hole.is_within_line or hole.after.strip()):
        return True
    whole_lines = text[: text.rfind("\n") + 1]
    if whole_lines.count("\n") >= hole.max_lines:
        return True
    return len(within_block(hole, whole_lines)) < len(whole_lines.rstrip("\n")) or whole_lines.endswith("\n\n\n")
