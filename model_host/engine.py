"""The engine: `submit` a request, read a `Generation`; one owner thread runs all requests together, step by step.

Owns: the thread, the queue, what becomes of each step's logits, and the work at rest. A request reuses the latents of every prompt and
answer before it that begins with the same ids, exactly: they were computed for the very same ids at the very same positions. Where
it allows, it takes over others too (`Reuse.SHIFTED`); then the exact ones are computed once nobody wants anything.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import llguidance
import torch
from torch import Tensor

from model_host.catalogue import without_infilling
from model_host.checkpoints import release_memory
from model_host.config import ModelConfig
from model_host.drafts import Drafter, Pay
from model_host.errors import CheckpointError, EngineClosed, EngineError, RankLost, RequestError
from model_host.generation import (
    REPOSITORY_TOKENS,
    Chat,
    Cost,
    Facts,
    Finish,
    Generation,
    Priority,
    Progress,
    Request,
    Reuse,
    TokenLogprob,
)
from model_host.grammar import GrammarGuide, vocabulary_of
from model_host.pages import PAGE_TOKENS, Ids, PagePool, pages_for, shared
from model_host.reuse.shifted import Source
from model_host.runner import Kernels, Runner, choose, load
from model_host.sampling import Sampler, logprobs
from model_host.scheduler import Part, Scheduler, Sequence
from model_host.tiers import NEWS_TOKENS, DiskTier, RamTier, Tier, is_news, key_of
from model_host.tokenizer import Encoded, TextDecoder, Tokenizer

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Memory for latents, where nobody says otherwise: 200,000 tokens of the starter in float32, 34,000 of Coder-V2-Lite in bfloat16."""
DRAFT_TOKENS = 4
PAUSE_S = 1.0
"""Whoever asks nothing for so long leaves time for keeping things."""
CLOSE_CALL_NATS = 0.05
"""About as much do shifted latents move the lead of one token over the next (docs/log.md): a smaller one is left to exact latents."""
LEAST_PARAMETERS = 1_000_000_000
"""A smaller model, such as the starter, loses a little by what it is told of other files, at most places (docs/log.md)."""
MAX_INEXACT = 8
"""So many prompts wait for being computed exactly."""
CHUNK_S = 0.2
"""About how long a chunk of a prompt may take: nobody waits longer than that for a step, be it to begin or to stop."""
CLOSING_S = 2.0
"""How long a step may take that is waited for when the engine is closed; a longer one waits for a process of the model."""
FIRST_CHUNK_TOKENS, MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 256, 64, 4096


@dataclass(frozen=True, slots=True)
class Disk:
    """Where on disk latents may be kept, and how much of them."""

    folder: Path
    max_bytes: int


def load_engine(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    kernels: Kernels = "auto",
    cache_bytes: int = CACHE_BYTES,
    ram_bytes: int = 0,
    disk: Disk | None = None,
    progress: Progress = lambda what, share: None,
) -> "LocalEngine":
    """Reads the checkpoint in `folder` (tokenizer first: it fails fast) and starts its engine. Raises CheckpointError.

    Latents lie in `cache_bytes` of the device; those that it loses stay in `ram_bytes` of the computer's memory, where that is another, and
    on `disk`, where one is given. Where the weights leave less, it is less.
    """
    started = time.monotonic()
    tokenizer = Tokenizer(folder)
    progress("reading weights", 0.0)
    form = choose(ModelConfig.read(folder), device=device, dtype=dtype, kernels=kernels)
    if form.cache_bytes is not None and form.cache_bytes < cache_bytes:
        log.warning(
            "The weights leave room for %d MB of cache, of the %d that cache_mb allows.", form.cache_bytes // 10**6, cache_bytes // 10**6
        )
        cache_bytes = form.cache_bytes
    ram_bytes = ram_bytes if form.ram_bytes is None else min(ram_bytes, form.ram_bytes)
    try:
        model = load(folder, device=device, dtype=dtype, threads=threads, kernels=kernels, progress=progress)
        runner = Runner(model, cache_bytes)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CheckpointError(
            "The memory that was free when loading began was not there any more: end what else uses it, or lower cache_mb;"
            " `deepseek-lsp doctor` says what is left."
        ) from error
    if tokenizer.bos_id != model.config.bos_token_id:
        raise CheckpointError(f"{folder}: tokenizer and config.json disagree on the beginning-of-sentence token: they are of two models.")
    facts = Facts(
        checkpoint=str(folder),
        device=str(model.device),
        dtype=model.precision,
        parameters=model.config.parameters,
        weight_bytes=model.weight_bytes,
        context_tokens=model.config.max_position_embeddings,
        without_fim=None if tokenizer.has_fim else without_infilling(folder),
        without_chat=tokenizer.without_chat,
        load_s=time.monotonic() - started,
        repository_tokens=REPOSITORY_TOKENS if model.config.parameters >= LEAST_PARAMETERS else 0,
        cache_bytes=runner.cache_bytes,
        cache_tokens=runner.pages * PAGE_TOKENS,
    )
    tiers: list[Tier] = [RamTier(ram_bytes)] if ram_bytes and model.device.type != "cpu" else []
    if disk:
        tiers.append(DiskTier(disk.folder, key_of(folder, model.precision, model.latent_dtype, type(model).__name__), disk.max_bytes))
    return LocalEngine(runner, tokenizer, facts, tiers)


@dataclass(eq=False, slots=True, kw_only=True)
class Answer:
    """A request at work: its sequence, and how ids become text."""

    request: Request
    generation: Generation
    sequence: Sequence
    sampler: Sampler
    decoder: TextDecoder
    guide: GrammarGuide | None
    drafter: Drafter
    submitted_at: float
    started_at: float = 0.0
    first_token_at: float = 0.0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def cost(self, finish: Finish) -> Cost:
        ended_at = time.monotonic()
        cached, shifted = max(self.sequence.cached, 0), self.sequence.shifted
        done = self.sequence.prompt_tokens if self.new_tokens else min(self.sequence.computed, self.sequence.prompt_tokens)
        return Cost(
            finish=finish,
            cached_tokens=cached,
            shifted_tokens=shifted,
            settled_tokens=self.sequence.settled,
            computed_tokens=max(done - cached - shifted, 0),
            new_tokens=self.new_tokens,
            queued_s=(self.started_at or ended_at) - self.submitted_at,
            first_token_s=self.first_token_at - self.started_at if self.new_tokens else 0.0,
            decode_s=ended_at - self.first_token_at if self.new_tokens else 0.0,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )


Job = tuple[Request, Generation, float]
"""A request, where its answer goes, and when it was submitted."""


class LocalEngine:
    """The `Engine` of this machine. Satisfies model_host.generation.Engine."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, facts: Facts, tiers: tuple[Tier, ...] | list[Tier] = ()) -> None:
        self._runner, self._tokenizer, self._facts, self._tiers = runner, tokenizer, facts, tiers
        self._scheduler = Scheduler(PagePool(runner.pages), FIRST_CHUNK_TOKENS)
        self._pay = Pay()
        self._answers: list[Answer] = []
        self._inexact: list[Source] = []
        """Prompts whose latents are partly not exact, oldest first."""
        self._resting: Sequence | None = None
        """The one of them that is being computed exactly."""
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.rested = threading.Event()
        """Set while there is nothing left to be done, not even at rest."""
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
        if self._closed.is_set():  # and nobody may look into the queue any more
            generation.feed(EngineClosed("The engine was shut down."))
        return generation

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            self._runner.stop()
            self._thread.join()
        for tier in self._tiers:
            tier.close()
        self.__dict__.pop("_runner", None)  # the weights and the latents
        release_memory()

    def _work(self) -> None:
        """The owner thread's life."""
        while not self._closed.is_set():
            try:
                self._take_in()
                self._step() if self._answers else self._rest()
            except RankLost as error:
                self._end_all(EngineClosed("The engine was shut down.") if self._closed.is_set() else error)
            except EngineError as error:
                self._fail_all(error)
            except torch.OutOfMemoryError:
                self._fail_all(RequestError("The device ran out of memory: lower cache_mb, or choose a smaller model."))
            except Exception as error:
                self._fail_all(EngineError(f"The engine failed on this request: {error!r}. Please report it."))
        try:
            self._keep()
        finally:
            while not self._queue.empty():
                if job := self._queue.get():
                    job[1].feed(EngineClosed("The engine was shut down."))
            self._fail_all(EngineClosed("The engine was shut down."))

    def _take_in(self) -> None:
        """Starts what was submitted; waits for something when there is nothing to do."""
        while not (self._answers or self._inexact) or not self._queue.empty():
            job = self._wait()
            if job is None:
                return
            request, generation, submitted_at = job
            try:
                self._stop_resting()
                self._start(request, generation, submitted_at)
            except EngineError as error:
                generation.feed(error)
            except Exception as error:
                generation.feed(EngineError(f"The engine failed on this request: {error!r}. Please report it."))

    def _wait(self) -> Job | None:
        """The next thing to do. After a pause, what is new since the last one is kept in the tiers."""
        if self._queue.empty() and not self._inexact:
            if self._tiers:
                try:
                    return self._queue.get(timeout=PAUSE_S)
                except queue.Empty:
                    self._keep()
            self.rested.set()
        job = self._queue.get()
        self.rested.clear()
        return job

    def _keep(self) -> None:
        """Gives the tiers what they have not got of the last prompts, where there is memory for a copy."""
        for tier in self._tiers:
            for ids in reversed(self._scheduler.prompts):
                pages = self._scheduler.pages_of(ids)
                whole = ids[: len(pages) * PAGE_TOKENS]
                try:
                    if is_news(tier, whole):
                        tier.keep(whole, self._runner.take_out(pages))
                except (RuntimeError, MemoryError) as error:
                    log.warning("A prompt's latents were not kept: %s", error)

    def _restore(self, ids: Ids) -> None:
        """Brings latents back from a tier, where one has a good deal more of the prompt than the device, and this has memory for them."""
        for tier in self._tiers:
            kept, tokens = tier.longest(ids)
            if tokens < len(self._scheduler.pages_of(ids)) * PAGE_TOKENS + NEWS_TOKENS:
                continue
            latents = tier.get(kept)
            if latents and self._runner.fits(latents, len(kept)):
                try:
                    self._scheduler.restore(kept, partial(self._runner.put_in, latents=latents))
                except (RuntimeError, MemoryError) as error:
                    log.warning("A prompt's latents were not taken back, it is computed: %s", error)

    def _start(self, request: Request, generation: Generation, submitted_at: float) -> None:
        prompt = self._encode(request)
        if request.reuse is not Reuse.OFF:
            self._restore(prompt.ids)
        answer = Answer(
            request=request,
            generation=generation,
            sequence=Sequence(
                ids=list(prompt.ids), prompt_tokens=len(prompt.ids), priority=request.priority, reuse=request.reuse, hole=prompt.hole
            ),
            sampler=Sampler(request.sampling, prompt.ids),
            decoder=TextDecoder(self._tokenizer, prompt.must_begin, request.stop),
            guide=GrammarGuide(self._vocabulary, request.grammar) if request.grammar else None,
            drafter=Drafter(prompt.ids, self._tokenizer.encode(request.likely)),
            submitted_at=submitted_at,
        )
        self._answers.append(answer)
        self._scheduler.add(answer.sequence)

    def _encode(self, request: Request) -> Encoded:
        """The prompt's ids. A hole's surroundings are cut to what fits; a question that does not fit is refused."""
        room = min(self._facts.context_tokens, self._runner.pages * PAGE_TOKENS) - request.max_new_tokens
        if not isinstance(request.prompt, Chat):
            # A grammar speaks of what is added, which a word begun anew would not obey.
            return self._tokenizer.encode_fim(request.prompt, max_tokens=room, heal=request.grammar is None)
        prompt = self._tokenizer.encode_chat(request.prompt)
        if len(prompt.ids) > self._facts.context_tokens - request.max_new_tokens:
            raise RequestError(
                f"The question is {len(prompt.ids):,} tokens long, and this model has room for {room:,} beside an answer of"
                f" {request.max_new_tokens:,}: select less code."
            )
        if len(prompt.ids) > room:
            page_bytes = self._facts.cache_bytes // self._runner.pages
            needed = pages_for(len(prompt.ids) + request.max_new_tokens) * page_bytes
            raise RequestError(
                f"The question and its answer need {needed / 1e6:,.0f} MB of cache for {len(prompt.ids) + request.max_new_tokens:,}"
                f" tokens, and {self._facts.cache_bytes / 1e6:,.0f} MB are set aside: select less code, or raise cache_mb."
            )
        return prompt

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        return vocabulary_of(self._tokenizer)

    def _step(self) -> None:
        """Plans, runs the model once, and hands every answer its logits."""
        for answer in [answer for answer in self._answers if answer.generation.is_cancelled]:
            self._end(answer, Finish.CANCELLED)
        self._draft()
        plan = self._scheduler.plan()
        for what in plan.taken_over:
            self._runner.take_over(what)
        if not plan.parts:
            return
        started = time.monotonic()
        answers = {answer.sequence: answer for answer in self._answers}
        for part in plan.parts:
            answers[part.sequence].started_at = answers[part.sequence].started_at or started
        logits = self._runner.run(plan.step())  # [wanted, V]
        self._learn(plan.parts, time.monotonic() - started)
        row = 0
        for part in plan.parts:
            rows = part.sequence.drafted + 1 if part.is_complete else 0
            self._continue(answers[part.sequence], part, logits[row : row + rows])
            row += rows

    def _rest(self) -> None:
        """Computes a chunk of a prompt that was answered from latents that are not exact; the last one first."""
        if not self._inexact:
            return
        if self._resting is None:
            ids = self._inexact[-1].ids
            self._resting = Sequence(ids=list(ids), prompt_tokens=len(ids), priority=Priority.REST)
            self._scheduler.add(self._resting)
        plan = self._scheduler.plan()
        for what in plan.taken_over:
            self._runner.take_over(what)
        self._runner.run(plan.step())
        for part in plan.parts:
            is_done = part.is_complete
            self._scheduler.advance(part, [])
            if is_done:
                self._stop_resting()
                self._inexact.pop()

    def _stop_resting(self) -> None:
        """Makes way for a request; what was computed stays, and resting goes on from there."""
        if self._resting is not None:
            self._scheduler.remove(self._resting)
            self._resting = None

    def _draft(self) -> None:
        """Puts guesses behind the sequence that decodes, if it is alone and guessing pays."""
        decoding = [answer for answer in self._answers if answer.sequence.is_decoding]
        if len(decoding) == len(self._answers) == 1 and self._pay.is_worth_it():
            answer = decoding[0]
            room = answer.request.max_new_tokens - answer.new_tokens - 1
            drafts = answer.drafter.propose(min(DRAFT_TOKENS, room)) if answer.new_tokens and not answer.guide else []
            answer.sequence.ids += drafts
            answer.sequence.drafted = len(drafts)
            answer.drafted_tokens += len(drafts)

    def _learn(self, parts: tuple[Part, ...], took_s: float) -> None:
        """Chooses the next prompt chunks' length by how long this one took, and notes what a decode step costs."""
        tokens = max(part.tokens for part in parts)
        if len(parts) == 1 and parts[0].sequence.is_decoding:
            self._pay.note_step(took_s, parts[0].sequence.drafted)
        elif tokens >= MIN_CHUNK_TOKENS:
            affordable = int(tokens * CHUNK_S / took_s)
            self._scheduler.chunk_tokens = min(max(affordable // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)

    def _continue(self, answer: Answer, part: Part, logits: Tensor) -> None:
        """Takes the tokens that logits [drafts + 1, V] give, as far as the drafts were right; none for an unfinished prompt."""
        drafts = part.sequence.ids[len(part.sequence.ids) - part.sequence.drafted :]
        new: list[int] = []
        finish: Finish | None = None
        is_open = False
        for place, row in enumerate(logits):
            if is_open := self._is_open(answer, row):
                break
            token, finish = self._said(answer, row)
            if finish is Finish.END:
                break
            new.append(token)
            if finish or place == len(drafts) or token != drafts[place]:
                break
        if drafts:
            right = shared(tuple(drafts), tuple(new))
            answer.accepted_tokens += right
            self._pay.note_drafts(right)
        self._scheduler.advance(part, new)
        if finish:
            self._end(answer, finish)
        elif is_open:
            self._scheduler.settle(part.sequence)

    def _is_open(self, answer: Answer, logits: Tensor) -> bool:
        """Whether exact latents have to choose among logits [V], and can in the time that the request gives them."""
        if answer.sequence.is_exact or answer.sampler.lead(logits, self._allowed(answer)) >= CLOSE_CALL_NATS:
            return False
        return self._scheduler.missing(answer.sequence) * CHUNK_S / self._scheduler.chunk_tokens <= answer.request.settle_s

    def _allowed(self, answer: Answer) -> Tensor | None:
        """The ids that may come next; None: all."""
        if answer.decoder.must_begin:
            return torch.tensor(self._tokenizer.compatible(answer.decoder.must_begin))
        return answer.guide.allowed() if answer.guide else None

    def _said(self, answer: Answer, logits: Tensor) -> tuple[int, Finish | None]:
        """Chooses one token from logits [V] and feeds its text; says whether the answer is finished with it."""
        token = answer.sampler.choose(logits, self._allowed(answer))
        answer.new_tokens += 1
        answer.first_token_at = answer.first_token_at or time.monotonic()
        if answer.request.logprobs is not None:
            answer.generation.feed(self._logprob(logits, token, answer.request.logprobs))
        if self._tokenizer.is_special(token):
            return token, Finish.END
        answer.drafter.add(token)
        if text := answer.decoder.add(token):
            answer.generation.feed(text)
        if answer.guide:
            answer.guide.add(token)
        if answer.decoder.is_stopped:
            return token, Finish.STOP
        if answer.guide and answer.guide.is_complete:
            return token, Finish.END
        return token, Finish.LENGTH if answer.new_tokens == answer.request.max_new_tokens else None

    def _logprob(self, logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
        chosen, others = logprobs(logits, token, alternatives)
        return TokenLogprob(
            content=self._tokenizer.token_bytes(token),
            logprob=chosen,
            alternatives=tuple((self._tokenizer.token_bytes(id), value) for id, value in others),
        )

    def _end(self, answer: Answer, finish: Finish) -> None:
        cost = answer.cost(finish)
        self._answers.remove(answer)
        if answer.new_tokens and answer.sequence.exact < answer.sequence.prompt_tokens:
            ids = tuple(answer.sequence.ids[: answer.sequence.prompt_tokens])
            self._inexact = [*(other for other in self._inexact if not other.is_same_text(ids)), Source.of(ids)][-MAX_INEXACT:]
        self._scheduler.remove(answer.sequence)
        if finish in (Finish.END, Finish.LENGTH) and (text := answer.decoder.end()):
            answer.generation.feed(text)
        answer.generation.feed(cost)

    def _end_all(self, error: EngineError) -> None:
        """Ends every request with `error`; what they have computed stays. Rest is over too: it might break again and again."""
        self._stop_resting()
        self._inexact.clear()
        for answer in self._answers:
            self._scheduler.remove(answer.sequence)
            answer.generation.feed(error)
        self._answers.clear()

    def _fail_all(self, error: EngineError) -> None:
        """Ends everything with `error`, and begins anew: a step that broke may have left wrong latents behind."""
        for answer in self._answers:
            answer.generation.feed(error)
        self._answers.clear()
        self._inexact.clear()
        self._resting = None
        self._scheduler = Scheduler(PagePool(self._runner.pages), FIRST_CHUNK_TOKENS)
