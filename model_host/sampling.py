"""Chooses the next token from logits: greedy, or temperature with top-k and top-p, within a set of allowed ids.

Owns: the distribution. Knows nothing of text. A request's random numbers come from its own seed, so that the same request
gives the same answer whatever else the engine does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model_host.generation import Sampling


class Sampler:
    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor, allowed: Sequence[int] | None = None) -> int:
        """The next id for float32 logits [vocab]; only ids of `allowed`, where it is given."""
        if allowed is not None:
            among = torch.tensor(allowed, device=logits.device)  # [A]
            return int(allowed[self._choose(logits[among])])
        return self._choose(logits)

    def _choose(self, logits: Tensor) -> int:
        s = self._sampling
        if s.temperature <= 0:
            return int(logits.argmax())
        values, ids = (logits.cpu() / s.temperature).sort(descending=True)  # [V]
        if s.top_k:
            values, ids = values[: s.top_k], ids[: s.top_k]
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier ones; the first is always kept
        probabilities = probabilities.masked_fill(before >= s.top_p, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])
