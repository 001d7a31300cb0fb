"""Models of a checkpoint in each of the ways in which a plan divides them, all on this CPU; and what they say."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model_host.batch import Span, Step
from model_host.config import ModelConfig, Portion
from model_host.devices import Device, Share
from model_host.divided import RankedModel, SpreadModel
from model_host.eager import TRIED_CONTEXT
from model_host.experts import Held, Spread
from model_host.generation import Progress
from model_host.holders import load_dense, load_experts, load_spread
from model_host.pages import pages_for
from model_host.runner import StepModel

CPU = torch.device("cpu")
CARD = Device(name="cpu", kind="gpu", free_bytes=0, bytes_per_s=1.0)
"""What a plan takes for a GPU."""
PROMPT, NEW = 40, 24


def quiet(what: str, share: float) -> None: ...


def held(folder: Path, experts: range, precision: str, kernels: str = "torch") -> Held:
    return load_experts(
        folder, ModelConfig.read(folder), experts, precision=precision, dtype=torch.float32, device=CPU, threads=1, kernels=kernels,
        progress=quiet,
    )  # fmt: skip


def assembled(folder: Path, precision: str, here: list[Held]) -> SpreadModel:
    spread = Spread(here)
    config = ModelConfig.read(folder)
    model = load_dense(folder, config, spread, precision=precision, dtype=torch.float32, device=CPU, progress=quiet)
    return SpreadModel(model, spread, precision)


def whole(folder: Path, precision: str, kernels: str = "torch") -> SpreadModel:
    return assembled(folder, precision, [held(folder, range(ModelConfig.read(folder).n_routed_experts or 0), precision, kernels)])


def divided(whole: int, parts: int, least: int = 1) -> list[range]:
    """Uneven on purpose: the first have one more than their due, the last what is left. Each has a multiple of `least`."""
    units = -(-whole // least)
    cuts = [0, *(min(units * part // parts + 1, units) * least for part in range(1, parts)), whole]
    return [range(a, b) for a, b in pairwise(cuts)]


def in_ranks(
    folder: Path,
    precision: str,
    world: int,
    kernels: str = "torch",
    devices: tuple[Device, ...] = (),
    on_cpu: int = 0,
    progress: Progress = quiet,
) -> RankedModel:
    """A portion of every layer on each of so many devices; the last experts where a plan puts what does not fit."""
    config = ModelConfig.read(folder)
    experts, layers = config.n_routed_experts or 0, range(config.num_hidden_layers)
    shares = [
        Share(device=device, layers=layers, experts=own, weight_bytes=0, portion=Portion(heads=heads, inner=inner, shared=shared))
        for device, own, heads, inner, shared in zip(
            devices or (CARD,) * world,
            divided(experts - on_cpu, world),
            divided(config.num_attention_heads, world),
            divided(config.intermediate_size, world, 64 if precision in ("int4", "nf4") else 1),
            divided(config.n_shared_experts or 0, world),
            strict=True,
        )
    ]
    if on_cpu:
        cpu = Device(name="cpu", kind="cpu", free_bytes=0, bytes_per_s=1.0)
        shares.append(Share(device=cpu, layers=range(0), experts=range(experts - on_cpu, experts), weight_bytes=0))
    model = load_spread(folder, shares, precision=precision, dtype=torch.float32, threads=1, kernels=kernels, progress=progress)
    assert isinstance(model, RankedModel)
    return model


def greedy(model: StepModel, new: int = NEW) -> tuple[list[int], Tensor]:
    """A prompt, in two chunks, then one token at a time: the tokens and the last logits."""
    pages = tuple(range(pages_for(PROMPT + new)))
    latents = model.pool(pages_for(TRIED_CONTEXT))
    if isinstance(model, RankedModel):
        model.prepare(latents)
    ids = torch.randint(8000, (PROMPT,), generator=torch.Generator().manual_seed(5)).tolist()
    said: list[int] = []
    model.forward(Step(ids=tuple(ids[:25]), spans=(Span(tokens=25, context=25, pages=pages[:2]),), wanted=()), latents)
    step = Step(ids=tuple(ids[25:]), spans=(Span(tokens=15, context=PROMPT, pages=pages[:3]),), wanted=(14,))
    while True:
        logits = model.forward(step, latents)
        said.append(int(logits[0].argmax()))
        if len(said) == new:
            return said, logits
        context = PROMPT + len(said)
        step = Step(ids=(said[-1],), spans=(Span(tokens=1, context=context, pages=pages[: pages_for(context)]),), wanted=(0,))
