"""Where an answer ends by its words: stop strings, found wherever the pieces of a growing text are cut.

Owns: holding back what may be the beginning of a stop string. Knows nothing of tokens.
"""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.has_come = False
        """Whether a stop string came; nothing follows then."""

    def add(self, piece: str) -> str:
        """The text that can be shown now, `piece` included as far as it cannot begin a stop string."""
        text = self._held + piece
        first = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.has_come, self._held = True, ""
            return text[:first]
        begun = max((beginning(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def end(self) -> str:
        """What was held back as the beginning of a stop string that did not come."""
        text, self._held = self._held, ""
        return text


def beginning(text: str, stop: str) -> int:
    """How many last characters of `text` are the first of `stop`."""
    return next(length for length in range(min(len(text), len(stop) - 1), -1, -1) if stop.startswith(text[len(text) - length :]))
