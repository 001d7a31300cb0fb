"""The operations of a small step in plain torch: what `kernels` does, written to be read. The reference of its tests, and what
runs where Triton is missing.

Letters in shapes are those of models/deepseek_v2.py. T are a step's rows: one new token each, with its own context; rows of one
sequence share a page table. M are partial results that are added up: the K routed experts' and the S shared ones'.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model_host.pages import PAGE_TOKENS
from model_host.quantized import Packed
from model_host.rotation import rotate

Matrix = Tensor | Packed


def add_norm(x: Tensor, parts: Tensor, shares: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] plus the sum of parts [T, M, D], each times its share [T, M] where given; and that sum's RMSNorm."""
    parts = parts.float() if shares is None else parts.float() * shares.unsqueeze(-1)
    total = (x.float() + parts.sum(dim=1)).type_as(x)
    return total, F.rms_norm(total, weight.shape, weight, eps)


def latent_queries(
    projected: Tensor, rotation: Tensor, slots: Tensor, norm: Tensor, eps: float, kv_b: Tensor, c_kv: Tensor, k_pe: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes a layer's new latents into the pool's c_kv [slots, R] and k_pe [slots, P], and gives the queries that read them:
    with W_UK taken in (arXiv 2405.04434, section 2.1.2) [T, H, R], and rotated [T, H, P].

    projected [T, H*(N+P) + R+P] holds the queries, then the latents as they leave their projection; rotation [T, P/2, 2] is cosine
    and sine; norm [R] the latents' RMSNorm; kv_b [H, N+V, R] the keys' and values' up-projection.
    """
    heads, rank, rope = len(kv_b), c_kv.shape[-1], k_pe.shape[-1]
    q, new_c_kv, new_k_pe = projected.split((projected.shape[-1] - rank - rope, rank, rope), dim=-1)
    turns = torch.view_as_complex(rotation)  # [T, P/2]
    c_kv.index_copy_(0, slots.long(), F.rms_norm(new_c_kv, (rank,), norm, eps))
    k_pe.index_copy_(0, slots.long(), rotate(new_k_pe, turns))
    q = q.unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, T, N+P]
    nope = q.shape[-1] - rope
    q_latent = q[..., :nope] @ kv_b[:, :nope]  # [H, T, R]
    return q_latent.transpose(0, 1), rotate(q[..., nope:], turns).transpose(0, 1)


def attend(
    q_latent: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, tables: Tensor, owners: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """Softmax attention of each row over the first contexts[t] latents of its sequence, which lie in the pages
    tables[owners[t]]. q_latent [T, H, R], q_pe [T, H, P], c_kv [slots, R], k_pe [slots, P] -> [T, H, R]"""
    mixed = torch.empty_like(q_latent)
    within = torch.arange(PAGE_TOKENS, device=tables.device)
    for row, context in enumerate(contexts.tolist()):
        slots = (tables[owners[row]].long()[:, None] * PAGE_TOKENS + within).flatten()[:context]  # [S]
        keys = c_kv[slots]  # [S, R]
        scores = (q_latent[row] @ keys.T + q_pe[row] @ k_pe[slots].T).float() * scale  # [H, S]
        mixed[row] = scores.softmax(dim=-1).type_as(keys) @ keys
    return mixed


def values(mixed: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    """W_UV, applied to the mixed latents [T, H, R] of every head; kv_b [H, N+V, R] -> [T, H*V]"""
    return (mixed.transpose(0, 1) @ kv_b[:, nope:].transpose(1, 2)).transpose(0, 1).flatten(1)


def route(
    x: Tensor, weight: Tensor, top_k: int, scaling: float, always: int, groups: int = 1, top_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The K experts of highest softmax affinity (section 2.2.1) of x [T, D], weight [E, D]: their shares [T, K + always], the
    last `always` of them 1 for the experts that every token sees, and their ids [T, K]. Of several groups only the `top_groups`
    whose best expert is best are chosen from (section 2.2.2)."""
    shares = F.linear(x.float(), weight.float()).softmax(dim=-1).unflatten(-1, (groups, -1))  # [T, G, E/G]
    best = shares.amax(dim=-1).topk(top_groups, dim=-1).indices
    kept = torch.zeros(shares.shape[:-1], dtype=torch.bool, device=x.device).scatter_(-1, best, True)
    shares, experts = shares.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(-2).topk(top_k, dim=-1)
    return F.pad(shares * scaling, (0, always), value=1.0), experts.int()


def experts(
    x: Tensor, ids: Tensor, gate_up: Matrix, down: Matrix, shared: tuple[Matrix, Matrix, Matrix] | None, first: int | None = None
) -> Tensor:
    """What each chosen expert makes of x [T, D], not yet weighed: [T, M, D]. ids [T, K] choose among gate_up [E, 2I, D] and
    down [E, D, I]; `shared` are the gate [S*I, D], up [S*I, D] and down [D, S*I] of the S experts that every token sees.
    Where all of them are packed, these S are one part: a group of columns of their down projection may belong to two of them.
    Where `first` is given, only the experts from it on are here; what others would make is 0."""
    if isinstance(gate_up, Packed):
        assert isinstance(down, Packed)
        routed = experts(x, ids, gate_up.unpacked(x.dtype), down.unpacked(x.dtype), None, first)
        if shared is None:
            return routed
        gate_of_all, up_of_all, down_of_all = shared
        inner = F.silu(linear(x, gate_of_all)) * linear(x, up_of_all)
        return torch.cat((routed, linear(inner, down_of_all).unsqueeze(1)), dim=1)
    assert isinstance(down, Tensor)
    ids = ids - (first or 0)
    is_here = (ids >= 0) & (ids < len(down))
    ids = ids.where(is_here, 0)
    gate, up = (gate_up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)  # [T, K, I] each
    parts = (down[ids] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * is_here.unsqueeze(-1)  # [T, K, D]
    if shared is None:
        return parts
    gate, up, back = (matrix for matrix in shared if isinstance(matrix, Tensor))
    inner = (F.silu(x @ gate.T) * (x @ up.T)).unflatten(-1, (-1, down.shape[-1]))  # [T, S, I]
    backs = back.unflatten(-1, (-1, down.shape[-1])).permute(1, 2, 0)  # [S, I, D]
    return torch.cat((parts, (inner.transpose(0, 1) @ backs).transpose(0, 1)), dim=1)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, D] times weight [out, D], transposed -> [T, out]"""
    return F.linear(x, weight.unpacked(x.dtype) if isinstance(weight, Packed) else weight)
