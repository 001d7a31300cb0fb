"""Latents at another place: what is turned to another position is what would have been computed there."""

import pytest
import torch

from model_host.batch import Shift
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig
from model_host.latents import LatentPool
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
