"""Conversations of one connection: what was said, and the prompt for the next answer, with what it refers to.

Owns: turns and the room for them. A turn keeps the text it was asked with, references and all, so that the next prompt begins with this
one and its latents are still there. Knows nothing of LSP's messages.
"""

import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lsp_server.actions import prompting, surroundings
from lsp_server.actions.surroundings import Part
from lsp_server.errors import Refusal
from lsp_server.settings import ActionSettings
from model_host.generation import Chat, Engine, Message

MOST = 32
"""So many conversations are kept; the one that was silent longest goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A turn that waits for its answer."""

    conversation: str
    words: str
    chat: Chat
    dropped: tuple[str, ...]


class Conversations:
    """Used on the event loop."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, tuple[Message, ...]] = OrderedDict()

    def ask(self, engine: Engine, settings: ActionSettings, id: str | None, text: str, references: Sequence[Part]) -> Question:
        """The next question of the conversation `id`, or the first of a new one. What does not fit is left out: first the oldest turns,
        then references from the last to the first. Raises Refusal when not even `text` fits."""
        if id is not None and id not in self._turns:
            raise Refusal("This conversation is no longer known here: begin a new one.")
        room = prompting.room_for(engine, settings, settings.max_new_tokens) - surroundings.about_tokens(text)
        if room < 0:
            raise Refusal("That is more text than the model has room for: send less.")
        found = surroundings.fitted(references, room)
        words = prompting.unforged(found.words + text)
        room -= surroundings.about_tokens(found.words)
        kept, dropped = recent(self._turns.get(id or "", ()), room)
        notes = (*found.dropped, f"the {dropped} oldest turns of the conversation") if dropped else found.dropped
        chat = prompting.conversation(engine, (*kept, Message(role="user", content=words)), "show")
        return Question(conversation=id or str(uuid.uuid4()), words=words, chat=chat, dropped=notes)

    def answered(self, question: Question, answer: str) -> None:
        turns = (Message(role="user", content=question.words), Message(role="assistant", content=answer.strip()))
        self._turns[question.conversation] = (*self._turns.get(question.conversation, ()), *turns)
        self._turns.move_to_end(question.conversation)
        while len(self._turns) > MOST:
            self._turns.popitem(last=False)

    def end(self, id: str) -> None:
        self._turns.pop(id, None)


def recent(turns: Sequence[Message], max_tokens: int) -> tuple[tuple[Message, ...], int]:
    """The newest exchanges that fit, and how many turns are left out. Once some are, half of the room is freed, so that the prompt does
    not begin anew with every question."""
    costs = [surroundings.about_tokens(turn.content) for turn in turns]
    if sum(costs) <= max_tokens:
        return tuple(turns), 0
    first, left = len(turns), max_tokens // 2
    while first >= 2 and sum(costs[first - 2 : first]) <= left:
        left -= sum(costs[first - 2 : first])
        first -= 2
    return tuple(turns[first:]), first
