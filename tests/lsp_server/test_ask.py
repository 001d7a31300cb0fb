"""From a cursor to a suggestion or a reason, with an engine whose words are known."""

from dataclasses import replace

import pytest
from lsprotocol import types

from lsp_server import ask
from lsp_server.host import Host
from lsp_server.session import Document, Encoding
from lsp_server.settings import InlineSettings
from model_host.errors import RequestError
from tests.scripted import FACTS, ScriptedEngine

SETTINGS = InlineSettings()


def document(text: str) -> Document:
    return Document(types.TextDocumentItem("file:///p/a.py", "python", 0, text), Encoding.Utf16)


def host(*pieces: str | None, **facts: object) -> Host:
    return Host(engine=ScriptedEngine(pieces, facts=replace(FACTS, **facts)), state="ready", message="")


async def answer(host: Host, text: str, line: int, character: int, settings: InlineSettings = SETTINGS) -> ask.Answer:
    return await ask.complete(host, document(text), types.Position(line, character), "a.py", settings, ask.Memory())


async def test_reading_stops_and_the_engine_is_told_once_the_completion_is_complete():
    scripted = host("a\n", "b\n", "c = 1\n", *["d\n"] * 1000)
    assert (await answer(scripted, "x(y", 0, 2)).text == "a"
    assert scripted.engine.generations[0].is_cancelled


async def test_a_closing_bracket_behind_the_cursor_is_replaced_when_the_completion_brings_it():
    found = await answer(host("name)"), 'print("🙂", )\n', 0, 12)
    assert found.text == "name)"
    assert found.range == types.Range(types.Position(0, 12), types.Position(0, 13))


async def test_a_cancelled_question_cancels_its_generation():
    import asyncio

    scripted = host(None)
    asking = asyncio.ensure_future(answer(scripted, "x = ", 0, 4))
    while not scripted.engine.generations:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert scripted.engine.generations[0].is_cancelled


@pytest.mark.parametrize(
    ("pieces", "facts", "settings", "said"),
    [
        ([], {}, SETTINGS, "nothing to add"),
        (["\n\n"], {}, SETTINGS, "nothing to add"),
        (["y"], {"without_fim": "It has no fill-in-the-middle tokens."}, SETTINGS, "no fill-in-the-middle tokens"),
        (["y"], {}, InlineSettings(enabled=False), "inline.enabled is false"),
        ([None], {}, InlineSettings(deadline_s=0.05), "inline.deadline_s = 0.05"),
    ],
)
async def test_nothing_shown_always_has_a_reason(pieces: list[str | None], facts: dict, settings: InlineSettings, said: str):
    found = await answer(host(*pieces, **facts), "x = ", 0, 4, settings)
    assert found.text == "" and said in found.reason


async def test_what_the_engine_cannot_do_is_passed_on_in_its_words(monkeypatch: pytest.MonkeyPatch):
    scripted = host("y")

    def refuse(request: object) -> None:
        raise RequestError("The device ran out of memory.")

    monkeypatch.setattr(scripted.engine, "submit", refuse)
    assert (await answer(scripted, "x = ", 0, 4)).reason == "The device ran out of memory."


async def test_without_an_engine_or_a_document_the_reason_is_theirs():
    loading = Host(message="Loading starter: 42 %.")
    assert (await answer(loading, "x", 0, 0)).reason == "Loading starter: 42 %."
    found = await ask.complete(host("y"), None, types.Position(0, 0), "a.py", SETTINGS, ask.Memory())
    assert "not open" in found.reason


async def test_a_bracket_behind_the_cursor_stays_when_the_completion_closes_its_own():
    found = await answer(host("len(names)"), "print()\n", 0, 6)
    assert found.accepted is not None and found.accepted.lines[0] == "print(len(names))\n"
