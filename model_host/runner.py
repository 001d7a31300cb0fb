"""Runs steps on the model: plain integers in, logits out.

Owns: the model and its latent pool, and which form of attention pays. Knows nothing of requests.
"""

import time

import torch
from torch import Tensor

from model_host.batch import Copy, Span, Step
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Model
from model_host.pages import pages_for

TRIED_TOKENS = (8, 16, 32, 64, 128, 256)
TRIED_CONTEXT = 1024


class Runner:
    """A model in plain torch, on any device."""

    def __init__(self, model: Model, cache_bytes: int) -> None:
        self.model = model
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        page_bytes = LatentPool.page_bytes(model.config, self.dtype)
        self.pages = max(cache_bytes // page_bytes, pages_for(TRIED_CONTEXT))
        self.cache_bytes = self.pages * page_bytes
        self._latents = LatentPool(model.config, self.pages, self.dtype, self.device)
        self.short_tokens = 0
        self.short_tokens = self._measured_short_tokens()

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the CPU."""
        logits: Tensor = self.model(Layout.of(step, self.device, self.short_tokens), self._latents)
        return logits.cpu()

    @torch.inference_mode()
    def copy(self, copy: Copy) -> None:
        self._latents.copy(copy.source, copy.target, copy.tokens)

    @torch.inference_mode()
    def _measured_short_tokens(self) -> int:
        """The longest chunk for which attention over latents was the faster form on this machine, by one layer of a step."""
        block = next(self.model.blocks())
        pages = tuple(range(pages_for(TRIED_CONTEXT)))
        self._latents.c_kv[0, :TRIED_CONTEXT].normal_()
        self._latents.k_pe[0, :TRIED_CONTEXT].normal_()
        longest = 1
        for tokens in TRIED_TOKENS:
            step = Step(ids=(0,) * tokens, spans=(Span(tokens=tokens, context=TRIED_CONTEXT, pages=pages),), wanted=())
            took = {True: 0.0, False: 0.0}
            for is_short in (True, False, True, False):
                layout = Layout.of(step, self.device, tokens if is_short else 0)
                x = self.model.embed_tokens(layout.ids)
                rotation = self.model.rotation(layout.positions)
                started = self._clock()
                block.self_attn(x, rotation, 0, self._latents, layout)
                took[is_short] = self._clock() - started  # the second of each counts, the first warms up
            if took[False] < took[True]:
                break
            longest = tokens
        return longest

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
