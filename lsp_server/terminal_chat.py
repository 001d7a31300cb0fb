"""The verb `chat`: questions and answers in a terminal, about files of the folder it is started in, with the same actions as an editor's.

Owns: the loop, what a line means, and what is shown. A change is shown as a diff and made when the user says yes.
"""

import asyncio
import contextlib
import difflib
import importlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import platformdirs
from lsprotocol import types
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.text import Text

from lsp_server.actions import joining_tests, prompting, reading, references, regions, tasks, writing_tests
from lsp_server.actions.conversations import Conversations
from lsp_server.actions.extraction import cleaned
from lsp_server.actions.references import Reference
from lsp_server.actions.tasks import Asked, Place, Span, Task
from lsp_server.actions.writing_tests import Watched
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.host import Host
from lsp_server.session import Document, Encoding, Session, split_lines
from lsp_server.settings import Settings
from lsp_server.workspace import path_of
from model_host.generation import Engine
from prompts.library import Action

HISTORY_LINES = 1000
Result = TypeVar("Result")
HELP = """Ask anything, or:

/file PATH or PATH:FROM-TO    what the next questions are about (lines counted from 1)
/new                          a new conversation, about nothing yet
/quit                         or Ctrl-D; Ctrl-C stops an answer

and at the last /file:
"""


@dataclass
class TerminalChat:
    """One conversation in a terminal. Lives as long as the verb."""

    console: Console
    engine: Engine
    settings: Settings
    actions: tuple[Action, ...]
    confirm: Callable[[str], str] = input
    folder: Path = field(default_factory=Path.cwd)

    def __post_init__(self) -> None:
        self._conversations, self._session = Conversations(), Session()
        self._id: str | None = None
        self._pending: list[Reference] = []
        self._current: Reference | None = None

    async def line(self, line: str) -> None:
        """Does what a line of the user's asks for. Raises Refusal."""
        word, _, rest = line.strip().partition(" ")
        if word == "/file":
            self._refer(rest.strip())
        elif word == "/new":
            self._id, self._current, self._pending = None, None, []
        elif word == "/help":
            lines = [f"/{action.name:<16} {action.title('the function')}" for action in self.actions]
            self.console.print(Text(HELP + "\n".join(lines)))
        elif word.startswith("/"):
            await self._act(word.removeprefix("/"), rest.strip())
        elif line.strip():
            await self._answer(line.strip())

    def _refer(self, place: str) -> None:
        name, _, numbers = place.partition(":")
        path = Path(os.path.abspath(self.folder / Path(name).expanduser()))  # noqa: PTH100 - links stay links: the guard judges them
        span = None
        if numbers:
            first, _, last = numbers.partition("-")
            if not first.isdigit() or (last and not last.isdigit()):
                raise Refusal(f"{place!r} names no lines: write /file PATH:FROM-TO, counted from 1.")
            span = Span(start=Place(line=max(int(first) - 1, 0), character=0), end=Place(line=int(last or first) - 1, character=10**6))
        reference = Reference(uri=path.as_uri(), range=span)
        part = references.part(self._session, reference, name, [self.folder.as_uri()], 0)  # reads it, or refuses
        self._current, self._pending = reference, [*self._pending, reference]
        self.console.print(Text(f"{part.what}: {len(part.text.splitlines())} lines", style="dim"))

    async def _answer(self, text: str) -> None:
        settings = self.settings.actions
        parts = [
            references.part(self._session, reference, self._shown(reference.uri), [self.folder.as_uri()], order)
            for order, reference in enumerate(self._pending)
        ]
        question = self._conversations.ask(self.engine, settings, self._id, text, parts)
        words = await self._watched(
            lambda watched: reading.answer(self.engine, question.chat, settings.max_new_tokens, settings, watched.heard, None)
        )
        answer = cleaned(words.text, question.words).strip()
        if not answer:
            raise Unusable("The model gave no answer. Ask again, in other words.")
        self._conversations.answered(question, answer)
        self._id, self._pending = question.conversation, []
        self._note(reading.notes_of(self.engine, words, question.dropped))

    async def _act(self, name: str, instruction: str) -> None:
        """An action at the last file referred to."""
        action = next((action for action in self.actions if action.name == name), None)
        if action is None:
            raise Refusal(f"There is no /{name}. Say /help for what there is.")
        if self._current is None:
            raise Refusal(f"/{name} needs to know where: say /file PATH:FROM-TO first.")
        document = references.read(self._current.uri, [self.folder.as_uri()], Session())
        whole = Span(start=Place(line=0, character=0), end=Place(line=document.line_count - 1, character=10**6))
        reported = (instruction,) if instruction and action.head.applies_to == "diagnostic" else ()
        asked = Asked(action=name, uri=document.uri, range=self._current.range or whole, diagnostics=reported, instruction=instruction)
        limit = self.settings.inline.max_document_chars
        task = tasks.prepare(action, asked, document, self._shown(document.uri), [self.folder.as_uri()], limit)
        if action.head.answer == "new_file":
            await self._tests(task)
            return
        chat, context = prompting.prompt(task, self.engine, self.settings.actions, [], {})
        most = action.head.max_new_tokens
        words = await self._watched(lambda watched: reading.answer(self.engine, chat, most, self.settings.actions, watched.heard, None))
        self._note(reading.notes_of(self.engine, words, context.dropped))
        if action.head.answer == "show":
            reading.shown(task, words)
        else:
            self._offer(document.uri, document.text, regions.applied(task.region.lines, reading.changes(task, words)))

    async def _tests(self, task: Task) -> None:
        plan = writing_tests.plan(task, [self.folder.as_uri()])
        settings, python = self.settings.actions, self.settings.tests_python
        code, notes = await self._watched(lambda watched: writing_tests.write(self.engine, task, plan, settings, python, watched))
        self._note(notes)
        new = code.rstrip("\n") + "\n"
        if plan.existing:
            lines = tuple(split_lines(plan.existing))
            newline = Document(types.TextDocumentItem("", "", 0, plan.existing), Encoding.Utf32).snapshot(types.Position(0, 0)).newline
            new = regions.applied(lines, joining_tests.changes(lines, newline, task.snapshot.language, code))
        self._offer(plan.suite.file.as_uri(), plan.existing, new)

    async def _watched(self, work: Callable[[Watched], Awaitable[Result]]) -> Result:
        """Does `work` while its words are shown as they come; another attempt takes the place of the one before."""
        text = ""
        with Live(console=self.console, refresh_per_second=8, vertical_overflow="visible", transient=False) as live:

            async def heard(piece: str) -> None:
                nonlocal text
                text += piece
                live.update(Markdown(text))

            async def start_over(why: str) -> None:
                nonlocal text
                text = ""
                live.update(Markdown(text), refresh=True)
                self.console.print(Text(f"Once more: {why}", style="yellow"))

            result = await work(Watched(heard=heard, start_over=start_over))
        if not self.console.is_terminal:
            self.console.print()  # a file gets the text at once, without the line's end
        return result

    def _offer(self, uri: str, old: str, new: str) -> None:
        """Shows a change and makes it when the user says yes and the file is still what it was."""
        name = self._shown(uri)
        diff = "".join(difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), name, name))
        self.console.print(Syntax(diff, "diff", background_color="default"))
        if self.confirm(f"Write {name}? [y/N] ").strip().lower() not in ("y", "yes"):
            self.console.print(Text("Nothing was written.", style="dim"))
            return
        path = self.folder / name
        there = path.read_bytes().decode("utf-8") if path.exists() else ""
        if there != old:
            raise Stale(f"{name} changed meanwhile, so nothing was written. Ask again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(new.encode("utf-8"))
        self.console.print(Text(f"{name} is written.", style="green"))

    def _note(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            self.console.print(Text(note, style="yellow"))

    def _shown(self, uri: str) -> str:
        path = path_of(uri)
        assert path is not None
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else path.name


def talk(settings: Settings, actions: tuple[Action, ...], files: list[str]) -> bool:
    """Runs the conversation until the user ends it; says whether there was a model."""
    console, host = Console(), Host()
    with asyncio.Runner() as runner, remembered_lines():
        with console.status(f"Loading {settings.model} …"):
            runner.run(host.start(settings, lambda what, share: None))
        if host.engine is None:
            console.print(Text(host.message, style="red"))
            return False
        try:
            console.print(Text(f"{host.message} /help says what there is.", style="dim"))
            chat = TerminalChat(console, host.engine, settings, actions)
            for line in [f"/file {file}" for file in files]:
                said(console, runner, chat, line)
            while (typed := asked(console)) is not None and typed.strip() not in ("/quit", "/exit"):
                said(console, runner, chat, typed)
        finally:
            host.close()
    return True


def said(console: Console, runner: asyncio.Runner, chat: TerminalChat, line: str) -> None:
    try:
        runner.run(chat.line(line))
    except Refusal as refusal:
        console.print(Text(str(refusal), style="yellow"))
    except KeyboardInterrupt:
        console.print(Text("Stopped.", style="yellow"))


def asked(console: Console) -> str | None:
    """The next line; None at the end."""
    try:
        return input("› ")
    except EOFError:
        return None
    except KeyboardInterrupt:
        return ""


@contextlib.contextmanager
def remembered_lines() -> Iterator[None]:
    """Lines that were asked before are there with the arrow keys, from one day to the next; only the user can read them."""
    try:
        readline = importlib.import_module("readline")  # not there on Windows
    except ImportError:
        yield
        return
    file = platformdirs.user_state_path("deepseek-lsp", appauthor=False, ensure_exists=True) / "chat_history"
    file.touch(mode=0o600)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)
