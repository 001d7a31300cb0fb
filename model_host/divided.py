"""Models whose parts lie on several devices: experts in the CPU's memory, layers on several GPUs, or a portion of each in a process of its
own. Each satisfies model_host.runner.StepModel.

Owns: how parts work together, and that a rank's death leaves everything as it was before the step. Knows nothing of files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec

import torch
from torch import Tensor

from model_host.batch import Copy, Shift, Step
from model_host.config import ModelConfig
from model_host.eager import TRIED_CONTEXT, EagerModel
from model_host.experts import Spread
from model_host.gpu.model import GpuModel
from model_host.hot import HotExperts
from model_host.latents import LatentPool, LayeredPool, few
from model_host.models.deepseek_v2 import Model, Together
from model_host.orders import Begin, Fill
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.ranks import Ranks
from model_host.wire import ConnectionLost, Wire

PREPARED_PAGES = pages_for(TRIED_CONTEXT)
"""What making ready for steps may write over."""


def stepping(model: Model, spread: Spread | None = None, *, captures: bool = True) -> GpuModel | EagerModel:
    """Captured graphs for a model of which all lies on one GPU but experts of `spread` in the CPU's memory, where Triton is; else plain
    torch."""
    can = captures and model.device.type == "cuda" and find_spec("triton") and (spread is None or spread.in_kernels is not None)
    return GpuModel(model, spread=spread) if can else EagerModel(model)


class SpreadModel:
    """A model, some layers of one or a portion of each, whose experts lie on several devices or in fewer bits. Satisfies
    model_host.runner.StepModel."""

    def __init__(self, model: Model, spread: Spread, precision: str, hot: HotExperts | None = None, *, captures: bool = True) -> None:
        self._stepping = stepping(model, spread, captures=captures)
        self._spread, self.hot = spread, hot
        if hot is not None:
            spread.note = hot.note
        self.config, self.device, self.latent_dtype = model.config, self._stepping.device, self._stepping.latent_dtype
        self.precision = precision
        self.weight_bytes = self._stepping.weight_bytes + sum(held.weight_bytes for held in spread.here)

    def work_with(self, others: Together | None) -> None:
        """Those who have the other portions, from now on."""
        self._stepping.model.together = others
        if isinstance(self._stepping, GpuModel):
            self._stepping.forget()  # graphs in which there are sums with those before

    def pool(self, pages: int) -> LatentPool:
        return self._stepping.pool(pages)

    def prepare(self, latents: LatentPool) -> None:
        self._stepping.prepare(latents)

    def forward(self, step: Step, latents: LatentPool, x: Tensor | None = None) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the device; x, from any device, as in `Model.forward`."""
        out = self._stepping.forward(step, latents, None if x is None else x.to(self.device))
        if self.hot is not None:
            self.hot.end_step()
        return out


class RankedModel:
    """A model of which each rank has a portion, by rank 0, which has the others do what it does. Satisfies model_host.runner.StepModel.

    After a rank has died or failed, all others are started anew before the next step, and get the latents of rank 0.
    """

    def __init__(self, config: ModelConfig, own: SpreadModel, ranks: Ranks) -> None:
        """`own` is rank 0's portion; the ranks are running."""
        self.config, self.own, self._ranks = config, own, ranks
        self.device, self.precision, self.latent_dtype = own.device, own.precision, own.latent_dtype
        self.weight_bytes = own.weight_bytes + ranks.weight_bytes
        own.work_with(ranks.wire)

    def pool(self, pages: int) -> "RankedPool":
        return RankedPool(self.config, pages, self.latent_dtype, self.device, self._ranks)

    def prepare(self, latents: LatentPool) -> None:
        assert isinstance(latents, RankedPool)
        with self._together():
            self._ranks.tell(Begin(latents.pages))
            self.own.prepare(latents)

    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on rank 0's device, once they are there. Raises RankLost."""
        assert isinstance(latents, RankedPool)
        if not self._ranks.is_running:
            self._resume(latents)
        latents.note(step)
        with self._together() as wire:
            self._ranks.tell(step)
            out = self.own.forward(step, latents)
            wire.wait()
            return out

    def _resume(self, latents: "RankedPool") -> None:
        """Starts the other ranks anew, with what lies in the latents."""
        self._ranks.restart()
        self.own.work_with(self._ranks.wire)
        first = list(range(min(PREPARED_PAGES, latents.pages)))
        kept = latents.take_out(first)
        try:
            self.prepare(latents)
        finally:  # it may have broken off in the middle
            LatentPool.put_in(latents, first, *kept)
        with self._together():
            latents.give_all()

    @contextmanager
    def _together(self) -> Iterator[Wire]:
        """Around what all ranks do together. What breaks here leaves the others waiting, so they are ended."""
        wire = self._ranks.wire
        assert wire is not None
        try:
            with self._ranks.watched():
                yield wire
        except BaseException as error:
            self.own.work_with(None)
            if isinstance(error, ConnectionLost) or wire.is_lost:
                raise self._ranks.failed(error) from error
            self._ranks.close()
            raise

    def stop(self) -> None:
        """Ends the other ranks' processes, from any thread: a step that waits for them raises RankLost, and so do all after it."""
        self._ranks.stop()

    def close(self) -> None:
        """Ends the other ranks' processes."""
        self.own.work_with(None)
        self._ranks.close()

    def __del__(self) -> None:
        if getattr(self, "_ranks", None) is not None:
            self.close()


class RankedPool(LatentPool):
    """Rank 0's latents, of which every rank has a copy: what is done with them here, the others are told. Where one of them is gone, the
    next step finds that out."""

    def __init__(self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device, ranks: Ranks) -> None:
        super().__init__(config, pages, dtype, device)
        self.pages, self._ranks = pages, ranks
        self._written: set[int] = set()
        """Pages that may hold something."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        super().copy(source, target, tokens)
        self._written.add(target)
        self._tell(Copy(source, target, tokens))

    def shift(self, shift: Shift) -> None:
        super().shift(shift)
        self._written.update(shift.target[shift.target_start // PAGE_TOKENS :])
        self._tell(shift)

    def put_in(self, pages: list[int], c_kv: Tensor, k_pe: Tensor) -> None:
        super().put_in(pages, c_kv, k_pe)
        self._written.update(pages)
        if (wire := self._ranks.wire) is not None:
            try:
                with self._ranks.watched(), suppress(ConnectionLost):
                    self._give(pages)
            except BaseException:
                wire.lose()  # the others wait for what was not given
                raise

    def note(self, step: Step) -> None:
        """Of what is to be written by a step."""
        for span in step.spans:
            self._written.update(span.pages[(span.context - span.tokens) // PAGE_TOKENS :])

    def give_all(self) -> None:
        """Gives the others everything there is. Raises ConnectionLost."""
        self._give(sorted(self._written))

    def _tell(self, command: Copy | Shift) -> None:
        if self._ranks.is_running:
            with self._ranks.watched(), suppress(ConnectionLost):
                self._ranks.tell(command)

    def _give(self, pages: list[int]) -> None:
        for some, _ in few(pages):
            self._ranks.tell(Fill(tuple(some)))
            assert self._ranks.wire is not None
            for part in self.of_pages(some):
                self._ranks.wire.give(part)


class LayeredModel:
    """A model whose layers lie on several devices: each part passes on what its last layer gives. All of them are in this process,
    since only one of them works at a time. Satisfies model_host.runner.StepModel."""

    def __init__(self, config: ModelConfig, parts: Sequence[SpreadModel]) -> None:
        self.config, self.parts = config, tuple(parts)
        first, *_ = parts
        self.device, self.precision, self.latent_dtype = first.device, first.precision, first.latent_dtype
        self.weight_bytes = sum(part.weight_bytes for part in parts)

    def pool(self, pages: int) -> LayeredPool:
        """Each part's latents on its own device."""
        return LayeredPool([part.pool(pages) for part in self.parts])

    def prepare(self, latents: LatentPool) -> None:
        assert isinstance(latents, LayeredPool)
        for part, own in zip(self.parts, latents.parts, strict=True):
            part.prepare(own)

    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the last part's device."""
        assert isinstance(latents, LayeredPool)
        x: Tensor | None = None
        for part, own in zip(self.parts, latents.parts, strict=True):
            x = part.forward(step, own, x)
        assert x is not None
        return x
