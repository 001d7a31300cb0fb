"""What a caller of the model host holds: prompts, Request, Generation, Engine. Values and one async iterator; no torch.

Owns: the contract between those who want text and whoever makes it (the engine of this package, a remote one, a scripted one
in tests). Knows nothing of tokens' ids, caches or devices.
"""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from itertools import accumulate, pairwise
from typing import Literal, Protocol, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Fim:
    """Fill in the middle, between `prefix` and `suffix`; the middle is known to begin with `middle`, and the answer goes on
    behind it. An unfinished word at its end is completed as a word (token healing), never as broken tokens."""

    repository: str = ""
    """What is known of other files, before the prefix. The same for all holes of a workspace, which then share what is computed of it."""
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
    in_template: bool = True
    """False: the messages' text alone, one behind the other, to be gone on with; for checkpoints that never learned to converse."""


class Priority(IntEnum):
    """Who goes first: what a user is looking at while typing, what opened a menu, what was asked for, what may be wanted later."""

    INLINE = 0
    MENU = 1
    CHAT = 2
    BACKGROUND = 3
    REST = 4
    """Only while nothing else is there to be done; the engine's own work."""


class Reuse(StrEnum):
    """What of earlier work a request may take over."""

    OFF = "off"
    EXACT = "exact"
    """Latents computed for the same tokens after the same tokens: the answer is that of a cold run."""
    SHIFTED = "shifted"
    """Also latents of the same tokens after others, as after an edit above the cursor: nearly that. Where they leave a choice between two
    tokens open, the exact ones are computed first (Request.settle_s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn: the likeliest at temperature 0, else by chance among those the limits leave.

    The same seed gives the same text, whatever else the engine does meanwhile (to the bit in float32).
    """

    temperature: float = 0.0
    top_k: int = 0
    """Among so many of the likeliest; 0: all."""
    top_p: float = 1.0
    """Among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Among those at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, logits of tokens that stand in the prompt or the answer are lowered by this factor (arXiv 1909.05858, section 4.1)."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer may look like: a JSON schema, a regular expression, or a Lark grammar, in llguidance's dialects."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: Fim | Chat
    max_new_tokens: int
    sampling: Sampling = Sampling()
    priority: Priority = Priority.INLINE
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these, wherever tokens end."""
    grammar: Grammar | None = None
    likely: str = ""
    """How the answer may well go on, such as the rest of the last suggestion: verified, never taken on trust."""
    reuse: Reuse = Reuse.EXACT
    settle_s: float = math.inf
    """A greedy choice too close for shifted latents waits for exact ones, if they are expected within so long; else it falls as it may."""
    logprobs: int | None = None
    """With how many alternatives each token's log-probability is wanted; None: not at all."""

    def candidates(self, count: int) -> "tuple[Request, ...]":
        """The same request with `count` seeds. Submitted together they share the latents of their prompt."""
        seeds = range(self.sampling.seed, self.sampling.seed + count)
        return tuple(replace(self, sampling=replace(self.sampling, seed=seed)) for seed in seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of an answer: its bytes, its log-probability before any sampling limit, and the likeliest in its place."""

    content: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...]


class Finish(StrEnum):
    END = "end"
    """The model ended its answer, or its grammar was complete."""
    STOP = "stop"
    """One of the request's `stop` strings came."""
    LENGTH = "length"
    """`max_new_tokens`, or the model's context, is full."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one generation cost. cached_tokens + shifted_tokens + computed_tokens = tokens of the prompt."""

    finish: Finish
    cached_tokens: int
    """Reused exactly."""
    computed_tokens: int
    new_tokens: int
    queued_s: float
    first_token_s: float
    """From the start of the work to the first new token; 0 if none came."""
    decode_s: float
    """From the first new token to the last."""
    shifted_tokens: int = 0
    """Reused although they were computed after other tokens: with any, the answer is nearly that of a cold run, and may differ."""
    settled_tokens: int = 0
    """Prompt tokens that were computed exactly in the middle of the answer, because shifted ones left a choice open."""
    drafted_tokens: int = 0
    """Tokens that were guessed from the text and run beside the next one."""
    accepted_tokens: int = 0
    """Guesses that were what the model would have said."""

    @property
    def reuse(self) -> Reuse:
        """The most that was reused."""
        return Reuse.SHIFTED if self.shifted_tokens else Reuse.EXACT if self.cached_tokens else Reuse.OFF

    @property
    def tokens_per_s(self) -> float:
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(slots=True)
class Generation:
    """One running request: an async iterator of text pieces, made and read on one event loop, fed from any thread.

    Iterating raises EngineError when the request failed. `cost` is there once the iteration has ended.
    """

    cost: Cost | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens read so far, where the request asked for them."""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[str | TokenLogprob | Cost | Exception] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _tell: Callable[[], None] = field(default=lambda: None)

    def cancel(self) -> None:
        """Asks the engine to stop within one decode step. Harmless when it has already ended."""
        self._cancelled.set()
        self._tell()

    def when_cancelled(self, tell: Callable[[], None]) -> None:
        """For an engine that does not look at `is_cancelled` between its steps: `tell` is called with every cancellation from now on, in
        whatever thread."""
        self._tell = tell

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def feed(self, item: str | TokenLogprob | Cost | Exception) -> None:
        """For the engine: a piece of text, a token's log-probability before its text, or what ends the generation. A reader that
        is gone counts as a cancellation."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)
        except RuntimeError:  # the loop is closed
            self.cancel()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self.cost is not None:
            raise StopAsyncIteration
        while isinstance(item := await self._pieces.get(), TokenLogprob):
            self.logprobs.append(item)
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


REPOSITORY_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an engine runs, for status, log and doctor."""

    checkpoint: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    context_tokens: int
    load_s: float
    without_fim: str | None = None
    """Why it cannot fill in the middle, a sentence for the user; None when it can."""
    without_chat: str | None = None
    """Why it does not converse, a sentence for the user; None when it does."""
    repository_tokens: int = REPOSITORY_TOKENS
    """How much about other files it is told, where the user does not say."""
    cache_bytes: int = 0
    """Memory for latents."""
    cache_tokens: int = 0
    """How many tokens that holds."""


class Engine(Protocol):
    @property
    def facts(self) -> Facts: ...

    def submit(self, request: Request) -> Generation:
        """Queues the request; to be called on the event loop that will read the answer."""

    def close(self) -> None:
        """Ends running generations with EngineClosed and frees the memory."""


Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1; from any thread."""


def stages(progress: Progress, sizes: Sequence[float]) -> list[Progress]:
    """One progress each for pieces of work of such sizes, done one after the other."""
    total = sum(sizes)

    def stage(begin: float, end: float) -> Progress:
        return lambda what, share: progress(what, (begin + share * (end - begin)) / total)

    return [stage(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0.0))]
