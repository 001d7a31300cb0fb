"""What of a prompt may come from earlier ones: only equal ids, never what has to be computed, and nearly all of what an edit left alone."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from model_host.reuse.shifted import GRAM_TOKENS, LEAST_NEAR_TOKENS, LEAST_TOKENS, Run, Source, runs

PIECES = [tuple(random.Random(n).choices(range(50), k=length)) for n, length in enumerate((5, 20, 60, 150, 150, 400))]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(lambda pieces: sum(pieces, ()))


@settings(max_examples=300, deadline=None)
@given(
    ids=texts,
    sources=st.lists(st.tuples(texts, st.integers(0, 2000)), max_size=4),
    start=st.integers(0, 300),
    hole=st.none() | st.integers(0, 2000),
)
def test_runs_are_equal_ids_in_order_and_leave_alone_what_has_to_be_computed(ids: tuple, sources: list, start: int, hole: int | None):
    earlier, lengths = [Source.of(text) for text, _ in sources], [length for _, length in sources]
    place = start
    for run in runs(ids, start, earlier, lengths, hole):
        assert place <= run.start and run.start + LEAST_TOKENS <= run.stop < len(ids)
        place = run.stop
        source = sources[run.source][0]
        assert ids[run.start : run.stop] == source[run.source_start : run.source_start + run.tokens]
        assert run.source_start + run.tokens <= lengths[run.source]
        assert hole is None or run.stop <= hole - LEAST_NEAR_TOKENS or run.start > hole + LEAST_NEAR_TOKENS


def unlike(tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(10**6), k=tokens))


def taken(ids: tuple[int, ...], *sources: tuple[int, ...], start: int = 0) -> list[Run]:
    return list(runs(ids, start, [Source.of(source) for source in sources], [len(source) for source in sources]))


def test_behind_an_edit_all_but_the_lead_and_the_tail_is_taken_over():
    old = unlike(2000, 1)
    for removed, added in ((0, 3), (5, 0), (7, 7), (300, 2)):
        new = (*old[:500], *unlike(added, 2), *old[500 + removed :])
        [run] = taken(new, old, start=500)
        assert run.start - 500 - added < 0.03 * len(new) and run.stop == len(new) - LEAST_NEAR_TOKENS
        assert run.source_start - run.start == removed - added


def test_a_block_that_was_moved_is_found_where_it_stands_now():
    old = unlike(1500, 3)
    new = (*old[:300], *old[600:1100], *old[300:600], *old[1100:])
    assert [run.source_start // 100 for run in taken(new, old, start=300)] == [6, 3, 11]


def test_several_edits_are_computed_each_with_what_follows_it():
    old = unlike(4000, 4)
    places = range(400, 4000, 600)
    new = list(old)
    for place in places:
        new[place] = -place
    found = taken(tuple(new), old, start=400)
    assert [run.start for run in found] == [place + 1 + LEAST_NEAR_TOKENS for place in places]


def test_two_earlier_prompts_serve_where_each_has_what_the_other_lacks():
    first, second = unlike(700, 5), unlike(700, 6)
    new = (-1, *first, -2, *second, *unlike(LEAST_NEAR_TOKENS, 7))
    assert [run.source for run in taken(new, first, second)] == [0, 1]


def test_repeated_lines_come_from_where_the_text_round_them_came_from():
    line = unlike(GRAM_TOKENS + 3, 8)
    old = (*unlike(300, 9), *line * 20, *unlike(300, 10))
    new = (-1, *old)
    found = taken(new, old)
    assert len({run.start - run.source_start for run in found}) == 1


def test_nothing_is_taken_from_what_is_no_longer_there():
    old = unlike(1000, 11)
    assert not runs((-1, *old), 0, [Source.of(old)], [GRAM_TOKENS])
    assert not taken(unlike(1000, 12), old)


def test_an_edit_far_above_the_hole_computes_less_than_a_tenth():
    for tokens in (2000, 6000, 12_000):
        old = unlike(tokens, 13)
        new = (*old[: tokens // 3], -1, *old[tokens // 3 :])
        left = tokens + 1 - tokens // 3 - sum(run.tokens for run in runs(new, tokens // 3, [Source.of(old)], [tokens], 3 * tokens // 4))
        assert left < 0.1 * tokens


def test_files_behind_the_same_long_beginning_are_two_texts_and_one_typed_on_is_the_same():
    trunk, one, other = unlike(2000, 1), unlike(150, 2), unlike(150, 3)
    assert not Source.of(trunk + one).is_same_text(trunk + other)
    assert Source.of(trunk + one).is_same_text(trunk + one[:-30] + other)
