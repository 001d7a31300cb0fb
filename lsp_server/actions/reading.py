"""The model's answer: asked for, read as it comes, and understood as an edit or as words; or refused.

Owns: when reading ends, and what is made of the text. Where documents and actions meet the engine. Changes nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lsp_server.actions import extraction, prompting, regions, tasks
from lsp_server.actions.tasks import Task
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.session import Document
from lsp_server.settings import ActionSettings
from model_host.errors import EngineError
from model_host.generation import Chat, Cost, Engine, Finish, Generation, Priority, Request, Sampling
from prompts import by_example

CHARS_PER_NEW_TOKEN = 12
"""An answer of more is no text; what comes then is not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The model's answer as it came."""

    text: str
    is_cut_off: bool
    cost: Cost | None


Heard = Callable[[str], Awaitable[None]]
"""Called with each piece of an answer."""


async def unheard(piece: str) -> None:
    """For answers that nobody watches."""


async def answer(
    engine: Engine, chat: Chat, max_new_tokens: int, settings: ActionSettings, heard: Heard, document: Document | None
) -> Words:
    """Asks, and reads the answer to its end, or to where reading on is of no use. Cancelling cancels the generation; so does a change of
    `document`, which raises Stale. Raises Refusal where the engine refuses."""
    version = document.version if document else None
    request = Request(
        prompt=chat,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=settings.temperature),
        priority=Priority.CHAT,
        stop=() if chat.in_template else by_example.STOP,
    )
    try:
        async with engine.submit(request) as generation:
            text, is_whole = await read(
                generation, max_new_tokens * CHARS_PER_NEW_TOKEN, settings, heard, lambda: is_stale(document, version)
            )
            generation.cancel()
            cost = await generation.finished() if text else None
    except EngineError as error:
        raise Refusal(str(error)) from error
    if is_stale(document, version):
        raise Stale("The document changed while the model answered, so nothing is changed. Ask again.")
    if not text and not is_whole:
        name = "first_words_s" if settings.first_words_s <= settings.deadline_s else "deadline_s"
        raise Unusable(f"No word came within actions.{name} = {getattr(settings, name):g} s: a smaller model is faster.")
    cut_off = not is_whole or (cost is not None and cost.finish is not Finish.END and cost.finish is not Finish.STOP)
    return Words(text=text, is_cut_off=cut_off, cost=cost)


def is_stale(document: Document | None, version: int | None) -> bool:
    return document is not None and document.version != version


async def read(
    generation: Generation, max_chars: int, settings: ActionSettings, heard: Heard, is_over: Callable[[], bool]
) -> tuple[str, bool]:
    """The answer, and whether it came to its own end."""
    text = ""
    try:
        async with asyncio.timeout(settings.deadline_s) as whole:
            async with asyncio.timeout(settings.first_words_s) as first:
                async for piece in generation:
                    first.reschedule(None)
                    text += piece[: max_chars - len(text)]
                    await heard(piece)
                    if is_over() or len(text) >= max_chars or extraction.is_looping(text):
                        return text, False
                first.reschedule(None)
            whole.reschedule(None)
    except TimeoutError:
        return text, False
    return text, True


def code_of(task: Task, words: Words) -> str:
    """The code in an answer to the task. Raises Unusable."""
    code = extraction.code_in(words.text, task.region.shown, task.region.language, is_cut_off=words.is_cut_off)
    if task.action.head.asks:
        code = tasks.without_marks(code)
    return prompting.restored(code, task.region.shown)


def changes(task: Task, words: Words) -> list[regions.Change]:
    """What the answer changes in the document. Raises Unusable."""
    match task.action.head.answer:
        case "replace":
            return regions.replaced(task.region, code_of(task, words))
        case "docstring":
            return regions.documented(task.region, extraction.cleaned(words.text, task.region.shown))
        case _:
            return regions.inserted_above(task.region, code_of(task, words))


def shown(task: Task, words: Words) -> str:
    """An answer to be read. Raises Unusable when there is none."""
    text = extraction.cleaned(words.text, task.region.text).strip()
    if not text:
        raise Unusable("The model gave no answer. Ask again, or select other code.")
    return text


def notes_of(engine: Engine, words: Words, dropped: tuple[str, ...]) -> tuple[str, ...]:
    """What the user should know beside an answer."""
    notes = [engine.facts.without_chat] if engine.facts.without_chat else []
    notes += [f"Left out of the prompt for lack of room: {', '.join(dropped)}."] if dropped else []
    if words.is_cut_off:
        notes.append("The answer was cut off before its end.")
    return tuple(notes)
