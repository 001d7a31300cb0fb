"""The model in plain torch, on any device: the reference for every faster form, and what runs where there is none.

Owns: which form of attention pays for how many new tokens, by measurement.
"""

import time

import torch
from torch import Tensor

from model_host.batch import Span, Step
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Model
from model_host.pages import pages_for

TRIED_TOKENS = (8, 16, 32, 64, 128, 256)
TRIED_CONTEXT = 1024


class EagerModel:
    """Satisfies model_host.runner.StepModel."""

    def __init__(self, model: Model) -> None:
        self.model, self.config = model, model.config
        self.device, self.latent_dtype = model.device, model.dtype
        self.precision = str(model.dtype).removeprefix("torch.")
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.short_tokens = 1

    def pool(self, pages: int) -> LatentPool:
        return LatentPool(self.config, pages, self.latent_dtype, self.device)

    def prepare(self, latents: LatentPool) -> None:
        self.short_tokens = self._measured_short_tokens(latents)

    @torch.inference_mode()
    def forward(self, step: Step, latents: LatentPool, x: Tensor | None = None) -> Tensor:
        """Runs `step`, writes its tokens' latents, and returns float32 logits [wanted, vocab]; x as in `Model.forward`."""
        out: Tensor = self.model(Layout.of(step, self.device, self.short_tokens), latents, x)
        return out

    @torch.inference_mode()
    def _measured_short_tokens(self, latents: LatentPool) -> int:
        """The longest chunk for which attention over latents was the faster form on this machine, by one layer of a step."""
        block = next(self.model.blocks())
        pages = tuple(range(pages_for(TRIED_CONTEXT)))
        latents.c_kv[0, :TRIED_CONTEXT].normal_()
        latents.k_pe[0, :TRIED_CONTEXT].normal_()
        longest = 1
        for tokens in TRIED_TOKENS:
            step = Step(ids=(0,) * tokens, spans=(Span(tokens=tokens, context=TRIED_CONTEXT, pages=pages),), wanted=())
            took = {True: 0.0, False: 0.0}
            for is_short in (True, False, True, False):
                layout = Layout.of(step, self.device, tokens if is_short else 0)
                x = torch.zeros(tokens, self.config.hidden_size, dtype=self.latent_dtype, device=self.device)
                rotation = self.model.rotation(layout.positions)
                started = self._clock()
                block.self_attn(x, rotation, 0, latents, layout)
                took[is_short] = self._clock() - started  # the second of each counts, the first warms up
            if took[False] < took[True]:
                break
            longest = tokens
        return longest

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
