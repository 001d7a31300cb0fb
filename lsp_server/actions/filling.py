"""Fill-in-the-middle on request: what goes at the cursor, or into every hole that is marked in a selection.

Owns: the mark, `<fill>` or `<fill: what it should do>`, and the order: from the first hole to the last, each seeing those before it filled.
Gives edits; changes nothing.
"""

import re
from dataclasses import dataclass, replace

from lsprotocol import types
from pydantic import BaseModel, ConfigDict, Field

from lsp_server import context, filters
from lsp_server.actions import extraction, reading
from lsp_server.actions.reading import Heard
from lsp_server.actions.tasks import Span
from lsp_server.anchors import Anchors
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.session import Document, Snapshot, split_lines, units
from lsp_server.settings import Settings
from model_host.errors import EngineError
from model_host.generation import Engine, Fim, Priority, Request, Sampling
from prompts.comments import MARKERS

MARK = re.compile(r"<fill(?::(?P<instruction>[^<>\n]*))?>")
MAX_HOLES = 20
MAX_LINES = 60
MAX_NEW_TOKENS = 400


class ToFill(BaseModel):
    """The argument of the command `deepseek-lsp.fill`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    range: Span
    version: int | None = None
    instruction: str = Field(default="", max_length=1000)


@dataclass(frozen=True, slots=True)
class Hole:
    """`length` characters at `column` of a line, a mark or nothing, that become what the model says."""

    line: int
    column: int
    length: int
    instruction: str


def holes(snapshot: Snapshot, span: Span, instruction: str) -> list[Hole]:
    """The marks on the selection's lines; without a selection, the cursor. Raises Refusal."""
    if span.is_empty:
        return [Hole(snapshot.line, snapshot.column, 0, instruction)]
    found = [
        Hole(number, mark.start(), len(mark[0]), (mark["instruction"] or instruction).strip())
        for number in range(span.start.line, min(span.end.line + 1, len(snapshot.lines)))
        for mark in MARK.finditer(snapshot.lines[number])
    ]
    if not found:
        raise Refusal("No hole is marked in the selection: write <fill>, or <fill: what it should do>, where something is missing.")
    if len(found) > MAX_HOLES:
        raise Refusal(f"That are {len(found)} holes, and at most {MAX_HOLES} are filled at once: select fewer.")
    return found


async def filled(
    engine: Engine, document: Document, asked: ToFill, shown_path: str, settings: Settings, heard: Heard, repository: str = ""
) -> list[types.TextEdit]:
    """The edits that fill what was asked for, knowing what the `repository` says of other files. Raises Refusal."""
    if engine.facts.without_fim is not None:
        raise Refusal(engine.facts.without_fim)
    if asked.version is not None and asked.version != document.version:
        raise Stale("The document changed since, so nothing is filled. Ask again.")
    snapshot = document.snapshot(types.Position(asked.range.start.line, asked.range.start.character))
    if reason := context.refusal(snapshot, document.chars, settings.inline.max_document_chars):
        raise Refusal(reason)
    texts: list[str] = []
    wanted = holes(snapshot, asked.range, asked.instruction)
    for number, hole in enumerate(wanted):
        here = at_hole(snapshot, wanted, texts, number)
        prompt = Anchors().moved(here, settings.actions.context_tokens).hole(here, shown_path, repository)
        text = await words(engine, here, prompt, hole.instruction, settings, heard)
        behind = snapshot.lines[hole.line][hole.column + hole.length :].rstrip("\r\n")
        wanted[number] = replace(hole, length=hole.length + filters.brought(text, behind))
        texts.append(text)
        if document.version != snapshot.version:
            raise Stale("The document changed while the model answered, so nothing is filled. Ask again.")
    if not any(texts):
        raise Unusable("The model has nothing to add here.")
    return [edit(snapshot, hole, text) for hole, text in zip(wanted, texts, strict=True) if text]


def at_hole(snapshot: Snapshot, wanted: list[Hole], texts: list[str], number: int) -> Snapshot:
    """The document with the holes before `number` filled and the marks behind it gone, and the cursor in that hole."""
    lines = list(snapshot.lines)
    for index in range(len(wanted) - 1, -1, -1):  # from the last one, so that columns stay what they are
        hole = wanted[index]
        text = texts[index].replace("\n", snapshot.newline) if index < number else ""
        line = lines[hole.line]
        lines[hole.line] = line[: hole.column] + text + line[hole.column + hole.length :]
    hole = wanted[number]
    before = [(earlier, text) for earlier, text in zip(wanted, texts, strict=False) if earlier.line == hole.line]
    added = sum(len(text.replace("\n", snapshot.newline)) - earlier.length for earlier, text in before)
    start = "".join(lines[: hole.line]) + lines[hole.line][: hole.column + added]
    whole = Document(types.TextDocumentItem(snapshot.uri, snapshot.language, 0, "".join(lines)), snapshot.encoding)
    above = split_lines(start)
    return replace(whole.snapshot(types.Position(0, 0)), version=snapshot.version, line=len(above) - 1, column=len(above[-1]))


async def words(engine: Engine, here: Snapshot, prompt: Fim, instruction: str, settings: Settings, heard: Heard) -> str:
    """What goes into the hole at the snapshot's cursor. Raises Refusal."""
    if instruction:
        margin = here.before[: len(here.before) - len(here.before.lstrip())]
        comment = f"{margin}{MARKERS.get(here.language, '#')} {' '.join(instruction.split())}\n"
        prompt = replace(prompt, prefix=prompt.prefix + comment)
    hole = filters.Hole(before=here.before, after=here.after, following=here.lines[here.line + 1 : here.line + 20], max_lines=MAX_LINES)
    sampling = Sampling(temperature=settings.actions.temperature)
    request = Request(prompt=prompt, max_new_tokens=MAX_NEW_TOKENS, sampling=sampling, priority=Priority.CHAT)
    try:
        async with engine.submit(request) as generation:
            text, _ = await reading.read(generation, MAX_NEW_TOKENS * reading.CHARS_PER_NEW_TOKEN, settings.actions, heard, lambda: False)
    except EngineError as error:
        raise Refusal(str(error)) from error
    if extraction.is_looping(text):
        raise Unusable("The model went in circles, so nothing is filled. Ask again, with an instruction or another.")
    return filters.shown(hole, extraction.cleaned(text, "".join(here.lines)))


def edit(snapshot: Snapshot, hole: Hole, text: str) -> types.TextEdit:
    """The edit of the document that puts `text` into the hole."""
    line = snapshot.lines[hole.line]
    start, end = (types.Position(hole.line, units(line[:column], snapshot.encoding)) for column in (hole.column, hole.column + hole.length))
    return types.TextEdit(types.Range(start, end), text.replace("\n", snapshot.newline))
