"""Runs steps on a model: plain integers in, logits out.

Owns: the latent pool and its size, and which form of the model runs here: compiled kernels on a CPU where they were built, captured
graphs on a GPU where Triton is, plain torch elsewhere. Knows nothing of requests.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from model_host.batch import Copy, Step
from model_host.checkpoints import choose_device, load_model
from model_host.config import ModelConfig
from model_host.eager import EagerModel
from model_host.errors import CheckpointError
from model_host.generation import Progress
from model_host.gpu.model import GpuModel
from model_host.latents import LatentPool
from model_host.native.library import why_unavailable
from model_host.native.model import NativeModel
from model_host.pages import pages_for

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
        self._latents = LatentPool(model.config, self.pages, model.latent_dtype, model.device)
        model.prepare(self._latents)

    def run(self, step: Step) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the CPU."""
        return self.model.forward(step, self._latents).cpu()

    def copy(self, copy: Copy) -> None:
        self._latents.copy(copy.source, copy.target, copy.tokens)


def load(folder: Path, *, device: str, dtype: str, threads: int, kernels: Kernels, progress: Progress) -> StepModel:
    """The model of the checkpoint in `folder`, in the fastest form that this machine has. Raises CheckpointError."""
    form = choose(ModelConfig.read(folder), device=device, dtype=dtype, kernels=kernels)
    if form.torch_because is None:
        return NativeModel.load(folder, form.precision, progress, threads)
    if form.precision == "int8":
        raise CheckpointError(f"dtype int8 needs the compiled kernels for CPUs. {form.torch_because}")
    if threads:
        torch.set_num_threads(threads)
    model = load_model(folder, device=form.device, dtype=getattr(torch, form.precision), progress=progress)
    return GpuModel(model) if form.device.type == "cuda" and find_spec("triton") else EagerModel(model)


@dataclass(frozen=True, slots=True)
class Form:
    """How a checkpoint runs here."""

    device: torch.device
    precision: str
    torch_because: str | None
    """Why torch runs it, a sentence for the user, or None when the compiled kernels do."""


def choose(config: ModelConfig, *, device: str, dtype: str, kernels: Kernels) -> Form:
    """For dtype "auto" bfloat16, as the family was trained; but float32 for a small model in torch on a CPU, where it is exact and
    no slower. Raises CheckpointError when there is no such device."""
    where = choose_device(device)
    reason: str | None
    if where.type != "cpu":
        reason = f"The device is {where}."
    elif kernels == "torch":
        reason = "The setting kernels is 'torch'."
    elif dtype == "float16":
        reason = "The compiled kernels have no float16: choose bfloat16."
    else:
        reason = why_unavailable()
    exact = reason is not None and where.type == "cpu" and config.parameters <= SMALL_PARAMETERS
    return Form(where, ("float32" if exact else "bfloat16") if dtype == "auto" else dtype, reason)
