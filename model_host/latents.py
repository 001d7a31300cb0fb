"""The latent cache: c_kv and k_pe of every token and layer, in two tensors of slots that all sequences share by pages; and
where a step's tokens lie in them.

Owns: the memory. Knows nothing of token ids or of who uses which page (pages.py). Costs (kv_lora_rank + qk_rope_head_dim)
numbers per token and layer: 31,104 bytes a token for Coder-V2-Lite in bfloat16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from model_host.batch import Shift, Step
from model_host.config import ModelConfig
from model_host.pages import PAGE_TOKENS
from model_host.rotation import rope_frequencies, rotate

PAGES_AT_ONCE = 256
"""Taken from or given to a pool at a time, for which the device needs as much memory again: 128 MB of Coder-V2-Lite."""


def few(pages: Sequence[int]) -> Iterator[tuple[list[int], slice]]:
    """The pages, some at a time, and where their tokens lie among those of all."""
    for start in range(0, len(pages), PAGES_AT_ONCE):
        some = list(pages[start : start + PAGES_AT_ONCE])
        yield some, slice(start * PAGE_TOKENS, (start + len(some)) * PAGE_TOKENS)


class LatentPool:
    """Latents of `pages` pages. On a CPU, memory that was never written costs nothing: the system gives it page by page."""

    def __init__(self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        slots = pages * PAGE_TOKENS
        self._frequencies = rope_frequencies(config).to(device)  # [P/2]
        self.c_kv = torch.empty(config.num_hidden_layers, slots, config.kv_lora_rank, dtype=dtype, device=device)  # [L, slots, R]
        self.k_pe = torch.empty(config.num_hidden_layers, slots, config.qk_rope_head_dim, dtype=dtype, device=device)  # [L, slots, P]

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        return PAGE_TOKENS * config.num_hidden_layers * config.latent_dim * dtype.itemsize

    def write(self, layer: int, slots: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
        """Puts latents [T, R] and [T, P] into `slots` [T]."""
        self.c_kv[layer].index_copy_(0, slots, c_kv)
        self.k_pe[layer].index_copy_(0, slots, k_pe)

    def read(self, layer: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The latents in `slots`: [S, R] and [S, P]; a view when the slots are a slice."""
        return self.c_kv[layer, slots], self.k_pe[layer, slots]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` tokens of page `source` into page `target`."""
        a, b = source * PAGE_TOKENS, target * PAGE_TOKENS
        self.c_kv[:, b : b + tokens] = self.c_kv[:, a : a + tokens]
        self.k_pe[:, b : b + tokens] = self.k_pe[:, a : a + tokens]

    def shift(self, shift: Shift) -> None:
        """Copies latents to another position. c_kv has none in it; k_pe, which turns with its position, is turned on by the distance
        (arXiv 2104.09864, section 3.2.2), once: what was shifted is never shifted again, since rounding would add up."""
        distance = shift.target_start - shift.source_start
        turn = torch.polar(torch.ones_like(self._frequencies), distance * self._frequencies)  # [P/2]
        most = PAGES_AT_ONCE * PAGE_TOKENS
        for done in range(0, shift.tokens, most):
            tokens = min(shift.tokens - done, most)
            source = self._slots(shift.source, shift.source_start + done, tokens)
            target = self._slots(shift.target, shift.target_start + done, tokens)
            self.c_kv[:, target] = self.c_kv[:, source]
            self.k_pe[:, target] = rotate(self.k_pe[:, source], turn)

    def take_out(self, pages: list[int]) -> tuple[Tensor, Tensor]:
        """A copy of the latents of whole pages, on the CPU: c_kv [L, T, R] and k_pe [L, T, P]."""
        taken = _room([self], pages)
        self.copy_out(pages, *taken)
        return taken

    def copy_out(self, pages: list[int], c_kv: Tensor, k_pe: Tensor) -> None:
        """Copies the latents of whole pages into tensors of that shape."""
        for some, tokens in few(pages):
            c_kv[:, tokens], k_pe[:, tokens] = self.of_pages(some)

    def of_pages(self, pages: list[int]) -> tuple[Tensor, Tensor]:
        """A copy on the device, of pages that are few."""
        slots = self._slots(tuple(pages), 0, len(pages) * PAGE_TOKENS)
        return self.c_kv[:, slots], self.k_pe[:, slots]

    def put_in(self, pages: list[int], c_kv: Tensor, k_pe: Tensor) -> None:
        """Writes what `take_out` gave into whole pages."""
        for some, tokens in few(pages):
            slots = self._slots(tuple(some), 0, len(some) * PAGE_TOKENS)
            self.c_kv[:, slots] = c_kv[:, tokens].to(self.c_kv.device)
            self.k_pe[:, slots] = k_pe[:, tokens].to(self.k_pe.device)

    def _slots(self, pages: tuple[int, ...], start: int, tokens: int) -> Tensor:
        """Where the tokens from position `start` on lie, [tokens]."""
        positions = torch.arange(start, start + tokens)
        slots = torch.tensor(pages)[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
        return slots.to(self.c_kv.device)


class LayeredPool(LatentPool):
    """Latents of a model whose layers lie on several devices: a pool for each part of them, with the same pages."""

    def __init__(self, parts: Sequence[LatentPool]) -> None:
        self.parts = tuple(parts)

    def copy(self, source: int, target: int, tokens: int) -> None:
        for part in self.parts:
            part.copy(source, target, tokens)

    def shift(self, shift: Shift) -> None:
        for part in self.parts:
            part.shift(shift)

    def take_out(self, pages: list[int]) -> tuple[Tensor, Tensor]:
        c_kv, k_pe = _room(self.parts, pages)
        for part, *own in self._with_parts(c_kv, k_pe):
            part.copy_out(pages, *own)
        return c_kv, k_pe

    def put_in(self, pages: list[int], c_kv: Tensor, k_pe: Tensor) -> None:
        for part, *own in self._with_parts(c_kv, k_pe):
            part.put_in(pages, *own)

    def _with_parts(self, c_kv: Tensor, k_pe: Tensor) -> Iterator[tuple[LatentPool, Tensor, Tensor]]:
        """Each part, and what of the latents of all layers is its own."""
        layers = [len(part.c_kv) for part in self.parts]
        return zip(self.parts, c_kv.split(layers), k_pe.split(layers), strict=True)


def _room(pools: Sequence[LatentPool], pages: list[int]) -> tuple[Tensor, Tensor]:
    """Memory on the CPU for the latents of so many pages, c_kv [L, T, R] and k_pe [L, T, P], of pools whose layers follow each other."""
    layers, tokens, c_kv, k_pe = sum(len(pool.c_kv) for pool in pools), len(pages) * PAGE_TOKENS, pools[0].c_kv, pools[0].k_pe
    return (
        torch.empty(layers, tokens, c_kv.shape[-1], dtype=c_kv.dtype),
        torch.empty(layers, tokens, k_pe.shape[-1], dtype=k_pe.dtype),
    )


@dataclass(frozen=True, slots=True)
class Reach:
    """What one sequence's new tokens attend to."""

    rows: slice
    """The sequence's tokens among those of the step."""
    slots: Tensor | slice
    """Where its context lies, [S]; a slice where the pages follow each other."""
    is_short: bool
    """Whether the new tokens are so few that attention over the latents themselves is cheaper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A step as tensors on a device."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T], where the new latents go
    wanted: Tensor  # [W], rows whose logits are wanted
    reaches: tuple[Reach, ...]

    @classmethod
    def of(cls, step: Step, device: torch.device, short_tokens: int) -> Self:
        """Spans of at most `short_tokens` new tokens are short. All integers go to the device in one copy, which on a GPU nobody
        waits for."""
        within = torch.arange(PAGE_TOKENS)
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        scattered: list[Tensor] = []
        contexts: list[slice | None] = []
        for span in step.spans:
            held = (torch.tensor(span.pages)[:, None] * PAGE_TOKENS + within).flatten()[: span.context]  # [S]
            first = span.pages[0]
            in_a_row = span.pages == tuple(range(first, first + len(span.pages)))
            contexts.append(slice(first * PAGE_TOKENS, first * PAGE_TOKENS + span.context) if in_a_row else None)
            if not in_a_row:
                scattered.append(held)
            positions.append(torch.arange(span.context - span.tokens, span.context))
            slots.append(held[span.context - span.tokens :])
        parts = [torch.tensor(step.ids), torch.cat(positions), torch.cat(slots), torch.tensor(step.wanted, dtype=torch.long), *scattered]
        integers = torch.cat(parts)
        if device.type == "cuda":
            integers = integers.pin_memory()
        on_device = integers.to(device, non_blocking=True).split([len(part) for part in parts])
        rows = [slice(a, b) for a, b in pairwise(accumulate((span.tokens for span in step.spans), initial=0))]
        rest = iter(on_device[4:])
        reaches = (
            Reach(its_rows, next(rest) if context is None else context, span.tokens <= short_tokens)
            for span, its_rows, context in zip(step.spans, rows, contexts, strict=True)
        )
        ids, at, into, wanted = on_device[:4]
        return cls(ids=ids, positions=at, slots=into, wanted=wanted, reaches=tuple(reaches))
