"""Who runs next: sequences, their place in line, and the plan of one step. Integers only, no tensors.

Owns: the order (inline before menu before chat before background, then first come), what one step holds, admission to the pages,
and who gives way when they run out. Knows nothing of text, sampling or models.

Every running sequence whose prompt is done decodes in every step. Of prompts, one chunk a step is computed, in that order. While a
more urgent sequence runs, a less urgent prompt gets no chunk, but for one: so a completion is delayed by a chunk at most, and a
chat that asks between keystrokes still gets on.
"""

from dataclasses import dataclass, field

from model_host.batch import Copy, Span, Step
from model_host.generation import Priority
from model_host.pages import PAGE_TOKENS, PagePool, pages_for, shared

MAX_RUNNING = 16
"""Sequences that decode in one step; more wait."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One candidate's tokens and where their latents lie."""

    ids: list[int]
    """Prompt, then what was sampled, then drafts to be verified."""
    prompt_tokens: int
    priority: Priority
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading ids whose latents are in the pages."""
    drafted: int = 0
    """How many of the last ids are drafts."""
    cached: int = -1
    """Prompt tokens that were found in the cache when it was admitted first; -1 before."""
    admitted: bool = False
    was_delayed: bool = False
    """Whether it has waited for, or run beside, a chunk of a less urgent prompt."""

    @property
    def is_decoding(self) -> bool:
        return self.admitted and self.computed == len(self.ids) - 1 - self.drafted >= self.prompt_tokens - 1


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step."""

    sequence: Sequence
    tokens: int

    @property
    def is_complete(self) -> bool:
        """Whether the step computes the sequence's last id, so that the next one can be sampled."""
        return self.sequence.computed + self.tokens == len(self.sequence.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now; empty `parts` mean that nothing can run."""

    parts: tuple[Part, ...]
    copies: tuple[Copy, ...]

    def step(self) -> Step:
        ids: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        for part in self.parts:
            sequence, context = part.sequence, part.sequence.computed + part.tokens
            ids += sequence.ids[sequence.computed : context]
            spans.append(Span(tokens=part.tokens, context=context, pages=tuple(sequence.pages[: pages_for(context)])))
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

    def add(self, sequence: Sequence) -> None:
        """Puts the sequence behind all that are as urgent."""
        sequence.was_delayed = self._last_chunk > sequence.priority  # it came in while that chunk was run
        place = next((i for i, other in enumerate(self._sequences) if other.priority > sequence.priority), len(self._sequences))
        self._sequences.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, ended or cancelled; what it has computed stays findable."""
        self._sequences.remove(sequence)
        self._give_back(sequence)

    def plan(self) -> Plan:
        """The next step. Urgent sequences take pages from less urgent ones where there are none left."""
        parts: list[Part] = []
        copies: list[Copy] = []
        room = self.chunk_tokens
        self._last_chunk = Priority.INLINE
        for sequence in list(self._sequences):
            if len(parts) == MAX_RUNNING:
                break
            if sequence.is_decoding:
                tokens = 1 + sequence.drafted
            elif room and self._may_prefill(sequence, parts) and not self._waits_for_another(sequence):
                if not sequence.admitted:
                    copies += self._admit(sequence)
                tokens = min(len(sequence.ids) - sequence.computed, room)
            else:
                continue
            if not self._make_room(sequence, sequence.computed + tokens):
                continue
            if not sequence.is_decoding:
                room -= tokens
                self._last_chunk = sequence.priority
                for part in parts:
                    part.sequence.was_delayed |= part.sequence.priority < sequence.priority
            parts.append(Part(sequence, tokens))
        return Plan(parts=tuple(parts), copies=tuple(copies))

    def advance(self, part: Part, new: list[int]) -> None:
        """Notes that the part was run and what came after it: drafts that were right and one more id, or nothing if it ended."""
        sequence = part.sequence
        before, base = sequence.computed, len(sequence.ids) - sequence.drafted
        right = shared(tuple(sequence.ids[base:]), tuple(new))
        sequence.computed = min(before + part.tokens, base + right)
        sequence.ids[base:], sequence.drafted = new, 0
        if sequence.computed // PAGE_TOKENS > before // PAGE_TOKENS:
            sequence.pages = self._pool.publish(sequence.pages, tuple(sequence.ids[: sequence.computed]))

    def _may_prefill(self, sequence: Sequence, parts: list[Part]) -> bool:
        return not any(p.sequence.was_delayed for p in parts if p.sequence.priority < sequence.priority)

    def _waits_for_another(self, sequence: Sequence) -> bool:
        """Whether another one is just computing a beginning that this one could share."""
        if sequence.admitted:
            return False
        ids = tuple(sequence.ids)
        return any(
            other.admitted
            and other.computed < other.prompt_tokens
            and shared(tuple(other.ids), ids) // PAGE_TOKENS > other.computed // PAGE_TOKENS
            for other in self._sequences
        )

    def _admit(self, sequence: Sequence) -> list[Copy]:
        """Finds what is cached of it; returns the copy that brings the last, partly shared page."""
        match = self._pool.match(tuple(sequence.ids))
        sequence.admitted, sequence.pages, sequence.computed = True, match.pages, len(match.pages) * PAGE_TOKENS
        copies = []
        if match.tail_tokens and self._pool.available:
            sequence.pages = [*match.pages, *self._pool.allocate(1)]
            sequence.computed = match.tokens
            copies = [Copy(match.tail, sequence.pages[-1], match.tail_tokens)]
        if match.tail_tokens:
            self._pool.release([match.tail])
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        return copies

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
        pages = self._pool.publish(sequence.pages, tuple(sequence.ids[: sequence.computed]), ended=True)
        self._pool.release(pages)
        sequence.pages, sequence.computed, sequence.admitted = [], 0, False
