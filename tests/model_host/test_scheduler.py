"""Who runs next, without a model: plans are carried out by a driver that samples made-up ids."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from model_host.generation import Priority
from model_host.pages import PagePool, pages_for
from model_host.scheduler import Plan, Scheduler, Sequence

CHUNK = 32


def sequence(ids: list[int], priority: Priority = Priority.INLINE) -> Sequence:
    return Sequence(ids=ids, prompt_tokens=len(ids), priority=priority)


def carry_out(scheduler: Scheduler, plan: Plan, chance: random.Random) -> None:
    """Pretends to run the step: drafts turn out right or wrong by chance."""
    step = plan.step()
    assert len(step.ids) == sum(span.tokens for span in step.spans)
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


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Priority), st.integers(1, 90), st.booleans(), st.integers(1, 6), st.integers(0, 12)), max_size=12),
    st.integers(12, 30),
    st.integers(0, 1000),
)
def test_any_mixture_ends_with_every_page_given_back(work: list[tuple[Priority, int, bool, int, int]], pages: int, seed: int):
    """Requests that come, are cancelled, run out of pages and give way: all of them end, and none leaves a page behind."""
    chance, pool = random.Random(seed), PagePool(pages)
    scheduler = Scheduler(pool, CHUNK)
    waiting = [
        (sequence([chance.randint(0, 1) if alike else chance.randint(0, 99) for _ in range(n)], p), a, c) for p, n, alike, a, c in work
    ]
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
        carry_out(scheduler, plan, chance)
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
