"""The latent cache of one sequence: c_kv and k_pe of every layer, in two tensors that grow by doubling.

Owns: the memory and how many tokens are valid. Knows nothing of token ids or of who reuses what. Costs
(kv_lora_rank + qk_rope_head_dim) numbers per token and layer: 31,104 bytes a token for Coder-V2-Lite in bfloat16.
"""

import torch
from torch import Tensor

from model_host.config import ModelConfig

FIRST_CAPACITY = 1024


class LatentCache:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        layers = config.num_hidden_layers
        self._c_kv = torch.empty(layers, FIRST_CAPACITY, config.kv_lora_rank, dtype=dtype, device=device)
        self._k_pe = torch.empty(layers, FIRST_CAPACITY, config.qk_rope_head_dim, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return self._c_kv.nbytes + self._k_pe.nbytes

    def extend(self, layer: int, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's latents [T, R], [T, P] behind the valid ones; returns all of that layer's, [S, R] and [S, P].

        The tokens count as cached only after `advance`, once every layer has written.
        """
        end = self.length + len(c_kv)
        if end > self._c_kv.shape[1]:
            self._grow(end)
        self._c_kv[layer, self.length : end] = c_kv
        self._k_pe[layer, self.length : end] = k_pe
        return self._c_kv[layer, :end], self._k_pe[layer, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first `length` tokens."""
        assert length <= self.length
        self.length = length

    def _grow(self, needed: int) -> None:
        capacity = self._c_kv.shape[1]
        while capacity < needed:
            capacity *= 2
        for name in ("_c_kv", "_k_pe"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, : self.length] = old[:, : self.length]
            setattr(self, name, new)
