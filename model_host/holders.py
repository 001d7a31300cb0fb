"""Reads a model's experts into whoever holds them: compiled kernels on a CPU, torch elsewhere; and a whole model of such parts, its
layers on one device or on several, or a portion of each on several.

Owns: which form holds experts on a device, and that every tensor goes from its file into one place, packed on the way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model_host.batch import Copy, Shift, Step
from model_host.checkpoints import allocate, checked_shards, destinations_in, of_layers, outline, tensors
from model_host.config import ModelConfig, Portion
from model_host.devices import Share
from model_host.eager import TRIED_CONTEXT, EagerModel
from model_host.experts import Held, Spread, SpreadLayer, TorchExperts, sinks
from model_host.generation import Progress
from model_host.gpu.model import GpuModel
from model_host.hot import HotExperts, ReadExpert
from model_host.latents import LatentPool, LayeredPool
from model_host.models.deepseek_v2 import Model, MoE, Together
from model_host.native.library import why_unavailable
from model_host.native.model import NativeExperts
from model_host.nf4 import Nf4Linear
from model_host.orders import Begin, Fill, Post
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.quantized import BITS, FEWER_BITS, PackedLinear, linears
from model_host.ranks import ConnectionLost, Ranks, Wire

PACKED = PackedLinear | Nf4Linear
PLAIN = ("kv_b_proj", "lm_head")
"""Linear layers that stay as they are: attention over latents takes the first apart, and the second decides between close calls."""
PREPARED_PAGES = pages_for(TRIED_CONTEXT)
"""What making ready for steps may write over."""
GIVEN_PAGES = 256
"""At a time, to other ranks: 128 MB of Coder-V2-Lite."""


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
) -> "SpreadModel | LayeredModel | RankedModel":
    """The model of `folder` as a plan divides it: layers, or a portion of each, on the devices of the shares that have some; experts there
    and in the CPU's memory. Portions but the first are in processes of their own. Raises CheckpointError, RankLost."""
    config = ModelConfig.read(folder)
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "threads": threads, "kernels": kernels}
    on_cpu = [share for share in shares if not share.layers]
    bearing = [share for share in shares if share.layers]
    if posts := [Post(device=s.device.name, portion=s.portion, experts=s.experts) for s in bearing if s.portion is not None]:
        ranks = Ranks(folder, posts[1:], home=torch.device(posts[0].device), captures=not on_cpu, **how)
        try:
            ranks.start(progress)
            return RankedModel(config, _part(folder, config, [bearing[0], *on_cpu], how, progress, captures=ranks.captures), ranks)
        except BaseException:
            ranks.close()
            raise
    parts = [_part(folder, config, [share, *on_cpu], how, progress) for share in bearing]
    return parts[0] if len(parts) == 1 else LayeredModel(config, parts)


def _part(
    folder: Path, config: ModelConfig, shares: Sequence[Share], how: Mapping[str, Any], progress: Progress, *, captures: bool = True
) -> "SpreadModel":
    """The layers of the first share, or its portion of them, with their experts in the devices of all of them."""
    layers, device = shares[0].layers, torch.device(shares[0].device.name)
    held = [
        load_experts(folder, config, share.experts, device=torch.device(share.device.name), progress=progress, layers=layers, **how)
        for share in shares
    ]
    spread = Spread(held)
    dense = {"precision": how["precision"], "dtype": how["dtype"], "device": device, "progress": progress}
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
) -> "SpreadModel":
    """What a rank other than the first has of the model, which is all but the output. Raises CheckpointError."""
    how: dict[str, Any] = {"precision": precision, "dtype": dtype, "device": torch.device(post.device), "progress": progress}
    spread = Spread([load_experts(folder, config, post.experts, threads=threads, kernels=kernels, **how)])
    model = load_dense(folder, config, spread, portion=post.portion, ends=False, **how)
    return SpreadModel(model, spread, precision, captures=captures)


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
    """A model, some layers of one or a portion of each, whose experts lie on several devices or in fewer bits. Satisfies
    model_host.runner.StepModel."""

    def __init__(self, model: Model, spread: Spread, precision: str, hot: HotExperts | None = None, *, captures: bool = True) -> None:
        self._stepping = stepping(model, is_whole=captures and spread.only is not None)
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
        """Float32 logits [wanted, vocab] of the step, on rank 0's device, once they are there. Raises RankLost, CheckpointError."""
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
        self._ranks.start(lambda what, share: None)
        self.own.work_with(self._ranks.wire)
        first = list(range(min(PREPARED_PAGES, latents.pages)))
        kept = latents.take_out(first)
        self.prepare(latents)
        with self._together():
            LatentPool.put_in(latents, first, *kept)
            latents.give_all()

    @contextmanager
    def _together(self) -> Iterator[Wire]:
        """Around what all ranks do together. What breaks here leaves the others waiting, so they are ended."""
        wire = self._ranks.wire
        assert wire is not None
        try:
            yield wire
        except BaseException as error:
            self.own.work_with(None)
            if isinstance(error, ConnectionLost) or wire.is_lost:
                raise self._ranks.failed(error) from error
            self._ranks.close()
            raise

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
        if self._ranks.is_running:
            with suppress(ConnectionLost):
                self._give(pages)

    def note(self, step: Step) -> None:
        """Of what is to be written by a step."""
        for span in step.spans:
            self._written.update(span.pages[(span.context - span.tokens) // PAGE_TOKENS :])

    def give_all(self) -> None:
        """Gives the others everything there is. Raises ConnectionLost."""
        self._give(sorted(self._written))

    def _tell(self, command: Copy | Shift) -> None:
        if self._ranks.is_running:
            with suppress(ConnectionLost):
                self._ranks.tell(command)

    def _give(self, pages: list[int]) -> None:
        for start in range(0, len(pages), GIVEN_PAGES):
            some = pages[start : start + GIVEN_PAGES]
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
