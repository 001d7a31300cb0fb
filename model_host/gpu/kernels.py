"""The operations of a small step as Triton kernels: same names, arguments and results as in `plain`, where they are explained.

None of them waits for the host: expert ids, page tables and context lengths are read on the device, and the launch grids depend
on shapes alone, so that a captured graph stays right as contexts grow. At most `MAX_ROWS` rows: one tile of the tensor cores'
smallest matmul. A decode step is bound by the bytes it reads; every weight and latent is read once a step, as it lies.

Where a matrix is applied to one or two rows, products are summed by plain threads ("few"); for more, by tensor cores ("many").
Products with packed matrices are in `packed`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model_host.gpu import packed
from model_host.gpu.plain import Matrix
from model_host.gpu.tiles import DEFAULT, MAX_ROWS, TILE, Tile, Tuning, depth_of, of_here, padded, parts_for, takers
from model_host.pages import PAGE_TOKENS
from model_host.quantized import Packed

__all__ = ["DEFAULT", "Tile", "Tuning", "add_norm", "attend", "experts", "latent_queries", "linear", "route", "values"]


def linear(x: Tensor, weight: Matrix, tuning: Tuning = DEFAULT) -> Tensor:
    """x [T, D] times weight [out, D], transposed -> [T, out]"""
    if isinstance(weight, Packed):
        return packed.linear(x, weight, tuning)
    rows, depth = x.shape
    if rows > tuning.linear_rows:
        return torch.nn.functional.linear(x, weight)
    tile, out = tuning.linear, x.new_empty(rows, len(weight))
    grid = (triton.cdiv(len(weight), tile.rows), rows)
    _linear[grid](x, weight, out, len(weight), D=depth, ROWS=tile.rows, DEPTH=depth_of(tile, depth), num_warps=tile.warps)
    return out


@triton.jit
def _linear(x, weight, out, size, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(1)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        some = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        live = (o < size)[:, None] & (d < D)[None, :]
        total += tl.load(weight + o[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32) * some[None, :]
    tl.store(out + row * size + o, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=o < size)


def add_norm(x: Tensor, parts: Tensor, shares: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, normed = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    _add_norm[(len(x),)](
        x, parts, parts if shares is None else shares, weight, total, normed, eps,
        PARTS=parts.shape[1], SHARED_OUT=shares is not None, D=size, DEPTH=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip
    return total, normed


@triton.jit
def _add_norm(
    x, parts, shares, weight, total, normed, eps,
    PARTS: tl.constexpr, SHARED_OUT: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, DEPTH)
    live = d < D
    added = tl.zeros((DEPTH,), tl.float32)
    for m in tl.static_range(PARTS):
        part = tl.load(parts + (row * PARTS + m) * D + d, mask=live, other=0.0).to(tl.float32)
        if SHARED_OUT:
            part *= tl.load(shares + row * PARTS + m)
        added += part
    added += tl.load(x + row * D + d, mask=live, other=0.0).to(tl.float32)
    rounded = added.to(x.dtype.element_ty)
    tl.store(total + row * D + d, rounded, mask=live)
    value = rounded.to(tl.float32)
    scaled = value / tl.sqrt(tl.sum(value * value, axis=0) / D + eps) * tl.load(weight + d, mask=live, other=0.0).to(tl.float32)
    tl.store(normed + row * D + d, scaled.to(x.dtype.element_ty), mask=live)


def latent_queries(
    projected: Tensor, rotation: Tensor, slots: Tensor, norm: Tensor, eps: float, kv_b: Tensor, c_kv: Tensor, k_pe: Tensor
) -> tuple[Tensor, Tensor]:
    rows, heads, rank, rope = len(projected), len(kv_b), c_kv.shape[-1], k_pe.shape[-1]
    nope = (projected.shape[-1] - rank - rope) // heads - rope
    q_latent, q_pe = projected.new_empty(rows, heads, rank), projected.new_empty(rows, heads, rope)
    block = min(64, padded(rank))
    _latent_queries[(heads + 1, max(triton.cdiv(rank, block), rows))](
        projected, rotation, slots, norm, kv_b, c_kv, k_pe, q_latent, q_pe, rows, eps,
        H=heads, N=nope, NV=kv_b.shape[1], R=rank, P=rope, WIDTH=projected.shape[-1], BLOCK_N=padded(nope), BLOCK_R=block,
        WHOLE_R=triton.next_power_of_2(rank), HALF_P=triton.next_power_of_2(rope // 2), num_warps=4,
    )  # fmt: skip
    return q_latent, q_pe


@triton.jit(do_not_specialize=["rows"])
def _latent_queries(
    projected, rotation, slots, norm, kv_b, c_kv, k_pe, q_latent, q_pe, rows, eps,
    H: tl.constexpr, N: tl.constexpr, NV: tl.constexpr, R: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_R: tl.constexpr, HALF_P: tl.constexpr,
):  # fmt: skip
    """Programs (head, part of R) absorb W_UK; those of one head more than there are write the latents, (H, row)."""
    head, part = tl.program_id(0), tl.program_id(1)
    if head < H and part * BLOCK_R < R:
        t, n, r = tl.arange(0, TILE), tl.arange(0, BLOCK_N), part * BLOCK_R + tl.arange(0, BLOCK_R)
        here = projected + t * WIDTH + head * (N + P)
        q = tl.load(here[:, None] + n[None, :], mask=(t < rows)[:, None] & (n < N)[None, :], other=0.0)  # [T, N]
        w_uk = kv_b + (head * NV + n[:, None]) * R + r[None, :]
        w = tl.load(w_uk, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)  # [N, R]
        absorbed = tl.dot(q, w, input_precision="ieee")
        into = q_latent + (t[:, None] * H + head) * R + r[None, :]
        tl.store(into, absorbed.to(q_latent.dtype.element_ty), mask=(t < rows)[:, None] & (r < R)[None, :])
        if part == 0:
            _rotate(here + N, q_pe + (t * H + head) * P, rotation + t * P, t < rows, P, HALF_P)
    if head == H and part < rows:
        slot = tl.load(slots + part).to(tl.int64)
        r = tl.arange(0, WHOLE_R)
        new = projected + part * WIDTH + H * (N + P)
        latent = tl.load(new + r, mask=r < R, other=0.0).to(tl.float32)
        latent = latent / tl.sqrt(tl.sum(latent * latent, axis=0) / R + eps)
        latent *= tl.load(norm + r, mask=r < R, other=0.0).to(tl.float32)
        tl.store(c_kv + slot * R + r, latent.to(c_kv.dtype.element_ty), mask=r < R)
        one = tl.arange(0, 1)
        _rotate(new + R + one, k_pe + slot * P + one, rotation + part * P + one, one == 0, P, HALF_P)


@triton.jit
def _rotate(source, target, turns, live, P: tl.constexpr, HALF_P: tl.constexpr):
    """Turns the pairs of `source` by the complex numbers at `turns`; all three hold a pointer for each row, [T]."""
    pair = tl.arange(0, HALF_P)[None, :]
    mask = live[:, None] & (pair < P // 2)
    a = tl.load(source[:, None] + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source[:, None] + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(turns[:, None] + 2 * pair, mask=mask, other=0.0)
    sin = tl.load(turns[:, None] + 2 * pair + 1, mask=mask, other=0.0)
    kind = target.dtype.element_ty
    tl.store(target[:, None] + 2 * pair, (a * cos - b * sin).to(kind), mask=mask)
    tl.store(target[:, None] + 2 * pair + 1, (a * sin + b * cos).to(kind), mask=mask)


def attend(
    q_latent: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, tables: Tensor, owners: Tensor, contexts: Tensor, scale: float,
    tuning: Tuning = DEFAULT,
) -> Tensor:  # fmt: skip
    """Each row's context is split into parts that are attended to independently and then weighed by their shares of the softmax
    (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html)."""
    rows, heads, rank = q_latent.shape
    rope, tile = q_pe.shape[-1], tuning.attend
    splits = max(tuning.programs // triton.next_power_of_2(rows), 8)
    tokens = tile.rows if q_latent.itemsize == 2 else MAX_ROWS
    partial = torch.empty(rows, heads, splits, rank, dtype=torch.float32, device=q_latent.device)
    mass = torch.empty(rows, heads, splits, dtype=torch.float32, device=q_latent.device)
    _attend_part[(splits, rows, triton.cdiv(heads, MAX_ROWS))](
        q_latent, q_pe, c_kv, k_pe, tables, owners, contexts, partial, mass, scale * 1.4426950408889634, tables.stride(0), splits,
        H=heads, R=rank, P=rope, PAGE=PAGE_TOKENS, BLOCK_R=padded(rank), BLOCK_P=padded(rope), TOKENS=tokens,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    mixed, block = torch.empty_like(q_latent), min(triton.next_power_of_2(rank), max(8192 // splits, 16))
    _combine[(rows * heads, triton.cdiv(rank, block))](
        partial, mass, contexts, mixed, H=heads, R=rank, SPLITS=splits, TOKENS=tokens, BLOCK_R=block, num_warps=4
    )
    return mixed


@triton.jit
def _part_tokens(context, splits, TOKENS: tl.constexpr):
    """Tokens of one part of a context: whole tiles, as few as make no more than `splits` parts."""
    return tl.cdiv(tl.cdiv(context, splits), TOKENS) * TOKENS


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _attend_part(
    q_latent, q_pe, c_kv, k_pe, tables, owners, contexts, partial, mass, scale, table_stride, splits,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """`scale` holds log2(e), so that exponentials are powers of two. The softmax is kept up to date from tile to tile
    (arXiv 2205.14135, section 3.1)."""
    split, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + row)
    size = _part_tokens(context, splits, TOKENS)
    start = split * size
    stop = tl.minimum(start + size, context)
    if start < stop:
        h = tl.program_id(2) * TILE + tl.arange(0, TILE)
        r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
        head = (row * H + h)[:, None]
        in_r, in_p = (h < H)[:, None] & (r < R)[None, :], (h < H)[:, None] & (p < P)[None, :]
        q = tl.load(q_latent + head * R + r[None, :], mask=in_r, other=0.0)  # [H, R]
        q_rope = tl.load(q_pe + head * P + p[None, :], mask=in_p, other=0.0)  # [H, P]
        table = tables + tl.load(owners + row) * table_stride
        highest = tl.full((TILE,), -float("inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        mixed = tl.zeros((TILE, BLOCK_R), tl.float32)
        for first in range(start, stop, TOKENS):
            token = first + tl.arange(0, TOKENS)
            live = token < stop
            page = tl.load(table + token // PAGE, mask=live, other=0)
            slot = page.to(tl.int64) * PAGE + token % PAGE
            keys = tl.load(c_kv + slot[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)  # [S, R]
            k_rope = tl.load(k_pe + slot[:, None] * P + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0.0)  # [S, P]
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
            scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee") * scale  # [H, S]
            scores = tl.where(live[None, :], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            share = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(share, axis=1)
            mixed = tl.dot(share.to(keys.dtype), keys, mixed * fade[:, None], input_precision="ieee")
            highest = higher
        into = (row * H + h) * splits + split
        tl.store(partial + into[:, None] * R + r[None, :], mixed / total[:, None], mask=in_r)
        tl.store(mass + into, highest + tl.log2(total), mask=h < H)


@triton.jit
def _combine(
    partial, mass, contexts, mixed,
    H: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0)
    context = tl.load(contexts + row_head // H)
    split = tl.arange(0, SPLITS)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = split * _part_tokens(context, SPLITS, TOKENS) < context
    here = row_head * SPLITS + split
    weight = tl.load(mass + here, mask=live, other=-float("inf"))
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    parts = tl.load(partial + here[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0)
    tl.store(mixed + row_head * R + r, out.to(mixed.dtype.element_ty), mask=r < R)


def values(mixed: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    rows, heads, rank = mixed.shape
    size = kv_b.shape[1] - nope
    out = mixed.new_empty(rows, heads * size)
    block = 32 if size > MAX_ROWS else MAX_ROWS
    _values[(heads, triton.cdiv(size, block))](
        mixed, kv_b, out, rows, H=heads, N=nope, V=size, R=rank, BLOCK_V=block, BLOCK_R=min(128, padded(rank)), num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _values(
    mixed, kv_b, out, rows,
    H: tl.constexpr, N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    t, v = tl.arange(0, TILE), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((TILE, BLOCK_V), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        some = tl.load(mixed + (t[:, None] * H + head) * R + r[None, :], mask=(t < rows)[:, None] & (r < R)[None, :], other=0.0)
        w_uv = kv_b + (head * (N + V) + N + v[:, None]) * R + r[None, :]
        w = tl.load(w_uv, mask=(v < V)[:, None] & (r < R)[None, :], other=0.0)  # [V, R]
        total = tl.dot(some, tl.trans(w), total, input_precision="ieee")
    into = out + (t[:, None] * H + head) * V + v[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=(t < rows)[:, None] & (v < V)[None, :])


def route(
    x: Tensor, weight: Tensor, top_k: int, scaling: float, always: int, groups: int = 1, top_groups: int = 1
) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    number = len(weight)
    logits = torch.empty(rows, number, dtype=torch.float32, device=x.device)
    _affinities[(rows, triton.cdiv(number, 4))](x, weight, logits, E=number, D=size, DEPTH=min(2048, triton.next_power_of_2(size)))
    shares = torch.empty(rows, top_k + always, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    _choose[(rows,)](
        logits, shares, ids, scaling, E=number, K=top_k, ALWAYS=always, GROUPS=groups, KEPT=top_groups,
        BLOCK_E=triton.next_power_of_2(number), BLOCK_G=triton.next_power_of_2(groups), num_warps=1,
    )  # fmt: skip
    return shares, ids


@triton.jit
def _affinities(x, weight, logits, E: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0)
    e = tl.program_id(1) * 4 + tl.arange(0, 4)
    total = tl.zeros((4, DEPTH), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        some = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weight + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += w * some[None, :]
    tl.store(logits + row * E + e, tl.sum(total, axis=1), mask=e < E)


@triton.jit
def _choose(
    logits, shares, ids, scaling,
    E: tl.constexpr, K: tl.constexpr, ALWAYS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    logit = tl.load(logits + row * E + e, mask=e < E, other=-float("inf"))
    share = tl.exp(logit - tl.max(logit, axis=0))
    share = share / tl.sum(share, axis=0)
    share = tl.where(e < E, share, -1.0)  # below what any expert can have: a share may be 0
    if GROUPS > 1:
        g, group = tl.arange(0, BLOCK_G), e // (E // GROUPS)
        best_of = tl.max(tl.where(g[:, None] == group[None, :], share[None, :], -1.0), axis=1)  # [G]
        kept = tl.zeros((BLOCK_E,), tl.int32)
        for _ in tl.static_range(KEPT):
            chosen_group = tl.min(tl.where(best_of == tl.max(best_of, axis=0), g, BLOCK_G), axis=0)
            kept += (group == chosen_group).to(tl.int32)
            best_of = tl.where(g == chosen_group, -2.0, best_of)
        share = tl.where((e < E) & (kept == 0), 0.0, share)
    for k in tl.static_range(K):
        best = tl.max(share, axis=0)
        chosen = tl.min(tl.where(share == best, e, BLOCK_E), axis=0)
        tl.store(shares + row * (K + ALWAYS) + k, best * scaling)
        tl.store(ids + row * K + k, chosen)
        share = tl.where(e == chosen, -1.0, share)
    for s in tl.static_range(ALWAYS):
        tl.store(shares + row * (K + ALWAYS) + K + s, 1.0)


def experts(
    x: Tensor, ids: Tensor, gate_up: Matrix, down: Matrix, shared: tuple[Matrix, Matrix, Matrix] | None, tuning: Tuning = DEFAULT,
    first: int | None = None,
) -> Tensor:  # fmt: skip
    """The shared experts are computed by the same programs, as experts that every row has chosen. Parts are float32."""
    if isinstance(gate_up, Packed):
        return packed.experts(x, ids, gate_up, down, shared, tuning, first)
    assert isinstance(down, Tensor)
    rows, size = x.shape
    number, inner_size, chosen = len(gate_up), down.shape[-1], ids.shape[-1]
    gate, up, back = shared or (gate_up, gate_up, down)
    assert isinstance(back, Tensor)
    always = back.shape[-1] // inner_size if shared else 0
    inner = x.new_empty(rows, chosen + always, inner_size)
    parts = parts_for(x, chosen + always, first)
    sizes = {"D": size, "I": inner_size, "K": chosen, "S": always, "FIRST": first or 0, "E": number}
    if rows <= tuning.few_rows:
        tile = tuning.few_up
        grid = (rows * (chosen + always), triton.cdiv(inner_size, tile.rows))
        blocks = {"ROWS": tile.rows, "DEPTH": depth_of(tile, size), "num_warps": tile.warps}
        _few_up[grid](x, ids, gate_up, gate, up, inner, **sizes, **blocks)
        tile = tuning.few_down
        grid = (rows * (chosen + always), triton.cdiv(size, tile.rows))
        blocks = {"ROWS": tile.rows, "DEPTH": depth_of(tile, inner_size), "num_warps": tile.warps}
        _few_down[grid](inner, ids, down, back, parts, **sizes, **blocks)
        return parts
    sizes |= {"BLOCK_K": triton.next_power_of_2(chosen)}
    tile = tuning.many_up
    blocks = {"ROWS": tile.rows, "DEPTH": depth_of(tile, size), "num_warps": tile.warps, "num_stages": tile.stages}
    _many_up[triton.cdiv(inner_size, tile.rows), number + always](x, ids, gate_up, gate, up, inner, rows, **sizes, **blocks)
    tile = tuning.many_down
    blocks = {"ROWS": tile.rows, "DEPTH": depth_of(tile, inner_size), "num_warps": tile.warps, "num_stages": tile.stages}
    _many_down[triton.cdiv(size, tile.rows), number + always](inner, ids, down, back, parts, rows, **sizes, **blocks)
    return parts


@triton.jit
def _few_up(
    x, ids, gate_up, shared_gate, shared_up, inner,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program for each choice and part of I; a row's choices come one after the other, the shared experts last."""
    choice = tl.program_id(0)
    row, m = choice // (K + S), choice % (K + S)
    expert, is_here = of_here(ids, row, m, FIRST, E, K)
    if m < K:
        gate = gate_up + expert * (2 * I * D)
        up = gate + I * D
    else:
        gate = shared_gate + (m - K).to(tl.int64) * (I * D)
        up = shared_up + (m - K).to(tl.int64) * (I * D)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    taken = (i < I) & is_here
    gates = tl.zeros((ROWS, DEPTH), tl.float32)
    ups = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        some = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        at, live = i[:, None] * D + d[None, :], taken[:, None] & (d < D)[None, :]
        gates += tl.load(gate + at, mask=live, other=0.0).to(tl.float32) * some
        ups += tl.load(up + at, mask=live, other=0.0).to(tl.float32) * some
    total = tl.sum(gates, axis=1)
    out = total * tl.sigmoid(total) * tl.sum(ups, axis=1)
    tl.store(inner + choice * I + i, out.to(inner.dtype.element_ty), mask=i < I)


@triton.jit
def _few_down(
    inner, ids, down, shared_down, parts,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0)
    row, m = choice // (K + S), choice % (K + S)
    expert, is_here = of_here(ids, row, m, FIRST, E, K)
    if m < K:
        matrix = down + expert * (D * I)
    else:
        matrix = shared_down + (m - K).to(tl.int64) * I
    stride = tl.where(m < K, I, S * I)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, I, DEPTH):
        i = start + tl.arange(0, DEPTH)
        some = tl.load(inner + choice * I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
        live = ((d < D) & is_here)[:, None] & (i < I)[None, :]
        total += tl.load(matrix + d[:, None] * stride + i[None, :], mask=live, other=0.0).to(tl.float32) * some
    tl.store(parts + choice * D + d, tl.sum(total, axis=1), mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _many_up(
    x, ids, gate_up, shared_gate, shared_up, inner, rows,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program for each expert and part of I; it computes all rows, a tile of which costs what one row costs, and stores those
    that have chosen the expert."""
    expert = tl.program_id(1)
    takes, which = takers(ids, expert, rows, FIRST, E, K, BLOCK_K)
    if tl.max(takes, axis=0) > 0:
        if expert < E:
            gate = gate_up + expert.to(tl.int64) * (2 * I * D)
            up = gate + I * D
        else:
            gate = shared_gate + (expert - E).to(tl.int64) * (I * D)
            up = shared_up + (expert - E).to(tl.int64) * (I * D)
        t, i = tl.arange(0, TILE), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        gates = tl.zeros((TILE, ROWS), tl.float32)
        ups = tl.zeros((TILE, ROWS), tl.float32)
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            some = tl.load(x + t[:, None] * D + d[None, :], mask=(t < rows)[:, None] & (d < D)[None, :], other=0.0)
            at, live = i[:, None] * D + d[None, :], (i < I)[:, None] & (d < D)[None, :]
            gates = tl.dot(some, tl.trans(tl.load(gate + at, mask=live, other=0.0)), gates, input_precision="ieee")
            ups = tl.dot(some, tl.trans(tl.load(up + at, mask=live, other=0.0)), ups, input_precision="ieee")
        out = gates * tl.sigmoid(gates) * ups
        into = inner + (t * (K + S) + which)[:, None] * I + i[None, :]
        tl.store(into, out.to(inner.dtype.element_ty), mask=(takes > 0)[:, None] & (i < I)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _many_down(
    inner, ids, down, shared_down, parts, rows,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    takes, which = takers(ids, expert, rows, FIRST, E, K, BLOCK_K)
    if tl.max(takes, axis=0) > 0:
        if expert < E:
            matrix = down + expert.to(tl.int64) * (D * I)
        else:
            matrix = shared_down + (expert - E).to(tl.int64) * I
        stride = tl.where(expert < E, I, S * I)
        d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.arange(0, TILE) * (K + S) + which  # [T]
        total = tl.zeros((TILE, ROWS), tl.float32)
        for start in range(0, I, DEPTH):
            i = start + tl.arange(0, DEPTH)
            some = tl.load(inner + part[:, None] * I + i[None, :], mask=(takes > 0)[:, None] & (i < I)[None, :], other=0.0)
            live = (d < D)[:, None] & (i < I)[None, :]
            w = tl.load(matrix + d[:, None] * stride + i[None, :], mask=live, other=0.0)
            total = tl.dot(some, tl.trans(w), total, input_precision="ieee")
        tl.store(parts + part[:, None] * D + d[None, :], total, mask=(takes > 0)[:, None] & (d < D)[None, :])
