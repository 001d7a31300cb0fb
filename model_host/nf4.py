"""Weights in NF4 (QLoRA, arXiv 2305.14314, section 3): four bits, a float32 scale for every 64 of them, packed and read by bitsandbytes.

Owns: which of its calls are made. Routed experts lie one after the other in one tensor a layer, which bitsandbytes has no class for.
int4 (`quantized`) is smaller, as exact, and several times as fast: this is for those who want just that format. bitsandbytes is
imported when the first matrix is packed, since that takes seconds.
"""

import logging
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from model_host.errors import CheckpointError
from model_host.quantized import by_expert, rows_together, unfilled

BLOCK = 64
"""Weights that share a scale."""
MISSING = "nf4 is bitsandbytes' format, and that is not installed: pip install 'deepseek-lsp[bitsandbytes]', or choose int4."


def why_unavailable() -> str | None:
    return None if find_spec("bitsandbytes") else MISSING


@cache
def bitsandbytes() -> Any:
    """The library, imported."""
    # Where the package `kernels` is, bitsandbytes fetches code from the hub and runs it; without that it does its own, and complains.
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as library  # noqa: PLC0415  # 2 to 4 s and 200 MB, for one precision
    import bitsandbytes.functional  # noqa: PLC0415

    return library


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 numbers that a block's codes stand for, before its scale [16]."""
    found: Tensor = bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return found


class Nf4Stack(nn.Module):
    """Matrices of one shape, one an expert: [E, rows, columns]. As `quantized.Stack`, which see."""

    def __init__(self, experts: int, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        if columns % BLOCK:
            raise CheckpointError(f"nf4 wants rows of a multiple of {BLOCK} weights, and this model has some of {columns}: choose int4.")
        self.rows, self.columns = rows, columns
        self.codes = unfilled((experts, rows, columns // 2), torch.uint8, device)
        self.scales = unfilled((experts, rows, columns // BLOCK), torch.float32, device)

    def put(self, expert: int, first_row: int, weight: Tensor) -> None:
        quantize = bitsandbytes().functional.quantize_4bit
        for some in weight.to(self.codes.device).split(rows_together(weight.shape[1], self.codes.device)):
            rows = slice(first_row, first_row + len(some))
            codes, state = quantize(some.contiguous(), blocksize=BLOCK, quant_type="nf4")
            self.codes[expert, rows].copy_(codes.view(len(some), -1))
            self.scales[expert, rows].copy_(state.absmax.view(len(some), -1))
            first_row += len(some)

    def product(self, x: Tensor, choices: Tensor) -> Tensor:
        """Row i of x [n, columns] times the matrix of expert choices[i], which ascend -> [n, rows]"""
        return torch.cat([self.times(expert, rows) for expert, rows in by_expert(x, choices)])

    def times(self, expert: int, x: Tensor) -> Tensor:
        """x [n, columns] -> [n, rows]; bitsandbytes unpacks the matrix for several rows, and reads it packed for one."""
        foreign = bitsandbytes()
        state = foreign.functional.QuantState(
            absmax=self.scales[expert].flatten(),
            shape=torch.Size((self.rows, self.columns)),
            dtype=x.dtype,
            code=levels(x.device),
            blocksize=BLOCK,
            quant_type="nf4",
        )
        product: Tensor = foreign.matmul_4bit(x, self.codes[expert].view(-1, 1).t(), state)
        return product


class Nf4Linear(nn.Module):
    """In place of nn.Linear, without bias."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.stack = Nf4Stack(1, rows, columns, device)

    def put(self, weight: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Packs a matrix, or a part of one that begins and ends with a block."""
        self.stack.put(0, 0, weight[rows, columns])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]"""
        product: Tensor = self.stack.times(0, x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return product
