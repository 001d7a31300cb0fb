"""Every released checkpoint, as a tiny twin in the hub's own format, gives the logits that transformers gives for the same folder."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from model_host.catalogue import CATALOGUE, IDENTIFYING, LARGE, LITE, Entry
from model_host.checkpoints import load_model
from model_host.config import ModelConfig
from model_host.models.deepseek_v2 import Model
from tests.model_host import sequences, twins

TOKENS = 8 * twins.ORIGINAL_POSITIONS
"""Positions far beyond the length that YaRN stretches."""
SMALL_PART = 1e-3
"""Of the logits' standard deviation: how far float32 may be off (issue 3, tests)."""
BY_NAME = {entry.name.partition("/")[2]: entry for entry in CATALOGUE}
ENTRY_OF = {"lite": BY_NAME["DeepSeek-Coder-V2-Lite-Base"], "large": BY_NAME["DeepSeek-V2.5"]}


def logits_of(model: Model, ids: Tensor) -> Tensor:
    """Logits of every position: a long first part, then a short one, then token by token."""
    return sequences.logits_of(model, ids, len(ids) - 24, 20, 1, 1, 1, 1)


def loaded(folder: Path, dtype: str = "float32") -> Model:
    return load_model(folder, device=torch.device("cpu"), dtype=getattr(torch, dtype), progress=lambda what, share: None)


def reference(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What transformers' native model makes of the same folder."""
    model = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(ids[None]).logits[0].float()


def error(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float((ours - expected).abs().max() / expected.std())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 8000, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("entry", CATALOGUE, ids=BY_NAME)
def test_every_released_checkpoint_gives_the_logits_of_transformers(entry: Entry, ids: Tensor, tmp_path: Path):
    folder = twins.write(tmp_path / entry.name.replace("/", "--"), twins.hub_config(entry), seed=CATALOGUE.index(entry))
    assert error(logits_of(loaded(folder), ids), reference(folder, ids)) < SMALL_PART


@pytest.mark.parametrize("entry", CATALOGUE, ids=BY_NAME)
def test_a_twin_has_every_flag_of_its_release_and_only_smaller_dimensions(entry: Entry, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(twins.hub_config(entry)))
    twin = ModelConfig.read(tmp_path).model_dump()
    release = entry.shape.model_dump()
    small = set(IDENTIFYING) - {"first_k_dense_replace", "n_shared_experts", "num_experts_per_tok"}
    other = {"max_position_embeddings", "bos_token_id", "eos_token_id", "yarn"}
    assert {name: twin[name] for name in twin.keys() - small - other} == {name: release[name] for name in release.keys() - small - other}
    assert all((twin[name] is None) == (release[name] is None) and (twin[name] or 0) <= (release[name] or 0) for name in small)
    assert twin["yarn"] | {"original_max_position_embeddings": 4096} == release["yarn"]


ROPES = {
    "mscale 0.707": {"rope_scaling": twins.yarn(0.707, 0.707)},
    "mscale 1.0": {"rope_scaling": twins.yarn(1.0, 1.0)},
    "mscales that differ": {"rope_scaling": twins.yarn(0.707, 1.0)},
    "mscale for cos and sin only": {"rope_scaling": twins.yarn(1.0, 0.0)},
    "other betas and factor": {"rope_scaling": twins.yarn(1.0, 1.0) | {"beta_fast": 8, "beta_slow": 2, "factor": 4.5}},
    "no yarn": {"rope_scaling": None},
    "another theta, no yarn": {"rope_scaling": None, "rope_theta": 500_000.0},
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "greedy, scaled": {"topk_method": "greedy", "routed_scaling_factor": 2.5},
    "greedy, without groups": {"topk_method": "greedy", "n_group": None, "topk_group": None},
    "group-limited": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "group-limited, all groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 4},
    "no shared experts": {"n_shared_experts": 0},
    "one expert a token": {"num_experts_per_tok": 1},
    "two dense layers": {"first_k_dense_replace": 2},
    "experts everywhere": {"first_k_dense_replace": 0},
}


@pytest.mark.parametrize("size", ENTRY_OF)
@pytest.mark.parametrize("change", ROPES.values(), ids=ROPES)
def test_every_rope_gives_the_logits_of_transformers(size: str, change: dict[str, Any], ids: Tensor, tmp_path: Path):
    folder = twins.write(tmp_path / "twin", twins.hub_config(ENTRY_OF[size], **change))
    assert error(logits_of(loaded(folder), ids), reference(folder, ids)) < SMALL_PART


@pytest.mark.parametrize("q_lora_rank", [None, 40], ids=["plain queries", "low-rank queries"])
@pytest.mark.parametrize("change", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing_gives_the_logits_of_transformers(q_lora_rank: int | None, change: dict[str, Any], ids: Tensor, tmp_path: Path):
    config = twins.hub_config(ENTRY_OF["lite"], q_lora_rank=q_lora_rank, **change)
    folder = twins.write(tmp_path / "twin", config)
    assert error(logits_of(loaded(folder), ids), reference(folder, ids)) < SMALL_PART


def test_tied_embeddings_give_the_logits_of_transformers(ids: Tensor, tmp_path: Path):
    folder = twins.write(tmp_path / "twin", twins.hub_config(ENTRY_OF["lite"], tie_word_embeddings=True))
    model = loaded(folder)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert error(logits_of(model, ids), reference(folder, ids)) < SMALL_PART


@pytest.mark.parametrize("size", ENTRY_OF)
def test_bfloat16_is_as_close_to_the_truth_as_transformers_in_bfloat16(size: str, ids: Tensor, tmp_path: Path):
    folder = twins.write(tmp_path / "twin", twins.hub_config(ENTRY_OF[size]))
    truth = reference(folder, ids)
    noise = (reference(folder, ids, torch.bfloat16) - truth).square().mean().sqrt()
    ours = (logits_of(loaded(folder, "bfloat16"), ids) - truth).square().mean().sqrt()
    assert ours <= 1.1 * noise


@pytest.mark.parametrize("size", ENTRY_OF)
def test_what_transformers_writes_again_is_the_same_checkpoint(size: str, ids: Tensor, tmp_path: Path):
    hub = twins.write(tmp_path / "hub", twins.hub_config(ENTRY_OF[size]))
    again = tmp_path / "again"
    DeepseekV2ForCausalLM.from_pretrained(hub, dtype=torch.bfloat16).save_pretrained(again, max_shard_size="500KB")
    assert len(list(again.glob("*.safetensors"))) > 2 and "rope_parameters" in json.loads((again / "config.json").read_text())
    assert ModelConfig.read(again) == ModelConfig.read(hub)
    assert torch.equal(logits_of(loaded(again), ids), logits_of(loaded(hub), ids))


def test_the_misspelt_routing_of_early_configurations_means_greedy(ids: Tensor, tmp_path: Path):
    config = twins.hub_config(ENTRY_OF["lite"])
    right = twins.write(tmp_path / "right", config)
    misspelt = twins.write(tmp_path / "misspelt", copy.deepcopy(config) | {"topk_method": "gready"})
    assert torch.equal(logits_of(loaded(misspelt), ids), logits_of(loaded(right), ids))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_from_the_type_they_are_stored_in(stored: torch.dtype, held: str, tmp_path: Path):
    config = twins.hub_config(ENTRY_OF["lite"])
    model = loaded(twins.write(tmp_path / "twin", config, dtype=stored), held)
    wanted = dict(twins.weights(config))
    kind = getattr(torch, held)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert torch.equal(model.norm.weight, wanted["model.norm.weight"].to(stored).to(kind))
    experts = dict(model.named_parameters())["layers.2.mlp.experts.down_proj"]
    assert torch.equal(experts[5], wanted["model.layers.2.mlp.experts.5.down_proj.weight"].to(stored).to(kind))


@pytest.mark.parametrize("shape", [LITE, LARGE], ids=["16B", "236B"])
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"n_shared_experts": None}, {"first_k_dense_replace": 3}], ids=str)
def test_the_parameters_computed_are_those_the_model_has(shape: ModelConfig, change: dict[str, Any]):
    config = shape.model_copy(update=change)
    with torch.device("meta"):
        model = Model(config)
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.rounded_parameters == sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "norm" in name or "mlp.gate.weight" in name or "embed_tokens" in name or "lm_head" in name
    )


def test_entries_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CATALOGUE[0].name = "another"  # type: ignore[misc]
