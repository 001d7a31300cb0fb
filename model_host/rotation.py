"""Rotary position embedding: how fast each pair of a key turns from one position to the next, and the turning itself.

Owns: the frequencies of a checkpoint, YaRN's among them. Knows nothing of attention or of the cache.
"""

import math

import torch
from torch import Tensor

from model_host.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies [P/2]; with YaRN, the slow ones interpolated (arXiv 2309.00071, section 3.2)."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    fast = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # [P/2]
    if config.yarn is None:
        return fast
    yarn = config.yarn

    def dim_turning(rotations: float) -> float:
        """The dimension that makes `rotations` turns within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_turning(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow_share = ramp.clamp(0, 1)
    return fast * (1 - slow_share) + fast / yarn.factor * slow_share


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i+1) of x [..., T, P] by the complex `rotation` [T, P/2]; computed in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., T, P/2]
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)
