"""What the model sees of a file, and that it sees the same while one types."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server import ask
from lsp_server.anchors import CHARS_PER_TOKEN, MAX_TYPED_CHARS, Anchors
from lsp_server.host import Host
from lsp_server.session import Document, Encoding, Snapshot
from lsp_server.settings import InlineSettings
from model_host.generation import Fim, Priority
from tests.scripted import ScriptedEngine


def document(text: str, uri: str = "file:///p/a.py") -> Document:
    return Document(types.TextDocumentItem(uri, "python", 0, text), Encoding.Utf32)


def at(text: str, line: int, column: int, uri: str = "file:///p/a.py") -> Snapshot:
    return document(text, uri).snapshot(types.Position(line, column))


def asked(anchors: Anchors, snapshot: Snapshot, context_tokens: int = 500) -> Fim:
    """The prompt, and the anchor kept for the next one."""
    anchor = anchors.at(snapshot, context_tokens)
    anchors.keep(snapshot.uri, anchor)
    return anchor.hole(snapshot, "a.py")


def test_a_small_file_is_shown_whole_with_its_path_and_cut_at_the_start_of_the_line():
    prompt = asked(Anchors(), at("a = 1\nb = a + c\nd\n", 1, 8))
    assert prompt == Fim(prefix="# a.py\na = 1\n", middle="b = a + ", suffix="c\nd\n")


def test_line_endings_of_windows_do_not_reach_the_model():
    prompt = asked(Anchors(), at("a\r\nb\rc\r\n", 1, 1))
    assert "\r" not in prompt.prefix + prompt.middle + prompt.suffix


LONG = "".join(f"def f{n}(a):\n    x = a + {n}\n    return x\n\n" for n in range(400))


@given(line=st.integers(0, 1599))
def test_a_long_file_is_shown_within_the_budget_and_around_the_cursor(line: int):
    prompt = asked(Anchors(), at(LONG, line, 0))
    assert len(prompt.prefix) + len(prompt.suffix) <= 1.3 * 500 * CHARS_PER_TOKEN
    assert (prompt.prefix.removeprefix("# a.py\n") + prompt.suffix) in LONG


def test_the_window_moves_in_steps_so_that_places_further_down_reuse_the_prefix():
    anchors = Anchors()
    prefixes = [asked(anchors, at(LONG, line, 0)).prefix for line in range(800, 900)]
    kept = sum(later.startswith(earlier) for earlier, later in itertools.pairwise(prefixes))
    assert kept >= 90


def typed(text: str, rest: str = "") -> Snapshot:
    """A cursor in the middle of the long file behind `text`, right of it `rest`."""
    head, tail = LONG[: LONG.index("def f200")], LONG[LONG.index("def f200") :]
    whole = head + text
    return at(whole + rest + "\n" + tail, whole.count("\n"), len(whole) - whole.rfind("\n") - 1)


def test_typing_over_several_lines_changes_neither_prefix_nor_suffix():
    anchors = Anchors()
    texts = ["", "x", "x = f1(", "x = f1(\n    2,\n", "x = f1(\n    2,\n)\n\n\ny = "]
    prompts = [asked(anchors, typed(text)) for text in texts]
    assert len({(prompt.prefix, prompt.suffix) for prompt in prompts}) == 1
    assert [prompt.middle for prompt in prompts] == texts


def test_the_anchor_moves_when_the_text_right_of_the_cursor_or_above_the_anchor_differs():
    anchors = Anchors()
    asked(anchors, typed("if x:\n    y = f("))
    assert asked(anchors, typed("if x:\n    y = f(", ")")).middle == "    y = f("
    asked(anchors, typed("if x:\n    z"))
    edited = "".join(typed("if x:\n    z = 1").lines).replace("def f180", "def g180")
    line = edited[: edited.index("    z = 1")].count("\n")
    assert asked(anchors, at(edited, line, 9)).middle == "    z = 1"


def test_the_anchor_moves_when_the_cursor_leaves_upwards():
    anchors = Anchors()
    asked(anchors, at("a = 1\nb = 2\nc = 3\n", 2, 5))
    assert asked(anchors, at("a = 1\nb = 2\nc = 3\n", 0, 4)).middle == "a = "


def test_much_typed_text_becomes_part_of_the_prefix():
    anchors = Anchors()
    asked(anchors, typed("x = 0\n"))
    much = "x = 0\n" + "y = x + 1\n" * (MAX_TYPED_CHARS // 10 + 1)
    assert asked(anchors, typed(much + "z")).middle == "z"


texts = st.text(st.sampled_from("ab(\n"), max_size=12)


@settings(max_examples=300)
@given(start=texts, edits=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), texts, st.integers(0, 99)), max_size=12))
def test_whatever_is_edited_wherever_prefix_middle_and_suffix_are_the_documents_text_at_the_cursor(start: str, edits: list):
    anchors, text = Anchors(), start
    for chosen, removed, added, cursor in edits:
        place = chosen % (len(text) + 1)
        text = text[:place] + added + text[place + removed :]
        before = text[: cursor % (len(text) + 1)]
        prompt = asked(anchors, at(text, before.count("\n"), len(before) - before.rfind("\n") - 1))
        assert prompt.prefix.removeprefix("# a.py\n") + prompt.middle == before
        assert prompt.suffix == text.removeprefix(before)


async def test_at_rest_the_anchor_moves_to_the_cursors_line_once_its_prompt_is_computed(monkeypatch):
    monkeypatch.setattr(ask, "REST_S", 0.0)
    engine = ScriptedEngine(["x"])
    host, memory, options = Host(engine=engine, state="ready", message=""), ask.Memory(), InlineSettings()
    first, second = "a = 1\nb = \n", "a = 1\nb = 2\nc = \n"

    async def answered(text: str, line: int) -> ask.Answer:
        return await ask.complete(host, document(text), types.Position(line, 4), "a.py", options, memory)

    await answered(first, 1)
    answer = await answered(second, 2)
    assert engine.requests[-1].prompt.middle == "b = 2\nc = "
    await ask.think_ahead(host, answer, "a.py", options, memory)
    prefilled = engine.requests[-1]
    assert prefilled.priority is Priority.BACKGROUND
    assert prefilled.prompt.middle == "c = " and prefilled.prompt.prefix.endswith("b = 2\n")
    asked_again = memory.anchors.at(document(second).snapshot(types.Position(2, 4)), options.context_tokens)
    assert asked_again.line == 2
