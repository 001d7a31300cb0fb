"""What the modules of kernels share: sizes of tiles, and which rows of a step have chosen an expert."""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16
TILE: tl.constexpr = tl.constexpr(MAX_ROWS)
"""Rows or heads of a tile: the least that tl.dot takes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a matrix is walked through: `rows` of it by `depth` of its columns at a time."""

    rows: int
    depth: int
    warps: int
    stages: int = 1
    """How many of these parts are on their way from memory at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Sizes that change how fast the kernels are, and nothing else."""

    few_rows: int = 2
    """Up to so many rows the experts are walked through by choice; above, by expert, so that those chosen twice are read once."""
    few_up: Tile = field(default=Tile(4, 1024, 4))
    few_down: Tile = field(default=Tile(4, 2048, 4))
    many_up: Tile = field(default=Tile(32, 128, 4, 4))
    many_down: Tile = field(default=Tile(32, 128, 4, 4))
    linear_rows: int = 1
    """Up to so many rows `linear` is the kernel here; above, torch's matmul."""
    linear: Tile = field(default=Tile(4, 1024, 4))
    packed_rows: int = 2
    """Up to so many rows packed matrices are walked through row by row; above, by tensor cores for all rows together."""
    few8: Tile = field(default=Tile(4, 512, 2, 4))
    few4: Tile = field(default=Tile(8, 512, 2))
    many8: Tile = field(default=Tile(32, 128, 4, 4))
    many4: Tile = field(default=Tile(32, 64, 2, 4))
    """`depth` is always that of a group here."""
    attend: Tile = field(default=Tile(64, 0, 8, 2))
    """`rows` are tokens of context here."""
    programs: int = 128
    """How many parts the contexts of a step are split into, all rows together: about one for each multiprocessor."""


DEFAULT = Tuning()


@triton.jit
def takers(ids, expert, rows, FIRST: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which rows have chosen `expert` of those from FIRST on, [T] of 0 and 1, and as which of their choices, [T]."""
    t, k = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    chosen = tl.load(ids + t[:, None] * K + k[None, :], mask=(t < rows)[:, None] & (k < K)[None, :], other=-1)
    is_it = (chosen == expert + FIRST).to(tl.int32)
    takes = tl.where(expert < E, tl.sum(is_it, axis=1), (t < rows).to(tl.int32))
    which = tl.where(expert < E, tl.sum(is_it * k[None, :], axis=1), K + expert - E)
    return takes, which


@triton.jit
def of_here(ids, row, m, FIRST: tl.constexpr, E: tl.constexpr, K: tl.constexpr):
    """A row's choice m among the E experts from FIRST on, and whether it is one of them. Of the shared ones, which follow: 0 and that
    it is."""
    expert = tl.load(ids + row * K + m, mask=m < K, other=FIRST) - FIRST
    return expert.to(tl.int64), (expert >= 0) & (expert < E)


def parts_for(x: Tensor, count: int, first: int | None) -> Tensor:
    """Memory for `count` parts of every row of x [T, D]; where experts are elsewhere, nobody writes theirs."""
    empty = torch.empty if first is None else torch.zeros
    return empty(len(x), count, x.shape[1], dtype=torch.float32, device=x.device)


def padded(size: int) -> int:
    """The least tile of tl.dot that holds `size`."""
    return max(MAX_ROWS, 1 << (size - 1).bit_length())


def depth_of(tile: Tile, size: int) -> int:
    return min(tile.depth, padded(size))
