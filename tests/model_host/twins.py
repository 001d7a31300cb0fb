"""Tiny twins of the released checkpoints: the hub's files to the letter, with every flag as released and every dimension small.

Owns: what the hub's config.json, shards, index and names look like. The weights are random; the tokenizer is the starter's, which
has all of the family's special tokens.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_host.catalogue import LARGE, LITE, Entry
from model_host.checkpoints import STARTER

AS_ON_THE_HUB: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 8187,
    "eos_token_id": 8188,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "deepseek_v2",
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "vocab_size": 8192,
}
LITE_TWIN: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
LARGE_TWIN: dict[str, Any] = LITE_TWIN | {
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 48, "n_routed_experts": 32,
    "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
}  # fmt: skip
ORIGINAL_POSITIONS = 64
"""Of YaRN: 4096 in the releases, here small so that positions far beyond it are cheap."""


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    """The hub's spelling; factor and betas as in every release."""
    return {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": ORIGINAL_POSITIONS, "type": "yarn",
    }  # fmt: skip


def hub_config(entry: Entry, **changes: Any) -> dict[str, Any]:
    """The config.json of the entry's twin."""
    assert entry.shape in (LITE, LARGE) and entry.shape.yarn
    small = LITE_TWIN if entry.shape is LITE else LARGE_TWIN
    rope = yarn(entry.shape.yarn.mscale, entry.shape.yarn.mscale_all_dim)
    return AS_ON_THE_HUB | small | {"max_position_embeddings": 40 * ORIGINAL_POSITIONS, "rope_scaling": rope} | changes


def weights(config: dict[str, Any], seed: int = 0, *, blank: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Random weights under the hub's names, one matrix an expert, in the hub's order. `blank` ones are zero, and made in no time."""
    draw = torch.Generator().manual_seed(seed)
    d, heads, kv_rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank = config["q_lora_rank"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        if blank:
            return torch.zeros(rows, columns, dtype=torch.bfloat16)
        return torch.randn(rows, columns, generator=draw) * gain * columns**-0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=draw)

    def mlp(stem: str, inner: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{stem}.gate_proj.weight", matrix(inner, d)
        yield f"{stem}.up_proj.weight", matrix(inner, d)
        yield f"{stem}.down_proj.weight", matrix(d, inner)

    yield "model.embed_tokens.weight", matrix(config["vocab_size"], d, d**0.5)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        if q_rank is None:
            yield f"{stem}.self_attn.q_proj.weight", matrix(heads * (nope + rope), d, 2.0)
        else:
            yield f"{stem}.self_attn.q_a_proj.weight", matrix(q_rank, d)
            yield f"{stem}.self_attn.q_a_layernorm.weight", norm(q_rank)
            yield f"{stem}.self_attn.q_b_proj.weight", matrix(heads * (nope + rope), q_rank, 2.0)
        yield f"{stem}.self_attn.kv_a_proj_with_mqa.weight", matrix(kv_rank + rope, d)
        yield f"{stem}.self_attn.kv_a_layernorm.weight", norm(kv_rank)
        yield f"{stem}.self_attn.kv_b_proj.weight", matrix(heads * (nope + v), kv_rank)
        yield f"{stem}.self_attn.o_proj.weight", matrix(d, heads * v)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{stem}.mlp", config["intermediate_size"])
        else:
            yield f"{stem}.mlp.gate.weight", matrix(config["n_routed_experts"], d, 2.0)
            for expert in range(config["n_routed_experts"]):
                yield from mlp(f"{stem}.mlp.experts.{expert}", config["moe_intermediate_size"])
            if config["n_shared_experts"]:
                yield from mlp(f"{stem}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
        yield f"{stem}.input_layernorm.weight", norm(d)
        yield f"{stem}.post_attention_layernorm.weight", norm(d)
    yield "model.norm.weight", norm(d)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", matrix(config["vocab_size"], d, 3.0)


def write(
    folder: Path, config: dict[str, Any], *, shards: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0, blank: bool = False
) -> Path:
    """Writes a checkpoint as the hub has it into `folder`, which is made."""
    folder.mkdir(parents=True)
    tensors = [(name, tensor.to(dtype)) for name, tensor in weights(config, seed, blank=blank)]
    total = sum(tensor.nbytes for _, tensor in tensors)
    where: dict[str, str] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    filled = 0
    for name, tensor in tensors:
        number = min(filled * shards // total, shards - 1)
        parts[number][name] = tensor
        where[name] = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        filled += tensor.nbytes
    for number, part in enumerate(parts, start=1):
        save_file(part, folder / f"model-{number:05}-of-{shards:05}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STARTER / file, folder / file)
    return folder
