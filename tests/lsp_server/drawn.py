"""Documents drawn in text: «the selection» or | for the cursor, and what an action with a scripted answer makes of them."""

from dataclasses import replace

from lsprotocol import types

from lsp_server.actions import prompting, reading, regions, tasks
from lsp_server.actions.tasks import Asked
from lsp_server.session import Document, Encoding
from lsp_server.settings import ActionSettings
from prompts import library
from tests.scripted import FACTS, ScriptedEngine

ACTIONS = {action.name: action for action in library.load()[0]}
URI = "file:///project/shop.py"
FOLDERS = ["file:///project"]


def parse(drawing: str) -> tuple[str, types.Range]:
    """The text and the selection of a drawing."""
    if "«" in drawing:
        before, rest = drawing.split("«")
        inside, after = rest.split("»")
    else:
        before, _, after = drawing.partition("|")
        inside = ""
    start, end = position_behind(before), position_behind(before + inside)
    return before + inside + after, types.Range(start, end)


def position_behind(text: str) -> types.Position:
    lines = text.replace("\r\n", "\n").split("\n")
    return types.Position(len(lines) - 1, len(lines[-1]))


def document_of(text: str, language: str = "python", uri: str = URI) -> Document:
    return Document(types.TextDocumentItem(uri, language, 7, text), Encoding.Utf32)


def asked_of(name: str, range: types.Range, **more: object) -> Asked:
    start, end = (tasks.Place(line=place.line, character=place.character) for place in (range.start, range.end))
    return Asked(action=name, uri=more.pop("uri", URI), range=tasks.Span(start=start, end=end), **more)


def task_of(drawing: str, name: str, language: str = "python", **more: object) -> tuple[tasks.Task, Document]:
    text, range = parse(drawing)
    uri = str(more.get("uri", URI))
    document = document_of(text, language, uri)
    return tasks.prepare(ACTIONS[name], asked_of(name, range, **more), document, "shop.py", FOLDERS, 2_000_000), document


async def after(drawing: str, name: str, *answer: str, language: str = "python", **more: object) -> str:
    """The document once the action `name` was done with the model answering `answer`."""
    task, document = task_of(drawing, name, language, **more)
    engine = ScriptedEngine(answer, facts=replace(FACTS, context_tokens=16_384))
    settings = ActionSettings()
    chat, _ = prompting.prompt(task, engine, settings, [], {})
    words = await reading.answer(engine, chat, task.action.head.max_new_tokens, settings, reading.unheard, document)
    return regions.applied(task.region.lines, reading.changes(task, words))
