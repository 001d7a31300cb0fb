"""The compiled forward pass against transformers' model, and against itself in every form it can take."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM

from model_host.batch import Span, Step
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.latents import LatentPool
from model_host.native import build
from model_host.native.library import Attention, available_levels, why_unavailable
from model_host.native.model import NativeModel, random_weights
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not available_levels(), reason=str(why_unavailable()))

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "rope_theta": 1e4}
SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {"n_routed_experts": 16, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
ODD = {
    "vocab_size": 203,
    "hidden_size": 75,
    "intermediate_size": 101,
    "moe_intermediate_size": 37,
    "kv_lora_rank": 42,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 19,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "groups and low-rank queries": {**GROUPED, "q_lora_rank": 48},
    "yarn with its temperature": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn with two temperatures": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
    "only dense layers": {"first_k_dense_replace": 3},
    "only experts": {"first_k_dense_replace": 0},
    "no shared experts": {"n_shared_experts": 0},
    "odd sizes": ODD | {"q_lora_rank": 33},
    "tied embeddings": {"tie_word_embeddings": True},
}


@cache
def reference(**changes: Any) -> tuple[DeepseekV2ForCausalLM, ModelConfig, list[tuple[str, Tensor]]]:
    """transformers' model of a shape, with unit gain, and the tensors of its checkpoint."""
    changes = {name: dict(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    hub_config = DeepseekV2Config(**SHAPE | changes)
    config = ModelConfig.model_validate(hub_config.to_dict() | {"model_type": "deepseek_v2"})
    model = DeepseekV2ForCausalLM(hub_config).eval()
    model.set_experts_implementation("eager")  # the others refuse odd sizes
    weights = list(random_weights(config, seed=0))
    by_name = dict(weights)
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".experts"):
            parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            each = (torch.cat([by_name[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(len(parameter)))
            parameter.data = torch.stack(list(each))
        else:
            parameter.data = by_name.get(name, parameter).clone()
    return model, config, weights


def expected(model: DeepseekV2ForCausalLM, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0]


def drawn(count: int, vocab: int = 203, seed: int = 1) -> tuple[int, ...]:
    return tuple(torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def pool(config: ModelConfig, pages: int, dtype: torch.dtype = torch.float32) -> LatentPool:
    """A pool whose memory holds what nobody may read."""
    latents = LatentPool(config, pages, dtype, CPU)
    latents.c_kv.fill_(float("nan"))
    latents.k_pe.fill_(float("nan"))
    return latents


def run(
    model: NativeModel, ids: Sequence[int], chunks: Sequence[int] = (), pages: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits of every token, run in chunks of the given sizes in the given pages."""
    pages = tuple(pages or range(pages_for(len(ids))))
    latents = pool(model.config, max(pages) + 1, dtype)
    logits, at = [], 0
    for tokens in chunks or (len(ids),):
        end = at + tokens
        span = Span(tokens=tokens, context=end, pages=tuple(pages[: pages_for(end)]))
        logits.append(model.forward(Step(ids=tuple(ids[at:end]), spans=(span,), wanted=tuple(range(tokens))), latents))
        at = end
    return torch.cat(logits)


def off(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of the wanted logits."""
    return float((actual - wanted).abs().max() / wanted.std())


@pytest.fixture(scope="module")
def small() -> NativeModel:
    _, config, weights = reference()
    return NativeModel(config, weights, "float32", threads=2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", [Attention.ABSORBED, Attention.EXPANDED])
def test_logits_are_those_of_transformers(variant: str, form: Attention):
    changes = {name: tuple(value.items()) if isinstance(value, dict) else value for name, value in VARIANTS[variant].items()}
    model, config, weights = reference(**changes)
    native = NativeModel(config, weights, "float32", threads=2)
    native.use_attention(form)
    ids = drawn(300)
    assert off(run(native, ids, [170, 1, 1, 128]), expected(model, ids)) < 1e-3


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.15), ("int8", 0.15), ("int4", 1.2)])
def test_every_instruction_set_and_precision_stays_close_to_float32(level: str, dtype: Any, bound: float):
    model, config, weights = reference(first_k_dense_replace=3, **ODD)  # without experts: rounding may not flip a choice
    native = NativeModel(config, weights, dtype, threads=2, level=level)
    ids = drawn(200)
    wanted = expected(model, ids)
    for latents in (torch.float32, torch.bfloat16) if dtype != "float32" else (torch.float32,):
        for chunks in ([200], [150, *[1] * 20, 30]):
            for form in (Attention.ABSORBED, Attention.EXPANDED):
                native.use_attention(form)
                assert off(run(native, ids, chunks, dtype=latents), wanted) < bound


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.15), ("int8", 0.15), ("int4", 0.7)])
def test_experts_are_right_on_every_instruction_set(level: str, dtype: Any, bound: float):
    model, config, weights = reference()
    native = NativeModel(config, weights, dtype, threads=2, level=level)
    ids = drawn(60)
    differences = (run(native, ids) - expected(model, ids)).abs().amax(dim=1) / expected(model, ids).std()
    assert differences.median() < bound


def test_float32_weights_work_over_bfloat16_latents():
    model, config, weights = reference(first_k_dense_replace=3)
    native = NativeModel(config, weights, "float32", threads=2)
    for form in (Attention.ABSORBED, Attention.EXPANDED):
        native.use_attention(form)
        ids = drawn(150)
        assert off(run(native, ids, [149, 1], dtype=torch.bfloat16), expected(model, ids)) < 0.1


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 120), min_size=1, max_size=5))
def test_any_chunking_gives_what_one_piece_gives(cuts: list[int]):
    _, config, weights = reference()
    native = NativeModel(config, weights, "float32", threads=2)
    ids = drawn(300)
    rest = len(ids) - sum(cuts)
    assert off(run(native, ids, [*cuts, rest] if rest > 0 else [len(ids)]), run(native, ids)) < 1e-3


def test_a_step_larger_than_the_scratch_gives_what_transformers_gives():
    model, config, weights = reference()
    native = NativeModel(config, weights, "float32", threads=2)
    ids = drawn(1500)
    assert off(run(native, ids), expected(model, ids)) < 1e-3


def test_sequences_run_together_as_they_run_alone(small: NativeModel):
    prompts = [drawn(length, seed=length) for length in (1, 16, 17, 100, 260)]
    latents, spans, page = pool(small.config, 100), [], 0
    for prompt in prompts:
        spans.append(Span(tokens=len(prompt), context=len(prompt), pages=tuple(range(page, page + pages_for(len(prompt))))))
        page += pages_for(len(prompt))
    ids = tuple(id for prompt in prompts for id in prompt)
    together = small.forward(Step(ids=ids, spans=tuple(spans), wanted=tuple(range(len(ids)))), latents)
    assert off(together, torch.cat([run(small, prompt) for prompt in prompts])) < 1e-3
    nexts = tuple(
        Span(tokens=1, context=s.context + 1, pages=(*s.pages, page + i)[: pages_for(s.context + 1)]) for i, s in enumerate(spans)
    )
    step = Step(ids=(5,) * len(prompts), spans=nexts, wanted=tuple(range(len(prompts))))
    alone = torch.stack([run(small, (*prompt, 5))[-1] for prompt in prompts])
    assert off(small.forward(step, latents), alone) < 1e-3


def test_scattered_pages_give_what_contiguous_pages_give(small: NativeModel):
    ids = drawn(20 * PAGE_TOKENS)
    scattered = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:20].tolist()
    assert torch.equal(run(small, ids, [100, 1, 219], scattered), run(small, ids, [100, 1, 219]))


@pytest.mark.parametrize("wanted", [(), (0,), (129,), (3, 64, 129), (129, 3, 3)])
def test_only_wanted_rows_are_given_and_they_are_the_same(small: NativeModel, wanted: tuple[int, ...]):
    ids = drawn(130)
    span = Span(tokens=130, context=130, pages=tuple(range(9)))
    latents = pool(small.config, 9)
    some = small.forward(Step(ids=ids, spans=(span,), wanted=wanted), latents)
    every = run(small, ids)
    assert some.shape == (len(wanted), small.config.vocab_size)
    assert not wanted or off(some, every[list(wanted)]) < 1e-3
    one_more = Step(ids=(7,), spans=(Span(tokens=1, context=131, pages=tuple(range(9))),), wanted=(0,))
    assert off(small.forward(one_more, latents), run(small, (*ids, 7))[-1:]) < 1e-3


def test_one_thread_gives_what_two_give():
    _, config, weights = reference(**GROUPED)
    one, two = (NativeModel(config, weights, "bfloat16", threads=threads) for threads in (1, 2))
    ids = drawn(200)
    torch.testing.assert_close(run(one, ids, [150, *[1] * 10, 40]), run(two, ids, [150, *[1] * 10, 40]), atol=2e-2, rtol=0)


def test_the_starter_goes_on_greedily_as_transformers_does(tokenizer: Any):
    model = AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32).eval()
    native = NativeModel.load(STARTER, "float32", progress=lambda what, share: None)
    assert native.threads >= 1 and native.weight_bytes > 40_000_000
    ids = drawn(64, vocab=8000)
    with torch.inference_mode():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 64:].tolist()
    latents = pool(native.config, 6)
    ours: list[int] = []
    step = Step(ids=ids, spans=(Span(tokens=64, context=64, pages=tuple(range(4))),), wanted=(63,))
    while len(ours) < len(theirs):
        ours.append(int(native.forward(step, latents)[0].argmax()))
        context = 64 + len(ours)
        step = Step(ids=(ours[-1],), spans=(Span(tokens=1, context=context, pages=tuple(range(pages_for(context)))),), wanted=(0,))
    assert ours == theirs


@pytest.mark.parametrize(("dtype", "share", "bound"), [("int8", 1 / 2.5, 0.002), ("int4", 1 / 4, 0.05)])
def test_quantized_weights_lose_little_on_the_starter(dtype: str, share: float, bound: float):
    ids = tuple(Tokenizer(STARTER).encode(Path(build.__file__).read_text("utf-8"))[:400])
    full, small = (NativeModel.load(STARTER, kind, progress=lambda what, share: None, threads=2) for kind in ("float32", dtype))
    wanted, actual = run(full, ids).log_softmax(-1), run(small, ids).log_softmax(-1)
    assert small.weight_bytes < full.weight_bytes * share
    assert float((wanted.exp() * (wanted - actual)).sum(-1).mean()) < bound  # divergence in nats a token


def test_a_missing_tensor_is_named():
    _, config, weights = reference()
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first model\.layers\.1\.mlp\.gate\.weight"):
        NativeModel(config, [pair for pair in weights if pair[0] != "model.layers.1.mlp.gate.weight"], "float32")


def test_a_tensor_of_another_shape_is_named():
    _, config, weights = reference()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape"):
        NativeModel(config, [(name, tensor[:-1] if "lm_head" in name else tensor) for name, tensor in weights], "float32")


def test_where_there_is_no_compiler_the_build_says_why_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (reason,) = build.build(tmp_path)
    assert "no C++ compiler" in reason.read_text()


def test_a_compiler_that_fails_leaves_its_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -c raise(SystemExit('error:_broken'))")
    (reason,) = build.build(tmp_path)
    assert "could not compile them for plain" in reason.read_text()
