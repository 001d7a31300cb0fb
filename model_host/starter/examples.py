"""Turns documents and pairs into training sequences: plain text, fill-in-the-middle in PSM order, chat turns, packed end to end.

Owns: what share each kind has and where holes fall. Every segment is tokenised by itself, as at inference, so that no token
spans a border. Holes are random character spans of a document's window (FIM rate 0.5, before packing; arXiv 2406.11931,
section 3.1), never shaped like the anchored prompts of the server.
"""

import random
from collections.abc import Iterator
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


def windows(text: str, max_chars: int, chance: random.Random) -> Iterator[str]:
    """Cuts a text into windows of at most `max_chars` that begin at line starts; the first one's length is random."""
    start, limit = 0, max_chars if len(text) <= max_chars else chance.randint(max_chars // 4, max_chars)
    while start < len(text):
        stop = start + limit
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
            stop = stop if stop > start else start + limit
        yield text[start:stop]
        start, limit = stop, max_chars


def hole(text: str, chance: random.Random) -> tuple[int, int]:
    """A random span: its start anywhere, its length log-uniform up to half the text, half of them run to a line's end."""
    length = int(np.exp(chance.uniform(0, np.log(max(len(text) // 2, 2)))))
    start = chance.randint(0, max(len(text) - length, 0))
    stop = min(start + length, len(text))
    if chance.random() < 0.5:
        line_end = text.find("\n", stop)
        stop = len(text) if line_end < 0 else line_end
    return start, stop


class ExampleSource:
    """An endless, seeded stream of packed sequences over fixed documents and pairs."""

    def __init__(self, documents: list[Document], pairs: list[Pair], tokenizer: Tokenizer) -> None:
        self._documents, self._pairs, self._tokenizer = documents, pairs, tokenizer
        self._sentinels = Sentinels.of(tokenizer)
        tokenizer.encode_special_tokens = True

    def _encode(self, *texts: str) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _document(self, document: Document, max_chars: int, chance: random.Random) -> Iterator[list[int]]:
        s = self._sentinels
        for window in windows(document.text, max_chars, chance):
            head = f"# {document.path}\n" if chance.random() < PATH_RATE else ""
            if chance.random() < FIM_RATE:
                start, stop = hole(window, chance)
                prefix, suffix, middle = self._encode(head + window[:start], window[stop:], window[start:stop])
                yield [s.bos, s.begin, *prefix, s.hole, *suffix, s.end, *middle, s.eos]
            else:
                (plain,) = self._encode(head + window)
                yield [s.bos, *plain, s.eos]

    def _chat(self, pair: Pair) -> list[int]:
        ask, answer = self._encode(f"User: {pair.ask}\n\nAssistant:", f" {pair.answer}")
        return [self._sentinels.bos, *ask, *answer, self._sentinels.eos]

    def sequences(self, context: int, count: int, seed: int) -> NDArray[np.uint16]:
        """`count` packed sequences of `context` + 1 tokens, [count, context + 1], the same for the same seed."""
        chance = random.Random(seed)
        max_chars = int(context * CHARS_PER_TOKEN)
        needed, stream, chat_tokens = count * (context + 1), list[int](), 0
        while len(stream) < needed:
            if self._pairs and chat_tokens < CHAT_RATE * len(stream):
                ids = self._chat(chance.choice(self._pairs))
                stream += ids
                chat_tokens += len(ids)
            else:
                for ids in self._document(chance.choice(self._documents), max_chars, chance):
                    stream += ids
        return np.array(stream[:needed], dtype=np.uint16).reshape(count, context + 1)
