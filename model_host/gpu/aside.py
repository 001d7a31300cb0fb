"""What the CPU computes while a GPU runs a layer: the routed experts that lie in its memory.

Owns: the buffers that go there and back, at the same addresses in every step, since captured graphs hold them. Knows nothing of graphs:
a layer says `send`, whoever runs it calls `sent` behind that and `compute` before what needs the result.
"""

import torch
from torch import Tensor

from model_host.config import ModelConfig
from model_host.experts import Spread


class Aside:
    """Of one model; used by the thread that runs its steps."""

    def __init__(self, spread: Spread, config: ModelConfig, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._spread = spread
        is_gpu, hidden, chosen = device.type == "cuda", config.hidden_size, config.num_experts_per_tok or 0
        self._x = torch.zeros(max_rows, hidden, dtype=dtype, pin_memory=is_gpu)
        self._weights = torch.zeros(max_rows, chosen, pin_memory=is_gpu)
        self._ids = torch.zeros(max_rows, chosen, dtype=torch.int32, pin_memory=is_gpu)
        self._made = torch.zeros(max_rows, hidden, pin_memory=is_gpu)
        self.back = torch.zeros(max_rows, hidden, device=device)
        """What `compute` made of a layer's rows, float32 [max_rows, D]."""
        self._is_there = torch.cuda.Event() if is_gpu else None

    def send(self, x: Tensor, shares: Tensor, ids: Tensor) -> None:
        """A layer's rows x [T, D], and what its gate chose: ids [T, K] and their shares, the first K of [T, M]."""
        rows = len(x)
        self._x[:rows].copy_(x, non_blocking=True)
        self._weights[:rows].copy_(shares[:, : ids.shape[1]].contiguous(), non_blocking=True)
        self._ids[:rows].copy_(ids, non_blocking=True)

    def sent(self) -> None:
        """To be called once what was sent is under way, and before anything else is given to the device."""
        if self._is_there is not None:
            self._is_there.record()

    def compute(self, layer: int, tokens: int, rows: int) -> None:
        """The layer's experts here, for the first `tokens` of `rows`. The rows behind them repeat the first one."""
        if self._is_there is not None:
            self._is_there.synchronize()
        made = self._spread.elsewhere(layer, self._x[:tokens], self._weights[:tokens], self._ids[:tokens])
        self._made[:tokens] = made
        self._made[tokens:rows] = made[0]
        self.back[:rows].copy_(self._made[:rows], non_blocking=True)
