"""The second seam between words and weights: an action and a place become a prompt, a generation becomes an answer, or a refusal.

Owns: what an action is asked with (`Asked`), where it applies, its prompt, the reading of its answer. What becomes of the answer is
`regions` and the features' matter. Nothing here changes a document.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lsprotocol import types
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lsp_server import context
from lsp_server.actions import extraction, guard, regions, surroundings, symbols
from lsp_server.actions.regions import Region
from lsp_server.actions.surroundings import Context, Part
from lsp_server.anchors import with_newlines
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.session import Document, Snapshot
from lsp_server.settings import ActionSettings
from model_host.errors import EngineError
from model_host.generation import Chat, Cost, Engine, Finish, Generation, Message, Priority, Request, Sampling
from prompts import by_example
from prompts.library import Action

CHARS_PER_NEW_TOKEN = 12
"""An answer of more is no text; what comes then is not read."""
NEAR_LINES = 12
"""Around a diagnostic that is in no function."""
MAX_FIX_LINES = 150
EDITING = frozenset({"replace", "docstring", "insert_above", "new_file"})
MAX_DIAGNOSTIC_CHARS = 1000


class Place(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    line: int = Field(ge=0)
    character: int = Field(ge=0)


class Span(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    start: Place
    end: Place

    @property
    def is_empty(self) -> bool:
        return self.start == self.end


class Asked(BaseModel):
    """What is asked for: the data of a code action, and the argument of the command `deepseek-lsp.run`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: str
    uri: str
    range: Span
    version: int | None = None
    """The document's version this is about; None: whichever it has when the work begins."""
    diagnostics: tuple[str, ...] = ()
    instruction: str = Field(default="", max_length=4000)

    @classmethod
    def read(cls, value: Any) -> "Asked":
        """From what a client sent. Raises Refusal."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise Refusal(f"The request for an action is not understood: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An action at a place of one version of a document."""

    action: Action
    asked: Asked
    snapshot: Snapshot
    region: Region
    shown_path: str

    @property
    def name(self) -> str:
        return self.region.symbol.name if self.region.symbol else ""

    @property
    def title(self) -> str:
        return self.action.title(self.name)


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


def fits(action: Action, snapshot: Snapshot, span: Span, diagnostics: int) -> str | None:
    """The title under which the action is offered at a place, or None. Looks at the lines around and asks nobody."""
    head = action.head
    if head.languages and snapshot.language not in head.languages:
        return None
    symbol = symbols.symbol_at(snapshot.lines, snapshot.language, span.start.line) if head.applies_to == "symbol" else None
    if head.applies_to == "symbol" and symbol is None:
        return None
    if head.applies_to == "selection" and span.is_empty:
        return None
    if head.applies_to == "diagnostic" and not diagnostics:
        return None
    if head.only_where:
        first, last = (symbol.first, symbol.last) if symbol else (span.start.line, span.end.line)
        if not re.search(head.only_where, "".join(snapshot.lines[first : last + 1])):
            return None
    return action.title(symbol.name if symbol else "")


def prepare(action: Action, asked: Asked, document: Document | None, shown_path: str, folders: list[str], max_document_chars: int) -> Task:
    """The task that was asked for, about the document as it is now. Raises Refusal."""
    if document is None:
        raise Refusal("The document is not open: the editor has to send textDocument/didOpen first.")
    if asked.version is not None and asked.version != document.version:
        raise Stale("The document changed since the action was offered, so nothing is changed. Ask for actions again.")
    start = types.Position(asked.range.start.line, asked.range.start.character)
    if not document.contains(start):
        raise Refusal(f"Line {start.line + 1} is outside the document, which has {document.line_count} lines.")
    snapshot = document.snapshot(start)
    if reason := context.refusal(snapshot, document.chars, max_document_chars):
        raise Refusal(reason)
    if action.head.answer in EDITING and (reason := guard.refusal(asked.uri, folders, is_open=True)):
        raise Refusal(reason)
    if action.head.asks and not asked.instruction.strip():
        raise Refusal(f"{action.title('')}: an instruction is needed. {action.head.asks}")
    region = region_of(action, asked, snapshot)
    if not region.text.strip():
        raise Refusal("There is no code here: select some.")
    if len(region.text) > action.head.max_code_chars:
        raise Refusal(
            f"That is {len(region.text):,} characters of code, and this action takes {action.head.max_code_chars:,}: select less."
        )
    return Task(action=action, asked=asked, snapshot=snapshot, region=region, shown_path=shown_path)


def region_of(action: Action, asked: Asked, snapshot: Snapshot) -> Region:
    """The lines an action is about. Raises Refusal."""
    lines, span = snapshot.lines, asked.range
    symbol = None
    first, last = span.start.line, min(span.end.line, len(lines) - 1)
    if last > first and span.end.character == 0:
        last -= 1
    match action.head.applies_to:
        case "symbol":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            if symbol is None:
                raise Refusal("There is no function or class here: put the cursor into one.")
            first, last = symbol.first, symbol.last
        case "diagnostic":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            if symbol and symbol.last - symbol.first < MAX_FIX_LINES:
                first, last = symbol.first, max(symbol.last, last)
            else:
                first, last = block_around(lines, first, last)
        case "file":
            first, last = 0, len(lines) - 1
        case "selection":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            symbol = symbol if symbol and symbol.first >= first and symbol.last <= last else None
    first, last = regions.trimmed(lines, first, last)
    return Region(lines=lines, language=snapshot.language, newline=snapshot.newline, first=first, last=last, symbol=symbol)


def block_around(lines: tuple[str, ...], first: int, last: int) -> tuple[int, int]:
    """The lines around a place as far as the next blank line, and not far."""
    low, high = first, last
    while low > max(first - NEAR_LINES, 0) and lines[low - 1].strip():
        low -= 1
    while high < min(last + NEAR_LINES, len(lines) - 1) and lines[high + 1].strip():
        high += 1
    return low, high


def values(task: Task, more: dict[str, str]) -> dict[str, str]:
    """What the prompt's variables stand for."""
    diagnostics = "\n".join(f"> {message[:MAX_DIAGNOSTIC_CHARS]}" for message in task.asked.diagnostics)
    return {
        "path": task.shown_path,
        "language": task.snapshot.language,
        "fence_language": extraction.fence_language(task.snapshot.language),
        "code": with_newlines([task.region.shown]),
        "name": task.name,
        "instruction": task.asked.instruction.strip(),
        "diagnostics": diagnostics.replace("\n\n", "\n") or "(nothing more is known)",
        "framework": "",
        "module": "",
    } | more


def prompt(task: Task, engine: Engine, settings: ActionSettings, parts: list[Part], more: dict[str, str]) -> tuple[Chat, Context]:
    """The conversation that asks for the task, and what of its context found room. Raises Refusal."""
    given = values(task, more)
    fence = surroundings.fence_for(given["code"])
    body = task.action.model_copy(update={"body": task.action.body.replace("```", fence)}).words(given)
    room = room_for(engine, settings, task.action.head.max_new_tokens) - surroundings.about_tokens(body)
    if engine.facts.without_chat is not None:
        room -= surroundings.about_tokens(by_example.example(task.action.head.answer))
    if room < 0:
        raise Refusal("The code and the answer are more than the model has room for: select less.")
    found = surroundings.fitted([*file_parts(task, file_tokens(engine, settings), room), *parts], room)
    return conversation(engine, (Message(role="user", content=unforged(found.words + body)),), task.action.head.answer), found


def conversation(engine: Engine, messages: tuple[Message, ...], kind: str) -> Chat:
    """The messages as the checkpoint takes them: in its template, or by example where it knows none."""
    if engine.facts.without_chat is None:
        return Chat(messages=messages)
    words = "\n\n".join(message.content for message in messages)
    return Chat(messages=(Message(role="user", content=by_example.text(kind, words)),), in_template=False)


def room_for(engine: Engine, settings: ActionSettings, max_new_tokens: int) -> int:
    """Tokens a prompt may have."""
    most = min(engine.facts.context_tokens, engine.facts.cache_tokens or engine.facts.context_tokens)
    return min(settings.context_tokens, most - max_new_tokens - 16)


def file_tokens(engine: Engine, settings: ActionSettings) -> int:
    """Tokens that the file may have in a prompt: the same for every action, so that their prompts begin alike."""
    return min(settings.context_tokens * 3 // 4, engine.facts.context_tokens // 2)


def file_parts(task: Task, most: int, room: int) -> list[Part]:
    """What the document itself has to say about the region; of the file `most` tokens, or a part of them where `room` is short."""
    wanted, region = task.action.head.context, task.region
    fence = extraction.fence_language(task.snapshot.language)
    found = []
    if "file" in wanted and (region.first > 0 or region.last < len(region.lines) - 1):
        while most > room and most > 1:
            most //= 2
        text, is_whole = surroundings.around(region.lines, region.first, region.last, most)
        found.append(
            Part(
                what=f"the rest of {task.shown_path}",
                lacks="" if is_whole else f"the far parts of {task.shown_path}",
                heading=f"The file {task.shown_path}:" if is_whole else f"From the file {task.shown_path}:",
                language=fence,
                text=with_newlines([text]),
                importance=wanted.index("file"),
            )
        )
    if "callees" in wanted and region.symbol and (headers := symbols.signatures(region.lines, region.language, region.symbol)):
        found.append(
            Part(
                what=f"what {region.symbol.name} calls",
                heading="It calls:",
                language=fence,
                text=with_newlines(["\n".join(headers)]),
                importance=wanted.index("callees"),
                order=2,
            )
        )
    return found


def continued(chat: Chat, answered: str, question: str) -> Chat:
    """The conversation with one more exchange."""
    if not chat.in_template:
        more = f"{answered.rstrip()}\n\n{by_example.REQUEST}{question}\n\n{by_example.ANSWER}"
        return Chat(messages=(*chat.messages, Message(role="user", content=more)), in_template=False)
    turns = (Message(role="assistant", content=answered), Message(role="user", content=unforged(question)))
    return Chat(messages=(*chat.messages, *turns))


def unforged(text: str) -> str:
    """Text in which nothing looks like the beginning of another turn, in templates that write turns as plain words."""
    return extraction.FORGED.sub(r"\n\n \1:", text)


def restored(code: str, original: str) -> str:
    """`code` with the lines that `unforged` moved moved back."""
    return re.sub(r"(\A|\n\n) (User|Assistant):", r"\1\2:", code) if extraction.FORGED.search("\n\n" + original) else code


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
        raise Unusable(f"No word came within actions.first_words_s = {settings.first_words_s:g} s: a smaller model is faster.")
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
    return restored(code, task.region.shown)


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
