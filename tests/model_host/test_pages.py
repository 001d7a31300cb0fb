"""Pages against a model of them: what a sequence finds is what was written for its ids, and no page is ever lost or shared wrongly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_host.pages import PAGE_TOKENS, OutOfPages, PagePool, pages_for, shared

# few ids and multiples of a page, so that texts share beginnings and end on borders
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=70).map(tuple) | st.sampled_from([(0,) * n for n in (16, 17, 32, 33, 64)])


class Memory:
    """What the latents of every slot were computed for: the ids up to and with their own."""

    def __init__(self, pages: int) -> None:
        self.pool, self.slots, self.inexact = PagePool(pages), dict[tuple[int, int], tuple[int, ...]](), set[tuple[int, int]]()

    def write(self, pages: list[int], ids: tuple[int, ...], first: int) -> None:
        for place in range(first, len(ids)):
            self.slots[pages[place // PAGE_TOKENS], place % PAGE_TOKENS] = ids[: place + 1]
            self.inexact.discard((pages[place // PAGE_TOKENS], place % PAGE_TOKENS))

    def spoil(self, pages: list[int], first: int, tokens: int) -> None:
        """What has seen other tokens before it than these."""
        self.inexact |= {(pages[place // PAGE_TOKENS], place % PAGE_TOKENS) for place in range(first, tokens)}

    def holds(self, pages: list[int], ids: tuple[int, ...]) -> bool:
        return all(self.slots[pages[i // PAGE_TOKENS], i % PAGE_TOKENS] == ids[: i + 1] for i in range(len(ids)))

    def is_exact(self, pages: list[int], tokens: int) -> bool:
        return not any((pages[i // PAGE_TOKENS], i % PAGE_TOKENS) in self.inexact for i in range(tokens))

    def admit(self, ids: tuple[int, ...], *, approximate: bool = False) -> tuple[list[int], int, int]:
        """Finds what is cached of ids, as the scheduler does, and writes the rest; returns the pages, what was found, what is exact."""
        match = self.pool.match(ids, approximate=approximate)
        assert match.tokens < len(ids)
        assert approximate or match.exact_tokens == match.tokens
        pages, found = match.pages, len(match.pages) * PAGE_TOKENS
        if match.tail_tokens:
            if self.pool.available:
                pages, found = [*pages, *self.pool.allocate(1)], match.tokens
                for place in range(match.tail_tokens):
                    self.slots[pages[-1], place] = self.slots[match.tail, place]
                    self.inexact.discard((pages[-1], place))
                    self.inexact |= {(pages[-1], place)} if (match.tail, place) in self.inexact else set()
            self.pool.release([match.tail])
        assert self.holds(pages, ids[:found])
        try:
            pages = [*pages, *self.pool.allocate(pages_for(len(ids)) - len(pages))]
        except OutOfPages:
            self.pool.release(pages)
            raise
        exact = min(match.exact_tokens, found)
        assert self.is_exact(pages, exact)
        self.write(pages, ids, found)
        if exact < found:
            self.spoil(pages, found, len(ids))
        return pages, found, len(ids) if exact == found else exact


WORK = st.lists(st.tuples(TEXTS, st.booleans(), st.booleans(), st.sampled_from([None, None, 0, 5, 16, 40])), max_size=30)


@settings(max_examples=400, deadline=None)
@given(WORK, st.integers(4, 14))
def test_whatever_comes_and_goes_a_match_is_what_was_computed_for_these_very_ids(work: list, size: int):
    """Exact where an exact one is asked for; of those that take over from elsewhere, what follows that is never found as exact."""
    memory = Memory(size)
    running: list[tuple[list[int], tuple[int, ...], int]] = []
    for ids, early, end_one, shifted_from in work:
        try:
            pages, found, exact = memory.admit(ids, approximate=shifted_from is not None)
        except OutOfPages:
            assert pages_for(len(ids)) > memory.pool.available or running
        else:
            if shifted_from is not None and found <= shifted_from < exact:
                memory.spoil(pages, shifted_from, len(ids))
                exact = shifted_from
            running.append((memory.pool.publish(pages, ids, exact_tokens=exact) if early else pages, ids, exact))
        if end_one and running:
            its_pages, its_ids, exact = running.pop(0)
            memory.pool.release(memory.pool.publish(its_pages, its_ids, exact_tokens=exact, ended=True))
        for its_pages, its_ids, exact in running:
            assert memory.holds(its_pages, its_ids) and memory.is_exact(its_pages, exact)
    for pages, _, _ in running:
        memory.pool.release(pages)
    assert memory.pool.held == 0 and memory.pool.available == size
    memory.pool.release(memory.pool.allocate(size))


@given(TEXTS, TEXTS)
def test_a_second_text_finds_all_it_shares_with_the_first_but_its_last_id(first: tuple[int, ...], second: tuple[int, ...]):
    memory = Memory(20)
    pages, _, _ = memory.admit(first)
    memory.pool.release(memory.pool.publish(pages, first, ended=True))
    _, found, _ = memory.admit(second)
    assert found == min(shared(first, second), len(second) - 1)


def test_the_longest_unused_text_is_forgotten_first():
    memory = Memory(4)
    for number in range(4):
        text = (number,) * 16
        pages, _, _ = memory.admit(text)
        memory.pool.release(memory.pool.publish(pages, text, ended=True))
    again = memory.pool.match((0,) * 17)
    memory.pool.release(again.pages)
    memory.pool.release(memory.pool.allocate(1))
    assert [memory.pool.match((number,) * 17).tokens for number in range(4)] == [16, 0, 16, 16]


def test_two_that_compute_the_same_at_once_end_up_with_the_same_pages():
    pool, ids = PagePool(8), tuple(range(32))
    mine, yours = pool.allocate(2), pool.allocate(2)
    mine = pool.publish(mine, ids)
    assert pool.publish(yours, ids) == mine and pool.held == 2
    pool.release(mine)
    assert pool.held == 2
    pool.release(mine)
    assert pool.held == 0


def test_asking_for_more_than_there_is_takes_nothing():
    pool = PagePool(3)
    held = pool.allocate(2)
    with pytest.raises(OutOfPages):
        pool.allocate(2)
    assert pool.available == 1
    pool.release(held)
