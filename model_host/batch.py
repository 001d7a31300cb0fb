"""What one step of the model runs: the next tokens of one or several sequences. Plain integers, no tensors.

Owns: the contract between who decides what runs (scheduler, engine) and who runs it (the models). Knows nothing of requests.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of one sequence in a step: `tokens` new tokens, the last of its first `context` tokens. A sequence may have several,
    in the order of its tokens; between them lie tokens whose latents are there already."""

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
class Shift:
    """Latents to take over before a step: those of `tokens` tokens from position `source_start` of one sequence on, to position
    `target_start` of another. The rotated part of their keys is turned on by the difference of the positions."""

    source: tuple[int, ...]
    source_start: int
    target: tuple[int, ...]
    target_start: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """All spans of a step; `ids` are their new tokens one after the other, `wanted` the rows of `ids` whose logits are needed."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    wanted: tuple[int, ...]
