"""What the model is told of a workspace's other files: all are told the same, it grows at rest only, and some files are never told of."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server import ask
from lsp_server.host import Host
from lsp_server.repository import FULL_SHARE, Piece, Repository, grown, text_of
from lsp_server.session import Session
from lsp_server.settings import InlineSettings
from tests.scripted import ScriptedEngine

OPENED: list[str] = []
"""What this process opened or listed, while a test wants to know."""
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event in ("open", "os.scandir", "os.listdir") and OPENED else None)


class Workspace:
    """A folder with files, documents open in it, and an engine that remembers what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root, self.session, self.engine = root, Session(), ScriptedEngine(["x"])
        self.memory = ask.Memory(repository=Repository(self.session, lambda: [root.as_uri()]))
        self.settings = InlineSettings()

    def write(self, **files: str) -> None:
        for name, text in files.items():
            file = self.root / name.replace("__", "/").replace("_py", ".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")

    def open(self, name: str, text: str | None = None, folder: Path | None = None) -> str:
        file = (folder or self.root) / name
        uri, language = file.as_uri(), "python" if name.endswith(".py") else "c"
        self.session.open(types.TextDocumentItem(uri, language, 0, file.read_text("utf-8") if text is None else text))
        return uri

    async def complete(self, uri: str, line: int = 0) -> ask.Answer:
        host, document = Host(engine=self.engine, state="ready", message=""), self.session.find(uri)
        answer = await ask.complete(host, document, types.Position(line, 10**6), uri.rpartition("/")[2], self.settings, self.memory)
        assert not answer.reason
        return answer

    async def rest(self, answer: ask.Answer) -> None:
        host = Host(engine=self.engine, state="ready", message="")
        await ask.rest(host, answer, "a.py", self.settings, self.memory)

    async def visit(self, name: str, text: str | None = None, folder: Path | None = None) -> str:
        """Opens a document, completes there and rests."""
        self.memory.remembered.forget()
        await self.rest(await self.complete(self.open(name, text, folder)))
        return self.block

    @property
    def block(self) -> str:
        return text_of(self.memory.repository.pieces)

    @property
    def told(self) -> str:
        """What the engine was told last."""
        return self.engine.requests[-1].prompt.repository


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.setattr(ask, "REST_S", 0.0)
    (tmp_path / "p").mkdir()
    yield Workspace(tmp_path / "p")


async def test_what_a_document_imports_is_told_once_the_user_rests_and_the_document_itself_once_it_was_left(workspace: Workspace):
    workspace.write(
        a_py="from b import total\n\ndef first(): pass\n", b_py="def total(items):\n    secret = 1\n", c_py="def third(): pass\n"
    )
    first = await workspace.complete(workspace.open("a.py"))
    assert workspace.told == ""
    await workspace.rest(first)
    assert workspace.block == "# b.py\ndef total(items):\n\n"
    assert workspace.told == workspace.block, "the prompt with the new block is computed before the block counts"
    assert await workspace.visit("c.py") == "# b.py\ndef total(items):\n\n# a.py\ndef first(): pass\n\n"


async def test_all_files_of_a_workspace_are_told_the_same(workspace: Workspace):
    workspace.write(**{f"{name}_py": f"import b, c\n\ndef of_{name}(): pass\n" for name in "abcd"})
    for name in "abcd":
        await workspace.visit(f"{name}.py")
    told = set()
    for name in "abcd":
        workspace.memory.remembered.forget()
        await workspace.complete((workspace.root / f"{name}.py").as_uri())
        told.add(workspace.told)
    assert told == {workspace.block} and all(f"of_{name}" in workspace.block for name in "abc")


async def test_typing_never_changes_what_is_told_and_rest_adds_what_is_new_of_a_document_that_was_left(workspace: Workspace):
    workspace.write(a_py="import b\n", b_py="def total(): pass\n")
    uri = workspace.open("a.py")
    await workspace.rest(await workspace.complete(uri))
    before = workspace.block
    for letter in "\ndef more(x):":
        document = workspace.session.find(uri)
        end = types.Position(document.line_count, 0)
        workspace.session.change(
            types.DidChangeTextDocumentParams(
                types.VersionedTextDocumentIdentifier(uri=uri, version=1),
                [types.TextDocumentContentChangePartial(range=types.Range(end, end), text=letter)],
            )
        )
        workspace.memory.remembered.forget()
        answer = await workspace.complete(uri, document.line_count - 1)
        assert workspace.told == before
    await workspace.rest(answer)
    assert workspace.block == before
    assert (await workspace.visit("b.py")).startswith(before) and workspace.block.endswith("# a.py\ndef more(x):\n\n")


async def test_a_file_changed_since_is_told_anew_behind_what_was_told_before(workspace: Workspace):
    workspace.write(a_py="import b\n", b_py="def old(): pass\n")
    before = await workspace.visit("a.py")
    workspace.write(b_py="def new(): pass\n\ndef newer(): pass\n")
    assert await workspace.visit("a.py") == before + "# b.py\ndef new(): pass\ndef newer(): pass\n\n"


async def test_switched_off_nothing_is_told_and_nothing_is_read(workspace: Workspace):
    workspace.write(a_py="import b\n", b_py="def total(): pass\n")
    await workspace.visit("a.py")
    workspace.settings = InlineSettings(repository_tokens=0)
    workspace.memory.remembered.forget()
    answer = await workspace.complete((workspace.root / "a.py").as_uri())
    assert workspace.told == ""
    await workspace.rest(answer)
    assert workspace.block == ""


def hide(folder: Path) -> None:
    (folder / ".gitignore").write_text("hidden.py\n!kept.py\n")


def sees_outside(folder: Path) -> None:
    (folder.parent / "elsewhere.py").write_text("def hidden_name(): pass\n")
    (folder / "hidden.py").unlink()
    (folder / "hidden.py").symlink_to(folder.parent / "elsewhere.py")


def a_secret(folder: Path) -> None:
    (folder / ".env").write_text("def hidden_name(): pass\n")
    (folder / "hidden.py").unlink()
    (folder / "hidden.py").symlink_to(folder / ".env")


def no_text(folder: Path) -> None:
    (folder / "hidden.py").write_bytes(b"def hidden_name(): pass\n\0")


def no_utf8(folder: Path) -> None:
    (folder / "hidden.py").write_bytes(b"def hidden_name(): pass\n# \xff\n")


def too_large(folder: Path) -> None:
    (folder / "hidden.py").write_text("def hidden_name(): pass\n" * 100_000)


def no_file(folder: Path) -> None:
    (folder / "hidden.py").unlink()
    os.mkfifo(folder / "hidden.py")


@pytest.mark.parametrize("why", [hide, sees_outside, a_secret, no_text, no_utf8, too_large, no_file])
async def test_what_is_none_of_the_projects_own_text_is_never_told(workspace: Workspace, why: Callable[[Path], None]):
    workspace.write(a_py="import hidden\nimport kept\n", hidden_py="def hidden_name(): pass\n", kept_py="def kept_name(): pass\n")
    why(workspace.root)
    assert await workspace.visit("a.py") == "# kept.py\ndef kept_name(): pass\n\n"


@pytest.mark.parametrize("name", [".env.py", "id_rsa", "node_modules/x.py", ".cache/x.py", "../outside.py"])
async def test_open_documents_of_that_kind_are_not_told_either(workspace: Workspace, name: str):
    file = (workspace.root / name).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("def hidden_name(): pass\n")
    workspace.write(a_py="def first(): pass\n", b_py="\n")
    await workspace.visit("a.py")
    workspace.open(file.name, folder=file.parent)
    workspace.memory.repository.use(file.as_uri())
    assert "hidden_name" not in await workspace.visit("b.py") and "first" in workspace.block


async def test_imports_of_what_cannot_be_a_file_and_folders_that_make_no_sense_do_not_hide_the_others(workspace: Workspace):
    workspace.write(a_py=f"import {'x' * 5000}\nimport odd.b\nimport c\n", odd__b_py="def b(): pass\n", c_py="def c(): pass\n")
    (workspace.root / "odd" / ".gitignore").mkdir()
    (workspace.root / "odd" / "b.py").chmod(0)
    (workspace.root / "loop.py").symlink_to(workspace.root / "loop.py")
    assert "def c(): pass" in await workspace.visit("a.py")


async def test_without_a_folder_nothing_is_told(workspace: Workspace):
    workspace.memory = ask.Memory(repository=Repository(workspace.session, list))
    workspace.write(a_py="import b\n", b_py="def total(): pass\n")
    await workspace.visit("a.py")
    assert await workspace.visit("b.py") == ""


async def test_a_huge_workspace_costs_a_keystroke_nothing_and_rest_the_files_that_are_imported(workspace: Workspace):
    workspace.write(a_py="import f7, f8\n", **{f"f{number}_py": f"def f{number}(): pass\n" for number in range(2000)})
    uri = workspace.open("a.py")
    OPENED.append("begin")
    answer = await workspace.complete(uri)
    while_typing = [name for name in OPENED if str(workspace.root) in name]
    await workspace.rest(answer)
    at_rest = [name for name in OPENED if str(workspace.root) in name]
    OPENED.clear()
    assert while_typing == [] and sorted(at_rest) == [str(workspace.root / name) for name in ("f7.py", "f8.py")]


pieces = st.builds(
    lambda name, size, version: Piece(Path(name), name, f"# {name}\n{version}" + "x" * size),
    st.sampled_from("abcdefgh"),
    st.integers(0, 40),
    st.integers(0, 2),
)
wanted_lists = st.lists(pieces, max_size=8, unique_by=lambda piece: piece.file)


@given(steps=st.lists(wanted_lists, max_size=12), max_chars=st.integers(20, 400))
def test_a_block_grows_at_its_end_or_is_made_anew_and_never_exceeds_its_room(steps: list[list[Piece]], max_chars: int):
    block: tuple[Piece, ...] = ()
    for wanted in steps:
        while len(text_of(wanted)) > FULL_SHARE * max_chars:
            wanted.pop()
        new = grown(block, wanted, max_chars)
        assert new[: len(block)] == block or set(new) == set(wanted)
        assert set(wanted) <= set(new) and len(text_of(new)) <= max_chars
        assert {piece.file: piece for piece in new} | {piece.file: piece for piece in wanted} == {piece.file: piece for piece in new}
        assert grown(new, wanted, max_chars) == new
        block = new


async def test_going_back_and_forth_between_documents_ends_with_a_block_that_stays(workspace: Workspace):
    names = [f"m{number}" for number in range(5)]
    for name in names:
        body = "".join(f"def {name}_{number}(value, other): pass\n" for number in range(60))
        workspace.write(**{f"{name}_py": f"import only_{name}, shared\n{body}", f"only_{name}_py".replace("_py", ".py"): body})
    workspace.write(shared_py="def shared(): pass\n")
    for _ in range(3):
        for name in names:
            await workspace.visit(f"{name}.py")
    settled = workspace.block
    for name in names:
        assert await workspace.visit(f"{name}.py") == settled
