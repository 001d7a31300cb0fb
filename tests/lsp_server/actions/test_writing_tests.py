"""Tests for a function: what is wrong with an answer, how it joins a file that is there, and a run behind walls."""

import contextlib
import os
import socket
import sys
import uuid
from pathlib import Path

import pytest
from lsprotocol import types

from lsp_server import answering
from lsp_server.actions import checking_tests, reading, sandbox, suites, tasks, writing_tests
from lsp_server.connection import Connection
from lsp_server.errors import Refusal, Stale, Unusable
from lsp_server.host import Host
from lsp_server.settings import ActionSettings
from tests.lsp_server.drawn import ACTIONS, asked_of, document_of
from tests.scripted import AnsweringEngine

SHOP = """import decimal


class Cart:
    def total(self, tax=0):
        return tax


def add(a, b):
    return a + b
"""
GOOD = "from shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def prepared(root: Path, line: int = 8) -> tuple[tasks.Task, suites.Plan]:
    uri = (root / "shop.py").as_uri()
    here = types.Range(types.Position(line, 0), types.Position(line, 0))
    asked = asked_of("tests", here, uri=uri)
    task = tasks.prepare(ACTIONS["tests"], asked, document_of(SHOP, uri=uri), "shop.py", [root.as_uri()], 2_000_000)
    return task, writing_tests.plan(task, [root.as_uri()])


def problem(root: Path, code: str, line: int = 8) -> str | None:
    return checking_tests.problem(*prepared(root, line), code)


def test_tests_that_import_what_is_there_have_no_problem(root: Path):
    assert problem(root, GOOD) is None
    assert problem(root, "import decimal\nimport pytest\nimport shop\n\ndef test_add():\n    assert shop.add(1, 2)\n") is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def test_add(:\n", "no Python"),
        ("from shop import add\nadd(1, 2)\n", "begins with test"),
        ("from shop import add\n\ndef test_nothing():\n    pass\n", "never use add"),
        ("from shop import subtract\n\ndef test_add():\n    add()\n", "shop has no subtract"),
        ("import numpy\nfrom shop import add\n\ndef test_add():\n    add()\n", "import of numpy cannot work"),
        ("from shop.deep import add\n\ndef test_add():\n    add()\n", "import of shop.deep cannot work"),
    ],
)
def test_tests_that_cannot_work_are_told_why(root: Path, code: str, said: str):
    assert said in problem(root, code)


JAVA_CART = "package shop;\n\nclass Cart {\n    int total() {\n        return 0;\n    }\n}\n"
JAVA_TEST = "class CartTest {\n    @Test\n    void zero() {\n        new Cart().total();\n    }\n}"


def elsewhere(root: Path, name: str, text: str, language: str, line: int) -> tuple[tasks.Task, suites.Plan]:
    """As `prepared`, for a file in another language."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    uri = (root / name).as_uri()
    asked = asked_of("tests", types.Range(types.Position(line, 0), types.Position(line, 0)), uri=uri)
    task = tasks.prepare(ACTIONS["tests"], asked, document_of(text, language, uri), name, [root.as_uri()], 2_000_000)
    return task, writing_tests.plan(task, [root.as_uri()])


@pytest.mark.parametrize(
    ("name", "text", "language", "line", "code", "said"),
    [
        ("Cart.java", JAVA_CART, "java", 3, JAVA_TEST, None),
        ("Cart.java", JAVA_CART, "java", 3, JAVA_TEST.removesuffix("}"), "does not parse, from line"),
        ("Cart.java", JAVA_CART, "java", 3, JAVA_TEST.replace("@Test", ""), "no test"),
        ("Cart.java", JAVA_CART, "java", 3, JAVA_TEST.replace("total", "sum"), "never use total"),
        ("Cart.java", JAVA_CART, "java", 3, "public " + JAVA_TEST.replace("CartTest", "Tests"), "called CartTest"),
        ("a.ts", "export function add(a: number) { return a; }\n", "typescript", 0, "test.each([1])('x', () => add(1));", None),
        ("a.ts", "export function add(a: number) { return a; }\n", "typescript", 0, "add(1);", "no test"),
        ("a.go", "package a\n\nfunc Add() int { return 1 }\n", "go", 2, "func TestAdd(t *testing.T) { Add() }", None),
        ("a.go", "package a\n\nfunc Add() int { return 1 }\n", "go", 2, "func TestAdd(t *testing.T) { add() }", "never use Add"),
        ("src/a.rs", "pub fn add() {}\n", "rust", 0, "#[tokio::test]\nasync fn adds() { add(); }", None),
        ("A.kt", "fun add() = 1\n", "kotlin", 0, "class ATest {\n    @Test\n    fun a() { add() }\n}", None),
    ],
)
def test_tests_in_other_languages_are_read_too(root: Path, name: str, text: str, language: str, line: int, code: str, said: str | None):
    found = checking_tests.problem(*elsewhere(root, name, text, language, line), code)
    assert found is None if said is None else found is not None and said in found


def test_a_forgotten_package_is_put_in(root: Path):
    task, plan = elsewhere(root, "Cart.java", JAVA_CART, "java", 3)
    code = checking_tests.code_of(task, plan, f"```java\n{JAVA_TEST}\n```", is_cut_off=False)
    assert code == f"package shop;\n\n{JAVA_TEST}"
    assert checking_tests.code_of(task, plan, f"```java\n{code}\n```", is_cut_off=False) == code


def test_a_forgotten_import_of_the_tested_name_is_put_in(root: Path):
    task, plan = prepared(root, line=4)
    answer = "```python\ndef test_total():\n    assert Cart().total() == 0\n```"
    code = checking_tests.code_of(task, plan, answer, is_cut_off=False)
    assert code == "from shop import Cart\n\n\ndef test_total():\n    assert Cart().total() == 0"
    assert checking_tests.problem(task, plan, code) is None


def test_tests_are_written_nowhere_but_in_the_workspace(root: Path):
    task, _ = prepared(root)
    with pytest.raises(Refusal, match="open the folder"):
        writing_tests.plan(task, ["file:///elsewhere"])
    (root / "tests").symlink_to("/")
    with pytest.raises(Refusal, match="outside the workspace"):
        writing_tests.plan(task, [root.as_uri()])


async def written(root: Path, python: str, *answers: str) -> tuple[str, tuple[str, ...], AnsweringEngine, list[str]]:
    task, plan = prepared(root)
    engine, begun_anew = AnsweringEngine(*answers), []

    async def start_over(why: str) -> None:
        begun_anew.append(why)

    watched = writing_tests.Watched(heard=reading.unheard, start_over=start_over)
    code, notes = await writing_tests.write(engine, task, plan, ActionSettings(), python, watched)
    return code, notes, engine, begun_anew


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{GOOD}```",
        f"Sure:\n\n```py\n{GOOD}```\nRun it with:\n```sh\nrm -rf /\n```",
        f"```\n{GOOD}\n```<｜end▁of▁sentence｜>User: more",
        f"~~~python\n{GOOD}~~~\n\nUser: and now?\n\nAssistant: ```python\nimport os\n```",
        GOOD,
    ],
)
async def test_tests_in_any_wrapping_are_the_same_tests(root: Path, answer: str):
    code, notes, _, begun_anew = await written(root, "", answer)
    assert code == GOOD.rstrip("\n") and notes == () and begun_anew == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("", "without a block of code"),
        ("I cannot help with that.", "without a block of code"),
        ("```python\n```", "empty block"),
        (f"```python\n{GOOD[:-8]}", "cut off|no Python"),
        ("```python\n" + "def test_add(): add()\n" * 100_000, "cut off"),
        ("x" * 1_000_000, "cut off|without a block"),
        ("../../etc/passwd", "without a block of code"),
        (f"<｜fim▁begin｜>```python\n{GOOD}```", "without a block of code"),
        (f"```python\n{GOOD}\u202e```", "U.202E"),
        ("```python\nimport os\nos.system('rm -rf /')\n```", "begins with test"),
    ],
    ids=lambda text: text[:20],
)
async def test_an_answer_without_tests_twice_writes_nothing_and_says_why(root: Path, answer: str, said: str):
    with pytest.raises(Unusable, match=said):
        await written(root, "", answer, answer)


async def test_tests_that_cannot_work_are_mended_once_with_the_reason_in_the_question(root: Path):
    wrong = GOOD.replace("import add", "import subtract")
    code, notes, engine, begun_anew = await written(root, "", f"```python\n{wrong}```", f"```python\n{GOOD}```")
    assert code == GOOD.rstrip("\n") and notes == () and begun_anew == ["shop has no subtract to import."]
    first, answer, question = engine.requests[1].prompt.messages
    assert first == engine.requests[0].prompt.messages[0] and "subtract" in answer.content
    assert "shop has no subtract to import." in question.content


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_tests_that_fail_are_mended_once_and_then_written_with_a_word(root: Path):
    failing = f"```python\n{GOOD.replace('== 3', '== 4')}```"
    code, notes, engine, begun_anew = await written(root, sys.executable, failing, f"```python\n{GOOD}```")
    if not begun_anew:
        pytest.skip(" ".join(notes))
    assert "assert 3 == 4" in engine.requests[1].prompt.messages[2].content
    assert code == GOOD.rstrip("\n") and notes == ("The tests were run, and pass.",)
    _, notes, _, _ = await written(root, sys.executable, failing, failing)
    assert "do not work yet" in notes[-1] and "assert 3 == 4" in notes[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_a_run_sees_the_unsaved_source_has_no_network_and_writes_nothing_to_disk(root: Path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "file"
    code = f"""
import socket, pytest
from shop import add

def test_add():
    assert add(1, 2) == 30
    open("inside.txt", "w").write("gone with the run")

def test_walls():
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", 9), 1)
    with pytest.raises(OSError):
        open({str(outside)!r}, "w")
"""
    task, plan = prepared(root)
    run = await writing_tests.tried(task, plan, code.replace("30", "3"), sys.executable)
    if not run.is_done:
        pytest.skip(run.output)
    assert run.passed, run.output
    assert not (root / "inside.txt").exists() and not outside.exists() and not (root / "tests").exists()
    failed = await writing_tests.tried(task, plan, code, sys.executable)
    assert not failed.passed and "assert 3 == 30" in failed.output


HOSTILE = """
import asyncio, os, resource, signal, socket

def refused(what):
    try:
        what()
    except (OSError, ValueError, MemoryError):
        return True
    return False

socket.socketpair()
asyncio.run(asyncio.sleep(0))
checks = {{
    "the socket of a program outside": refused(lambda: socket.socket(socket.AF_UNIX).connect({listening!r})),
    "a port of this machine": refused(lambda: socket.create_connection(("127.0.0.1", {port}), 2)),
    "a secret in the environment": "DEEPSEEK_ENGINE_TOKEN" not in os.environ,
    "the server's environment": refused(lambda: open("/proc/{server}/environ").read()),
    "the server's memory": refused(lambda: open("/proc/{server}/mem", "rb+")),
    "the server's life": refused(lambda: os.kill({server}, signal.SIGTERM)),
    "private folders": not any(os.listdir(folder) for folder in {private!r}),
    "a large file": refused(lambda: open("large", "wb").write(bytes(40 << 20))) or os.path.getsize("large") <= 32 << 20,
    "much memory": refused(lambda: bytearray(8 << 30)),
    "its limits": refused(lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))),
    "the root of the file system": refused(lambda: open("/deepseek-lsp-was-here", "w")),
}}
print([what for what, held in checks.items() if not held])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_hostile_tests_reach_nothing_outside(root: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch):
    from lsp_server.actions import walls  # Linux's only

    monkeypatch.setenv("DEEPSEEK_ENGINE_TOKEN", "secret")
    listening = str(tmp_path_factory.mktemp("s") / "s")
    private = [str(Path.home() / name) for name in walls.PRIVATE if (Path.home() / name).is_dir()]
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("127.0.0.1", 0)) as port:
        local.bind(listening)
        local.listen()
        code = HOSTILE.format(listening=listening, port=port.getsockname()[1], server=os.getpid(), private=private)
        run = await sandbox.run([sys.executable, "-c", code], root, {})
    if not run.is_done:
        pytest.skip(run.output)
    assert run.passed and run.output.strip() == "[]", run.output


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_nothing_that_tests_begin_outlives_them(root: Path):
    mark = f"outlives-{uuid.uuid4()}"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}]); print('begun')"
    run = await sandbox.run([sys.executable, "-c", code], root, {})
    if not run.is_done:
        pytest.skip(run.output)
    assert run.passed and run.output.strip() == "begun"
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert mark.encode() not in file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_a_run_that_never_ends_is_ended(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "LIMIT_S", 1.0)
    run = await sandbox.run([sys.executable, "-c", "import os\nos.fork()\nwhile True: pass"], root, {})
    if not run.is_done:
        pytest.skip(run.output)
    assert not run.passed and "did not end within 1 s" in run.output


async def test_nothing_is_run_unless_the_user_names_a_python(root: Path):
    task, plan = prepared(root)
    assert await writing_tests.tried(task, plan, GOOD, "") is None
    assert "is no program" in (await writing_tests.tried(task, plan, GOOD, "/no/python")).output


@pytest.mark.parametrize("is_open", [False, True])
async def test_tests_are_not_added_to_a_file_that_changed_while_the_model_answered(root: Path, is_open: bool):
    file, server = root / "test_shop.py", Connection([], [], Host())
    file.write_text(GOOD)
    task, plan = prepared(root)
    assert plan.suite.file == file
    if is_open:
        server.session.open(types.TextDocumentItem(file.as_uri(), "python", 1, "# new\n" + GOOD))
    else:
        file.write_text("# new\n" + GOOD)
    with pytest.raises(Stale, match=r"test_shop\.py changed while the model answered"):
        await answering.tests_edit(server, task, plan, "def test_more():\n    assert add(0, 0) == 0\n")
