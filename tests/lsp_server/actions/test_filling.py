"""Holes filled on request, drawn."""

import pytest
from lsprotocol import types

from lsp_server.actions import filling, reading, tasks
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.session import Document
from lsp_server.settings import Settings
from tests.lsp_server.drawn import URI, document_of, parse
from tests.scripted import AnsweringEngine


def asked(drawing: str, **more: object) -> tuple[Document, filling.ToFill]:
    text, range = parse(drawing)
    start, end = (tasks.Place(line=place.line, character=place.character) for place in (range.start, range.end))
    return document_of(text), filling.ToFill(uri=URI, range=tasks.Span(start=start, end=end), **more)


async def after(drawing: str, *answers: str, **more: object) -> tuple[str, AnsweringEngine]:
    document, wanted = asked(drawing, **more)
    engine = AnsweringEngine(*answers)
    edits = await filling.filled(engine, document, wanted, "shop.py", Settings(), reading.unheard)
    for edit in reversed(edits):
        document.change(types.TextDocumentContentChangePartial(range=edit.range, text=edit.new_text))
    return document.text, engine


async def test_the_cursors_place_is_filled_with_an_instruction_as_a_comment_that_stays_in_the_prompt():
    text, engine = await after("def f(a):\n    |\n", "return 2 * a\n", instruction="double\nit")
    assert text == "def f(a):\n    return 2 * a\n"
    assert engine.requests[0].prompt.prefix.endswith("def f(a):\n    # double it\n")


async def test_each_hole_sees_those_before_it_filled_and_no_mark():
    text, engine = await after("«x = <fill> + <fill: the other>\n\r\ny = <fill>»\n", "first(1)", "second", "third")
    assert text == "x = first(1) + second\n\r\ny = third\n"
    prompts = [request.prompt for request in engine.requests]
    assert [prompt.middle for prompt in prompts] == ["x = ", "x = first(1) + ", "y = "]
    assert "# the other\n" in prompts[1].prefix and "x = first(1) + second\n" in prompts[2].prefix
    assert not any("<fill" in prompt.prefix + prompt.middle + prompt.suffix for prompt in prompts)


async def test_a_bracket_behind_a_hole_that_the_answer_closes_does_not_stand_there_twice():
    text, engine = await after("«show(<fill>) + show(<fill>)»\n", "a)", "len(b)")
    assert text == "show(a) + show(len(b))\n"
    assert [request.prompt.middle for request in engine.requests] == ["show(", "show(a) + show("]


@pytest.mark.parametrize(
    ("drawing", "more", "error", "said"),
    [
        ("«x = 1»", {}, Refusal, "No hole is marked"),
        ("«" + "<fill>" * 21 + "»", {}, Refusal, "at most 20"),
        ("x = |", {"version": 3}, Stale, "changed since"),
        ("x = |", {}, Unusable, "nothing to add"),
    ],
)
async def test_what_cannot_be_filled_says_why(drawing: str, more: dict, error: type, said: str):
    with pytest.raises(error, match=said):
        await after(drawing, "", **more)
