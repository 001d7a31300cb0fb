"""Weights in fewer bits, in plain torch: int8 with a scale a row, int4 with a scale for every 64 columns of a row.

Owns: the packed layout, and products that read it. A matrix is unpacked while it is multiplied with and no longer; never a whole layer.
Knows nothing of the model. `native/forward.cpp` rounds in the same way.

Layout of a matrix [rows, columns]: int8 codes [rows, columns] or two int4 codes a byte [rows, ceil(columns / 2)], each 8 more than it
is; and bfloat16 scales [rows, groups]. A weight is its code times its group's scale. The bytes of a group hold the first half of its
columns in their low bits and the second half in their high bits, so that whoever reads neighbouring bytes needs neighbouring columns of
what they are multiplied with. A last group of n columns takes ceil(n / 2) bytes.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_host.footprint import GROUP_COLUMNS

Bits = Literal[4, 8]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
FEWER_BITS = (*BITS, "nf4")
"""Precisions that weights are brought to while they are loaded."""
SHARES = (0.92, 0.84, 0.76)
"""Tried beside the scale that keeps a group's largest weight, as shares of it: smaller ones cut that weight off and round the others
more finely. The one with the least squared error is taken."""
PACKED_TOGETHER = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Numbers at a time: as many as a CPU's cache holds with what packing makes of them, and on a GPU few enough to leave it its memory."""
UNPACKED_TOGETHER = 1 << 22
GATHERED = 24
"""Rows of up to so many choices take each its own copy of its expert's codes, and one product; more go expert by expert."""


def pack(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> codes and scales, as they lie."""
    together = rows_together(weight.shape[1], weight.device)
    parts = [(_packed8 if bits == 8 else _packed4)(rows.float()) for rows in weight.split(together)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def rows_together(columns: int, device: torch.device) -> int:
    """How many rows of a matrix are packed at a time."""
    return max(PACKED_TOGETHER.get(device.type, 1 << 22) // columns, 1)


def _packed8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()  # [rows, 1]
    return _codes(weight, scales.float(), -127, 127).to(torch.int8), scales


def _packed4(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    grouped = F.pad(weight, (0, -columns % GROUP_COLUMNS)).view(rows, -1, GROUP_COLUMNS)  # [rows, G, 64]
    extreme = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))  # [rows, G, 1]
    best = (extreme / -8).bfloat16().float()  # the largest becomes -8, of which there is one more than of 7
    codes = _codes(grouped, best, -8, 7)
    least = _error(codes, best, grouped)
    for share in SHARES:
        scales = (extreme * (share / -8)).bfloat16().float()
        tried = _codes(grouped, scales, -8, 7)
        error = _error(tried, scales, grouped)
        better = error < least
        least, best = error.where(better, least), scales.where(better, best)
        codes = torch.where(better, tried, codes)
    numbers = (codes + 8).to(torch.uint8)  # [rows, G, 64]
    halves = [_halved(numbers[:, : columns // GROUP_COLUMNS], GROUP_COLUMNS // 2)]
    if left := columns % GROUP_COLUMNS:
        halves.append(_halved(numbers[:, -1:], -(-left // 2)))
    return torch.cat(halves, dim=1), best.squeeze(2).bfloat16()


def _halved(numbers: Tensor, half: int) -> Tensor:
    """The first 2 * half of every group's numbers [rows, G, 64] -> bytes [rows, G * half]"""
    return (numbers[:, :, :half] | numbers[:, :, half : 2 * half] << 4).flatten(1)


def _codes(weight: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    return (weight * scales.where(scales != 0, 1.0).reciprocal()).round_().clamp_(least, most)


def _error(codes: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    off = (codes * scales).sub_(weight)
    squares: Tensor = torch.linalg.vecdot(off, off)
    return squares.unsqueeze(2)  # [rows, G, 1]


def unpack(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weights [..., rows, columns] that codes and scales of any leading dimensions stand for."""
    if scales.shape[-1] == 1 and codes.dtype == torch.int8:
        return codes.to(dtype) * scales.to(dtype)
    whole = columns // GROUP_COLUMNS
    bytes_of_whole = whole * (GROUP_COLUMNS // 2)
    groups, rest = codes[..., :bytes_of_whole].unflatten(-1, (whole, GROUP_COLUMNS // 2)), codes[..., bytes_of_whole:]
    body = torch.cat((groups & 15, groups >> 4), dim=-1).flatten(-2)
    numbers = torch.cat((body, rest & 15, rest >> 4), dim=-1)[..., :columns]
    spread = scales.to(dtype).repeat_interleave(GROUP_COLUMNS, dim=-1)[..., :columns]
    return (numbers.to(dtype) - 8) * spread


class Packed(NamedTuple):
    """Packed matrices as they lie, for whoever reads them so."""

    codes: Tensor
    """[..., rows, columns in fewer bits]"""
    scales: Tensor
    """[..., rows, groups]"""
    columns: int

    @property
    def bits(self) -> Bits:
        return 8 if self.codes.dtype == torch.int8 else 4

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.codes, self.scales, self.columns, dtype)


class Stack(nn.Module):
    """Matrices of one shape, one an expert, plain or packed: [E, rows, columns]."""

    def __init__(self, experts: int, rows: int, columns: int, precision: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.columns, self.bits = columns, BITS.get(precision)
        if self.bits is None:
            self.weight = unfilled((experts, rows, columns), dtype, device)
            return
        width = columns if self.bits == 8 else -(-columns // 2)
        groups = 1 if self.bits == 8 else -(-columns // GROUP_COLUMNS)
        self.codes = unfilled((experts, rows, width), torch.int8 if self.bits == 8 else torch.uint8, device)
        self.scales = unfilled((experts, rows, groups), torch.bfloat16, device)

    @property
    def matrices(self) -> Tensor | Packed:
        return self.weight if self.bits is None else Packed(self.codes, self.scales, self.columns)

    def put(self, expert: int, first_row: int, weight: Tensor) -> None:
        """Packs some rows of one expert's matrix. What is packed is moved to the stack's device first: GPUs pack faster."""
        rows = slice(first_row, first_row + len(weight))
        if self.bits is None:
            self.weight[expert, rows].copy_(weight)
            return
        codes, scales = pack(weight.to(self.codes.device), self.bits)
        self.codes[expert, rows].copy_(codes)
        self.scales[expert, rows].copy_(scales)

    def product(self, x: Tensor, choices: Tensor) -> Tensor:
        """Row i of x [n, columns] times the matrix of expert choices[i], which ascend -> [n, rows]"""
        if len(choices) <= GATHERED:
            if self.bits is None:
                matrices = self.weight[choices]
            else:
                matrices = unpack(self.codes[choices], self.scales[choices], self.columns, x.dtype)
            return torch.bmm(matrices, x.unsqueeze(-1)).squeeze(-1)
        return torch.cat([F.linear(rows, self._matrix(expert, x.dtype)) for expert, rows in by_expert(x, choices)])

    def _matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        if self.bits is None:
            return self.weight[expert]
        return unpack(self.codes[expert], self.scales[expert], self.columns, dtype)


def by_expert(x: Tensor, choices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that some of the ascending choices [n] name, and its rows of x [n, columns]."""
    experts, counts = choices.unique_consecutive(return_counts=True)
    return zip(experts.tolist(), x.split(counts.tolist()), strict=True)


class PackedLinear(nn.Module):
    """In place of nn.Linear, without bias."""

    def __init__(self, rows: int, columns: int, bits: Bits, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = columns, rows, bits
        width = columns if bits == 8 else -(-columns // 2)
        groups = 1 if bits == 8 else -(-columns // GROUP_COLUMNS)
        self.codes = unfilled((rows, width), torch.int8 if bits == 8 else torch.uint8, device)
        self.scales = unfilled((rows, groups), torch.bfloat16, device)

    @property
    def matrix(self) -> Packed:
        return Packed(self.codes, self.scales, self.in_features)

    def put(self, weight: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Packs a matrix, or a part of one, as it is within the whole: in int8 a row's scale is that of all its columns. Groups of int4
        begin anew with the part, so it begins with one of them."""
        weight = weight[rows].to(self.codes.device)
        if self.bits == 8:
            codes, scales = pack(weight, 8)
            codes = codes[:, columns]
        else:
            codes, scales = pack(weight[:, columns], 4)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows], some rows at a time"""
        together = max(UNPACKED_TOGETHER // self.in_features, 1)
        parts = zip(self.codes.split(together), self.scales.split(together), strict=True)
        return torch.cat([F.linear(x, unpack(codes, scales, self.in_features, x.dtype)) for codes, scales in parts], dim=-1)


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Memory for weights in whatever form."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers below a module, by their name in it."""
    for name, inner in module.named_modules():
        if type(inner) is nn.Linear:
            yield name, inner
