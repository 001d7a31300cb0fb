"""Products with packed matrices as Triton kernels: codes and scales are read as they lie (`model_host.quantized`), once a step.

Owns: `linear` and `experts` of `kernels` where their matrices are packed; plain forms in `plain`. Up to `Tuning.packed_rows` rows are
multiplied one by one by plain threads, more by tensor cores, all together. Scales multiply sums in float32, never the codes, which are
whole numbers and exact in any type.

Four bits become numbers without being converted: put into the last bits of a float that is large enough for these to be its units, from
which that float is subtracted again. Conversions are four times as slow as other operations.
"""

import triton
import triton.language as tl
from torch import Tensor

from model_host.footprint import GROUP_COLUMNS
from model_host.gpu.plain import Matrix
from model_host.gpu.tiles import TILE, Tile, Tuning, depth_of, of_here, parts_for, takers
from model_host.quantized import Packed

GROUP: tl.constexpr = tl.constexpr(GROUP_COLUMNS)
HALF: tl.constexpr = tl.constexpr(GROUP_COLUMNS // 2)
"""Bytes of a whole group of int4."""
UNITS32 = 0x4B000000
"""2^23 in float32, whose last bits are units. Kernels get it as an argument: of a constant that it knows, the assembler makes two
operations of one."""
UNITS16: tl.constexpr = tl.constexpr(0x4300)
"""2^7 in bfloat16, likewise."""


def linear(x: Tensor, weight: Packed, tuning: Tuning) -> Tensor:
    rows, bits = len(x), weight.bits
    size = len(weight.codes)
    out = x.new_empty(rows, size)
    is_few = rows <= tuning.packed_rows
    tile = _tile(tuning, bits, is_few=is_few)
    sizes = {"SIZE": size, "D": weight.columns, "BITS": bits} | _blocks(tile, weight)
    if is_few:
        _few_linear[(triton.cdiv(size, tile.rows), rows)](x, weight.codes, weight.scales, out, UNITS32, **sizes)
    else:
        _many_linear[(triton.cdiv(size, tile.rows),)](x, weight.codes, weight.scales, out, rows, **sizes)
    return out


def experts(
    x: Tensor, ids: Tensor, gate_up: Packed, down: Matrix, shared: tuple[Matrix, Matrix, Matrix] | None, tuning: Tuning,
    first: int | None,
) -> Tensor:  # fmt: skip
    """Parts are float32. The up projections of the shared experts are computed by the same programs, as experts that every row has
    chosen; their down projection as that of one more, which is as wide as they are together."""
    assert isinstance(down, Packed)
    rows, size = x.shape
    number, inner_size, chosen, bits = len(gate_up.codes), down.columns, ids.shape[-1], gate_up.bits
    gate, up, back = shared or (gate_up, gate_up, down)
    assert isinstance(gate, Packed) and isinstance(up, Packed) and isinstance(back, Packed)
    always = back.columns // inner_size if shared else 0
    one_more = 1 if shared else 0
    inner = x.new_empty(rows, chosen + always, inner_size)
    parts = parts_for(x, chosen + one_more, first)
    is_few = rows <= tuning.packed_rows
    tile = _tile(tuning, bits, is_few=is_few)
    sizes = {"D": size, "I": inner_size, "K": chosen, "S": always, "FIRST": first or 0, "E": number, "BITS": bits}
    ups = (gate_up.codes, gate_up.scales, gate.codes, gate.scales, up.codes, up.scales)
    downs = (down.codes, down.scales, back.codes, back.scales)
    up_parts, down_parts = triton.cdiv(inner_size, tile.rows), triton.cdiv(size, tile.rows)
    if is_few:
        _few_up[(rows * (chosen + always), up_parts)](x, ids, *ups, inner, UNITS32, **sizes, **_blocks(tile, gate_up))
        _few_down[(rows * (chosen + one_more), down_parts)](inner, ids, *downs, parts, UNITS32, **sizes, **_blocks(tile, down))
        return parts
    sizes |= {"BLOCK_K": triton.next_power_of_2(chosen)}
    _many_up[(up_parts, number + always)](x, ids, *ups, inner, rows, **sizes, **_blocks(tile, gate_up))
    _many_down[(down_parts, number + one_more)](inner, ids, *downs, parts, rows, **sizes, **_blocks(tile, down))
    return parts


def _tile(tuning: Tuning, bits: int, *, is_few: bool) -> Tile:
    if is_few:
        return tuning.few8 if bits == 8 else tuning.few4
    return tuning.many8 if bits == 8 else tuning.many4


def _blocks(tile: Tile, matrices: Packed) -> dict[str, int]:
    if matrices.bits == 8:
        depth = depth_of(tile, matrices.columns)
    else:
        groups = triton.next_power_of_2(matrices.scales.shape[-1])
        depth = min(max(tile.depth // GROUP_COLUMNS, 1), groups) * GROUP_COLUMNS
    return {"ROWS": tile.rows, "DEPTH": depth, "STAGES": tile.stages, "num_warps": tile.warps}


@triton.jit
def _code_bytes(COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Of one row."""
    return COLUMNS if BITS == 8 else (COLUMNS + 1) // 2


@triton.jit
def _scale_count(COLUMNS: tl.constexpr, BITS: tl.constexpr):
    return 1 if BITS == 8 else (COLUMNS + GROUP - 1) // GROUP


@triton.jit
def _times_one(
    codes, scales, i, live, x, units,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows i of a matrix times one vector at x -> [ROWS]"""
    if BITS == 8:
        total = tl.zeros((ROWS, DEPTH), tl.float32)
        for start in tl.range(0, COLUMNS, DEPTH, num_stages=STAGES):
            d = start + tl.arange(0, DEPTH)
            some = tl.load(x + d, mask=d < COLUMNS, other=0.0).to(tl.float32)
            code = tl.load(codes + i[:, None] * COLUMNS + d[None, :], mask=live[:, None] & (d < COLUMNS)[None, :], other=0)
            total += code.to(tl.float32) * some[None, :]
        out = tl.sum(total, axis=1) * tl.load(scales + i, mask=live, other=0.0).to(tl.float32)
    else:
        G: tl.constexpr = DEPTH // GROUP
        BYTES: tl.constexpr = _code_bytes(COLUMNS, BITS)
        total = tl.zeros((ROWS, G), tl.float32)
        for start in tl.range(0, BYTES, DEPTH // 2, num_stages=STAGES):
            k = start + tl.arange(0, DEPTH // 2)
            low, high, is_there = _columns(k // HALF, k % HALF, COLUMNS)  # [DEPTH / 2] each
            pair = tl.load(codes + i[:, None] * BYTES + k[None, :], mask=live[:, None] & is_there[None, :], other=0).to(tl.int32)
            first = tl.load(x + low, mask=is_there, other=0.0).to(tl.float32)[None, :]
            second = tl.load(x + high, mask=is_there & (high < COLUMNS), other=0.0).to(tl.float32)[None, :]
            g = start // HALF + tl.arange(0, G)
            scale_at = scales + i[:, None] * _scale_count(COLUMNS, BITS) + g[None, :]
            scale = tl.load(scale_at, mask=live[:, None] & (g * GROUP < COLUMNS)[None, :], other=0.0).to(tl.float32)
            lows = ((pair & 15) | units).to(tl.float32, bitcast=True) - (8388608.0 + 8)
            highs = ((pair & 240) | units).to(tl.float32, bitcast=True) - (8388608.0 + 8 * 16)  # 16 times what they are
            sums = tl.sum(tl.reshape(lows * first, (ROWS, G, HALF)), axis=2)
            sums += tl.sum(tl.reshape(highs * second, (ROWS, G, HALF)), axis=2) * 0.0625
            total += sums * scale
        out = tl.sum(total, axis=1)
    return out


@triton.jit
def _columns(g, b, COLUMNS: tl.constexpr):
    """Of bytes b of groups g: the columns in their low and in their high bits, and whether there are such bytes. Only a last group
    that is not whole has fewer than the others."""
    low = b + g * GROUP
    if GROUP * (COLUMNS // GROUP) == COLUMNS:
        high = low + HALF
        is_there = low < COLUMNS
    else:
        half = tl.minimum((COLUMNS + 1 + b - low) // 2, HALF)
        high = low + half
        is_there = b < half
    return low, high, is_there


@triton.jit
def _times_many(
    codes, scales, i, live, x, taken,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows i of a matrix times the vectors at the pointers x [T], where `taken` -> [T, ROWS]"""
    total = tl.zeros((TILE, ROWS), tl.float32)
    if BITS == 8:
        for start in tl.range(0, COLUMNS, DEPTH, num_stages=STAGES):
            d = start + tl.arange(0, DEPTH)
            some = tl.load(x[:, None] + d[None, :], mask=taken[:, None] & (d < COLUMNS)[None, :], other=0.0)  # [T, DEPTH]
            code = tl.load(codes + i[:, None] * COLUMNS + d[None, :], mask=live[:, None] & (d < COLUMNS)[None, :], other=0)
            total = tl.dot(some, tl.trans(code.to(some.dtype)), total, input_precision="ieee")
        total *= tl.load(scales + i, mask=live, other=0.0).to(tl.float32)[None, :]
    else:
        b = tl.arange(0, HALF)
        for g in tl.range(0, _scale_count(COLUMNS, BITS), num_stages=STAGES):
            low, high, is_there = _columns(g, b, COLUMNS)
            at = i[:, None] * _code_bytes(COLUMNS, BITS) + (b + g * HALF)[None, :]
            pair = tl.load(codes + at, mask=live[:, None] & is_there[None, :], other=0)  # [ROWS, 32]
            first = tl.load(x[:, None] + low[None, :], mask=taken[:, None] & is_there[None, :], other=0.0)  # [T, 32]
            second = tl.load(x[:, None] + high[None, :], mask=taken[:, None] & (is_there & (high < COLUMNS))[None, :], other=0.0)
            if first.dtype == tl.bfloat16:
                lows = ((pair.to(tl.int16) & 15) | UNITS16).to(tl.bfloat16, bitcast=True) - (128.0 + 8)
                highs = ((pair.to(tl.int16) >> 4) | UNITS16).to(tl.bfloat16, bitcast=True) - (128.0 + 8)
            else:
                lows, highs = (pair & 15).to(first.dtype) - 8.0, (pair >> 4).to(first.dtype) - 8.0
            part = tl.dot(first, tl.trans(lows), input_precision="ieee")
            part = tl.dot(second, tl.trans(highs), part, input_precision="ieee")
            scale_at = scales + i * _scale_count(COLUMNS, BITS) + g
            total += part * tl.load(scale_at, mask=live, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["units"])
def _few_linear(
    x, codes, scales, out, units,
    SIZE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, o = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = _times_one(codes, scales, o, o < SIZE, x + row * D, units, D, BITS, ROWS, DEPTH, STAGES)
    tl.store(out + row * SIZE + o, total.to(out.dtype.element_ty), mask=o < SIZE)


@triton.jit(do_not_specialize=["rows"])
def _many_linear(
    x, codes, scales, out, rows,
    SIZE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t, o = tl.arange(0, TILE), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = _times_many(codes, scales, o, o < SIZE, x + t * D, t < rows, D, BITS, ROWS, DEPTH, STAGES)
    tl.store(out + t[:, None] * SIZE + o[None, :], total.to(out.dtype.element_ty), mask=(t < rows)[:, None] & (o < SIZE)[None, :])


@triton.jit(do_not_specialize=["units"])
def _few_up(
    x, ids, codes, scales, gate_codes, gate_scales, up_codes, up_scales, inner, units,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each choice and part of I, as in `kernels`."""
    choice, i = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, m = choice // (K + S), choice % (K + S)
    expert, is_here = of_here(ids, row, m, FIRST, E, K)
    live = (i < I) & is_here
    if m < K:
        first = expert * (2 * I)
        c, s = codes + first * _code_bytes(D, BITS), scales + first * _scale_count(D, BITS)
        gates = _times_one(c, s, i, live, x + row * D, units, D, BITS, ROWS, DEPTH, STAGES)
        c, s = c + I * _code_bytes(D, BITS), s + I * _scale_count(D, BITS)
        ups = _times_one(c, s, i, live, x + row * D, units, D, BITS, ROWS, DEPTH, STAGES)
    else:
        first = (m - K).to(tl.int64) * I
        c, s = gate_codes + first * _code_bytes(D, BITS), gate_scales + first * _scale_count(D, BITS)
        gates = _times_one(c, s, i, live, x + row * D, units, D, BITS, ROWS, DEPTH, STAGES)
        c, s = up_codes + first * _code_bytes(D, BITS), up_scales + first * _scale_count(D, BITS)
        ups = _times_one(c, s, i, live, x + row * D, units, D, BITS, ROWS, DEPTH, STAGES)
    out = gates * tl.sigmoid(gates) * ups
    tl.store(inner + choice * I + i, out.to(inner.dtype.element_ty), mask=i < I)


@triton.jit(do_not_specialize=["units"])
def _few_down(
    inner, ids, codes, scales, shared_codes, shared_scales, parts, units,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = K + (1 if S > 0 else 0)
    choice, d = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, m = choice // M, choice % M
    expert, is_here = of_here(ids, row, m, FIRST, E, K)
    live = (d < D) & is_here
    x = inner + (row * (K + S) + m) * I
    if m < K:
        first = expert * D
        c, s = codes + first * _code_bytes(I, BITS), scales + first * _scale_count(I, BITS)
        total = _times_one(c, s, d, live, x, units, I, BITS, ROWS, DEPTH, STAGES)
    else:
        total = _times_one(shared_codes, shared_scales, d, live, x, units, S * I, BITS, ROWS, DEPTH, STAGES)
    tl.store(parts + choice * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _many_up(
    x, ids, codes, scales, gate_codes, gate_scales, up_codes, up_scales, inner, rows,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each expert and part of I, as in `kernels`."""
    expert = tl.program_id(1)
    takes, which = takers(ids, expert, rows, FIRST, E, K, BLOCK_K)
    if tl.max(takes, axis=0) > 0:
        t, i = tl.arange(0, TILE), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live, taken = i < I, takes > 0
        if expert < E:
            first = expert.to(tl.int64) * (2 * I)
            c, s = codes + first * _code_bytes(D, BITS), scales + first * _scale_count(D, BITS)
            gates = _times_many(c, s, i, live, x + t * D, taken, D, BITS, ROWS, DEPTH, STAGES)
            c, s = c + I * _code_bytes(D, BITS), s + I * _scale_count(D, BITS)
            ups = _times_many(c, s, i, live, x + t * D, taken, D, BITS, ROWS, DEPTH, STAGES)
        else:
            first = (expert - E).to(tl.int64) * I
            c, s = gate_codes + first * _code_bytes(D, BITS), gate_scales + first * _scale_count(D, BITS)
            gates = _times_many(c, s, i, live, x + t * D, taken, D, BITS, ROWS, DEPTH, STAGES)
            c, s = up_codes + first * _code_bytes(D, BITS), up_scales + first * _scale_count(D, BITS)
            ups = _times_many(c, s, i, live, x + t * D, taken, D, BITS, ROWS, DEPTH, STAGES)
        out = gates * tl.sigmoid(gates) * ups
        into = inner + (t * (K + S) + which)[:, None] * I + i[None, :]
        tl.store(into, out.to(inner.dtype.element_ty), mask=taken[:, None] & live[None, :])


@triton.jit(do_not_specialize=["rows"])
def _many_down(
    inner, ids, codes, scales, shared_codes, shared_scales, parts, rows,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = K + (1 if S > 0 else 0)
    expert = tl.program_id(1)
    takes, which = takers(ids, expert, rows, FIRST, E, K, BLOCK_K)
    if tl.max(takes, axis=0) > 0:
        t, d = tl.arange(0, TILE), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live, taken = d < D, takes > 0
        x = inner + (t * (K + S) + which) * I
        if expert < E:
            first = expert.to(tl.int64) * D
            c, s = codes + first * _code_bytes(I, BITS), scales + first * _scale_count(I, BITS)
            total = _times_many(c, s, d, live, x, taken, I, BITS, ROWS, DEPTH, STAGES)
        else:
            total = _times_many(shared_codes, shared_scales, d, live, x, taken, S * I, BITS, ROWS, DEPTH, STAGES)
        into = parts + (t * M + which)[:, None] * D + d[None, :]
        tl.store(into, total, mask=taken[:, None] & live[None, :])
