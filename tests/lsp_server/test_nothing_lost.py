"""Whatever is typed, asked, answered and cancelled in whatever order: no character that the user typed is lost."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server import answering
from lsp_server.connection import Connection
from lsp_server.errors import Refusal
from lsp_server.features import fill
from lsp_server.host import Host
from lsp_server.server import create_server
from model_host.generation import Cost, Finish, Generation, Request
from tests.lsp_server.drawn import URI, asked_of
from tests.scripted import ScriptedEngine

TEXT = """class Shop:
    def add(self, item):
        self.items.append(item)
        return None


def total(a):
    # TODO
    return a
"""
ANSWERS = [
    "```python\ndef add(self, item):\n    self.items.append(item)\n```",
    '```python\n    """Words."""\n```',
    "```python\npass\n```",
    "def total(a):\n    return a",
    "nothing useful",
    "",
    "```python\ndef total(",
    "```python\n" + "x = 1\n" * 500,
]
END = Cost(finish=Finish.END, cached_tokens=0, computed_tokens=1, new_tokens=1, queued_s=0, first_token_s=0, decode_s=0)


class Waiting(ScriptedEngine):
    """Answers when the test says so."""

    def __init__(self) -> None:
        super().__init__([])
        self.waiting: dict[int, Generation] = {}
        self.submitted = asyncio.Event()
        self.standing: str | None = None
        """What everything is answered with from now on, unless None."""

    def submit(self, request: Request) -> Generation:
        self.generations.append(Generation())
        self.waiting[len(self.generations) - 1] = self.generations[-1]
        self.submitted.set()
        if self.standing is not None:
            self.answer(len(self.generations) - 1, self.standing)
        return self.generations[-1]

    async def reached_by(self, question: asyncio.Task[Any]) -> None:
        """Waits until a question just asked has come to the engine or to its end without it."""
        self.submitted.clear()
        submitted = asyncio.ensure_future(self.submitted.wait())
        await asyncio.wait([question, submitted], return_when=asyncio.FIRST_COMPLETED)
        submitted.cancel()

    def answer(self, number: int, text: str) -> None:
        if (generation := self.waiting.pop(number, None)) is not None:
            generation.feed(text)
            generation.feed(END)


REPLACING = {"fix", "optimise", "simplify", "refactor", "todo"}


def starts(text: str) -> list[int]:
    """Where the lines of a text begin."""
    return [0, *(index + 1 for index, letter in enumerate(text) if letter == "\n")]


@dataclass
class Editor:
    """What the user sees: a document whose edits are made when they are for its version. Every letter typed is one of its kind."""

    server: Connection
    text: str = TEXT
    version: int = 0
    alive: set[str] = field(default_factory=set)
    typed: int = 0

    def changed(self, text: str, change: types.TextDocumentContentChangeEvent) -> None:
        self.version += 1
        self.text = text
        identifier = types.VersionedTextDocumentIdentifier(uri=URI, version=self.version)
        self.server.session.change(types.DidChangeTextDocumentParams(identifier, [change]))
        assert self.server.session.find(URI).text == self.text

    def type(self, share: float) -> None:
        at, letter = int(share * len(self.text)), chr(0x4E00 + self.typed)
        self.typed += 1
        self.alive.add(letter)
        lines = starts(self.text[:at])
        here = types.Position(len(lines) - 1, at - lines[-1])
        changed = self.text[:at] + letter + self.text[at:]
        self.changed(changed, types.TextDocumentContentChangePartial(range=types.Range(here, here), text=letter))

    async def apply(self, params: types.ApplyWorkspaceEditParams) -> types.ApplyWorkspaceEditResult:
        """What the server asks its client to make."""
        return types.ApplyWorkspaceEditResult(applied=self.make("fill", params.edit))

    def make(self, name: str, edit: types.WorkspaceEdit) -> bool:
        """Makes an edit, and says whether it could be made."""
        (change,) = edit.document_changes
        if change.text_document.version != self.version:
            return False
        text, lines = self.text, [*starts(self.text), len(self.text)]
        taken = ""
        for one in sorted(change.edits, key=lambda one: -one.range.start.line):
            start, end = (lines[at.line] + at.character for at in (one.range.start, one.range.end))
            taken += text[start:end]
            text = text[:start] + one.new_text + text[end:]
        lost = self.alive - set(text)
        assert lost <= set(taken) and (not lost or name in REPLACING)
        self.alive -= lost
        self.changed(text, types.TextDocumentContentChangeWholeDocument(text))
        return True


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("type"), st.floats(0, 1)),
        st.tuples(st.just("ask"), st.sampled_from(["docstring", "explain_symbol", "review", *sorted(REPLACING)]), st.integers(0, 8)),
        st.tuples(st.just("fill"), st.integers(0, 8), st.integers(0, 12)),
        st.tuples(st.just("answer"), st.integers(0, 4), st.sampled_from(ANSWERS)),
        st.tuples(st.just("cancel"), st.integers(0, 4)),
        st.just(("collect",)),
        st.tuples(st.just("settle"), st.sampled_from(ANSWERS)),
    ),
    max_size=16,
)


@settings(deadline=None, max_examples=100)
@given(OPERATIONS)
def test_no_sequence_of_actions_edits_and_cancellations_loses_a_typed_character(operations: list[tuple]):
    asyncio.run(played(operations))


async def connected(engine: ScriptedEngine) -> Connection:
    """A server as it is behind `initialize`, for a client that can be told versions."""
    server = create_server([], [], Host(engine=engine, state="ready", message=""))
    workspace = types.WorkspaceClientCapabilities(workspace_edit=types.WorkspaceEditClientCapabilities(document_changes=True))
    folders = [types.WorkspaceFolder(uri="file:///project", name="project")]
    params = types.InitializeParams(capabilities=types.ClientCapabilities(workspace=workspace), workspace_folders=folders)
    initializing = server.protocol.lsp_initialize(params)
    handler, arguments, _ = next(initializing)
    await handler(*arguments)
    server.session.encoding = types.PositionEncodingKind.Utf32
    server.session.open(types.TextDocumentItem(URI, "python", 0, TEXT))
    return server


async def played(operations: list[tuple]) -> None:
    engine = Waiting()
    server = await connected(engine)
    editor = Editor(server)
    server.workspace_apply_edit_async = editor.apply
    asked: list[tuple[str, asyncio.Task[answering.Done | int]]] = []

    async def collect(*, all_of_them: bool) -> None:
        running = [task for _, task in asked if not task.done()]
        if running:
            await asyncio.wait(running, timeout=60 if all_of_them else 0.002)
        for name, task in list(asked):
            if task.done():
                asked.remove((name, task))
                with contextlib.suppress(Refusal, asyncio.CancelledError):
                    done = task.result()
                    if isinstance(done, answering.Done) and done.edit is not None:
                        editor.make(name, done.edit)

    async def settle(answer: str) -> None:
        """Everything that was asked comes to its end."""
        engine.standing = answer
        for number in range(len(engine.generations)):
            engine.answer(number, answer)
        await collect(all_of_them=True)
        engine.standing = None

    for what, *how in operations:
        if what == "type":
            editor.type(how[0])
        elif what == "ask":
            name, line = how
            lines = starts(editor.text)
            first = types.Position(min(line, len(lines) - 1), 0)
            last = first if name in ("docstring", "todo", "explain_symbol") else types.Position(min(line + 3, len(lines) - 1), 0)
            wanted = asked_of(name, types.Range(first, last), version=editor.version, diagnostics=("x",), instruction="better")
            asked.append((name, asyncio.ensure_future(answering.perform(server, wanted))))
            await engine.reached_by(asked[-1][1])
        elif what == "fill":
            lines = editor.text.split("\n")
            line = min(how[0], len(lines) - 1)
            place = {"line": line, "character": min(how[1], len(lines[line]))}
            wanted = fill.understood({"uri": URI, "range": {"start": place, "end": place}, "version": editor.version})
            asked.append(("fill", asyncio.ensure_future(fill.done(server, wanted))))
            await engine.reached_by(asked[-1][1])
        elif what == "answer":
            engine.answer(how[0], how[1])
            await asyncio.sleep(0)
        elif what == "cancel" and how[0] < len(asked):
            asked[how[0]][1].cancel()
        elif what == "collect":
            await collect(all_of_them=False)
        elif what == "settle":
            await settle(how[0])
        assert editor.alive <= set(editor.text) and server.session.find(URI).text == editor.text
    await settle(ANSWERS[0])
    assert not asked and editor.alive <= set(editor.text) and server.session.find(URI).text == editor.text
