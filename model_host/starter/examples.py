"""Turns documents and pairs into training sequences: plain text, fill-in-the-middle in PSM order, chat turns, in packed rows.

Owns: what share each kind has and where holes fall. Every segment is tokenised by itself, as at inference, so that no token
spans a border. Holes are random character spans of a document's window (FIM rate 0.5, before packing; arXiv 2406.11931,
section 3.1), never shaped like the anchored prompts of the server. A hole's example is whole or not there: cut in two by a row's
end it would teach that suffixes do not matter (docs/log.md).
"""

import bisect
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model_host.starter.corpus import Document
from model_host.starter.pairs import Pair
from model_host.starter.vocabulary import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE

FIM_RATE = 0.5
CHAT_RATE = 0.05
PATH_RATE = 0.5
"""Share of documents that open with a comment naming their path, as the server's prompts do."""
CHARS_PER_TOKEN = 3.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinels:
    bos: int
    eos: int
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Sentinels":
        vocabulary = tokenizer.get_vocab()
        return cls(
            bos=vocabulary[BOS], eos=vocabulary[EOS], begin=vocabulary[FIM_BEGIN], hole=vocabulary[FIM_HOLE], end=vocabulary[FIM_END]
        )


MIN_WINDOW_CHARS = 300


def window(text: str, max_chars: int, chance: random.Random) -> str:
    """A piece of `text` of at most `max_chars` that begins at a line's start; the whole of it when it fits."""
    if len(text) <= max_chars:
        return text
    start = text.rfind("\n", 0, chance.randint(0, len(text) - max_chars)) + 1
    return text[start : start + max_chars]


def hole(text: str, chance: random.Random) -> tuple[int, int]:
    """A random span: its start anywhere, its length log-uniform up to half the text, half of them run to a line's end."""
    length = int(math.exp(chance.uniform(0, math.log(max(len(text) // 2, 2)))))
    start = chance.randint(0, max(len(text) - length, 0))
    stop = min(start + length, len(text))
    if chance.random() < 0.5:
        line_end = text.find("\n", stop)
        stop = len(text) if line_end < 0 else line_end
    return start, stop


class ExampleSource:
    """An endless, seeded stream of packed sequences over fixed documents and pairs."""

    def __init__(self, documents: list[Document], pairs: list[Pair], tokenizer: Tokenizer, fim_rate: float = FIM_RATE) -> None:
        self._documents, self._pairs, self._tokenizer, self._fim_rate = documents, pairs, tokenizer, fim_rate
        self._ends = list(itertools.accumulate(len(document.text) for document in documents))
        self._sentinels = Sentinels.of(tokenizer)
        tokenizer.encode_special_tokens = True

    def _encode(self, *texts: str) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _window(self, max_chars: int, chance: random.Random) -> tuple[str, str]:
        """A window of a document, long ones chosen more often, and the comment that names its path or nothing."""
        place = chance.randrange(self._ends[-1])
        document = self._documents[bisect.bisect_right(self._ends, place)]
        head = f"# {document.path}\n" if chance.random() < PATH_RATE else ""
        return head, window(document.text, max_chars, chance)

    def _plain(self, max_chars: int, chance: random.Random) -> list[int]:
        head, text = self._window(max_chars, chance)
        (ids,) = self._encode(head + text)
        return [self._sentinels.bos, *ids, self._sentinels.eos]

    def _fim(self, max_chars: int, chance: random.Random) -> list[int]:
        s = self._sentinels
        longest = max(max_chars, MIN_WINDOW_CHARS)
        head, text = self._window(int(math.exp(chance.uniform(math.log(MIN_WINDOW_CHARS), math.log(longest)))), chance)
        start, stop = hole(text, chance)
        prefix, suffix, middle = self._encode(head + text[:start], text[stop:], text[start:stop])
        return [s.bos, s.begin, *prefix, s.hole, *suffix, s.end, *middle, s.eos]

    def _chat(self, chance: random.Random) -> list[int]:
        pair = chance.choice(self._pairs)
        ask, answer = self._encode(f"User: {pair.ask}\n\nAssistant:", f" {pair.answer}")
        return [self._sentinels.bos, *ask, *answer, self._sentinels.eos]

    def _row(self, tokens: int, chance: random.Random) -> list[int]:
        """One row: whole examples while they fit, the start of a plain document to fill it up."""
        row: list[int] = []
        while (room := tokens - len(row)) > 0:
            max_chars = int(room * CHARS_PER_TOKEN)
            kind = chance.random()
            if self._pairs and kind < CHAT_RATE:
                example = self._chat(chance)
            elif kind < CHAT_RATE + (1 - CHAT_RATE) * self._fim_rate:
                example = self._fim(int(max_chars * 0.8), chance)
            else:
                example = self._plain(max_chars, chance)
            row += example if len(example) <= room else self._plain(max_chars, chance)[:room]
        return row

    def sequences(self, context: int, count: int, seed: int) -> NDArray[np.uint16]:
        """`count` rows of `context` + 1 tokens, [count, context + 1], the same for the same seed."""
        chance = random.Random(seed)
        return np.array([self._row(context + 1, chance) for _ in range(count)], dtype=np.uint16)
