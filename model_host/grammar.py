"""Answers of a given form: which ids a grammar allows next. llguidance does the work.

Owns: the bridge between a tokenizer's ids and llguidance. Knows nothing of logits or requests.
"""

import llguidance
import torch
from torch import Tensor

from model_host.errors import RequestError
from model_host.generation import Grammar
from model_host.tokenizer import Tokenizer


class GrammarGuide:
    """One answer's way through its grammar. Raises RequestError when the grammar cannot be understood."""

    def __init__(self, vocabulary: llguidance.LLTokenizer, grammar: Grammar) -> None:
        matcher = llguidance.LLMatcher
        try:
            if grammar.kind == "json_schema":
                source = matcher.grammar_from_json_schema(grammar.source)
            elif grammar.kind == "regex":
                source = matcher.grammar_from_regex(grammar.source)
            else:
                source = matcher.grammar_from_lark(grammar.source)
            self._matcher = matcher(vocabulary, source)
        except ValueError as error:
            raise RequestError(f"The {grammar.kind} of the request cannot be understood: {error}") from error
        if self._matcher.is_error():
            raise RequestError(f"The {grammar.kind} of the request cannot be understood: {self._matcher.get_error()}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """The ids [A] that can come next; end of sequence is among them where the answer may end."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
        return bits.flatten().nonzero().flatten()

    def add(self, id: int) -> None:
        self._matcher.consume_token(id)


def vocabulary_of(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """The tokenizer as llguidance reads it; costs some 30 ms for 8,192 tokens and a second for 100,000, so keep it."""
    return llguidance.LLTokenizer(tokenizer.as_json(), n_vocab=tokenizer.size, eos_token=tokenizer.eos_id)
