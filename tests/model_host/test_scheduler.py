"""Who runs next, without a model: plans are carried out by a driver that samples made-up ids."""

import random
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from model_host.batch import Copy, Shift
from model_host.generation import Priority, Reuse
from model_host.pages import PAGE_TOKENS, PagePool, pages_for
from model_host.scheduler import Plan, Scheduler, Sequence

CHUNK = 32


def sequence(ids: list[int], priority: Priority = Priority.INLINE, reuse: Reuse = Reuse.EXACT) -> Sequence:
    return Sequence(ids=list(ids), prompt_tokens=len(ids), priority=priority, reuse=reuse)


class Memory:
    """Which token the latents of every slot are of, so that a step can be checked for finding its context."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def take_over(self, what: Copy | Shift) -> None:
        if isinstance(what, Copy):
            moved = {what.target * PAGE_TOKENS + i: self.slots[what.source * PAGE_TOKENS + i] for i in range(what.tokens)}
        else:
            places = range(what.tokens)
            moved = {slot(what.target, what.target_start + i): self.slots[slot(what.source, what.source_start + i)] for i in places}
        self.slots |= moved

    def run(self, plan: Plan) -> None:
        for what in plan.taken_over:
            self.take_over(what)
        step = plan.step()
        place = 0
        for span in step.spans:
            for position in range(span.context - span.tokens, span.context):
                self.slots[slot(span.pages, position)] = step.ids[place]
                place += 1
        assert place == len(step.ids)
        for part in plan.parts:
            stop = part.stretches[-1].stop
            assert [self.slots[slot(part.sequence.pages, position)] for position in range(stop)] == part.sequence.ids[:stop]


def slot(pages: list[int] | tuple[int, ...], position: int) -> int:
    return pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


def carry_out(scheduler: Scheduler, plan: Plan, chance: random.Random, memory: Memory | None = None) -> None:
    """Pretends to run the step: drafts turn out right or wrong by chance."""
    if memory:
        memory.run(plan)
    for part in plan.parts:
        new: list[int] = []
        if part.is_complete:
            drafts = part.sequence.ids[len(part.sequence.ids) - part.sequence.drafted :]
            new = [*drafts[: chance.randint(0, len(drafts))], chance.randint(2, 3)]
        scheduler.advance(part, new)


def run(scheduler: Scheduler, steps: int) -> list[Plan]:
    plans = []
    for _ in range(steps):
        plans.append(scheduler.plan())
        carry_out(scheduler, plans[-1], random.Random(0))
    return plans


def tokens_of(plan: Plan, who: Sequence) -> int:
    return sum(part.tokens for part in plan.parts if part.sequence is who)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Priority), st.integers(1, 90), st.booleans(), st.integers(1, 6), st.integers(0, 12)), max_size=12),
    st.integers(12, 30),
    st.integers(0, 1000),
)
def test_any_mixture_ends_with_every_page_given_back(work: list[tuple[Priority, int, bool, int, int]], pages: int, seed: int):
    """Requests that come, are cancelled, run out of pages and give way: all of them end, every step finds the latents of its context,
    wherever they were taken over from, and none leaves a page behind."""
    chance, pool, memory = random.Random(seed), PagePool(pages), Memory()
    scheduler = Scheduler(pool, CHUNK)

    def text(tokens: int, alike: bool) -> list[int]:
        """Pieces that others have too, at other places; or ids that few others have."""
        pieces = [random.Random(number).choices(range(99), k=chance.choice([20, 70])) for number in chance.choices(range(3), k=4)]
        return [*chain.from_iterable(pieces)][: 2 * tokens] if alike else chance.choices(range(99), k=tokens)

    waiting = [(sequence(text(n, alike), p, chance.choice(list(Reuse))), a, c) for p, n, alike, a, c in work]
    waiting = [job for job in waiting if pages_for(job[0].prompt_tokens + 10) <= pages]
    running: dict[Sequence, tuple[int, int]] = {}
    for _ in range(2000):
        if waiting and chance.random() < 0.5:
            new, answer, cancelled_after = waiting.pop()
            scheduler.add(new)
            running[new] = (answer, cancelled_after)
        for one in running:
            if one.is_decoding and chance.random() < 0.3:
                one.ids += [2, 2]
                one.drafted = 2
        plan = scheduler.plan()
        assert plan.parts or not running
        held = [page for one in running for page in one.pages]
        assert len(set(held)) <= pool.held
        carry_out(scheduler, plan, chance, memory)
        for one, (answer, left) in list(running.items()):
            running[one] = (answer, left - 1 if left > 0 else left)
            if left == 1 or len(one.ids) >= one.prompt_tokens + answer:
                scheduler.remove(one)
                del running[one]
        if not running and not waiting:
            break
    assert not running and not waiting
    assert pool.held == 0 and pool.available == pages


def test_typing_goes_before_menus_before_chat_before_what_may_be_wanted_later():
    scheduler = Scheduler(PagePool(64), CHUNK)
    asked = [sequence([number] * 64, priority) for number, priority in enumerate(reversed(Priority))]
    for one in asked:
        scheduler.add(one)
    firsts = [plan.parts[0].sequence.priority for plan in run(scheduler, 2)]
    assert firsts == [Priority.INLINE, Priority.INLINE]
    assert scheduler.plan().parts[0].sequence.priority is Priority.INLINE


def test_a_long_prompt_delays_a_completion_by_one_chunk_at_most():
    scheduler = Scheduler(PagePool(256), CHUNK)
    chat, inline = sequence([7] * 1000, Priority.CHAT), sequence([8] * 20)
    scheduler.add(chat)
    run(scheduler, 2)
    scheduler.add(inline)  # the chunk that ran meanwhile is the one
    assert sum(tokens_of(plan, chat) for plan in run(scheduler, 10)) == 0
    scheduler.remove(inline)
    assert tokens_of(run(scheduler, 1)[0], chat) == CHUNK


def test_a_chat_that_comes_while_a_completion_runs_gets_its_one_chunk_and_then_waits():
    scheduler = Scheduler(PagePool(256), CHUNK)
    inline, chat = sequence([8] * 20), sequence([7] * 1000, Priority.CHAT)
    scheduler.add(inline)
    run(scheduler, 2)
    scheduler.add(chat)
    assert [tokens_of(plan, chat) for plan in run(scheduler, 5)] == [CHUNK, 0, 0, 0, 0]


def test_a_chat_that_answers_goes_on_answering_beside_a_completion():
    scheduler = Scheduler(PagePool(256), CHUNK)
    chat, inline = sequence([7] * 20, Priority.CHAT), sequence([8] * 20)
    scheduler.add(chat)
    run(scheduler, 2)
    scheduler.add(inline)
    assert [tokens_of(plan, chat) for plan in run(scheduler, 3)] == [1, 1, 1]


def test_who_asks_for_a_beginning_that_is_just_being_computed_waits_and_shares_it():
    scheduler = Scheduler(PagePool(64), CHUNK)
    first, second = sequence([*range(100)]), sequence([*range(96), 500, 501])
    scheduler.add(first)
    scheduler.add(second)
    plans = run(scheduler, 6)
    assert sum(tokens_of(plan, first) for plan in plans[:4]) == 100
    assert second.cached == 96


def test_an_urgent_request_takes_the_pages_of_a_less_urgent_one_which_then_goes_on():
    pool = PagePool(8)
    scheduler = Scheduler(pool, 64)
    chat, inline = sequence([7] * 100, Priority.CHAT), sequence([*range(60)])
    scheduler.add(chat)
    run(scheduler, 4)
    said = list(chat.ids)
    scheduler.add(inline)
    run(scheduler, 2)
    assert inline.is_decoding and not chat.is_decoding
    scheduler.remove(inline)
    run(scheduler, 4)
    assert chat.is_decoding and chat.ids[: len(said)] == said


def shifted(first: list[int], second: list[int], pages: int = 256) -> tuple[Scheduler, Sequence]:
    """A scheduler that has computed the first prompt, and the second one, which may take over what it likes of it."""
    scheduler = Scheduler(PagePool(pages), 2048)
    for ids, reuse in ((first, Reuse.EXACT), (second, Reuse.SHIFTED)):
        one = sequence(ids, reuse=reuse)
        scheduler.add(one)
        run(scheduler, 2)
        if reuse is Reuse.EXACT:
            scheduler.remove(one)
    return scheduler, one


OLD = random.Random(1).choices(range(10**6), k=2000)
EDITED = [*OLD[:500], 7, 7, 7, *OLD[500:1200], *OLD[1210:]]


def test_an_edited_prompt_computes_what_is_round_its_edits_in_one_step():
    _, edited = shifted(OLD, EDITED)
    assert edited.is_decoding and edited.cached == 500
    assert len(EDITED) - 500 > edited.shifted > 1000


def test_what_was_taken_over_is_found_by_those_who_may_and_by_nobody_else():
    scheduler, edited = shifted(OLD, EDITED)
    scheduler.remove(edited)
    typed, exact = sequence([*EDITED, 8], reuse=Reuse.SHIFTED), sequence([*EDITED, 8])
    scheduler.add(typed)
    run(scheduler, 1)
    assert 500 <= typed.cached < 540 and typed.cached + typed.shifted == len(EDITED)
    scheduler.remove(typed)
    scheduler.add(exact)
    run(scheduler, 1)
    assert 500 <= exact.cached < 540 and exact.shifted == 0


def test_once_the_prompt_was_computed_at_rest_it_is_found_exactly():
    scheduler, edited = shifted(OLD, EDITED)
    scheduler.remove(edited)
    resting = sequence(EDITED, Priority.REST)
    scheduler.add(resting)
    while resting.computed < len(EDITED):
        scheduler.advance(scheduler.plan().parts[0], [])
    scheduler.remove(resting)
    again = sequence([*EDITED, 8], reuse=Reuse.SHIFTED)
    scheduler.add(again)
    run(scheduler, 1)
    assert (again.cached, again.shifted) == (len(EDITED), 0)


def test_rest_waits_for_everybody_else():
    scheduler = Scheduler(PagePool(256), CHUNK)
    resting, background = sequence([7] * 500, Priority.REST), sequence([8] * 100, Priority.BACKGROUND)
    scheduler.add(resting)
    run(scheduler, 2)
    computed = resting.computed
    scheduler.add(background)
    run(scheduler, 8)
    assert resting.computed == computed > 0
    scheduler.remove(background)
    run(scheduler, 1)
    assert resting.computed > computed


def test_without_room_for_what_could_be_taken_over_the_prompt_is_computed_all_the_same():
    _, edited = shifted(OLD, EDITED, pages=pages_for(len(OLD)) + 40)
    assert edited.is_decoding and edited.shifted == 0
