"""What becomes of the model's words before a user sees them: an ordered tuple of pure filters, and when to stop reading.

Owns: taste. A filter takes the hole and the text so far and gives the text to show; an empty one is not shown. Knows
nothing of models or of LSP.
"""

from collections.abc import Callable
from dataclasses import dataclass

CLOSERS = ")]}>\"'`,;:"


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


def is_complete(hole: Hole, text: str) -> bool:
    """Whether more words could not change what is shown: the block, the line or the limit is already passed."""
    if text.count("\n") > 0 and (hole.is_within_line or hole.after.strip()):
        return True
    whole_lines = text[: text.rfind("\n") + 1]
    if whole_lines.count("\n") >= hole.max_lines:
        return True
    return len(within_block(hole, whole_lines)) < len(whole_lines.rstrip("\n")) or whole_lines.endswith("\n\n\n")
