"""What goes before a prompt, and who gives way."""

from hypothesis import given
from hypothesis import strategies as st

from lsp_server.actions import surroundings
from lsp_server.actions.surroundings import Part

LINES = [f"line_{number} = {number}\n" for number in range(1000)]


def part(name: str, importance: int, chars: int = 100, order: int = 0) -> Part:
    return Part(what=name, heading=f"{name}:", language="", text="x" * chars, importance=importance, order=order)


def test_the_least_important_gives_way_first_and_is_named():
    parts = [part("tests", 2, order=1), part("file", 0, order=0), part("callees", 1, order=2)]
    every = surroundings.fitted(parts, 1000)
    assert every.dropped == () and [every.words.index(name) for name in ("file:", "tests:", "callees:")] == sorted(
        every.words.index(name) for name in ("file:", "tests:", "callees:")
    )
    assert surroundings.fitted(parts, 110).dropped == ("tests",)
    assert surroundings.fitted(parts, 60).dropped == ("callees", "tests")


def test_a_file_that_fits_is_shown_whole_and_a_larger_one_says_that_it_is_not():
    assert surroundings.around(LINES[:10], 3, 4, 1000) == ("".join(LINES[:10]), True)
    text, is_whole = surroundings.around(LINES, 500, 510, 500)
    assert not is_whole and "".join(LINES[500:511]) in text and surroundings.about_tokens(text) <= 520


def test_selections_near_each_other_share_their_window():
    windows = [surroundings.around(LINES, first, first + 3, 1000)[0] for first in range(990)]
    assert len(set(windows)) < 30


@given(st.lists(st.text(max_size=40).map(lambda text: text.replace("\n", "") + "\n"), min_size=1, max_size=60), st.data())
def test_a_window_always_holds_the_selection_in_whole_lines(lines: list[str], data: st.DataObject):
    first = data.draw(st.integers(0, len(lines) - 1))
    last = data.draw(st.integers(first, len(lines) - 1))
    text, _ = surroundings.around(lines, first, last, data.draw(st.integers(1, 300)))
    assert "".join(lines[first : last + 1]) in text and text in "".join(lines)


def test_fences_are_longer_than_those_within():
    assert surroundings.fence_for("a\n  ```\nb", "x") == "````" and surroundings.fence_for("") == "```"
