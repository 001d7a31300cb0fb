"""Reads a model's experts into whoever holds them: compiled kernels on a CPU, torch elsewhere; and a whole model of such parts, its
layers on one device or on several.

Owns: which form holds experts on a device, and that every tensor goes from its file into one place, packed on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model_host.batch import Step
from model_host.checkpoints import allocate, checked_shards, destinations_in, of_layers, outline, tensors
from model_host.config import ModelConfig
from model_host.eager import EagerModel
from model_host.errors import EngineError
from model_host.experts import Held, Spread, SpreadLayer, TorchExperts, sinks
from model_host.generation import Progress
from model_host.gpu.model import GpuModel
from model_host.hot import HotExperts, ReadExpert
from model_host.latents import LatentPool, LayeredPool
from model_host.models.deepseek_v2 import Model, MoE
from model_host.native.library import why_unavailable
from model_host.native.model import NativeExperts
from model_host.nf4 import Nf4Linear
from model_host.placement import Share
from model_host.quantized import BITS, FEWER_BITS, PackedLinear, linears
from model_host.ranks import Post, Ranks

PACKED = PackedLinear | Nf4Linear
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
    layers: range | None = None,
) -> Held:
    """The experts in `held` of all layers of the checkpoint in `folder`, or of some, which are counted from 0 then. Raises
    CheckpointError."""
    weights = tensors(checked_shards(folder, config), progress)
    if layers is not None:
        weights, config = of_layers(weights, layers), config.of(layers)
    if device.type == "cpu" and kernels == "auto" and precision != "nf4" and why_unavailable() is None:
        return NativeExperts(config, weights, precision, held, threads)
    here = TorchExperts(config, held, precision, dtype, device)
    places = dict(sinks(here, config))
    for name, tensor in weights:
        if name in places:
            here.put(*places[name], tensor)
    return here


def load_dense(
    folder: Path,
    config: ModelConfig,
    spread: Spread,
    *,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    layers: range | None = None,
) -> Model:
    """The model of `folder`, or some layers of it, whose routed experts are those of `spread`, with everything else on `device`. Raises
    CheckpointError."""
    weights = tensors(checked_shards(folder, config), progress)
    if layers is not None:
        weights = of_layers(weights, layers)
    model = empty_dense(config, spread, layers, precision=precision, dtype=dtype, device=device)
    places: dict[str, Callable[[Tensor], object]] = {name: place.copy_ for name, place in destinations_in(model)}
    places |= {f"model.{name}.weight": module.put for name, module in model.named_modules() if isinstance(module, PACKED)}
    for name, tensor in weights:
        if name in places:
            places[name](tensor)
    return model.eval()


def empty_dense(
    config: ModelConfig, spread: Spread, layers: range | None = None, *, precision: str, dtype: torch.dtype, device: torch.device
) -> Model:
    """The same, its memory not filled."""
    if layers is None:
        model = outline(config)
    else:
        model = outline(config.of(layers), begins=layers.start == 0, ends=layers.stop == config.num_hidden_layers)
    for layer, block in enumerate(model.blocks()):
        if isinstance(block.mlp, MoE):
            setattr(block.mlp, "experts", SpreadLayer(spread, layer))  # noqa: B010  it only has to be called like one
    if precision in FEWER_BITS:
        _pack_linears(model, precision, device)
    allocate(model, device, dtype)
    return model


def _pack_linears(model: Model, precision: str, device: torch.device) -> None:
    """Puts packed layers in the place of plain ones: attention's in int8 even where the others have four bits, as few as they are."""
    for name, linear in list(linears(model)):
        stem, _, own = name.rpartition(".")
        if own in PLAIN:
            continue
        rows, columns, in_attention = linear.out_features, linear.in_features, stem.endswith("self_attn")
        packed: nn.Module
        if precision == "nf4" and not in_attention:
            packed = Nf4Linear(rows, columns, device)
        else:
            packed = PackedLinear(rows, columns, 8 if in_attention else BITS[precision], device)
        setattr(model.get_submodule(stem), own, packed)


def load_spread(
    folder: Path,
    shares: Sequence[Share],
    *,
    precision: str,
    dtype: torch.dtype,
    threads: int,
    kernels: str,
    progress: Progress,
) -> "SpreadModel | LayeredModel":
    """The model of `folder` as a plan divides it: layers on the devices of the shares that have some, in this process; experts there,
    in the CPU's memory, and, where one device has all layers, on other GPUs in processes of their own. Raises CheckpointError,
    EngineError."""
    config = ModelConfig.read(folder)
    bearing = [share for share in shares if share.layers]
    on_cpu = [share for share in shares if not share.layers and share.device.kind == "cpu"]
    posts = [
        Post(device=share.device.name, first=share.experts.start, stop=share.experts.stop)
        for share in shares
        if not share.layers and share.device.kind == "gpu"
    ]
    assert len(bearing) == 1 or not posts
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "threads": threads, "kernels": kernels}
    ranks = Ranks(folder, config, posts, home=torch.device(bearing[0].device.name), **how) if posts else None
    try:
        if ranks is not None:
            ranks.start(progress)
        parts = [_part(folder, config, [share, *on_cpu], ranks, how, progress) for share in bearing]
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    return parts[0] if len(parts) == 1 else LayeredModel(config, parts)


def _part(
    folder: Path, config: ModelConfig, shares: Sequence[Share], ranks: Ranks | None, how: Mapping[str, Any], progress: Progress
) -> "SpreadModel":
    """The layers of the first share, with their experts in the devices of all of them and in the processes of `ranks`."""
    layers, device = shares[0].layers, torch.device(shares[0].device.name)
    held = [
        load_experts(folder, config, share.experts, device=torch.device(share.device.name), progress=progress, layers=layers, **how)
        for share in shares
    ]
    spread = Spread(held, ranks)
    precision, dtype = how["precision"], how["dtype"]
    model = load_dense(folder, config, spread, precision=precision, dtype=dtype, device=device, progress=progress, layers=layers)
    hot = None
    if len(held) == 2:
        hot = HotExperts(config.of(layers), held[0], held[1], expert_reader(folder, config, layers.start), device)
    return SpreadModel(model, spread, precision, ranks, hot)


def stepping(model: Model, *, is_whole: bool = True) -> GpuModel | EagerModel:
    """Captured graphs for a model of which all lies on one GPU, where Triton is; else plain torch."""
    return GpuModel(model) if is_whole and model.device.type == "cuda" and find_spec("triton") else EagerModel(model)


def expert_reader(folder: Path, config: ModelConfig, first_layer: int = 0) -> ReadExpert:
    """Reads single experts from the files of `folder`, layers counted from the first one."""
    files = {tensor.name: part.file for part in checked_shards(folder, config) for tensor in part.tensors}

    def read(layer: int, expert: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{first_layer + layer}.mlp.experts.{expert}.{kind}.weight"
            with safe_open(files[name], framework="pt") as opened:
                found[kind] = opened.get_tensor(name)
        return found

    return read


class SpreadModel:
    """A model, or some layers of one, whose experts lie on several devices or in fewer bits. Satisfies model_host.runner.StepModel."""

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

    def forward(self, step: Step, latents: LatentPool, x: Tensor | None = None) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the device; x, from any device, as in `Model.forward`."""
        x = None if x is None else x.to(self.device)
        if self._ranks is None:
            return self._stepped(step, latents, x)
        self._ranks.begin(len(step.ids))
        try:
            return self._stepped(step, latents, x)
        except EngineError:
            raise
        except Exception:
            self._ranks.close()  # they wait for layers of a step that has ended
            raise

    def _stepped(self, step: Step, latents: LatentPool, x: Tensor | None) -> Tensor:
        out = self._stepping.forward(step, latents, x)
        if self.hot is not None:
            self.hot.end_step()
        return out

    def close(self) -> None:
        """Ends the worker processes, where there are any."""
        if self._ranks is not None:
            self._ranks.close()

    def __del__(self) -> None:
        if getattr(self, "_ranks", None) is not None:
            self.close()


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
        return LayeredPool([LatentPool(part.config, pages, part.latent_dtype, part.device) for part in self.parts])

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
