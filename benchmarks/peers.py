"""Engines to hold against each other, each in a process of its own, with random weights of the same shape.

Owns: how a prompt is read and a token decoded by each, and what memory that took. benchmarks.engine asks and compares.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.llama_cpp_peer import LlamaCpp
from model_host.batch import Span, Step
from model_host.config import ModelConfig
from model_host.latents import LatentPool
from model_host.native.model import NativeModel
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.runner import Runner

CHUNK_TOKENS = 512
"""Of a prompt, as the engine cuts it on a CPU."""
ROOM_TOKENS = 64
"""For decoding, behind the longest context."""


class Peer(Protocol):
    """One sequence that grows."""

    weight_bytes: int

    def prefill(self, tokens: int) -> None:
        """Begins anew with a prompt of `tokens` tokens."""
        ...

    def decode(self) -> None:
        """Chooses one more token, greedily."""
        ...


class Ours:
    """The model host below the scheduler: steps on a runner."""

    def __init__(self, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> None:
        model = NativeModel.random(config, precision, seed=0, threads=threads)
        self.weight_bytes = model.weight_bytes
        page_bytes = LatentPool.page_bytes(config, model.latent_dtype)
        self._runner = Runner(model, pages_for(most_tokens + ROOM_TOKENS) * page_bytes)
        self._length, self._next, self._vocab = 0, 0, config.vocab_size

    def prefill(self, tokens: int) -> None:
        self._length = 0
        ids = [7 * place % self._vocab for place in range(tokens)]
        for start in range(0, tokens, CHUNK_TOKENS):
            self._run(ids[start : start + CHUNK_TOKENS], is_last=start + CHUNK_TOKENS >= tokens)

    def decode(self) -> None:
        self._run([self._next], is_last=True)

    def _run(self, ids: list[int], is_last: bool) -> None:
        self._length += len(ids)
        span = Span(tokens=len(ids), context=self._length, pages=tuple(range(pages_for(self._length))))
        logits = self._runner.run(Step(ids=tuple(ids), spans=(span,), wanted=(len(ids) - 1,) if is_last else ()))
        if is_last:
            self._next = int(logits[0].argmax())


class Transformers:
    """The native DeepSeek-V2 of transformers, called as its own generate does."""

    def __init__(self, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> None:
        from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache  # noqa: PLC0415  # not needed by ours

        torch.set_num_threads(threads)
        fields = config.model_dump(exclude={"yarn", "model_type"})
        theirs = DeepseekV2Config(**fields, num_key_value_heads=config.num_attention_heads)
        torch.set_default_dtype(getattr(torch, precision))
        self._model = DeepseekV2ForCausalLM(theirs).eval()
        torch.set_default_dtype(torch.float32)
        for parameter in self._model.parameters():
            if parameter.dim() > 1:  # unit gain, so that routing and attention are not degenerate
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        self.weight_bytes = sum(parameter.nbytes for parameter in self._model.parameters())
        self._new_cache, self._vocab = DynamicCache, config.vocab_size
        self._cache: Any = None
        self._next = torch.zeros(1, 1, dtype=torch.long)

    def prefill(self, tokens: int) -> None:
        self._cache = self._new_cache()
        self._run(torch.tensor([[7 * place % self._vocab for place in range(tokens)]]))

    def decode(self) -> None:
        self._run(self._next)

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> None:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = out.logits[:, -1:].argmax(-1)


KINDS: dict[str, Callable[[ModelConfig, str, int, int], Peer]] = {"ours": Ours, "transformers": Transformers, "llama_cpp": LlamaCpp}


@dataclass(frozen=True, slots=True)
class Timing:
    prefill_s: float
    decode_s: float
    """Of one token, the median."""
    bytes_above: int
    """Peak memory beyond what the process had with its weights loaded."""


class Worker:
    """A peer in its process."""

    def __init__(self, kind: str, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, config, precision, threads, most_tokens), daemon=True)
        self._process.start()
        self.weight_bytes: int = self._pipe.recv()

    def time(self, context_tokens: int, decode_tokens: int) -> Timing:
        """Reads a prompt of `context_tokens`, then decodes."""
        self._pipe.send((context_tokens, decode_tokens))
        timing: Timing = self._pipe.recv()
        return timing

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


@contextmanager
def working(kind: str, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> Iterator[Worker]:
    worker = Worker(kind, config, precision, threads, most_tokens)
    try:
        yield worker
    finally:
        worker.close()


def _serve(pipe: Connection, kind: str, config: ModelConfig, precision: str, threads: int, most_tokens: int) -> None:
    peer = KINDS[kind](config, precision, threads, most_tokens)
    peer.prefill(PAGE_TOKENS)
    peer.decode()
    pipe.send(peer.weight_bytes)
    while asked := pipe.recv():
        context_tokens, decode_tokens = asked
        before = _reset_peak()
        started = time.perf_counter()
        peer.prefill(context_tokens)
        prefill_s = time.perf_counter() - started
        took = []
        for _ in range(decode_tokens):
            started = time.perf_counter()
            peer.decode()
            took.append(time.perf_counter() - started)
        pipe.send(Timing(prefill_s, sorted(took)[len(took) // 2], _peak_bytes() - before))


def _reset_peak() -> int:
    """Resident bytes now, from which the next peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
