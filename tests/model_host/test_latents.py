"""Latents at another place: what is turned to another position is what would have been computed there; and what is moved is moved a part
at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_host import latents
from model_host.batch import Shift
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig
from model_host.latents import LatentPool, LayeredPool
from model_host.pages import PAGE_TOKENS
from model_host.rotation import rope_frequencies, rotate

CONFIG = ModelConfig.read(STARTER)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("start", "distance"), [(0, 5), (40, -37), (7, 900), (1000, -1000)])
def test_a_shifted_key_is_the_key_of_its_new_position_and_the_latent_stays(dtype, tolerance, start: int, distance: int):
    tokens, pages = 40, 160
    pool = LatentPool(CONFIG, pages, dtype, torch.device("cpu"))
    pool.c_kv.normal_()
    raw = torch.randn(CONFIG.num_hidden_layers, tokens, CONFIG.qk_rope_head_dim)

    def turned(first: int) -> torch.Tensor:
        angles = torch.arange(first, first + tokens)[:, None] * rope_frequencies(CONFIG)
        return rotate(raw, torch.polar(torch.ones_like(angles), angles))

    source, target = tuple(range(70)), tuple(range(pages - 1, pages - 71, -1))
    places = torch.arange(start, start + tokens)
    slots = torch.tensor(source)[places // PAGE_TOKENS] * PAGE_TOKENS + places % PAGE_TOKENS
    pool.k_pe[:, slots] = turned(start).to(dtype)
    pool.shift(Shift(source=source, source_start=start, target=target, target_start=start + distance, tokens=tokens))
    moved = places + distance
    there = torch.tensor(target)[moved // PAGE_TOKENS] * PAGE_TOKENS + moved % PAGE_TOKENS
    assert torch.equal(pool.c_kv[:, there], pool.c_kv[:, slots])
    assert (pool.k_pe[:, there].float() - turned(start + distance)).abs().max() < tolerance * raw.abs().max()


CPU = torch.device("cpu")


class Allocated(TorchDispatchMode):
    """How much memory each operation takes for what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = [one.untyped_storage() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.bytes += [one.nbytes() for one in made if one.data_ptr() not in known]
        return out


PAGES = [*range(9, 49), *range(3, 9)]


def whole() -> LatentPool:
    return LatentPool(CONFIG, 128, torch.bfloat16, CPU)


def layers_apart() -> LatentPool:
    return LayeredPool([LatentPool(CONFIG.of(layers), 128, torch.bfloat16, CPU) for layers in (range(3), range(3, 8))])


@pytest.mark.parametrize("made", [whole, layers_apart])
def test_a_long_prompt_is_moved_a_few_pages_at_a_time(made: Callable[[], LatentPool], monkeypatch: pytest.MonkeyPatch):
    """On a GPU all of it once more would need gigabytes, which nobody set aside."""
    shift = Shift(source=tuple(PAGES), source_start=5, target=tuple(range(127, 67, -1)), target_start=40, tokens=700)
    kept = tuple(torch.randn(8, len(PAGES) * PAGE_TOKENS, size).bfloat16() for size in (CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim))
    found, most = [], []
    for at_once in (1000, 4):
        monkeypatch.setattr(latents, "PAGES_AT_ONCE", at_once)
        pool = made()
        for part in pool.parts if isinstance(pool, LayeredPool) else [pool]:
            part.c_kv.zero_()
            part.k_pe.zero_()
        with Allocated() as moved:
            pool.put_in(PAGES, *kept)
            pool.shift(shift)
        with Allocated() as taken:
            found.append(pool.take_out([*PAGES, *shift.target]))
        for one in found[-1]:
            taken.bytes.remove(one.nbytes)
        most.append(max(moved.bytes + taken.bytes))
    for one, other, before in zip(*found, kept, strict=True):
        assert torch.equal(one, other) and torch.equal(one[:, : before.shape[1]], before)
    pages_bytes = 4 * LatentPool.page_bytes(CONFIG, torch.float32)  # what is turned is turned in float32
    assert most[1] <= pages_bytes < most[0]
