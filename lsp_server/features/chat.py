"""deepseek/chat: questions and answers beside the editor, about files, selections and diagnostics named by URI. Answers come as partial
results while they are made, or as `deepseek/stream`; `/name ...` is the action of that name at the first reference."""

from typing import Any

from lsprotocol import types
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lsp_server import answering
from lsp_server.actions import reading, references
from lsp_server.actions.extraction import cleaned
from lsp_server.actions.references import Reference
from lsp_server.actions.surroundings import Part
from lsp_server.actions.tasks import Asked, Place, Span
from lsp_server.activity import Activity, plain, refused
from lsp_server.answering import Done
from lsp_server.connection import Connection, LastAction
from lsp_server.errors import Refusal, Unusable
from model_host.generation import Engine

CHAT = "deepseek/chat"
END = "deepseek/chat/end"
ACTIONS = "deepseek/chat/actions"


class ChatParams(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: str = Field(min_length=1, max_length=100_000)
    conversation: str | None = None
    """The one to go on with; a new one without."""
    references: tuple[Reference, ...] = Field(default=(), max_length=50)
    partialResultToken: str | int | None = None
    stream: str | None = Field(default=None, min_length=1, max_length=100)
    """The client's own id for the `deepseek/stream` of the answer; then there is no progress bar beside it."""


def register(server: Connection) -> None:
    @server.feature(CHAT)
    async def chat(params: Any) -> dict[str, Any]:
        try:
            return await answered(server, understood(params))
        except Refusal as refusal:
            raise refused(refusal) from refusal

    @server.feature(END)
    async def end(params: Any) -> None:
        sent = plain(params)
        if isinstance(sent, dict):
            server.conversations.end(str(sent.get("conversation")))

    @server.feature(ACTIONS)
    async def actions(params: Any) -> list[dict[str, str]]:
        heads = ((action, action.head) for action in server.actions)
        return [
            {
                "name": action.name,
                "title": action.title("the function"),
                "answer": head.answer,
                "appliesTo": head.applies_to,
                "asks": head.asks,
            }
            for action, head in heads
        ]


def understood(params: Any) -> ChatParams:
    try:
        return ChatParams.model_validate(plain(params))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise Refusal(f"The question is not understood: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error


async def answered(server: Connection, params: ChatParams) -> dict[str, Any]:
    """The answer to a question, or what an action gave. Raises Refusal."""
    name, _, instruction = params.text.strip().removeprefix("/").partition(" ")
    if params.text.startswith("/"):
        return await acted(server, params, name, instruction.strip())
    async with answering.engine_for(server) as (engine, notes):
        answer = await said(server, params, engine)
        return answer | {"notes": [*notes, *answer["notes"]]}


async def said(server: Connection, params: ChatParams, engine: Engine) -> dict[str, Any]:
    """The engine's answer to a question."""
    settings = server.settings.actions
    parts = [part(server, reference, order) for order, reference in enumerate(params.references)]
    question = server.conversations.ask(engine, settings, params.conversation, params.text, parts)
    server.stop_ahead()
    activity = Activity(server, "Answering", "chat", params.references[0].uri if params.references else "", params.stream)

    async def heard(piece: str) -> None:
        await activity.heard(piece)
        if params.partialResultToken is not None:
            server.progress(types.ProgressParams(token=params.partialResultToken, value={"text": piece}))

    words = await activity.run(lambda: reading.answer(engine, question.chat, settings.max_new_tokens, settings, heard, None))
    server.last_action = LastAction(title="Answering", cost=words.cost)
    text = cleaned(words.text, question.words).strip()
    if not text:
        raise Unusable("The model gave no answer. Ask again, in other words.")
    server.conversations.answered(question, text)
    notes = reading.notes_of(engine, words, question.dropped)
    return {"conversation": question.conversation, "text": text, "notes": list(notes), "edit": None}


def part(server: Connection, reference: Reference, order: int) -> Part:
    """The text of a reference. Raises Refusal."""
    return references.part(server.session, reference, server.shown_path(reference.uri), server.folders(), order)


async def acted(server: Connection, params: ChatParams, name: str, instruction: str) -> dict[str, Any]:
    """What the action `name` gives at the first reference: words, or an edit that the client may make. Raises Refusal."""
    action = answering.find(server, name)
    if not params.references:
        raise Refusal(f"/{name} needs to know where: refer to a selection or a place in a file.")
    first = params.references[0]
    document = server.session.find(first.uri)
    whole = Span(start=Place(line=0, character=0), end=Place(line=document.line_count if document else 0, character=0))
    asked = Asked(action=action.name, uri=first.uri, range=first.range or whole, diagnostics=first.diagnostics, instruction=instruction)
    done = await answering.perform(server, asked, params.stream)
    conversation = await kept(server, params.conversation, first, done) if done.words else params.conversation
    return {"conversation": conversation, "text": done.words, "notes": list(done.notes), "edit": done.edit, "title": done.title}


async def kept(server: Connection, conversation: str | None, about: Reference, done: Done) -> str | None:
    """The conversation, which now holds what an action said, so that questions about it can follow; None where it cannot go on."""
    try:
        async with answering.engine_for(server) as (engine, _):
            question = server.conversations.ask(engine, server.settings.actions, conversation, f"{done.title}.", [part(server, about, 0)])
    except Refusal:  # the words are there all the same
        return None
    server.conversations.answered(question, done.words)
    return question.conversation
