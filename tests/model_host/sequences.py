"""Runs one sequence through the torch model, chunk by chunk, as the engine would."""

import torch
from torch import Tensor

from model_host.batch import Span, Step
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Model
from model_host.pages import pages_for

CPU = torch.device("cpu")


class Contiguous:
    """One sequence's latents in pages one after the other."""

    def __init__(self, model: Model, tokens: int, short_tokens: int = 32) -> None:
        self.model, self.short_tokens, self.length = model, short_tokens, 0
        self.pages = tuple(range(pages_for(tokens)))
        self.latents = LatentPool(model.config, len(self.pages), model.lm_head.weight.dtype, CPU)

    def run(self, ids: Tensor) -> Tensor:
        """Logits of every one of ids, the tokens after those that were run."""
        self.length += len(ids)
        span = Span(tokens=len(ids), context=self.length, pages=self.pages[: pages_for(self.length)])
        step = Step(ids=tuple(ids.tolist()), spans=(span,), wanted=tuple(range(len(ids))))
        with torch.inference_mode():
            return self.model(Layout.of(step, CPU, self.short_tokens), self.latents)


def logits_of(model: Model, ids: Tensor, *chunks: int, short_tokens: int = 32) -> Tensor:
    """Logits of every position, run in chunks of the given sizes."""
    sequence = Contiguous(model, len(ids), short_tokens)
    return torch.cat([sequence.run(part) for part in ids.split(list(chunks or (len(ids),)))])
