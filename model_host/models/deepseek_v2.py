"""The DeepSeek-V2 model (arXiv 2405.04434), read top to bottom: rotation, attention over latents, experts, block, model.

Owns: the architecture, with the checkpoint's own parameter names. Knows nothing of requests, sampling or files: it gets a step's
token ids and a `LatentPool` that already holds the earlier tokens, and returns logits. Plain torch on any device: the reference
that faster forms are held against.

Letters in shapes: T new tokens, S tokens of context (S >= T), D hidden_size, H heads, R kv_lora_rank, N/P/V the nope, rope
and value head dims, E routed experts, K experts per token, I moe_intermediate_size. A leading batch may stand before T.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_host.config import ModelConfig
from model_host.latents import LatentPool, Layout, Reach
from model_host.rotation import rope_frequencies, rotate


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1): what is cached per token is one latent c_kv [R] and one rotated key k_pe [P]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_rank, self.scale = config.kv_lora_rank, config.softmax_scale
        hidden, q_dim = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_dim, bias=False)
        self.q_is_low_rank = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_rank, self.heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=False)

    def queries(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., T, D] -> q_nope [..., H, T, N], q_pe [..., H, T, P]"""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_is_low_rank else self.q_proj(x)
        q = q.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # [..., H, T, N+P]
        q_nope, q_pe = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return q_nope, rotate(q_pe, rotation)

    def latents(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., T, D] -> c_kv [..., T, R], k_pe [..., T, P]: what the cache keeps"""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split((self.kv_rank, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(c_kv), rotate(k_pe, rotation)

    def expanded(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values written out for every head, the textbook form: cheapest when T is large. Returns [..., T, H*V]."""
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # [..., H, S, N+V]
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        k = torch.cat((k_nope, k_pe.unsqueeze(-3).expand(*k_nope.shape[:-1], -1)), dim=-1)  # [..., H, S, N+P]
        q = torch.cat((q_nope, q_pe), dim=-1)  # [..., H, T, N+P]
        alone = q.dim() == 3  # torch's fused kernels want a batch; without one it writes all scores out
        q, k, v = (part.unsqueeze(0) if alone else part for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[-2] > 1, scale=self.scale)
        return (out[0] if alone else out).transpose(-3, -2).flatten(-2)

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, mask: Tensor | None) -> Tensor:
        """W_UK taken into the query and W_UV applied to the result (section 2.1.2), so that the S latents are read as they
        lie, once for all heads: cheapest when T is small. Returns [..., T, H*V]."""
        w = self.kv_b_proj.weight.view(self.heads, self.nope_dim + self.v_dim, self.kv_rank)
        w_uk, w_uv = w.split((self.nope_dim, self.v_dim), dim=1)  # [H, N, R], [H, V, R]
        q_latent = q_nope @ w_uk  # [..., H, T, R]
        scores = q_latent @ c_kv.unsqueeze(-3).transpose(-2, -1) + q_pe @ k_pe.unsqueeze(-3).transpose(-2, -1)
        scores = scores.float() * self.scale  # [..., H, T, S]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1).type_as(c_kv) @ c_kv.unsqueeze(-3)  # [..., H, T, R]
        out: Tensor = mixed @ w_uv.transpose(-2, -1)  # [..., H, T, V]
        return out.transpose(-3, -2).flatten(-2)

    def forward(self, x: Tensor, rotation: Tensor, layer: int, latents: LatentPool, layout: Layout) -> Tensor:
        """x [T, D], a step's tokens -> [T, D]; writes their latents into the pool."""
        q_nope, q_pe = self.queries(x, rotation)
        latents.write(layer, layout.slots, *self.latents(x, rotation))
        out = [self._attended(q_nope[:, r.rows], q_pe[:, r.rows], *latents.read(layer, r.slots), r) for r in layout.reaches]
        projected: Tensor = self.o_proj(torch.cat(out))
        return projected

    def _attended(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, reach: Reach) -> Tensor:
        """One sequence's queries over its own context: [T, H*V]"""
        tokens, context = q_nope.shape[1], c_kv.shape[0]
        attend = self.absorbed if reach.is_short else self.expanded
        mask = None
        if tokens > 1 and (reach.is_short or context > tokens):
            mask = torch.ones(tokens, context, dtype=torch.bool, device=c_kv.device).tril(context - tokens)
        return attend(q_nope, q_pe, c_kv.type_as(q_nope), k_pe.type_as(q_nope), mask)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """Chooses K of E experts for each token, by softmax affinity (section 2.2.1) or within the best groups (2.2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts and config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups = config.n_group or 1 if config.topk_method == "group_limited_greedy" else 1
        self.top_groups = config.topk_group or 1

    def affinities(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E], in float32 whatever the model's type: close calls must not depend on it"""
        return F.linear(x.float(), self.weight.float()).softmax(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> weights [..., K], expert ids [..., K]"""
        scores = self.affinities(x)
        if self.groups > 1:
            grouped = scores.unflatten(-1, (self.groups, -1))  # [..., G, E/G]
            best = grouped.amax(dim=-1).topk(self.top_groups, dim=-1).indices
            kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=x.device).scatter_(-1, best, True)
            scores = grouped.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(-2)
        weights, experts = scores.topk(self.top_k, dim=-1)
        return weights * self.scaling, experts


class Experts(nn.Module):
    """The routed experts of one layer, each matrix kind fused into one tensor."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))  # [E, 2I, D]: gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))  # [E, D, I]

    def every(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Computes all E experts for all tokens and weighs the unchosen ones with zero: the obvious form, and one large
        matmul, which is what training wants. x [..., D], weights and experts [..., K] -> [..., D]"""
        share = torch.zeros(*x.shape[:-1], len(self.down_proj), dtype=x.dtype, device=x.device)
        share = share.scatter(-1, experts, weights.to(x.dtype))  # [..., E]
        gate, up = self.gate_up_proj.chunk(2, dim=1)  # [E, I, D] each
        inner: Tensor = F.silu(x @ gate.flatten(0, 1).T) * (x @ up.flatten(0, 1).T)  # [..., E*I]
        inner = inner.unflatten(-1, (len(gate), -1)) * share.unsqueeze(-1)
        return inner.flatten(-2) @ self.down_proj.transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sorts the tokens by expert, so that each chosen expert is read once, by one matmul over groups of rows. x [T, D],
        weights and experts [T, K] -> [T, D]"""
        choices = experts.flatten()  # [T*K]
        order = choices.argsort(stable=True)
        per_expert = torch.zeros(len(self.down_proj), dtype=torch.int32, device=x.device)
        ends = per_expert.scatter_add_(0, choices, torch.ones_like(choices, dtype=torch.int32)).cumsum(0, dtype=torch.int32)  # [E]
        gate, up = grouped(x[order // experts.shape[-1]], self.gate_up_proj, ends).chunk(2, dim=-1)  # [T*K, I] each
        y = grouped(F.silu(gate) * up, self.down_proj, ends)[order.argsort()].view(*experts.shape, -1)  # [T, K, D]
        return (y * weights.unsqueeze(-1).to(x.dtype)).sum(dim=-2)


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x [rows, in] times matrices[e].T, matrices [E, out, in] -> [rows, out]"""
    if hasattr(F, "grouped_mm") and (x.dtype == torch.bfloat16 or not x.is_cuda):
        return F.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([F.linear(x[a:b], m) for a, b, m in zip(starts, starts[1:], matrices, strict=False) if b > a])


class MoE(nn.Module):
    """Routed experts beside the shared ones that see every token (DeepSeekMoE, section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts or 0
        self.shared_experts = MLP(config.hidden_size, shared * config.moe_intermediate_size) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        routed: Tensor = self.experts(x, *self.gate(x))
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def every(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As `forward`, with a choice already made and every expert computed."""
        routed = self.experts.every(x, weights, experts)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Together(Protocol):
    """Ranks, each of which computes some heads and some experts of every layer: the same steps at the same time."""

    def summed(self, part: Tensor) -> Tensor:
        """The sum of what all ranks give, on each of them; `part` may be overwritten."""
        ...

    def launch(self, run: Callable[[], None]) -> None:
        """Runs what launches captured sums."""
        ...


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self, x: Tensor, rotation: Tensor, layer: int, latents: LatentPool, layout: Layout, together: Together | None = None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rotation, layer, latents, layout)
        x = x + (attended if together is None else together.summed(attended))
        made = self.mlp(self.post_attention_layernorm(x))
        out: Tensor = x + (made if together is None else together.summed(made))
        return out


class Model(nn.Module):
    """The whole model, some layers of one, or a portion of each: only what `begins` it has the embeddings, only what `ends` it the
    output."""

    def __init__(self, config: ModelConfig, *, begins: bool = True, ends: bool = True) -> None:
        super().__init__()
        self.config, self.begins, self.ends = config, begins, ends
        if begins:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        if ends:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if begins and ends and config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies: Tensor | None = None
        self.together: Together | None = None
        """Where this is a portion: those who have the others."""

    @property
    def device(self) -> torch.device:
        return next(self.blocks()).input_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks()).input_layernorm.weight.dtype

    def blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def rotation(self, positions: Tensor) -> Tensor:
        """Positions [T] -> complex rotations [T, P/2]"""
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.config).to(positions.device)
        angles = positions[:, None].float() * self.frequencies
        return torch.polar(torch.full_like(angles, self.config.rope_magnitude), angles)

    def forward(self, layout: Layout, latents: LatentPool, x: Tensor | None = None) -> Tensor:
        """Runs a step and returns float32 logits [wanted, vocab]; the latents of its tokens are in the pool afterwards. Layers that
        do not begin the model take x [T, D] from those before them, and those that do not end it return it."""
        rotation = self.rotation(layout.positions)
        x = self.embed_tokens(layout.ids) if x is None else x  # [T, D]
        for layer, block in enumerate(self.blocks()):
            x = block(x, rotation, layer, latents, layout, self.together)
        if not self.ends:
            return x
        logits: Tensor = self.lm_head(self.norm(x[layout.wanted]))
        return logits.float()
