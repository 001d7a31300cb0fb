"""Runs steps on a model: plain integers in, logits out.

Owns: the latent pool and its size, and which form of the model runs here: compiled kernels on a CPU where they were built, captured
graphs on a GPU where Triton is, plain torch elsewhere. Knows nothing of requests.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from model_host import nf4
from model_host.batch import Copy, Shift, Step
from model_host.catalogue import Entry, Precision
from model_host.checkpoints import choose_device, load_model
from model_host.config import ModelConfig
from model_host.devices import Share
from model_host.divided import LayeredModel, RankedModel, stepping
from model_host.errors import CheckpointError, EngineError
from model_host.generation import Progress
from model_host.holders import load_spread
from model_host.latents import LatentPool
from model_host.machine import real_devices
from model_host.native.library import why_unavailable
from model_host.native.model import NativeModel
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.placement import RESERVED_BYTES, USUAL_CONTEXT_TOKENS, Demand, Impossible, in_words, plan
from model_host.quantized import FEWER_BITS
from model_host.tiers import Latents

LEAST_TOKENS = 1024
"""What the latent pool holds at least, however small it was asked to be."""

SMALL_PARAMETERS = 500_000_000

Kernels = Literal["auto", "torch"]


class StepModel(Protocol):
    """A model that runs one step at a time."""

    config: ModelConfig
    device: torch.device
    precision: str
    """Of the weights, as settings name it."""
    weight_bytes: int
    latent_dtype: torch.dtype

    def pool(self, pages: int) -> LatentPool:
        """Memory for the latents of so many pages, on whichever devices need them."""
        ...

    def prepare(self, latents: LatentPool) -> None:
        """Measures and compiles what depends on this machine, before the first step; spoils what is in the pool."""
        ...

    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Runs `step`, writes its tokens' latents, and returns float32 logits [wanted, vocab] on the device."""
        ...


class Runner:
    def __init__(self, model: StepModel, cache_bytes: int) -> None:
        self.model = model
        page_bytes = LatentPool.page_bytes(model.config, model.latent_dtype)
        self.pages = max(cache_bytes // page_bytes, pages_for(LEAST_TOKENS))
        self.cache_bytes = self.pages * page_bytes
        self._latents = model.pool(self.pages)
        model.prepare(self._latents)

    def run(self, step: Step) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the CPU. Raises EngineError when a device or a process of the model is lost."""
        self._check(step)
        try:
            return self.model.forward(step, self._latents).cpu()
        except torch.OutOfMemoryError:
            raise
        except torch.AcceleratorError as error:
            first, *_ = str(error).splitlines() or ["no reason given"]
            parts = self.model.parts if isinstance(self.model, LayeredModel) else (self.model,)
            raise EngineError(
                f"{' or '.join(str(part.device) for part in parts)} is lost to this process ({first}): restart deepseek-lsp;"
                " `deepseek-lsp doctor` says what is left."
            ) from error

    def stop(self) -> None:
        """From any thread: whatever a step may wait for is not waited for any more."""
        if isinstance(self.model, RankedModel):
            self.model.stop()

    def _check(self, step: Step) -> None:
        """Compiled code trusts these numbers: outside of their bounds it would read and write others' memory."""
        assert len(step.ids) == sum(span.tokens for span in step.spans), f"{len(step.ids)} ids for spans of other lengths"
        vocabulary = self.model.config.vocab_size
        assert all(0 <= id < vocabulary for id in step.ids), f"an id that is not one of {vocabulary} in {step.ids}"
        assert all(0 <= row < len(step.ids) for row in step.wanted), f"logits wanted of {step.wanted}, with {len(step.ids)} tokens"
        for span in step.spans:
            assert 0 < span.tokens <= span.context <= len(span.pages) * PAGE_TOKENS, f"{span} has too few pages or no tokens"
            assert min(span.pages) >= 0 and max(span.pages) < self.pages, f"{span} names a page that is not one of {self.pages}"

    def take_over(self, what: Copy | Shift) -> None:
        """Puts latents that are there already where a sequence needs them."""
        if isinstance(what, Shift):
            self._latents.shift(what)
        else:
            self._latents.copy(what.source, what.target, what.tokens)

    def take_out(self, pages: list[int]) -> Latents:
        """A copy of what lies in whole pages."""
        return Latents(*self._latents.take_out(pages))

    def fits(self, latents: Latents, tokens: int) -> bool:
        """Whether they are of this model, and of so many tokens."""
        layers, rope = self.model.config.num_hidden_layers, self.model.config.qk_rope_head_dim
        return (
            latents.c_kv.shape == (layers, tokens, self.model.config.kv_lora_rank)
            and latents.k_pe.shape == (layers, tokens, rope)
            and latents.c_kv.dtype == latents.k_pe.dtype == self.model.latent_dtype
        )

    def put_in(self, pages: list[int], latents: Latents) -> None:
        """Writes the last of these latents into whole pages."""
        first = latents.c_kv.shape[1] - len(pages) * PAGE_TOKENS
        self._latents.put_in(pages, latents.c_kv[:, first:], latents.k_pe[:, first:])


def load(folder: Path, *, device: str, dtype: str, threads: int, kernels: Kernels, progress: Progress) -> StepModel:
    """The model of the checkpoint in `folder`, in the fastest form that this machine has. Raises CheckpointError."""
    form = choose(ModelConfig.read(folder), device=device, dtype=dtype, kernels=kernels)
    if form.problem:
        raise CheckpointError(form.problem)
    if form.torch_because is None and not form.shares:
        return NativeModel.load(folder, form.precision, progress, threads)
    if threads:
        torch.set_num_threads(threads)
    if form.shares:
        compute = torch.bfloat16 if form.precision in FEWER_BITS else getattr(torch, form.precision)
        return load_spread(
            folder, form.shares, precision=form.precision, dtype=compute, threads=threads, kernels=kernels, progress=progress
        )  # fmt: skip
    return stepping(load_model(folder, device=form.device, dtype=getattr(torch, form.precision), progress=progress))


@dataclass(frozen=True, slots=True)
class Form:
    """How a checkpoint runs here."""

    device: torch.device
    precision: str
    torch_because: str | None
    """Why torch runs it, a sentence for the user, or None when the compiled kernels do."""
    shares: tuple[Share, ...] = ()
    """What lies on which device, where experts lie apart or in fewer bits; else all of it is on `device`."""
    spread_in_words: tuple[str, ...] = ()
    problem: str | None = None
    """Why it cannot be loaded, and what could be."""
    cache_bytes: int | None = None
    """What the plan leaves for context; None: there is no plan."""
    ram_bytes: int | None = None
    """What it leaves of the computer's memory, where some of the experts lie there."""


def choose(config: ModelConfig, *, device: str, dtype: str, kernels: Kernels) -> Form:
    """For dtype "auto" bfloat16, as the family was trained, or the most bits that fit; but float32 for a small model in torch on a CPU,
    where it is exact and no slower. Raises CheckpointError when there is no such device."""
    where = choose_device(device)
    if dtype == "nf4" and (missing := nf4.why_unavailable()):
        raise CheckpointError(missing)
    if config.parameters <= SMALL_PARAMETERS and dtype not in FEWER_BITS:
        return _alone(config, where, dtype, kernels)
    devices = [known for known in real_devices() if device == "auto" or torch.device(known.name) == _numbered(where)]
    if not devices:  # a kind of device whose memory nobody can tell
        return _alone(config, where, dtype, kernels)
    entry = Entry(name="This model", shape=config, context_tokens=config.max_position_embeddings)
    context = min(USUAL_CONTEXT_TOKENS, config.max_position_embeddings)
    demand = Demand(entry=entry, precision=None if dtype == "auto" else Precision(dtype), context_tokens=context)
    made = plan(demand, devices)
    if isinstance(made, Impossible):
        return replace(_alone(config, where, dtype, kernels), problem=_why_impossible(made, demand, device))
    helper = made.shares[-1]
    form = replace(
        _alone(config, torch.device(made.shares[0].device.name), made.precision.value, kernels),
        cache_bytes=made.cache_bytes,
        ram_bytes=None if helper.layers else helper.device.free_bytes - RESERVED_BYTES["cpu"] - helper.weight_bytes,
    )
    if len(made.shares) == 1 and (form.torch_because is None or form.precision not in FEWER_BITS):
        return form
    return replace(form, shares=made.shares, spread_in_words=tuple(in_words(made)))


def _why_impossible(made: Impossible, demand: Demand, device: str) -> str:
    """What is in the way, and what would be possible: with all of the machine, where the user allows only one device of it."""
    if device == "auto":
        return " ".join(in_words(made))
    first, *_ = in_words(made)
    everywhere = plan(demand, real_devices())
    if isinstance(everywhere, Impossible):
        return " ".join(in_words(everywhere))
    places = ", ".join(share.device.name for share in everywhere.shares)
    return f"{first} That is of {device!r} alone: with device set to 'auto' it fits as {everywhere.precision} on {places}."


def _numbered(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _alone(config: ModelConfig, where: torch.device, dtype: str, kernels: Kernels) -> Form:
    """All of the model on one device."""
    reason: str | None
    if where.type != "cpu":
        reason = f"The device is {where}."
    elif kernels == "torch":
        reason = "The setting kernels is 'torch'."
    elif dtype == "nf4":
        reason = "The compiled kernels have no nf4: choose int4."
    elif dtype == "float16":
        reason = "The compiled kernels have no float16: choose bfloat16."
    else:
        reason = why_unavailable()
    exact = reason is not None and where.type == "cpu" and config.parameters <= SMALL_PARAMETERS
    return Form(where, ("float32" if exact else "bfloat16") if dtype == "auto" else dtype, reason)
