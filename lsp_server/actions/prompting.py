"""From a task to the conversation that asks for it: the prompt's words, what of the project goes before them, and the room there is.

Owns: the values of the prompt's variables, the room, and that no text of the user's forges a turn. Asks nobody.
"""

import re

from lsp_server import symbols
from lsp_server.actions import extraction, surroundings
from lsp_server.actions.surroundings import Context, Part
from lsp_server.actions.tasks import Task
from lsp_server.anchors import with_newlines
from lsp_server.errors import Refusal
from lsp_server.settings import ActionSettings
from model_host.generation import Chat, Engine, Message
from prompts import by_example

MAX_DIAGNOSTIC_CHARS = 1000


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


def conversation(engine: Engine, messages: tuple[Message, ...], kind: str) -> Chat:
    """The messages as the checkpoint takes them: in its template, or by example where it knows none."""
    if engine.facts.without_chat is None:
        return Chat(messages=messages)
    words = "\n\n".join(message.content for message in messages)
    return Chat(messages=(Message(role="user", content=by_example.text(kind, words)),), in_template=False)


def continued(chat: Chat, answered: str, question: str) -> Chat:
    """The conversation with one more exchange."""
    if not chat.in_template:
        more = f"{answered.rstrip()}\n\n{by_example.REQUEST}{question}\n\n{by_example.ANSWER}"
        return Chat(messages=(*chat.messages, Message(role="user", content=more)), in_template=False)
    turns = (Message(role="assistant", content=answered), Message(role="user", content=unforged(question)))
    return Chat(messages=(*chat.messages, *turns))


def room_for(engine: Engine, settings: ActionSettings, max_new_tokens: int) -> int:
    """Tokens a prompt may have."""
    most = min(engine.facts.context_tokens, engine.facts.cache_tokens or engine.facts.context_tokens)
    return min(settings.context_tokens, most - max_new_tokens - 16)


def file_tokens(engine: Engine, settings: ActionSettings) -> int:
    """Tokens that the file may have in a prompt: the same for every action, so that their prompts begin alike."""
    return min(settings.context_tokens * 3 // 4, engine.facts.context_tokens // 2)


def unforged(text: str) -> str:
    """Text in which nothing looks like the beginning of another turn, in templates that write turns as plain words."""
    return extraction.FORGED.sub(r"\n\n \1:", text)


def restored(code: str, original: str) -> str:
    """`code` with the lines that `unforged` moved moved back."""
    return re.sub(r"(\A|\n\n) (User|Assistant):", r"\1\2:", code) if extraction.FORGED.search("\n\n" + original) else code
