"""Runs steps of the model: ids in, logits out, over one sequence's latent cache.

Owns: the model, its device, and how a long prompt is cut into chunks. Knows nothing of requests.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_host.latents import LatentCache
from model_host.models.deepseek_v2 import Model

PREFILL_CHUNK_TOKENS = 512
"""A cancelled request is noticed between chunks. Larger ones gain nothing on a CPU, and little on a GPU for one sequence."""


class Runner:
    def __init__(self, model: Model) -> None:
        self.model = model
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype

    def new_cache(self) -> LatentCache:
        return LatentCache(self.model.config, self.dtype, self.device)

    @torch.inference_mode()
    def step(self, ids: Sequence[int], cache: LatentCache) -> Tensor:
        """Runs ids (the tokens after those cached) and returns float32 logits [vocab] of what follows."""
        logits: Tensor = self.model(torch.tensor(ids, device=self.device), cache)
        return logits[-1]

    def prefill(self, ids: Sequence[int], cache: LatentCache, is_cancelled: Callable[[], bool]) -> Tensor | None:
        """Runs a whole prompt's remaining ids, chunk by chunk; None when it was cancelled on the way (what was done is cached)."""
        logits = None
        for start in range(0, len(ids), PREFILL_CHUNK_TOKENS):
            if is_cancelled():
                return None
            logits = self.step(ids[start : start + PREFILL_CHUNK_TOKENS], cache)
        return logits
