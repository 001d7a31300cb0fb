"""Runs steps on a model: plain integers in, logits out.

Owns: the latent pool and its size, and which form of the model runs here: compiled kernels on a CPU where they were built, torch
elsewhere. Knows nothing of requests.
"""

from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from model_host.batch import Copy, Step
from model_host.checkpoints import choose_device, choose_precision
from model_host.config import ModelConfig
from model_host.eager import EagerModel
from model_host.errors import CheckpointError
from model_host.generation import Progress
from model_host.latents import LatentPool
from model_host.native.library import why_unavailable
from model_host.native.model import NativeModel
from model_host.pages import pages_for

LEAST_TOKENS = 1024
"""What the latent pool holds at least, however small it was asked to be."""

Kernels = Literal["auto", "torch"]


class StepModel(Protocol):
    """A model that runs one step at a time."""

    config: ModelConfig
    device: torch.device
    precision: str
    """Of the weights, as settings name it."""
    weight_bytes: int
    latent_dtype: torch.dtype

    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Runs `step`, writes its tokens' latents, and returns float32 logits [wanted, vocab] on the CPU."""
        ...


class Runner:
    def __init__(self, model: StepModel, cache_bytes: int) -> None:
        self.model = model
        page_bytes = LatentPool.page_bytes(model.config, model.latent_dtype)
        self.pages = max(cache_bytes // page_bytes, pages_for(LEAST_TOKENS))
        self.cache_bytes = self.pages * page_bytes
        self._latents = LatentPool(model.config, self.pages, model.latent_dtype, model.device)

    def run(self, step: Step) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the CPU."""
        return self.model.forward(step, self._latents)

    def copy(self, copy: Copy) -> None:
        self._latents.copy(copy.source, copy.target, copy.tokens)


def load(folder: Path, *, device: str, dtype: str, threads: int, kernels: Kernels, progress: Progress) -> StepModel:
    """The model of the checkpoint in `folder`, in the fastest form that this machine has. Raises CheckpointError."""
    where = choose_device(device)
    precision = choose_precision(dtype, where, ModelConfig.read(folder).parameters)
    reason = without_native(where, precision, kernels)
    if reason is None:
        return NativeModel.load(folder, precision, progress, threads)
    if precision == "int8":
        raise CheckpointError(f"dtype int8 needs the compiled kernels for CPUs. {reason}")
    if threads:
        torch.set_num_threads(threads)
    return EagerModel.load(folder, where, getattr(torch, precision), progress)


def without_native(device: torch.device, precision: str, kernels: Kernels) -> str | None:
    """A sentence for the user when the compiled kernels are not what would run, or None when they are."""
    if device.type != "cpu":
        return f"The device is {device}."
    if kernels == "torch":
        return "The setting kernels is 'torch'."
    if precision == "float16":
        return "The compiled kernels have no float16: choose bfloat16."
    return why_unavailable()
