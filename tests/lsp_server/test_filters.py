"""What is shown of what a model says, and when enough was said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_server.filters import Hole, brought, is_complete, shown

TEXT = st.text(st.sampled_from("ab():\n    "), max_size=60)


def hole(before: str = "    ", after: str = "", following: tuple[str, ...] = (), max_lines: int = 12) -> Hole:
    return Hole(before=before, after=after, following=following, max_lines=max_lines)


@pytest.mark.parametrize(
    ("where", "said", "expected"),
    [
        (hole(), "return 1\n", "return 1"),
        (hole(), "if a:\n        return 1\n    return 2\n\ndef f():", "if a:\n        return 1\n    return 2"),
        (hole(after="b)"), "a, \nmore", "a, "),
        (hole(after=")"), "a)\nmore", "a)"),
        (hole(max_lines=2), "a\n    b\n    c\n", "a\n    b"),
        (hole(following=("    return 2\n",)), "x = 1\n    return 2\n", "x = 1"),
        (hole(before="    ret", following=("    return 2\n",)), "urn 2\n", ""),
        (hole(), "  \n\n", ""),
        (hole(after=")"), ")", ""),
        (hole(before=""), "a = 1\n\n\n\nb = 2", "a = 1"),
    ],
)
def test_a_completion_ends_where_a_person_would_want_it_to(where: Hole, said: str, expected: str):
    assert shown(where, said) == expected


@given(said=TEXT, before=st.sampled_from(["", "    ", "    x = "]), after=st.sampled_from(["", ")", " + b"]))
def test_what_is_shown_begins_what_was_said_and_showing_it_again_changes_nothing(said: str, before: str, after: str):
    where = hole(before, after)
    once = shown(where, said)
    assert said.startswith(once) and shown(where, once) == once


@given(said=TEXT, more=TEXT, before=st.sampled_from(["", "    ", "    x = "]), after=st.sampled_from(["", ")", " + b"]))
def test_once_it_is_complete_nothing_more_changes_what_is_shown(said: str, more: str, before: str, after: str):
    where = hole(before, after, following=("    a\n",), max_lines=3)
    if is_complete(where, said):
        assert shown(where, said + more) == shown(where, said)


@pytest.mark.parametrize(
    ("text", "after", "count"),
    [
        ("name)", ")", 1),
        ("len(x)", ")", 0),
        ("len(x))", ")", 1),
        ("x)", "))", 1),
        ("x)", ");", 1),
        ("x);", ");", 2),
        ("f(a, [b", "])", 0),
        ('", "b")', '")', 2),
        ("don't\")", '")', 2),
        ('a\\"b', '")', 0),
        ("&'a str)", ")", 1),
        ('")")', ")", 1),
        ("x)\nreturn y", ")", 1),
        ("a + b", " + b", 4),
        ("a", "", 0),
    ],
)
def test_brackets_behind_the_cursor_make_room_for_those_that_the_text_closes_and_stay_for_those_it_opens(text: str, after: str, count: int):
    assert brought(text, after) == count
