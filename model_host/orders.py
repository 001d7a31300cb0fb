"""What rank 0 has the other ranks do, one line each: how they begin, then, in its order, everything it does with the model and its latents.

Owns: the words. Plain integers: no tensors, and nothing of processes.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from model_host.batch import Copy, Shift, Span, Step
from model_host.config import Portion

ASKED = "?"
"""A line for one that comes no further: it says at once where it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What one rank holds, and where."""

    device: str
    portion: Portion
    experts: range
    """Of every layer that has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Everything a rank is told when it starts."""

    folder: str
    precision: str
    dtype: str
    """That is computed in, where it is not the precision."""
    threads: int
    kernels: str
    captures: bool
    """Whether steps run as captured graphs, as they do on all ranks or on none."""
    rank: int
    post: Post
    meeting: str
    """The folder in which the ranks find each other."""
    world: int
    backend: str
    """Of what their sums go over: nccl or gloo."""

    def written(self) -> str:
        return json.dumps(asdict(self), default=lambda numbers: [numbers.start, numbers.stop])

    @classmethod
    def read(cls, line: str) -> "Orders":
        said = json.loads(line)
        post = said["post"]
        portion = Portion(**{name: range(*ends) for name, ends in post["portion"].items()})
        return cls(**said | {"post": Post(device=post["device"], portion=portion, experts=range(*post["experts"]))})


@dataclass(frozen=True, slots=True)
class Begin:
    """Take memory for the latents of so many pages, and make ready for steps."""

    pages: int


@dataclass(frozen=True, slots=True)
class Fill:
    """Take the latents of these pages from rank 0."""

    pages: tuple[int, ...]


Command = Begin | Fill | Copy | Shift | Step
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Begin, Fill, Copy, Shift, Step)}


def written(command: Command) -> str:
    numbers = [getattr(command, field.name) for field in fields(command)]
    return json.dumps([type(command).__name__, *numbers], default=lambda span: [span.tokens, span.context, span.pages])


def read(line: str) -> Command:
    name, *numbers = json.loads(line)
    kind = KINDS[name]
    named = {field.name: tuple(value) if isinstance(value, list) else value for field, value in zip(fields(kind), numbers, strict=True)}
    if kind is Step:
        named["spans"] = tuple(Span(tokens=tokens, context=context, pages=tuple(pages)) for tokens, context, pages in named["spans"])
    command: Command = kind(**named)
    return command
