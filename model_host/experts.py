"""The routed experts of a model where they lie: on one device, on several, in the memory of the CPU.

Owns: what a holder of experts is, the one in plain torch, and summing the parts. Holders know which experts they hold and leave the
others' choices out; a layer's result is the sum of what all of them return, in float32. Knows nothing of files.

Letters in shapes as in models/deepseek_v2.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_host.config import ModelConfig
from model_host.nf4 import Nf4Stack
from model_host.quantized import Stack


class Held(Protocol):
    """Some experts, of every layer that has any."""

    held: range
    """Those it began with."""
    device: torch.device

    @property
    def weight_bytes(self) -> int: ...

    def partial(self, layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, D], weights and experts [T, K] -> float32 [T, D], on any device: the sum over the experts that are here."""
        ...

    def replace(self, layer: int, old: int, new: int, weights: Mapping[str, Tensor]) -> None:
        """Puts another expert, by its matrices gate_proj, up_proj and down_proj, into the place of one that is here. What that raises
        leaves the old one there."""
        ...


class TorchExperts(nn.Module):
    """Experts in plain torch, on any device. Satisfies Held."""

    def __init__(self, config: ModelConfig, held: range, precision: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.held, self.first = held, config.first_k_dense_replace
        self.device, self.inner = device, config.moe_intermediate_size
        hidden, layers = config.hidden_size, range(self.first, config.num_hidden_layers)
        self.gate_up = nn.ModuleList(stack(len(held), 2 * self.inner, hidden, precision, dtype, device) for _ in layers)
        self.down = nn.ModuleList(stack(len(held), hidden, self.inner, precision, dtype, device) for _ in layers)
        self.dtype = dtype
        self.in_kernels = precision != "nf4"
        """Whether the kernels of captured graphs can read them."""
        self._slots = first_slots(config, held)
        self._slots_there = self._slots.to(device)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def put(self, layer: int, expert: int, kind: str, weight: Tensor) -> None:
        """`kind` as in a checkpoint: gate_proj, up_proj or down_proj."""
        matrices = (self.down if kind == "down_proj" else self.gate_up)[layer - self.first]
        assert isinstance(matrices, Stack | Nf4Stack)
        matrices.put(int(self._slots[layer, expert]), self.inner if kind == "up_proj" else 0, weight)

    def stacks(self, layer: int) -> tuple[Stack | Nf4Stack, Stack | Nf4Stack]:
        """A layer's matrices as they lie: [slots, 2I, D], gate rows before up rows, and [slots, D, I]."""
        gate_up, down = self.gate_up[layer - self.first], self.down[layer - self.first]
        assert isinstance(gate_up, Stack | Nf4Stack) and isinstance(down, Stack | Nf4Stack)
        return gate_up, down

    def replace(self, layer: int, old: int, new: int, weights: Mapping[str, Tensor]) -> None:
        slot = int(self._slots[layer, old])
        kept = [(parameter[slot], parameter[slot].clone()) for matrices in self.stacks(layer) for parameter in matrices.parameters()]
        try:
            for kind, weight in weights.items():
                self.put(layer, old, kind, weight)
        except BaseException:
            for place, before in kept:
                place.copy_(before)
            raise
        for slots in (self._slots, self._slots_there):
            slots[layer, new], slots[layer, old] = slot, -1

    def slots(self, layer: int, experts: Tensor) -> Tensor:
        """Which of a layer's stacks' matrices are those of each of the experts, on this device; -1 for one that is not here."""
        return self._slots_there[layer][experts.long()]

    def partial(self, layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        x, weights, experts = x.to(self.device, self.dtype), weights.to(self.device), experts.to(self.device)
        slots = self.slots(layer, experts)  # [T, K]
        rows, places = (slots >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return torch.zeros(x.shape, dtype=torch.float32, device=self.device)
        choices = slots[rows, places]  # [n]
        order = choices.argsort(stable=True)
        rows, places, choices = rows[order], places[order], choices[order]
        gate_up, down = self.stacks(layer)
        gate, up = gate_up.product(x[rows], choices).chunk(2, dim=-1)  # [n, I] each
        # Each choice in its own place, and summed from there: adding them up as they come is in another order every time on a GPU.
        parts = torch.zeros(*slots.shape, x.shape[-1], dtype=x.dtype, device=x.device)  # [T, K, D]
        parts[rows, places] = down.product(F.silu(gate) * up, choices)
        return torch.bmm(weights.float().unsqueeze(1), parts.float()).squeeze(1)


def stack(experts: int, rows: int, columns: int, precision: str, dtype: torch.dtype, device: torch.device) -> Stack | Nf4Stack:
    if precision == "nf4":
        return Nf4Stack(experts, rows, columns, device)
    return Stack(experts, rows, columns, precision, dtype, device)


def first_slots(config: ModelConfig, held: range) -> Tensor:
    """Where a holder keeps each expert of each layer [L, E]: its place, or -1 for one that is not there."""
    slots = torch.full((config.num_hidden_layers, config.n_routed_experts or 0), -1)
    slots[:, held.start : held.stop] = torch.arange(len(held))
    return slots


class Spread:
    """All holders of a model's experts in this process, together."""

    def __init__(self, here: Sequence[Held]) -> None:
        self.here = tuple(here)
        self.note: Callable[[int, Tensor], None] | None = None
        """Told the choices [T, K] of every layer."""

    @property
    def in_kernels(self) -> TorchExperts | None:
        """The first holder, where kernels of captured graphs can read its experts and all others, if there are any, are the CPU's."""
        first, others = self.here[0] if self.here else None, self.here[1:]
        can = isinstance(first, TorchExperts) and first.in_kernels and all(held.device.type == "cpu" for held in others)
        return first if can and isinstance(first, TorchExperts) else None

    def elsewhere(self, layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """What the other holders make of x [T, D], weights and experts [T, K] -> float32 [T, D] on the CPU."""
        parts = [held.partial(layer, x, weights, experts) for held in self.here[1:]]
        return sum(parts[1:], parts[0])

    def __call__(self, layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, D], weights and experts [T, K] -> [T, D]"""
        if self.note is not None:
            self.note(layer, experts)
        parts = [held.partial(layer, x, weights, experts) for held in self.here]
        out = sum((part.to(x.device) for part in parts), torch.zeros(x.shape, dtype=torch.float32, device=x.device))
        return out.to(x.dtype)


class SpreadLayer(nn.Module):
    """In place of `models.deepseek_v2.Experts`: one layer of a Spread, which is not the model's own."""

    def __init__(self, spread: Spread, layer: int) -> None:
        super().__init__()
        self._spread, self._layer = spread, layer

    @property
    def stacks(self) -> tuple[Stack, Stack, int]:
        """Of the holder that kernels read: as in `TorchExperts.stacks`, and the number of the expert that is first in them."""
        held = self._spread.in_kernels
        assert held is not None
        gate_up, down = held.stacks(self._layer)
        assert isinstance(gate_up, Stack) and isinstance(down, Stack)
        return gate_up, down, held.held.start

    def slots(self, experts: Tensor) -> Tensor:
        """Where in these stacks each of the chosen experts is, of which it takes note; -1 for one that is elsewhere."""
        if self._spread.note is not None:
            self._spread.note(self._layer, experts)
        held = self._spread.in_kernels
        assert held is not None
        return held.slots(self._layer, experts)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self._spread(self._layer, x, weights, experts)


def sinks(held: TorchExperts, config: ModelConfig) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """For every tensor name of a checkpoint that belongs to the experts, where it goes: layer, expert, kind."""
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for expert in held.held:
            for kind in ("gate_proj", "up_proj", "down_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight", (layer, expert, kind)
