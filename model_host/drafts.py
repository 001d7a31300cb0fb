"""Guesses what an answer will say next from text that is already there, and learns whether guessing pays. No tensors.

Owns: where drafts come from (prompt-lookup: the last tokens said, found earlier in the prompt or in what was said likely to come)
and when to try. Whether a draft is right, the engine finds out by running it beside the next token.
"""

from array import array
from collections.abc import Sequence

MATCHED_TOKENS = 3
"""So many tokens have to agree before what followed them is taken for a guess."""
TRIED_EVERY = 24
"""While guessing does not pay, one is made every so many steps, to notice when it does again."""


class Drafter:
    """The guesses for one answer."""

    def __init__(self, prompt: Sequence[int], likely: Sequence[int]) -> None:
        self._likely = tuple(likely)
        self._text = array("i", [*likely, *prompt])
        self._said = 0

    def add(self, id: int) -> None:
        """One more token of the answer."""
        self._text.append(id)
        self._said += 1

    def propose(self, tokens: int) -> list[int]:
        """At most `tokens` ids that may come next."""
        if self._said < len(self._likely) and tuple(self._text[len(self._text) - self._said :]) == self._likely[: self._said]:
            return list(self._likely[self._said : self._said + tokens])
        width = self._text.itemsize
        text = self._text.tobytes()
        last = text[-MATCHED_TOKENS * width :]
        found = text.rfind(last, 0, len(text) - width)
        while found % width and found > 0:
            found = text.rfind(last, 0, found + len(last) - 1)
        if found < 0 or len(self._text) <= MATCHED_TOKENS:
            return []
        start = found // width + MATCHED_TOKENS
        return list(self._text[start : start + tokens])


class Pay:
    """Whether guessing pays on this machine with this model, from steps with and without drafts."""

    def __init__(self) -> None:
        self._plain_s = self._drafted_s = 0.0
        """Seconds of a step with one token, and of one with drafts, both smoothed."""
        self._gained = 1.0
        """Tokens that a step with drafts brought beyond the one, smoothed; hopeful at first."""
        self._since_tried = 0

    def is_worth_it(self) -> bool:
        self._since_tried += 1
        unknown = not self._plain_s or not self._drafted_s
        pays = self._plain_s * (1 + self._gained) > self._drafted_s
        if self._plain_s and (unknown or pays or self._since_tried >= TRIED_EVERY):
            self._since_tried = 0
            return True
        return False

    def note_step(self, took_s: float, drafted: int) -> None:
        """A step of one sequence took so long, with so many drafts."""
        if drafted:
            self._drafted_s = smoothed(self._drafted_s, took_s)
        else:
            self._plain_s = smoothed(self._plain_s, took_s)

    def note_drafts(self, right: int) -> None:
        """So many drafts of a step were right."""
        self._gained = smoothed(self._gained, right)


def smoothed(old: float, new: float) -> float:
    return 0.8 * old + 0.2 * new if old else new
