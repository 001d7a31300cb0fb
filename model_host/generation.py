"""What a caller of the model host holds: prompts, Request, Generation, Engine. Values and one async iterator; no torch.

Owns: the contract between those who want text and whoever makes it (the engine of this package, a remote one, a scripted one
in tests). Knows nothing of tokens' ids, caches or devices.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Fim:
    """Fill in the middle, between `prefix` and `suffix`; the middle is known to begin with `middle`, and the answer goes on
    behind it. An unfinished word at its end is completed as a word (token healing), never as broken tokens."""

    prefix: str
    suffix: str
    middle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, put into the checkpoint's own chat template; the answer is the assistant's next turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Greedy at temperature 0; else softmax over the `top_k` (0: all) most likely tokens within probability `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: Fim | Chat
    max_new_tokens: int
    sampling: Sampling = Sampling()


class Finish(StrEnum):
    END = "end"
    """The model ended its answer."""
    LENGTH = "length"
    """`max_new_tokens`, or the model's context, is full."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one generation cost. cached_tokens + computed_tokens = tokens of the prompt."""

    finish: Finish
    cached_tokens: int
    computed_tokens: int
    new_tokens: int
    queued_s: float
    first_token_s: float
    """From the start of the work to the first new token; 0 if none came."""
    decode_s: float
    """From the first new token to the last."""

    @property
    def tokens_per_s(self) -> float:
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(slots=True)
class Generation:
    """One running request: an async iterator of text pieces, made and read on one event loop, fed from any thread.

    Iterating raises EngineError when the request failed. `cost` is there once the iteration has ended.
    """

    cost: Cost | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[str | Cost | Exception] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Asks the engine to stop within one decode step. Harmless when it has already ended."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def feed(self, item: str | Cost | Exception) -> None:
        """For the engine: a piece of text, or what ends the generation. A reader that is gone counts as a cancellation."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)
        except RuntimeError:  # the loop is closed
            self.cancel()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self.cost is not None:
            raise StopAsyncIteration
        item = await self._pieces.get()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Cost):
            self.cost = item
            raise StopAsyncIteration
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def finished(self) -> Cost:
        """Reads on to the end, dropping the text."""
        async for _ in self:
            pass
        assert self.cost is not None
        return self.cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an engine runs, for status, log and doctor."""

    checkpoint: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    context_tokens: int
    has_fim: bool
    load_s: float


class Engine(Protocol):
    @property
    def facts(self) -> Facts: ...

    def submit(self, request: Request) -> Generation:
        """Queues the request; to be called on the event loop that will read the answer."""

    def close(self) -> None:
        """Ends running generations with EngineClosed and frees the memory."""


Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1; from any thread."""
