"""Which tokens of a prompt may take over latents that were computed for the same tokens elsewhere: pure functions on ids.

Owns: finding long runs of equal ids in earlier prompts (wherever they stand now: an edit above moves them, a paste copies them), and
how much round each run is computed all the same. Knows nothing of pages, latents or requests.

Only the latents of the first layer depend on a token alone; those of the others have seen what stood before. So what the answer leans on
most is computed: the text on either side of the hole, and the prompt's end. How much was chosen by measurement (docs/log.md), as a share of
the prompt that stays below a tenth. What is still undecided after it is not for this module to settle (engine.CLOSE_CALL_NATS).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from model_host.pages import Ids, shared

GRAM_TOKENS = 12
"""Equal ids that make a run worth looking at. Runs are found by every GRAM_TOKENS-th place of a source, so those of twice as many are
found for sure."""
BEFORE_HOLE_SHARE, AFTER_HOLE_SHARE = 0.02, 0.06
"""Of the prompt's tokens. Those behind the hole come next after the text above it, and say where the answer has to lead."""
LEAST_NEAR_TOKENS = 16
"""At least so many there, and so many at the start of each run and at the prompt's end."""
LEAST_TOKENS = 32
"""A run shorter than that is computed."""
SAME_TOKENS = 64
"""A prompt that another follows to its last tokens is the same text, typed on. To begin alike says less: files share what is in front."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens from `start` to before `stop` of a prompt are those from `source_start` on of source number `source`."""

    start: int
    stop: int
    source: int
    source_start: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Source:
    """An earlier prompt whose latents are exact, and where in it to look for what."""

    ids: Ids
    places: dict[Ids, int] = field(default_factory=dict, compare=False)

    def is_same_text(self, ids: Ids) -> bool:
        """Whether `ids` begin as this one does almost to its end: the same file, typed on."""
        return len(self.ids) - shared(self.ids, ids) <= min(len(self.ids) // 10, SAME_TOKENS)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Source":
        ids = tuple(ids)
        starts = range((len(ids) - GRAM_TOKENS) // GRAM_TOKENS * GRAM_TOKENS, -1, -GRAM_TOKENS)
        return cls(ids, {ids[start : start + GRAM_TOKENS]: start for start in starts})


def runs(ids: Ids, start: int, sources: Sequence[Source], lengths: Sequence[int], hole: int | None = None) -> tuple[Run, ...]:
    """What of `ids` from `start` on can be taken over from `sources`, of which the first `lengths` tokens are there; in order,
    without overlap, nothing next to the `hole`, and never the last id, whose logits are needed."""
    found: list[Run] = []
    place, stop = start, len(ids) - LEAST_NEAR_TOKENS
    while place + GRAM_TOKENS <= stop:
        run = _longest(ids, place, start, stop, sources, lengths, found[-1:])
        if run is None:
            place += 1
        else:
            found.append(run)
            start = place = run.stop
    before, after = (max(int(share * len(ids)), LEAST_NEAR_TOKENS) for share in (BEFORE_HOLE_SHARE, AFTER_HOLE_SHARE))
    near = [] if hole is None else [range(hole - before, hole + 1 + after)]
    parts = (part for run in found for part in _without(run, [range(run.start, run.start + LEAST_NEAR_TOKENS), *near]))
    return tuple(part for part in parts if part.tokens >= LEAST_TOKENS)


def _without(run: Run, computed: Sequence[range]) -> list[Run]:
    """The parts of a run that lie outside of `computed`, in order."""
    parts: list[Run] = []
    place = run.start
    for one in [*sorted(computed, key=lambda one: one.start), range(run.stop, run.stop)]:
        stop = min(one.start, run.stop)
        if place < stop:
            parts.append(Run(place, stop, run.source, run.source_start + place - run.start))
        place = max(place, one.stop)
    return parts


def _longest(
    ids: Ids, place: int, start: int, stop: int, sources: Sequence[Source], lengths: Sequence[int], before: Iterable[Run]
) -> Run | None:
    """The longest run that covers the gram at `place` and lies between `start` and `stop`."""
    gram = ids[place : place + GRAM_TOKENS]
    best: Run | None = None
    candidates = [(n, at) for n, source in enumerate(sources) if (at := source.places.get(gram)) is not None]
    # where the last run came from, text goes on as it did there, which decides between repeated lines
    candidates += [(run.source, run.source_start + place - run.start) for run in before]
    for number, at in candidates:
        source, there = sources[number].ids, lengths[number]
        if source[at : at + GRAM_TOKENS] != gram or at + GRAM_TOKENS > there:
            continue
        room = min(place - start, at)
        back = shared(ids[place - room : place][::-1], source[at - room : at][::-1])
        on = shared(ids[place:stop], source[at:there])
        if best is None or back + on > best.tokens:
            best = Run(place - back, place + on, number, at - back)
    return best
