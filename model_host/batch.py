"""What one step of the model runs: the next tokens of one or several sequences. Plain integers, no tensors.

Owns: the contract between who decides what runs (scheduler, engine) and who runs it (the models). Knows nothing of requests.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One sequence's part of a step: its next `tokens` tokens, after which it is `context` tokens long."""

    tokens: int
    context: int
    pages: tuple[int, ...]
    """The pages that hold its `context` tokens, the new ones included; only the last may be partly filled."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Latents to copy before a step: those of the first `tokens` tokens of page `source`, into page `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """All spans of a step; `ids` are their new tokens one after the other, `wanted` the rows of `ids` whose logits are needed."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    wanted: tuple[int, ...]
