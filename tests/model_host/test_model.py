"""The model file against the reference implementation, and its two forms of attention against each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model_host.batch import Span, Step
from model_host.checkpoints import STARTER, load_model
from model_host.config import ModelConfig
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Experts, Model
from model_host.pages import pages_for
from tests.model_host.sequences import CPU, logits_of


@pytest.fixture(scope="module")
def starter() -> Model:
    return load_model(STARTER, device=torch.device("cpu"), dtype=torch.float32, progress=lambda what, share: None)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 8000, (200,), generator=torch.Generator().manual_seed(1))


def test_the_starter_gives_the_logits_that_transformers_gives(starter: Model, ids: Tensor):
    reference = AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(starter, ids), expected, atol=2e-3, rtol=1e-3)


def test_attention_over_latents_equals_attention_over_expanded_keys(starter: Model, ids: Tensor):
    whole = logits_of(starter, ids, short_tokens=1)
    torch.testing.assert_close(logits_of(starter, ids, short_tokens=10_000), whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits_of(starter, ids, 90, 1, 109, short_tokens=1), whole, atol=1e-3, rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(cut=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_a_prompt_in_chunks_gives_what_it_gives_in_one_piece(starter: Model, ids: Tensor, cut: list[int]):
    rest = len(ids) - sum(cut)
    chunks = [*cut, rest] if rest > 0 else [len(ids)]
    torch.testing.assert_close(logits_of(starter, ids, *chunks), logits_of(starter, ids), atol=1e-3, rtol=1e-3)


def test_sequences_in_one_step_over_scattered_pages_get_what_each_gets_alone(starter: Model, ids: Tensor):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2)).tolist()
    pool = LatentPool(starter.config, 20, torch.float32, CPU)
    texts = {tuple(order[:5]): ids[:70], tuple(order[5:8]): ids[100:133], tuple(order[8:9]): ids[50:66]}
    got: dict[tuple[int, ...], list[Tensor]] = {pages: [] for pages in texts}
    for start, stop in ((0, 10), (10, 16), (16, 33), (33, 70)):
        running = {pages: text for pages, text in texts.items() if len(text) >= stop}
        spans = tuple(Span(tokens=stop - start, context=stop, pages=pages[: pages_for(stop)]) for pages in running)
        step_ids = torch.cat([text[start:stop] for text in running.values()])
        step = Step(ids=tuple(step_ids.tolist()), spans=spans, wanted=tuple(range(len(step_ids))))
        with torch.inference_mode():
            for pages, logits in zip(running, starter(Layout.of(step, CPU, 8), pool).split(stop - start), strict=True):
                got[pages].append(logits)
    for pages, text in texts.items():
        torch.testing.assert_close(torch.cat(got[pages]), logits_of(starter, text)[: sum(map(len, got[pages]))], atol=1e-3, rtol=1e-3)


def test_computing_the_chosen_experts_equals_computing_all_of_them():
    config: dict[str, Any] = ModelConfig.read(STARTER).model_dump()
    experts = Experts(ModelConfig.model_validate(config | {"model_type": "deepseek_v2"}))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(20, config["hidden_size"])
    weights, chosen = torch.rand(20, config["n_routed_experts"]).topk(6)
    torch.testing.assert_close(experts(x, weights, chosen), experts.every(x, weights, chosen), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_in_one_file_loads_as_one_in_shards(copied: Path, starter: Model):
    from safetensors.torch import load_file

    whole = {name: tensor for shard in copied.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in copied.glob("*.safetensors"):
        shard.unlink()
    (copied / "model.safetensors.index.json").unlink()
    save_file(whole, copied / "model.safetensors")
    one = load_model(copied, device=torch.device("cpu"), dtype=torch.float32, progress=lambda what, share: None)
    for ours, theirs in zip(one.parameters(), starter.parameters(), strict=True):
        assert torch.equal(ours, theirs)
