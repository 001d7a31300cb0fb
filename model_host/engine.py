"""The engine: `submit` a request, read a `Generation`; one owner thread does all the work, one request after the other.

Owns: the thread, the queue, and the latent caches of the last few prompts. A request reuses the cache that shares the longest
prefix of ids with its prompt, exactly: what is cached was computed for the very same ids at the very same positions.
"""

import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model_host.checkpoints import load_model
from model_host.errors import CheckpointError, EngineClosed, EngineError, RequestError
from model_host.generation import Chat, Cost, Facts, Finish, Generation, Progress, Request
from model_host.latents import LatentCache
from model_host.runner import Runner
from model_host.sampling import Sampler
from model_host.tokenizer import Encoded, TextDecoder, Tokenizer

MAX_LINEAGES = 4
"""Prompts whose latents are kept. One each for a few files between which a user goes back and forth."""
KEPT_SHARE = 0.5
"""A prompt that shares less than this of a cached one gets a cache of its own while there is room."""


@dataclass
class Lineage:
    """A latent cache and the ids it was computed for."""

    cache: LatentCache
    ids: list[int] = field(default_factory=list)
    used_at: float = 0.0

    def shared(self, ids: tuple[int, ...]) -> int:
        """Leading ids in common with `ids`, at most all but the last one, whose logits have to be computed."""
        limit = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(limit) if self.ids[i] != ids[i]), limit)


def load_engine(folder: Path, *, device: str, dtype: str, threads: int, progress: Progress) -> "LocalEngine":
    """Reads the checkpoint in `folder` (tokenizer first: it fails fast) and starts its engine. Raises CheckpointError."""
    started = time.monotonic()
    if threads:
        torch.set_num_threads(threads)
    tokenizer = Tokenizer(folder)
    progress("reading weights", 0.0)
    model = load_model(folder, device=device, dtype=dtype, progress=progress)
    if tokenizer.bos_id != model.config.bos_token_id:
        raise CheckpointError(f"{folder}: tokenizer and config.json disagree on the beginning-of-sentence token: they are of two models.")
    runner = Runner(model)
    parameters = list(model.parameters())
    facts = Facts(
        checkpoint=str(folder),
        device=str(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.nbytes for p in parameters),
        context_tokens=model.config.max_position_embeddings,
        has_fim=tokenizer.has_fim,
        load_s=time.monotonic() - started,
    )
    return LocalEngine(runner, tokenizer, facts)


class LocalEngine:
    """The `Engine` of this machine. Satisfies model_host.generation.Engine."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, facts: Facts) -> None:
        self._runner, self._tokenizer, self._facts = runner, tokenizer, facts
        self._lineages: list[Lineage] = []
        self._queue: queue.SimpleQueue[tuple[Request, Generation, float] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> Facts:
        return self._facts

    def submit(self, request: Request) -> Generation:
        if self._closed.is_set():
            raise EngineClosed("The engine was shut down.")
        generation = Generation()
        self._queue.put((request, generation, time.monotonic()))
        return generation

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            request, generation, queued_at = job
            try:
                generation.feed(self._serve(request, generation, time.monotonic() - queued_at))
            except EngineError as error:
                generation.feed(error)
            except torch.OutOfMemoryError:
                self._lineages.clear()
                generation.feed(RequestError("The device ran out of memory: lower context_tokens, or choose a smaller model."))
            except Exception as error:
                self._lineages.clear()  # what a broken step left behind must not be reused
                generation.feed(EngineError(f"The engine failed on this request: {error!r}. Please report it."))
        self._lineages.clear()
        while not self._queue.empty():
            if job := self._queue.get():
                job[1].feed(EngineClosed("The engine was shut down."))

    def _serve(self, request: Request, generation: Generation, queued_s: float) -> Cost:
        """One request from its first token to its last."""
        started = time.monotonic()
        prompt = self._encode(request)
        lineage = self._lineage(prompt.ids)
        cached = lineage.cache.length
        logits = self._runner.prefill(prompt.ids[cached:], lineage.cache, lambda: self._stopped(generation))
        lineage.ids = list(prompt.ids[: lineage.cache.length])
        computed = lineage.cache.length - cached
        finish, new, first_at = Finish.CANCELLED, 0, 0.0
        if logits is not None:
            finish, new, first_at = self._decode(request, prompt, logits, lineage, generation)
        ended = time.monotonic()
        return Cost(
            finish=finish,
            cached_tokens=cached,
            computed_tokens=computed,
            new_tokens=new,
            queued_s=queued_s,
            first_token_s=first_at - started if new else 0.0,
            decode_s=ended - first_at if new else 0.0,
        )

    def _encode(self, request: Request) -> Encoded:
        room = self._facts.context_tokens - request.max_new_tokens
        if isinstance(request.prompt, Chat):
            prompt = self._tokenizer.encode_chat(request.prompt)
            if len(prompt.ids) > room:
                raise RequestError(
                    f"The question is {len(prompt.ids):,} tokens long, and this model has room for {room:,}: select less code."
                )
            return prompt
        return self._tokenizer.encode_fim(request.prompt, max_tokens=room)

    def _lineage(self, ids: tuple[int, ...]) -> Lineage:
        """The cache to go on from, cut back to what it shares with `ids`."""
        best = max(self._lineages, key=lambda lineage: lineage.shared(ids), default=None)
        if best is None or best.shared(ids) < KEPT_SHARE * len(best.ids):
            if len(self._lineages) < MAX_LINEAGES:
                best = Lineage(self._runner.new_cache())
                self._lineages.append(best)
            else:
                best = min(self._lineages, key=lambda lineage: lineage.used_at)
        best.used_at = time.monotonic()
        best.cache.rewind(best.shared(ids))
        return best

    def _decode(
        self, request: Request, prompt: Encoded, logits: Tensor, lineage: Lineage, generation: Generation
    ) -> tuple[Finish, int, float]:
        """Samples and runs token after token; returns why it ended, how many came, and when the first one did."""
        sampler = Sampler(request.sampling)
        decoder = TextDecoder(self._tokenizer, prompt.must_begin)
        first_at = 0.0
        for count in range(request.max_new_tokens):
            if self._stopped(generation):
                return Finish.CANCELLED, count, first_at
            allowed = self._tokenizer.compatible(decoder.must_begin) if decoder.must_begin else None
            token = sampler.choose(logits, allowed)
            first_at = first_at or time.monotonic()
            if self._tokenizer.is_special(token):
                return Finish.END, count + 1, first_at
            if text := decoder.add(token):
                generation.feed(text)
            logits = self._runner.step([token], lineage.cache)
            lineage.ids.append(token)
        return Finish.LENGTH, request.max_new_tokens, first_at

    def _stopped(self, generation: Generation) -> bool:
        if self._closed.is_set():
            raise EngineClosed("The engine was shut down.")
        return generation.is_cancelled
