"""The seam between words and weights: a cursor becomes a prompt, a generation becomes a suggestion, or a reason for none.

Owns: whether to ask at all, from memory or the model, the deadline, when to stop reading. The only module where documents meet the engine.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lsprotocol import types

from lsp_server import context, filters, workspace
from lsp_server.anchors import Anchors, with_newlines
from lsp_server.host import Host
from lsp_server.remembered import Remembered
from lsp_server.repository import Repository, text_of
from lsp_server.session import Document, Snapshot
from lsp_server.settings import InlineSettings
from model_host.errors import EngineError
from model_host.generation import Cost, Engine, Fim, Generation, Priority, Request, Reuse, Sampling

AHEAD_DEADLINE_S = 60.0
REST_S = 1.0
"""Whoever types nothing for so long rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Text to put into `range`, in the document's own line endings; or no text, and a `reason` to tell the user."""

    text: str = ""
    range: types.Range | None = None
    """On the cursor's line; empty, or over the closing characters behind the cursor that the text brings itself."""
    before: str = ""
    """The cursor's line up to the cursor."""
    asked: Snapshot | None = None
    """The document the model was asked about."""
    accepted: Snapshot | None = None
    """The document once the text is accepted."""
    reason: str = ""
    cost: Cost | None = None

    def is_taken_by(self, changes: Sequence[types.TextDocumentContentChangeEvent]) -> bool:
        """Whether the changes are one insertion of all that is still to be written of the text, which nobody types in one go."""
        change = changes[0] if len(changes) == 1 else None
        if not isinstance(change, types.TextDocumentContentChangePartial) or self.range is None:
            return False
        here = self.range.start
        typed = change.range.start.character - here.character
        return change.range.start.line == here.line and typed >= 0 and len(change.text) > 1 and self.text[typed:] == change.text


@dataclass(frozen=True, slots=True)
class Memory:
    """What one connection remembers from one question to the next."""

    remembered: Remembered = field(default_factory=Remembered)
    anchors: Anchors = field(default_factory=Anchors)
    repository: Repository = field(default_factory=Repository)


async def complete(
    host: Host,
    document: Document | None,
    position: types.Position,
    shown_path: str,
    settings: InlineSettings,
    memory: Memory,
    priority: Priority = Priority.INLINE,
    selected: types.SelectedCompletionInfo | None = None,
) -> Answer:
    """What to insert at `position`: from memory where that holds, else from the model. With an item `selected` in a menu of the editor's,
    what goes on behind that item, with the item in front. Cancelling this coroutine cancels the generation."""
    if not settings.enabled:
        return Answer(reason="Completions are switched off: inline.enabled is false.")
    if document is None:
        return Answer(reason="The document is not open: the editor has to send textDocument/didOpen first.")
    if (engine := host.engine) is None:
        return Answer(reason=host.message)
    if not document.contains(position):
        return Answer(reason=f"Line {position.line + 1} is outside the document, which has {document.line_count} lines.")
    snapshot = document.snapshot(position)
    if selected and (with_item := once_selected(document, position, selected, memory)):
        snapshot = with_item
    else:
        selected = None
    if reason := context.refusal(snapshot, document.chars, settings.max_document_chars):
        return Answer(reason=reason)
    if not settings.ignored_files and (reason := await asyncio.to_thread(workspace.why_ignored, snapshot.uri)):
        return Answer(reason=reason)
    if reason := engine.facts.without_fim:
        return Answer(reason=reason)
    if text := filters.something(hole_at(snapshot, settings), memory.remembered.rest(snapshot)):
        return behind(selected, suggestion(snapshot, text))
    anchor = memory.anchors.at(snapshot, settings.context_tokens)
    memory.anchors.keep(snapshot.uri, anchor)
    memory.repository.use(snapshot.uri)
    prompt = anchor.hole(snapshot, shown_path, memory.repository.block(repository_tokens(engine, settings)))
    try:
        answer = await filled(engine, snapshot, prompt, settings, priority)
    except EngineError as error:
        return Answer(reason=str(error))
    if answer.text:
        memory.remembered.keep(snapshot, with_newlines([answer.text]))
    return behind(selected, replace(answer, asked=snapshot))


def once_selected(document: Document, position: types.Position, selected: types.SelectedCompletionInfo, memory: Memory) -> Snapshot | None:
    """The document once the selected item is taken; None for an item that does not end at the cursor, and for one that the last suggestion
    there begins with anyhow, such as our own."""
    if selected.range.end != position or selected.range.start.line != position.line:
        return None
    snapshot, start = document.snapshot(position), document.snapshot(selected.range.start)
    typed = snapshot.before[start.column :]
    if (typed + memory.remembered.rest(snapshot)).startswith(with_newlines([selected.text])):
        return None
    return start.with_text(selected.text, len(typed))


def behind(selected: types.SelectedCompletionInfo | None, answer: Answer) -> Answer:
    """The answer for a document without the selected item: it brings the item along, over what was typed of it."""
    if selected is None or answer.range is None:
        return answer
    covered = answer.range.end.character - answer.range.start.character
    end = types.Position(selected.range.end.line, selected.range.end.character + covered)
    return replace(answer, text=selected.text + answer.text, range=types.Range(selected.range.start, end))


async def think_ahead(host: Host, answer: Answer, shown_path: str, settings: InlineSettings, memory: Memory) -> None:
    """While the user looks at an answer, and nobody else wants the engine: asks for what would follow it once accepted; then rests."""
    if (engine := host.engine) is None:
        return
    patient = settings.model_copy(update={"deadline_s": AHEAD_DEADLINE_S})
    accepted = answer.accepted
    with contextlib.suppress(EngineError):
        if accepted and not memory.remembered.rest(accepted):
            anchor = memory.anchors.at(accepted, settings.context_tokens)
            prompt = anchor.hole(accepted, shown_path, memory.repository.block(repository_tokens(engine, settings)))
            ahead = await filled(engine, accepted, prompt, patient, Priority.BACKGROUND)
            if ahead.text:
                memory.remembered.keep(accepted, with_newlines([ahead.text]))
    await rest(host, answer, shown_path, settings, memory)


async def rest(host: Host, answer: Answer, shown_path: str, settings: InlineSettings, memory: Memory) -> None:
    """Moves the anchor to the line where the user rests and lets the repository's block grow, so that no keystroke has to: both count once
    the prompt that they give is computed."""
    asked = answer.asked
    if (engine := host.engine) is None or asked is None:
        return
    await asyncio.sleep(REST_S)
    kept = memory.anchors.at(asked, settings.context_tokens)
    anchor = memory.anchors.moved(asked, settings.context_tokens) if kept.line < asked.line else kept
    pieces = await memory.repository.grown(repository_tokens(engine, settings))
    if anchor is kept and pieces == memory.repository.pieces:
        return
    prompt = anchor.hole(asked, shown_path, text_of(pieces))
    request = Request(prompt=prompt, max_new_tokens=1, priority=Priority.BACKGROUND, reuse=Reuse(settings.reuse))
    with contextlib.suppress(EngineError):
        async with engine.submit(request) as generation:
            await generation.finished()
        memory.anchors.keep(asked.uri, anchor)
        memory.repository.keep(pieces)


def repository_tokens(engine: Engine, settings: InlineSettings) -> int:
    """How much is told of other files: what the user says, else what suits the model."""
    return engine.facts.repository_tokens if settings.repository_tokens < 0 else settings.repository_tokens


def hole_at(snapshot: Snapshot, settings: InlineSettings) -> filters.Hole:
    return filters.Hole(
        before=snapshot.before,
        after=snapshot.after,
        following=snapshot.lines[snapshot.line + 1 : snapshot.line + 20],
        max_lines=settings.max_lines,
    )


def suggestion(snapshot: Snapshot, text: str, cost: Cost | None = None) -> Answer:
    """The answer that inserts `text`, which has \n for line endings, at the snapshot's cursor."""
    overlap = filters.brought(text, snapshot.after)
    own = text.replace("\n", snapshot.newline)
    return Answer(
        text=own,
        range=snapshot.range(snapshot.column, snapshot.column + overlap),
        before=snapshot.before,
        accepted=snapshot.with_text(own, overlap),
        cost=cost,
    )


async def filled(engine: Engine, snapshot: Snapshot, prompt: Fim, settings: InlineSettings, priority: Priority) -> Answer:
    """Asks the engine to fill the hole at the snapshot's cursor."""
    hole = hole_at(snapshot, settings)
    request = Request(
        prompt=prompt,
        max_new_tokens=settings.max_new_tokens,
        sampling=Sampling(temperature=settings.temperature),
        priority=priority,
        reuse=Reuse(settings.reuse),
        settle_s=settings.deadline_s,
    )
    async with engine.submit(request) as generation:
        raw, in_time = await read(generation, hole, settings.deadline_s)
        generation.cancel()
        cost = await generation.finished() if in_time else None
    if text := filters.shown(hole, raw):
        return suggestion(snapshot, text, cost)
    if not in_time:
        return Answer(reason=f"Nothing came within inline.deadline_s = {settings.deadline_s:g} s: a smaller model or context is faster.")
    return Answer(reason="The model only repeated what is there." if raw.strip() else "The model has nothing to add here.", cost=cost)


async def read(generation: Generation, hole: filters.Hole, deadline_s: float) -> tuple[str, bool]:
    """The text until it is complete, ended or late; and whether it was in time."""
    text = ""
    try:
        async with asyncio.timeout(deadline_s):
            async for piece in generation:
                text += piece
                if filters.is_complete(hole, text):
                    break
    except TimeoutError:
        return text, False
    return text, True
