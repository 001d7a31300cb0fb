"""Models with random weights in the shapes of DeepSeek-Coder-V2-Lite, or tiny ones, and sequences that decode with them."""

import time
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from model_host.batch import Span, Step
from model_host.config import ModelConfig
from model_host.experts import Spread, TorchExperts
from model_host.gpu.model import SHORT_TOKENS
from model_host.holders import empty_dense
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Model
from model_host.nf4 import Nf4Stack
from model_host.pages import pages_for
from model_host.quantized import PackedLinear, Stack

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163_840, "rope_theta": 10_000.0, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 100_000, "eos_token_id": 100_001,
}  # fmt: skip
TINY = LITE | {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """A model whose activations stay of about unit size, filled where it lies."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to(dtype).to_empty(device=device).eval()
    fill(model)
    return model


def random_packed_model(config: ModelConfig, precision: str, dtype: torch.dtype, device: torch.device) -> Model:
    """As `random_model`, in fewer bits."""
    held = TorchExperts(config, range(config.n_routed_experts or 0), precision, dtype, device)
    model = empty_dense(config, Spread([held]), precision=precision, dtype=dtype, device=device).eval()
    fill(held, model)
    return model


def fill(*parts: nn.Module) -> None:
    """Draws weights, by their names, so that what several ranks have is the same on all. In fewer bits the codes are drawn, not rounded
    to, which nothing but the sums can tell."""
    for part in parts:
        for name, module in part.named_modules():
            torch.manual_seed(crc32(name.encode()))
            if isinstance(module, PackedLinear | Stack) and module.bits:
                columns = module.in_features if isinstance(module, PackedLinear) else module.columns
                module.codes.random_(*((-127, 128) if module.bits == 8 else (0, 256)))
                module.scales.fill_((columns**-0.5) / (73.6 if module.bits == 8 else 4.64))  # over the codes' standard deviation
            elif isinstance(module, Nf4Stack):
                module.codes.random_(0, 256)
                module.scales.fill_((module.columns**-0.5) / 0.517)
            else:
                for kind, parameter in module.named_parameters(prefix=name, recurse=False):
                    if "norm" in kind:
                        parameter.data.fill_(1.0)
                    else:
                        parameter.data.normal_(std=1.0 if kind == "embed_tokens.weight" else parameter.shape[-1] ** -0.5)


class Sequences:
    """Some sequences of equal length in scattered pages of a pool, and the steps that make them longer."""

    def __init__(self, count: int, context: int, room: int, pool_pages: int, vocab: int) -> None:
        order = torch.randperm(pool_pages, generator=torch.Generator().manual_seed(7)).tolist()
        each = pages_for(context + room)
        assert count * each <= pool_pages
        self.pages = [tuple(order[i * each : (i + 1) * each]) for i in range(count)]
        self.context, self.vocab = context, vocab

    def step(self, ids: Sequence[int]) -> Step:
        """The step of the next tokens, the same number for every sequence."""
        tokens = len(ids) // len(self.pages)
        self.context += tokens
        held = pages_for(self.context)
        spans = tuple(Span(tokens=tokens, context=self.context, pages=pages[:held]) for pages in self.pages)
        return Step(ids=tuple(ids), spans=spans, wanted=tuple(range(tokens - 1, len(ids), tokens)))


def filled_pool(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> LatentPool:
    """Latents as large as real ones are: c_kv leaves a norm."""
    latents = LatentPool(config, pages_for(tokens), dtype, device)
    latents.c_kv.normal_()
    latents.k_pe.normal_()
    return latents


Forward = Callable[[Step], Tensor]


def plain_path(model: Model, latents: LatentPool) -> Forward:
    def forward(step: Step) -> Tensor:
        logits: Tensor = model(Layout.of(step, latents.c_kv.device, SHORT_TOKENS), latents)
        return logits

    return forward


def decode_seconds(forward: Forward, sequences: Sequences, tokens: int, warm_up: int = 3) -> float:
    """Median time of a greedy step, from one sampled token on the host to the next."""
    ids = [5 + i for i in range(len(sequences.pages))]
    took = []
    for _ in range(tokens + warm_up):
        began = time.perf_counter()
        ids = forward(sequences.step(ids)).argmax(dim=-1).tolist()
        took.append(time.perf_counter() - began)
    return sorted(took[warm_up:])[tokens // 2]
