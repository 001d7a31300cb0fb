"""Reads a model's experts into whoever holds them: compiled kernels on a CPU, torch elsewhere; and a whole model of such parts.

Owns: which form holds experts on a device, and that every tensor goes from its file into one place, packed on the way.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model_host.batch import Step
from model_host.checkpoints import allocate, checked_shards, destinations_in, outline, tensors
from model_host.config import ModelConfig
from model_host.eager import EagerModel
from model_host.errors import EngineError
from model_host.experts import Held, Spread, SpreadLayer, TorchExperts, sinks
from model_host.generation import Progress
from model_host.gpu.model import GpuModel
from model_host.hot import HotExperts, ReadExpert
from model_host.latents import LatentPool
from model_host.models.deepseek_v2 import Model, MoE
from model_host.native.library import why_unavailable
from model_host.native.model import NativeExperts
from model_host.placement import Share
from model_host.quantized import BITS, Bits, PackedLinear, linears
from model_host.ranks import Post, Ranks

PLAIN = ("kv_b_proj", "lm_head")
"""Linear layers that stay as they are: attention over latents takes the first apart, and the second decides between close calls."""


def load_experts(
    folder: Path,
    config: ModelConfig,
    held: range,
    *,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    kernels: str,
    progress: Progress,
) -> Held:
    """The experts in `held` of the checkpoint in `folder`. Raises CheckpointError."""
    weights = tensors(checked_shards(folder, config), progress)
    if device.type == "cpu" and kernels == "auto" and why_unavailable() is None:
        return NativeExperts(config, weights, precision, held, threads)
    here = TorchExperts(config, held, precision, dtype, device)
    places = dict(sinks(here, config))
    for name, tensor in weights:
        if name in places:
            here.put(*places[name], tensor)
    return here


def load_dense(
    folder: Path, config: ModelConfig, spread: Spread, *, precision: str, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Model:
    """The model of `folder` whose routed experts are those of `spread`, with everything else on `device`. Raises CheckpointError."""
    parts = checked_shards(folder, config)
    model = empty_dense(config, spread, precision=precision, dtype=dtype, device=device)
    places: dict[str, Callable[[Tensor], object]] = {name: place.copy_ for name, place in destinations_in(model)}
    places |= {f"model.{name}.weight": module.put for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, tensor in tensors(parts, progress):
        if name in places:
            places[name](tensor)
    return model.eval()


def empty_dense(config: ModelConfig, spread: Spread, *, precision: str, dtype: torch.dtype, device: torch.device) -> Model:
    """The same, its memory not filled."""
    model = outline(config)
    for layer, block in enumerate(model.blocks()):
        if isinstance(block.mlp, MoE):
            setattr(block.mlp, "experts", SpreadLayer(spread, layer))  # noqa: B010  it only has to be called like one
    if precision in BITS:
        _pack_linears(model, precision, device)
    allocate(model, device, dtype)
    return model


def _pack_linears(model: Model, precision: str, device: torch.device) -> None:
    """Puts packed layers in the place of plain ones: attention's in int8 even where the others are int4, as few as they are."""
    for name, linear in list(linears(model)):
        stem, _, own = name.rpartition(".")
        if own in PLAIN:
            continue
        bits: Bits = 8 if stem.endswith("self_attn") else BITS[precision]
        parent: nn.Module = model.get_submodule(stem)
        setattr(parent, own, PackedLinear(linear.out_features, linear.in_features, bits, device))


def load_spread(
    folder: Path,
    shares: Sequence[Share],
    *,
    precision: str,
    dtype: torch.dtype,
    threads: int,
    kernels: str,
    progress: Progress,
) -> "SpreadModel":
    """The model of `folder` as a plan divides it: the first share's device computes all but the experts, the CPU holds its experts in
    this process, other GPUs in processes of their own. Raises CheckpointError, EngineError."""
    config = ModelConfig.read(folder)
    device = torch.device(shares[0].device.name)
    here = [share for share in shares if share is shares[0] or share.device.kind == "cpu"]
    posts = [
        Post(device=share.device.name, first=share.experts.start, stop=share.experts.stop)
        for share in shares
        if not any(share is own for own in here)
    ]
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "threads": threads, "kernels": kernels}
    ranks = Ranks(folder, config, posts, **how) if posts else None
    try:
        if ranks is not None:
            ranks.start(progress)
        held = [
            load_experts(folder, config, share.experts, device=torch.device(share.device.name), progress=progress, **how) for share in here
        ]
        spread = Spread(held, ranks)
        model = load_dense(folder, config, spread, precision=precision, dtype=dtype, device=device, progress=progress)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    hot = HotExperts(config, held[0], held[1], expert_reader(folder, config), device) if len(held) == 2 else None
    return SpreadModel(model, spread, precision, ranks, hot)


def stepping(model: Model, *, is_whole: bool = True) -> GpuModel | EagerModel:
    """Captured graphs for a model of which all lies on one GPU, where Triton is; else plain torch."""
    on_gpu = model.lm_head.weight.device.type == "cuda"
    return GpuModel(model) if is_whole and on_gpu and find_spec("triton") else EagerModel(model)


def expert_reader(folder: Path, config: ModelConfig) -> ReadExpert:
    """Reads single experts from the files of `folder`."""
    files = {tensor.name: part.file for part in checked_shards(folder, config) for tensor in part.tensors}

    def read(layer: int, expert: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
            with safe_open(files[name], framework="pt") as opened:
                found[kind] = opened.get_tensor(name)
        return found

    return read


class SpreadModel:
    """A model whose experts lie on several devices or in fewer bits. Satisfies model_host.runner.StepModel."""

    def __init__(self, model: Model, spread: Spread, precision: str, ranks: Ranks | None = None, hot: HotExperts | None = None) -> None:
        self._stepping = stepping(model, is_whole=spread.whole is not None)
        self._spread, self._ranks, self.hot = spread, ranks, hot
        if hot is not None:
            spread.note = hot.note
        self.config, self.device, self.latent_dtype = model.config, self._stepping.device, self._stepping.latent_dtype
        self.precision = precision
        self.weight_bytes = self._stepping.weight_bytes + sum(held.weight_bytes for held in spread.here)
        self.weight_bytes += ranks.weight_bytes if ranks else 0

    def prepare(self, latents: LatentPool) -> None:
        self._stepping.prepare(latents)

    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the device."""
        if self._ranks is None:
            return self._stepped(step, latents)
        self._ranks.begin(len(step.ids))
        try:
            return self._stepped(step, latents)
        except EngineError:
            raise
        except Exception:
            self._ranks.close()  # they wait for layers of a step that has ended
            raise

    def _stepped(self, step: Step, latents: LatentPool) -> Tensor:
        logits = self._stepping.forward(step, latents)
        if self.hot is not None:
            self.hot.end_step()
        return logits

    def close(self) -> None:
        """Ends the worker processes, where there are any."""
        if self._ranks is not None:
            self._ranks.close()

    def __del__(self) -> None:
        if getattr(self, "_ranks", None) is not None:
            self.close()
