"""Which experts are used how often, and moving the most used ones to where they are computed fastest.

Owns: the counts, when a move pays, and swapping two experts of a layer between two holders. Weights come from the checkpoint again, so
that nothing is rounded twice. Where they cannot be read or there is no memory to move them, every expert stays where it is.
"""

import logging
from collections.abc import Callable, Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor

from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.experts import Held

log = logging.getLogger(__name__)

CHECKED_STEPS = 32
MOVES = 2
"""At a time: each reads two experts from their files, which the next step waits for."""
TIMES_HOTTER, MIN_USES = 1.5, 16.0
FADING = 0.9
"""What counts of earlier steps are worth after each check."""

ReadExpert = Callable[[int, int], Mapping[str, Tensor]]
"""A layer's expert from its files: its matrices by their kind."""


class HotExperts:
    """Of two holders of one model's experts: `fast` gets what is used most. Used by one thread."""

    def __init__(self, config: ModelConfig, fast: Held, slow: Held, read: ReadExpert, device: torch.device) -> None:
        self._first, layers = config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace
        self._fast, self._slow, self._read = fast, slow, read
        self._uses = torch.zeros(layers, config.n_routed_experts or 0, device=device)  # [layers, E]
        self._is_fast, self._is_slow = (torch.zeros(self._uses.shape, dtype=torch.bool) for _ in range(2))
        self._is_fast[:, fast.held.start : fast.held.stop] = True
        self._is_slow[:, slow.held.start : slow.held.stop] = True  # others may be in neither: those of other ranks
        self._steps = 0
        self._is_over = False
        """Once a move failed, none is tried again: each would hold up a step and fail the same way."""
        self.moves = 0

    def note(self, layer: int, experts: Tensor) -> None:
        """Counts a layer's choices [T, K], on the device, which nobody waits for."""
        chosen = experts.flatten()
        self._uses[layer - self._first].index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))

    def end_step(self) -> None:
        """Now and then swaps the experts for which that pays most; to be called between steps."""
        self._steps += 1
        if self._steps % CHECKED_STEPS or self._is_over:
            return
        uses = self._uses.cpu()
        self._uses *= FADING
        hottest, hot = uses.masked_fill(~self._is_slow, -1).max(dim=1)  # [layers], among the slow
        coldest, cold = uses.masked_fill(~self._is_fast, torch.inf).min(dim=1)
        gains = (hottest - coldest).where((hottest >= TIMES_HOTTER * coldest) & (hottest >= MIN_USES), 0.0)
        best, rows = gains.topk(min(MOVES, len(gains)))
        try:
            for gain, row in zip(best.tolist(), rows.tolist(), strict=True):
                if gain > 0:
                    self._swap(row, int(hot[row]), int(cold[row]))
        except (OSError, SafetensorError, CheckpointError, MemoryError, torch.OutOfMemoryError) as error:
            self._is_over = True
            log.warning("Experts stay where they are from now on, moving one failed: %s", error)

    def _swap(self, row: int, hot: int, cold: int) -> None:
        """Both are read before either is moved, and the slow holder begins: it can take back what it gave, in its own memory."""
        layer = row + self._first
        rising, falling = self._read(layer, hot), self._read(layer, cold)
        self._slow.replace(layer, hot, cold, falling)
        try:
            self._fast.replace(layer, cold, hot, rising)
        except BaseException:
            self._slow.replace(layer, cold, hot, rising)
            raise
        self._is_fast[row, hot], self._is_fast[row, cold] = True, False
        self._is_slow[row, hot], self._is_slow[row, cold] = False, True
        self.moves += 1
