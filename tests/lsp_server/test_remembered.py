"""What was suggested is served again without the model, as long as it holds, and what would follow it is there before it is asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server import ask
from lsp_server.connection import Connection
from lsp_server.filters import CLOSED_BY
from lsp_server.host import Host
from lsp_server.remembered import Remembered
from lsp_server.session import Document, Encoding, Snapshot
from lsp_server.settings import InlineSettings, Layer
from model_host.generation import Priority
from tests.scripted import ScriptedEngine

SETTINGS = InlineSettings()
ABOVE = "import os\n\n\ndef main():\n"
BELOW = "\n\nif __name__ == '__main__':\n    main()\n"
SUGGESTED = "for name in names:\n        print(name)"


def snapshot(text: str, uri: str = "file:///p/a.py") -> Snapshot:
    """A document with its cursor where the text says |."""
    before, after = text.split("|")
    document = Document(types.TextDocumentItem(uri, "python", 0, before + after), Encoding.Utf16)
    lines = before.replace("\r\n", "\n").split("\n")
    return document.snapshot(types.Position(len(lines) - 1, len(lines[-1])))


def remembered(at: str = f"{ABOVE}    |{BELOW}", text: str = SUGGESTED) -> Remembered:
    memory = Remembered()
    memory.keep(snapshot(at), text)
    return memory


@given(typed=st.integers(0, len(SUGGESTED)), newline=st.sampled_from(["\n", "\r\n"]))
def test_whoever_types_what_was_suggested_is_shown_the_rest(typed: int, newline: str):
    text = f"{ABOVE}    {SUGGESTED[:typed]}|{BELOW}".replace("\n", newline)
    assert remembered().rest(snapshot(text)) == SUGGESTED[typed:]


@pytest.mark.parametrize(
    "text",
    [
        f"{ABOVE}    foreach|{BELOW}",
        f"{ABOVE}   |{BELOW}",
        f"{ABOVE}    for| x{BELOW}",
        f"{ABOVE}    for|\n{BELOW}",
        f"{ABOVE}    x = 1\n    for|{BELOW}",
        f"import sys\n{ABOVE}    for|{BELOW}".replace("import os", "import re"),
        f"{ABOVE}    for|{BELOW}more\n",
        f"{ABOVE}    for name in names:\n        |{BELOW}".replace("names:", "others:"),
    ],
)
def test_it_is_not_shown_where_anything_near_differs(text: str):
    assert remembered().rest(snapshot(text)) == ""


def test_it_is_not_shown_in_another_file():
    assert remembered().rest(snapshot(f"{ABOVE}    for|{BELOW}", uri="file:///p/b.py")) == ""


def test_brackets_and_quotes_that_the_editor_closed_do_not_matter():
    memory = remembered(f"{ABOVE}    |{BELOW}", 'print("x", names)')
    assert memory.rest(snapshot(f'{ABOVE}    print("|"){BELOW}')) == 'x", names)'


def test_lines_far_away_do_not_matter():
    far = "".join(f"x{number} = {number}\n" for number in range(30))
    memory = remembered(f"{far}    |{BELOW}")
    assert memory.rest(snapshot(f"new = 1\n{far}    for|{BELOW}")) == SUGGESTED.removeprefix("for")


def test_the_newest_suggestion_that_holds_is_served():
    memory = remembered()
    memory.keep(snapshot(f"{ABOVE}    f|{BELOW}"), "oo()")
    assert memory.rest(snapshot(f"{ABOVE}    f|{BELOW}")) == "oo()"
    assert memory.rest(snapshot(f"{ABOVE}    fo|{BELOW}")) == "o()"
    assert memory.rest(snapshot(f"{ABOVE}    for|{BELOW}")) == SUGGESTED.removeprefix("for")


def document(text: str) -> Document:
    return Document(types.TextDocumentItem("file:///p/a.py", "python", 0, text), Encoding.Utf16)


async def answer(host: Host, memory: ask.Memory, text: str) -> ask.Answer:
    before, after = text.split("|")
    lines = before.split("\n")
    at = types.Position(len(lines) - 1, len(lines[-1]))
    return await ask.complete(host, document(before + after), at, "a.py", SETTINGS, memory)


CALL = 'show(rows[0], "(no, name)", {1: [2]})\n    return rows'


@given(typed=st.integers(0, len(CALL)))
async def test_brackets_and_quotes_that_the_editor_closed_while_one_typed_do_not_stand_there_twice(typed: int):
    """Whoever types a suggestion in an editor that closes brackets and then takes the rest has what was suggested."""
    closed = ""
    for letter in CALL[:typed]:
        if closed[:1] == letter:
            closed = closed[1:]
        elif letter in CLOSED_BY and closed[:1] != '"':
            closed = CLOSED_BY[letter] + closed
        elif letter == '"':
            closed = letter + closed
    memory = ask.Memory(remembered=remembered(f"{ABOVE}    |{BELOW}", CALL))
    at = snapshot(f"{ABOVE}    {CALL[:typed]}|{closed}{BELOW}")
    found = await ask.complete(
        Host(engine=ScriptedEngine([]), state="ready", message=""),
        document("".join(at.lines)),
        types.Position(at.line, at.column),
        "a.py",
        SETTINGS,
        memory,
    )
    if found.accepted is not None:
        assert "".join(found.accepted.lines) == f"{ABOVE}    {CALL}{BELOW}"
    else:
        assert typed == len(CALL)


async def test_typing_on_and_coming_back_ask_the_model_once():
    engine = ScriptedEngine(["self.name", " + 'x'"])
    host, memory = Host(engine=engine, state="ready", message=""), ask.Memory()
    first = await answer(host, memory, "    return |\n")
    typed = await answer(host, memory, "    return self.|\n")
    await answer(host, memory, "    return sold|\n")
    back = await answer(host, memory, "    return |\n")
    assert (first.text, typed.text, back.text) == ("self.name + 'x'", "name + 'x'", "self.name + 'x'")
    assert len(engine.requests) == 2


async def test_what_follows_an_accepted_suggestion_is_there_before_it_is_asked_for():
    engine = ScriptedEngine(["first()"])
    host, memory = Host(engine=engine, state="ready", message=""), ask.Memory()
    shown = await answer(host, memory, "x = |\ny = 2\n")
    assert shown.accepted is not None and shown.accepted.lines == ("x = first()\n", "y = 2\n", "")
    await ask.think_ahead(host, shown, "a.py", SETTINGS, memory)
    assert engine.requests[-1].priority is Priority.BACKGROUND and engine.requests[-1].prompt.middle == "x = first()"
    assert (await answer(host, memory, "x = first()|\ny = 2\n")).text == "first()"
    assert len(engine.requests) == 2


def test_settings_sent_again_unchanged_forget_nothing_and_changed_ones_do():
    server = Connection([], [], Host())
    server.memory.remembered.keep(snapshot("x = |"), "1")
    server.apply_settings()
    assert server.memory.remembered.rest(snapshot("x = |")) == "1"
    server.client_layers["workspace"] = Layer("a test", {"inline": {"max_lines": 1}})
    server.apply_settings()
    assert not server.memory.remembered.rest(snapshot("x = |"))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_document_after_acceptance_is_the_one_the_editor_will_have(newline: str):
    before = snapshot("a = 1\nb = foo(|)\nc = 3\n".replace("\n", newline))
    after = before.with_text(f"x,{newline}        y)", 1)
    assert "".join(after.lines) == "a = 1\nb = foo(x,\n        y)\nc = 3\n".replace("\n", newline)
    assert (after.before, after.after) == ("        y)", "")
