"""The seam between words and weights: a cursor becomes a prompt, a generation becomes a suggestion, or a reason for none.

Owns: whether to ask at all, the deadline, when to stop reading. The only module where documents meet the engine.
"""

import asyncio
from dataclasses import dataclass

from lsprotocol import types

from lsp_server import context, filters
from lsp_server.host import Host
from lsp_server.session import Document, Snapshot
from lsp_server.settings import InlineSettings
from model_host.errors import EngineError
from model_host.generation import Cost, Engine, Generation, Priority, Request, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Text to put into `range`, in the document's own line endings; or no text, and a `reason` to tell the user."""

    text: str = ""
    range: types.Range | None = None
    """On the cursor's line; empty, or over the closing characters behind the cursor that the text brings itself."""
    before: str = ""
    """The cursor's line up to the cursor."""
    reason: str = ""
    cost: Cost | None = None


async def complete(
    host: Host,
    document: Document | None,
    position: types.Position,
    shown_path: str,
    settings: InlineSettings,
    priority: Priority = Priority.INLINE,
) -> Answer:
    """What to insert at `position`. Cancelling this coroutine cancels the generation."""
    if not settings.enabled:
        return Answer(reason="Completions are switched off: inline.enabled is false.")
    if document is None:
        return Answer(reason="The document is not open: the editor has to send textDocument/didOpen first.")
    if host.engine is None:
        return Answer(reason=host.message)
    if not document.contains(position):
        return Answer(reason=f"Line {position.line + 1} is outside the document, which has {document.line_count} lines.")
    snapshot = document.snapshot(position)
    if reason := context.refusal(snapshot, document.chars, settings.max_document_chars):
        return Answer(reason=reason)
    if reason := host.engine.facts.without_fim:
        return Answer(reason=reason)
    try:
        return await filled(host.engine, snapshot, shown_path, settings, priority)
    except EngineError as error:
        return Answer(reason=str(error))


async def filled(engine: Engine, snapshot: Snapshot, shown_path: str, settings: InlineSettings, priority: Priority) -> Answer:
    """Asks the engine to fill the hole at the snapshot's cursor."""
    hole = filters.Hole(
        before=snapshot.before,
        after=snapshot.after,
        following=snapshot.lines[snapshot.line + 1 : snapshot.line + 20],
        max_lines=settings.max_lines,
    )
    request = Request(
        prompt=context.fim_prompt(snapshot, shown_path, settings.context_tokens),
        max_new_tokens=settings.max_new_tokens,
        sampling=Sampling(temperature=settings.temperature),
        priority=priority,
    )
    async with engine.submit(request) as generation:
        raw, in_time = await read(generation, hole, settings.deadline_s)
        generation.cancel()
        cost = await generation.finished() if in_time else None
    text = filters.shown(hole, raw)
    if text:
        overlap = len(hole.after) if hole.after and text.endswith(hole.after) else 0
        return Answer(
            text=text.replace("\n", snapshot.newline),
            range=snapshot.range(snapshot.column, snapshot.column + overlap),
            before=snapshot.before,
            cost=cost,
        )
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
