"""Chooses the next token from logits: greedy, or drawn within the limits a request sets, among allowed ids only.

Owns: the distribution. Knows nothing of text. A request's random numbers come from its own seed and are drawn one a token, so
that the same request gives the same answer whatever else the engine does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model_host.generation import Sampling


class Sampler:
    """The choices of one answer, in order."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._said = set(prompt) if sampling.repetition_penalty != 1 else set[int]()

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next id for float32 logits [vocab]; only one of `allowed` [A], where that is given."""
        s = self._sampling
        if s.repetition_penalty != 1:
            logits = self._penalised(logits)
        if allowed is not None:
            logits = logits[allowed]
        place = int(logits.argmax()) if s.temperature <= 0 else self._drawn(logits)
        chosen = place if allowed is None else int(allowed[place])
        if s.repetition_penalty != 1:
            self._said.add(chosen)
        return chosen

    def lead(self, logits: Tensor, allowed: Tensor | None = None) -> float:
        """By how much, in nats, the token that `choose` would take is ahead of the next one; infinite where chance decides."""
        s = self._sampling
        if s.temperature > 0:
            return math.inf
        if s.repetition_penalty != 1:
            logits = self._penalised(logits)
        if allowed is not None:
            logits = logits[allowed]
        if len(logits) < 2:
            return math.inf
        first, second = logits.topk(2).values.tolist()
        return float(first - second)

    def _penalised(self, logits: Tensor) -> Tensor:
        said = torch.tensor(sorted(self._said))
        values = logits[said]
        penalty = self._sampling.repetition_penalty
        return logits.index_copy(0, said, torch.where(values > 0, values / penalty, values * penalty))

    def _drawn(self, logits: Tensor) -> int:
        s = self._sampling
        values, ids = (logits / s.temperature).sort(descending=True, stable=True)  # [V]
        if s.top_k:
            values, ids = values[: s.top_k], ids[: s.top_k]
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier ones; the first is always kept
        kept = (before < s.top_p) & (probabilities >= s.min_p * probabilities[0])
        kept[0] = True
        probabilities = probabilities * kept
        at = torch.rand(1, generator=self._generator) * probabilities.sum()
        place = int(torch.searchsorted(probabilities.cumsum(-1), at, right=True).clamp(max=int(kept.nonzero()[-1])))
        return int(ids[place])


def logprobs(logits: Tensor, chosen: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `chosen` under float32 logits [vocab], and the likeliest ids with theirs."""
    every = logits.log_softmax(-1)
    values, ids = every.topk(min(alternatives, len(every)))
    return float(every[chosen]), list(zip(ids.tolist(), values.tolist(), strict=True))
