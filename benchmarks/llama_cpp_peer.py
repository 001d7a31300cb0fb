"""llama.cpp as a peer, where llama-cpp-python and gguf are installed (`pip install llama-cpp-python gguf`): the same shape with random
weights, written as a GGUF file without a vocabulary; and checkpoints of this family as GGUF files.

Owns: the names that llama.cpp gives to a DeepSeek-V2 model. kv_b_proj is stored in two parts, as its absorbed attention wants them.
"""

import ctypes
import json
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_host.checkpoints import hub_shapes
from model_host.config import ModelConfig

Numbers = NDArray[np.float32]
PRECISIONS = ("float32", "q8_0")
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def is_installed() -> bool:
    return bool(find_spec("llama_cpp") and find_spec("gguf"))


class LlamaCpp:
    """Satisfies benchmarks.peers.Peer; for shapes without low-rank queries and YaRN."""

    def __init__(self, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> None:
        import llama_cpp  # noqa: PLC0415  # an option, and not needed by the other peers

        self._do: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            self.weight_bytes = write(config, precision, file, drawn(config))
            wanted = llama_cpp.llama_model_default_params()
            wanted.use_mmap = False
            self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), wanted)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = -(-most_tokens // 256) * 256 + 256, 2048, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        assert self._model and self._context, "llama.cpp did not take the model"
        self._next, self._vocab = 0, config.vocab_size

    def prefill(self, tokens: int) -> None:
        self._do.llama_memory_clear(self._do.llama_get_memory(self._context), True)
        ids = [7 * place % self._vocab for place in range(tokens)]
        for start in range(0, tokens, 2048):
            self._run(ids[start : start + 2048])

    def decode(self) -> None:
        self._run([self._next])

    def _run(self, ids: list[int]) -> None:
        array = (self._do.llama_token * len(ids))(*ids)
        failed = self._do.llama_decode(self._context, self._do.llama_batch_get_one(array, len(ids)))
        assert not failed, f"llama.cpp could not run a step ({failed})"
        logits = np.ctypeslib.as_array(self._do.llama_get_logits_ith(self._context, -1), shape=(self._vocab,))
        self._next = int(logits.argmax())


def write(config: ModelConfig, precision: str, file: Path, weights: Iterable[tuple[str, Numbers]], tokenizer: Path | None = None) -> int:
    """Writes a GGUF file of weights by the hub's names, without a vocabulary or with that of a tokenizer.json; returns the bytes of its
    tensors. Not for low-rank queries."""
    import gguf  # noqa: PLC0415

    assert config.q_lora_rank is None
    out = gguf.GGUFWriter(str(file), "deepseek2")
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rope,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts or 0,
        "expert_used_count": config.num_experts_per_tok or 0,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 1,
    }
    for name, number in numbers.items():
        out.add_uint32(f"deepseek2.{name}", number)
    out.add_float32("deepseek2.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    out.add_float32("deepseek2.rope.freq_base", config.rope_theta)
    out.add_float32("deepseek2.expert_weights_scale", config.routed_scaling_factor)
    if config.yarn:
        out.add_string("deepseek2.rope.scaling.type", "yarn")
        out.add_float32("deepseek2.rope.scaling.factor", config.yarn.factor)
        out.add_uint32("deepseek2.rope.scaling.original_context_length", config.yarn.original_max_position_embeddings)
        out.add_float32("deepseek2.rope.scaling.yarn_beta_fast", config.yarn.beta_fast)
        out.add_float32("deepseek2.rope.scaling.yarn_beta_slow", config.yarn.beta_slow)
        out.add_float32("deepseek2.rope.scaling.yarn_log_multiplier", 0.1 * config.yarn.mscale_all_dim)
    if tokenizer is None:
        out.add_string("tokenizer.ggml.model", "no_vocab")
    else:
        _write_vocabulary(out, config, json.loads(tokenizer.read_text("utf-8")))
    total = 0
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, numbers_of in renamed(config, weights):
        small = numbers_of.ndim == 1 or "ffn_gate_inp" in name
        if precision == "q8_0" and not small:
            packed = gguf.quants.quantize(numbers_of, q8)
            out.add_tensor(name, packed, raw_dtype=q8)
            total += packed.nbytes
        else:
            out.add_tensor(name, numbers_of)
            total += numbers_of.nbytes
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return total


def _write_vocabulary(out: Any, config: ModelConfig, content: dict[str, Any]) -> None:
    """The tokens of a tokenizer.json of this family, and which of them are special."""
    ids = dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    names = {number: name for name, number in ids.items()}
    special = {token["id"] for token in content["added_tokens"]}
    out.add_string("tokenizer.ggml.model", "gpt2")
    out.add_string("tokenizer.ggml.pre", "deepseek-llm")
    out.add_array("tokenizer.ggml.tokens", [names.get(number, f"[unused {number}]") for number in range(config.vocab_size)])
    out.add_array(
        "tokenizer.ggml.token_type", [3 if number in special or number not in names else 1 for number in range(config.vocab_size)]
    )
    merges = content["model"]["merges"]
    out.add_array("tokenizer.ggml.merges", [merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    assert isinstance(config.eos_token_id, int)
    for key, number in {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "fim_pre_token_id": ids["<｜fim▁begin｜>"],
        "fim_suf_token_id": ids["<｜fim▁hole｜>"],
        "fim_mid_token_id": ids["<｜fim▁end｜>"],
    }.items():
        out.add_uint32(f"tokenizer.ggml.{key}", number)
    out.add_bool("tokenizer.ggml.add_bos_token", True)


def drawn(config: ModelConfig) -> Iterator[tuple[str, Numbers]]:
    """Random weights with unit gain."""
    chance = np.random.default_rng(0)
    for name, shape in hub_shapes(config):
        gain = np.float32(shape[-1] ** -0.5)
        yield name, np.ones(shape, np.float32) if len(shape) == 1 else chance.standard_normal(shape, dtype=np.float32) * gain


def renamed(config: ModelConfig, weights: Iterable[tuple[str, Numbers]]) -> Iterator[tuple[str, Numbers]]:
    """Every tensor by llama.cpp's name; the experts of a layer in one."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    experts: dict[str, list[Numbers]] = {}
    for hub_name, numbers in weights:
        stem = hub_name.removesuffix(".weight")
        if stem in GLOBAL:
            yield f"{GLOBAL[stem]}.weight", numbers
            continue
        _, _, layer, part = stem.split(".", 3)
        if part == "self_attn.kv_b_proj":
            by_head = numbers.reshape(heads, -1, config.kv_lora_rank)
            yield f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(by_head[:, :nope].transpose(0, 2, 1))
            yield f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(by_head[:, nope:])
        elif part.startswith("mlp.experts."):
            _, _, expert, kind = part.split(".")
            name = f"blk.{layer}.ffn_{kind.removesuffix('_proj')}_exps.weight"
            held = experts.setdefault(name, [np.empty(0, np.float32)] * (config.n_routed_experts or 0))
            held[int(expert)] = numbers
            if all(len(one) for one in held):
                yield name, np.stack(experts.pop(name))
        else:
            yield f"blk.{layer}.{OF_LAYER[part]}.weight", numbers
    assert not experts, "experts are missing"
