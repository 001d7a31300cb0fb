"""Reads a model's experts into whoever holds them: compiled kernels on a CPU, torch elsewhere; and a whole model as a plan divides it.

Owns: which form holds experts on a device, and that every tensor goes from its file into one place, packed on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model_host.catalogue import Precision
from model_host.checkpoints import allocate, checked_shards, destinations_in, of_layers, outline, tensors
from model_host.config import ModelConfig, Portion
from model_host.devices import Share
from model_host.divided import LayeredModel, RankedModel, SpreadModel
from model_host.errors import CheckpointError
from model_host.experts import Held, Spread, SpreadLayer, TorchExperts, sinks
from model_host.footprint import groups
from model_host.generation import Progress, stages
from model_host.hot import HotExperts, ReadExpert
from model_host.models.deepseek_v2 import Model, MoE
from model_host.native.library import why_unavailable
from model_host.native.model import NativeExperts
from model_host.nf4 import Nf4Linear
from model_host.orders import Post
from model_host.quantized import BITS, FEWER_BITS, PackedLinear, linears
from model_host.ranks import Ranks

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
    portion: Portion | None = None,
    ends: bool = True,
) -> Model:
    """The model of `folder`, some layers of it, or a portion of each, whose routed experts are those of `spread`, with everything else on
    `device`; the output only where it `ends` the model. Raises CheckpointError."""
    weights = tensors(checked_shards(folder, config), progress)
    if layers is not None:
        weights = of_layers(weights, layers)
    model = empty_dense(config, spread, layers, portion, precision=precision, dtype=dtype, device=device, ends=ends)
    places: dict[str, Callable[..., object]] = {name: partial(_copy, place) for name, place in destinations_in(model)}
    places |= {f"model.{name}.weight": module.put for name, module in model.named_modules() if isinstance(module, PACKED)}
    for name, tensor in weights:
        if name in places:
            places[name](tensor, *(config.cut(name, portion) if portion else ()))
    return model.eval()


def _copy(place: Tensor, tensor: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
    place.copy_(tensor[rows] if tensor.dim() == 1 else tensor[rows, columns])


def empty_dense(
    config: ModelConfig,
    spread: Spread,
    layers: range | None = None,
    portion: Portion | None = None,
    *,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    ends: bool = True,
) -> Model:
    """The same, its memory not filled."""
    own = config if portion is None else config.portion(portion)
    if layers is None:
        model = outline(own, ends=ends)
    else:
        model = outline(own.of(layers), begins=layers.start == 0, ends=ends and layers.stop == config.num_hidden_layers)
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
) -> SpreadModel | LayeredModel | RankedModel:
    """The model of `folder` as a plan divides it: layers, or a portion of each, on the devices of the shares that have some; experts there
    and in the CPU's memory. Portions but the first are in processes of their own. Raises CheckpointError, RankLost."""
    config = ModelConfig.read(folder)
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "threads": threads, "kernels": kernels}
    on_cpu = [share for share in shares if not share.layers]
    bearing = [share for share in shares if share.layers]
    if posts := [Post(device=s.device.name, portion=s.portion, experts=s.experts) for s in bearing if s.portion is not None]:
        ranks = Ranks(folder, posts[1:], home=torch.device(posts[0].device), **how)
        try:
            ranks.start(progress)
            own = _part(folder, config, [bearing[0], *on_cpu], how, ranks.beside, captures=ranks.captures)
            ranks.join()
        except BaseException:
            ranks.close()
            raise
        return RankedModel(config, own, ranks)
    told = stages(progress, [len(share.layers) for share in bearing])
    parts = [_part(folder, config, [share, *on_cpu], how, own) for share, own in zip(bearing, told, strict=True)]
    return parts[0] if len(parts) == 1 else LayeredModel(config, parts)


def _part(
    folder: Path, config: ModelConfig, shares: Sequence[Share], how: Mapping[str, Any], progress: Progress, *, captures: bool = True
) -> SpreadModel:
    """The layers of the first share, or its portion of them, with their experts in the devices of all of them."""
    layers, device = shares[0].layers, torch.device(shares[0].device.name)
    *of_experts, of_dense = _stages(config, [share.experts for share in shares], shares[0].portion, progress)
    held = [
        load_experts(folder, config, share.experts, device=torch.device(share.device.name), progress=told, layers=layers, **how)
        for share, told in zip(shares, of_experts, strict=True)
    ]
    spread = Spread(held)
    dense = {"precision": how["precision"], "dtype": how["dtype"], "device": device, "progress": of_dense}
    model = load_dense(folder, config, spread, layers=layers, portion=shares[0].portion, **dense)
    hot = None
    if len(held) == 2:
        hot = HotExperts(config.of(layers), held[0], held[1], expert_reader(folder, config, layers.start), device)
    return SpreadModel(model, spread, how["precision"], hot, captures=captures)


def load_rank(
    folder: Path,
    config: ModelConfig,
    post: Post,
    *,
    precision: str,
    dtype: torch.dtype,
    threads: int,
    kernels: str,
    captures: bool,
    progress: Progress,
) -> SpreadModel:
    """What a rank other than the first has of the model, which is all but the output. Raises CheckpointError."""
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "device": torch.device(post.device)}
    of_experts, of_dense = _stages(config, [post.experts], post.portion, progress)
    spread = Spread([load_experts(folder, config, post.experts, threads=threads, kernels=kernels, progress=of_experts, **how)])
    model = load_dense(folder, config, spread, portion=post.portion, ends=False, progress=of_dense, **how)
    return SpreadModel(model, spread, precision, captures=captures)


def _stages(config: ModelConfig, held: Sequence[range], portion: Portion | None, progress: Progress) -> list[Progress]:
    """For going through the files once for the experts in each of `held`, and once for a portion of everything else: as long as there is
    to read."""
    *others, routed = groups(config, Precision.BFLOAT16)
    expert_bytes = routed.bytes / (config.n_routed_experts or 1)
    due = len(portion.heads) / config.num_attention_heads if portion else 1.0
    return stages(progress, [*(len(experts) * expert_bytes for experts in held), due * sum(group.bytes for group in others)])


def expert_reader(folder: Path, config: ModelConfig, first_layer: int = 0) -> ReadExpert:
    """Reads single experts from the files of `folder`, layers counted from the first one. What reads them raises CheckpointError when a
    file is another than it was."""
    files = {tensor.name: (part.file, tensor.shape) for part in checked_shards(folder, config) for tensor in part.tensors}

    def read(layer: int, expert: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{first_layer + layer}.mlp.experts.{expert}.{kind}.weight"
            file, shape = files[name]
            with safe_open(file, framework="pt") as opened:
                found[kind] = opened.get_tensor(name)
            if found[kind].shape != shape:
                raise CheckpointError(f"{file} was replaced by another checkpoint's while it was in use")
        return found

    return read
