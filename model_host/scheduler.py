"""Who runs next: sequences, their place in line, and the plan of one step. Integers only, no tensors.

Owns: the order (inline before menu before chat before background, then first come), what one step holds, admission to the pages,
and who gives way when they run out. Knows nothing of text, sampling or models.

Every running sequence whose prompt is done decodes in every step. Of prompts, one chunk a step is computed, in that order. While a
more urgent sequence runs, a less urgent prompt gets no chunk, but for one: so a completion is delayed by a chunk at most, and a
chat that asks between keystrokes still gets on.

A sequence takes over what is cached of its beginning; and, if it may, what is cached of earlier prompts and stands in it elsewhere
(reuse.shifted). All its gaps between are computed as one stretch of work, several in one step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from model_host.batch import Copy, Shift, Span, Step
from model_host.generation import Priority, Reuse
from model_host.pages import PAGE_TOKENS, Ids, Match, PagePool, pages_for, shared
from model_host.reuse.shifted import Run, Source, runs

MAX_RUNNING = 16
"""Sequences that decode in one step; more wait."""
MAX_SOURCES = 8
"""So many of the last prompts are looked through for tokens to take over."""
WORTH_TOKENS = 64
"""What is not exact is taken over where it saves at least so many tokens."""
REST_CHUNK_TOKENS = 64
"""Chunks at rest are short: whoever comes waits for one."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One candidate's tokens and where their latents lie."""

    ids: list[int]
    """Prompt, then what was sampled, then drafts to be verified."""
    prompt_tokens: int
    priority: Priority
    reuse: Reuse = Reuse.EXACT
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading ids whose latents are in the pages."""
    exact: int = 0
    """How many of them, from the first on, are exact."""
    hole: int | None = None
    """Where the id of the hole stands, in a prompt that has one."""
    runs: tuple[Run, ...] = ()
    """Ids behind `computed` whose latents were taken over already."""
    drafted: int = 0
    """How many of the last ids are drafts."""
    cached: int = -1
    """Prompt tokens that were found in the cache, exactly, when it was admitted first; -1 before."""
    shifted: int = 0
    """Prompt tokens that were then taken over from elsewhere."""
    settled: int = 0
    """Prompt tokens that were computed exactly later on, before the sequence could go on."""
    admitted: bool = False
    was_delayed: bool = False
    """Whether it has waited for, or run beside, a chunk of a less urgent prompt."""

    @property
    def is_decoding(self) -> bool:
        return self.admitted and self.computed == len(self.ids) - 1 - self.drafted >= self.prompt_tokens - 1

    @property
    def is_exact(self) -> bool:
        return self.exact == self.computed

    def gaps(self, tokens: int) -> Iterator[range]:
        """The next at most `tokens` ids to compute, in stretches between those taken over."""
        start = self.computed
        for stop, beyond in [*((run.start, run.stop) for run in self.runs), (len(self.ids), len(self.ids))]:
            if (length := min(stop - start, tokens)) > 0:
                yield range(start, start + length)
                tokens -= length
            start = beyond


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step."""

    sequence: Sequence
    stretches: tuple[range, ...]
    """Of its ids."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.stretches))

    @property
    def is_complete(self) -> bool:
        """Whether the step computes the sequence's last id, so that the next one can be sampled."""
        return self.stretches[-1].stop == len(self.sequence.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now; empty `parts` mean that nothing can run."""

    parts: tuple[Part, ...]
    taken_over: tuple[Copy | Shift, ...]

    def step(self) -> Step:
        ids: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        for part in self.parts:
            sequence = part.sequence
            for stretch in part.stretches:
                ids += sequence.ids[stretch.start : stretch.stop]
                pages = tuple(sequence.pages[: pages_for(stretch.stop)])
                spans.append(Span(tokens=len(stretch), context=stretch.stop, pages=pages))
            if part.is_complete:
                wanted += range(len(ids) - 1 - sequence.drafted, len(ids))
        return Step(ids=tuple(ids), spans=tuple(spans), wanted=tuple(wanted))


class Scheduler:
    """All sequences of one engine. Used by its owner thread only."""

    def __init__(self, pool: PagePool, chunk_tokens: int) -> None:
        self._pool, self.chunk_tokens = pool, chunk_tokens
        self._sequences: list[Sequence] = []
        self._last_chunk = Priority.INLINE
        """How urgent the prompts of the last step were, the least urgent one's."""
        self._sources: list[Source] = []
        """The last exact prompts, oldest first."""

    def add(self, sequence: Sequence) -> None:
        """Puts the sequence behind all that are as urgent."""
        sequence.was_delayed = self._last_chunk > sequence.priority  # it came in while that chunk was run
        place = next((i for i, other in enumerate(self._sequences) if other.priority > sequence.priority), len(self._sequences))
        self._sequences.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, ended or cancelled; what it has computed stays findable."""
        self._sequences.remove(sequence)
        if sequence.exact >= sequence.prompt_tokens:
            self._note(tuple(sequence.ids[: sequence.prompt_tokens]))
        self._give_back(sequence)

    def missing(self, sequence: Sequence) -> int:
        """How many of the sequence's ids have no exact latents anywhere."""
        return len(sequence.ids) - len(self.pages_of(tuple(sequence.ids))) * PAGE_TOKENS

    def settle(self, sequence: Sequence) -> None:
        """Has a sequence begin anew with exact latents only, from those there are on; its ids stay."""
        sequence.reuse = Reuse.EXACT
        self._give_back(sequence)
        sequence.settled = self.missing(sequence)

    @property
    def prompts(self) -> list[Ids]:
        """The last prompts whose latents are exact, oldest first."""
        return [source.ids for source in self._sources]

    def pages_of(self, ids: Ids) -> list[int]:
        """The pages that hold the beginning of a prompt exactly, to be read at once."""
        return self._pool.exact_pages(ids)

    def restore(self, ids: Ids, write: Callable[[list[int]], None]) -> None:
        """Makes a prompt findable as if it had been computed, its full pages, after those that were not there before, the last ones, were
        written. Nothing is done when there is no room; nor what can be seen when `write` raises."""
        there = self._pool.match((*ids, -1))
        if there.tail_tokens:
            self._pool.release([there.tail])
        pages, new = there.pages, len(ids) // PAGE_TOKENS - len(there.pages)
        try:
            if 0 < new <= self._pool.available:
                pages = [*pages, *self._pool.allocate(new)]
                write(pages[-new:])
                pages = self._pool.publish(pages, ids[: len(pages) * PAGE_TOKENS])
                self._note(ids)
        finally:
            self._pool.release(pages)

    def _note(self, ids: Ids) -> None:
        """Remembers a prompt as a source of latents for others."""
        self._sources = [*(source for source in self._sources if not source.is_same_text(ids)), Source.of(ids)][-MAX_SOURCES:]

    def plan(self) -> Plan:
        """The next step. Urgent sequences take pages from less urgent ones where there are none left."""
        parts: list[Part] = []
        taken_over: list[Copy | Shift] = []
        room = self.chunk_tokens
        self._last_chunk = Priority.INLINE
        for sequence in list(self._sequences):
            if len(parts) == MAX_RUNNING or (sequence.priority is Priority.REST and sequence is not self._sequences[0]):
                break
            if sequence.is_decoding:
                tokens = 1 + sequence.drafted
            elif room and self._may_prefill(sequence, parts) and not self._waits_for_another(sequence):
                if not sequence.admitted:
                    taken_over += self._admit(sequence)
                tokens = room if sequence.priority < Priority.REST else min(room, REST_CHUNK_TOKENS)
            else:
                continue
            stretches = tuple(sequence.gaps(tokens))
            if not self._make_room(sequence, stretches[-1].stop):
                continue
            part = Part(sequence, stretches)
            if not sequence.is_decoding:
                room -= part.tokens
                self._last_chunk = sequence.priority
                for other in parts:
                    other.sequence.was_delayed |= other.sequence.priority < sequence.priority
            parts.append(part)
        return Plan(parts=tuple(parts), taken_over=tuple(taken_over))

    def advance(self, part: Part, new: list[int]) -> None:
        """Notes that the part was run and what came after it: drafts that were right and one more id, or nothing if it ended."""
        sequence = part.sequence
        before, base = sequence.computed, len(sequence.ids) - sequence.drafted
        right = shared(tuple(sequence.ids[base:]), tuple(new[:-1]))  # the last one of new was sampled, not computed
        reached = min(part.stretches[-1].stop, base + right)
        if sequence.exact == before:
            sequence.exact = min(part.stretches[0].stop, reached)
        sequence.computed = max([reached, *(run.stop for run in sequence.runs if run.start <= reached)])
        sequence.runs = tuple(run for run in sequence.runs if run.start > reached)
        sequence.ids[base:], sequence.drafted = new, 0
        if sequence.computed // PAGE_TOKENS > before // PAGE_TOKENS:
            sequence.pages = self._publish(sequence)

    def _may_prefill(self, sequence: Sequence, parts: list[Part]) -> bool:
        return not any(p.sequence.was_delayed for p in parts if p.sequence.priority < sequence.priority)

    def _waits_for_another(self, sequence: Sequence) -> bool:
        """Whether another one is just computing a beginning that this one could share."""
        if sequence.admitted:
            return False
        ids = tuple(sequence.ids)
        return any(
            other.admitted
            and other.priority < Priority.REST
            and other.computed < other.prompt_tokens
            and shared(tuple(other.ids), ids) // PAGE_TOKENS > other.computed // PAGE_TOKENS
            for other in self._sequences
        )

    def _admit(self, sequence: Sequence) -> list[Copy | Shift]:
        """Finds what is cached of it; returns what has to be brought: the last, partly shared page, and runs from elsewhere."""
        sequence.admitted = True
        taken_over: list[Copy | Shift] = []
        if sequence.reuse is not Reuse.OFF:
            match = self._match(sequence)
            sequence.pages, sequence.computed = match.pages, len(match.pages) * PAGE_TOKENS
            if match.tail_tokens and self._pool.available:
                sequence.pages = [*match.pages, *self._pool.allocate(1)]
                sequence.computed = match.tokens
                taken_over.append(Copy(match.tail, sequence.pages[-1], match.tail_tokens))
            if match.tail_tokens:
                self._pool.release([match.tail])
            sequence.exact = min(match.exact_tokens, sequence.computed)
            if sequence.reuse is Reuse.SHIFTED:
                taken_over += self._take_from_elsewhere(sequence)
        if sequence.cached < 0:
            sequence.cached = sequence.exact
            sequence.shifted = sequence.computed - sequence.exact + sum(run.tokens for run in sequence.runs)
        return taken_over

    def _match(self, sequence: Sequence) -> Match:
        """What is cached of its beginning: exact, unless what is not saves a good deal."""
        ids = tuple(sequence.ids)
        match = self._pool.match(ids)
        if sequence.reuse is Reuse.SHIFTED and len(ids) - match.tokens > WORTH_TOKENS:
            self._release(match)
            match = self._pool.match(ids, approximate=True)
        return match

    def _release(self, match: Match) -> None:
        self._pool.release(match.pages if match.tail < 0 else [*match.pages, match.tail])

    def _take_from_elsewhere(self, sequence: Sequence) -> list[Shift]:
        """Plans what of the prompt comes from earlier ones; gets the pages for it, or leaves it be when there are not enough."""
        if sequence.prompt_tokens - sequence.computed <= WORTH_TOKENS:
            return []
        ids = tuple(sequence.ids[: sequence.prompt_tokens])
        lengths = [len(self.pages_of(source.ids)) * PAGE_TOKENS for source in self._sources]
        found = runs(ids, sequence.computed, self._sources, lengths, sequence.hole)
        if not found:
            return []
        held = {number: self._pool.match((*self._sources[number].ids, -1)) for number in {run.source for run in found}}
        shifts: list[Shift] = []
        missing = pages_for(found[-1].stop) - len(sequence.pages)
        if missing <= self._pool.available:
            sequence.pages += self._pool.allocate(missing)
            sequence.runs = found
            shifts = [
                Shift(
                    source=tuple(held[run.source].pages),
                    source_start=run.source_start,
                    target=tuple(sequence.pages),
                    target_start=run.start,
                    tokens=run.tokens,
                )
                for run in found
            ]
        for match in held.values():
            self._release(match)
        return shifts

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Gets the pages for so many tokens, from the sequences behind it if need be; says whether it could."""
        missing = pages_for(tokens) - len(sequence.pages)
        behind = self._sequences[self._sequences.index(sequence) + 1 :]
        while missing > self._pool.available:
            last = next((other for other in reversed(behind) if other.pages), None)
            if last is None:
                return False
            self._give_back(last)
        if missing > 0:
            sequence.pages += self._pool.allocate(missing)
        return True

    def _give_back(self, sequence: Sequence) -> None:
        """Takes all pages from a sequence; when it runs again it begins with what is still cached."""
        if sequence.drafted:
            del sequence.ids[-sequence.drafted :]
            sequence.drafted = 0
        pages = self._publish(sequence, ended=True)
        self._pool.release(pages)
        sequence.pages, sequence.computed, sequence.exact, sequence.runs, sequence.admitted = [], 0, 0, (), False

    def _publish(self, sequence: Sequence, *, ended: bool = False) -> list[int]:
        ids = tuple(sequence.ids[: sequence.computed])
        return self._pool.publish(sequence.pages, ids, exact_tokens=sequence.exact, ended=ended)
