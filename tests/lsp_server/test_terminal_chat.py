"""The chat in a terminal: with scripted answers, and once as a user runs it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from lsp_server.errors import Refusal, Stale
from lsp_server.settings import Settings
from lsp_server.terminal_chat import TerminalChat
from prompts import library
from tests.scripted import AnsweringEngine, ScriptedEngine

SHOP = "def add(a, b):\n    return a - b\n"
FIXED = "```python\ndef add(a, b):\n    return a + b\n```"


def chat(folder: Path, *pieces: str, yes: str = "y") -> tuple[TerminalChat, io.StringIO]:
    (folder / "shop.py").write_text(SHOP)
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    engine = ScriptedEngine(pieces)
    return TerminalChat(console, engine, Settings(), library.load()[0], confirm=lambda question: yes, folder=folder), shown


async def test_a_question_is_about_the_file_and_the_conversation_goes_on(tmp_path: Path):
    running, shown = chat(tmp_path, "It **adds**", " numbers.")
    await running.line("/file shop.py:1-2")
    await running.line("What does it do?")
    await running.line("Sure?")
    assert "shop.py, lines 1 to 2: 2 lines" in shown.getvalue() and "It adds numbers." in shown.getvalue()
    first, second = running.engine.requests
    assert "return a - b" in first.prompt.messages[0].content
    assert [message.content for message in second.prompt.messages][1:] == ["It **adds** numbers.", "Sure?"]


async def test_a_fix_is_shown_as_a_diff_and_written_when_the_user_says_yes(tmp_path: Path):
    running, shown = chat(tmp_path, FIXED)
    await running.line("/file shop.py:2")
    await running.line("/fix add(1, 2) gives -1")
    assert "+    return a + b" in shown.getvalue() and "shop.py is written" in shown.getvalue()
    assert (tmp_path / "shop.py").read_text() == "def add(a, b):\n    return a + b\n"
    assert "gives -1" in running.engine.requests[0].prompt.messages[0].content


async def test_nothing_is_written_without_a_yes_or_over_what_changed_meanwhile(tmp_path: Path):
    running, _ = chat(tmp_path, FIXED, yes="")
    await running.line("/file shop.py")
    await running.line("/fix it")
    assert (tmp_path / "shop.py").read_text() == SHOP

    def change_and_agree(question: str) -> str:
        (tmp_path / "shop.py").write_text("# mine\n")
        return "y"

    running.confirm = change_and_agree
    with pytest.raises(Stale):
        await running.line("/fix it")
    assert (tmp_path / "shop.py").read_text() == "# mine\n"


async def test_tests_become_a_file_of_their_own(tmp_path: Path):
    running, _ = chat(tmp_path, "```python\ndef test_add():\n    assert add(1, 2) == 3\n```")
    await running.line("/file shop.py:1")
    await running.line("/tests")
    assert (tmp_path / "tests" / "test_shop.py").read_text().startswith("from shop import add\n")


@pytest.mark.parametrize("is_terminal", [False, True])
async def test_another_attempt_takes_the_place_of_the_answer_that_does_not_work(tmp_path: Path, is_terminal: bool):
    running, shown = chat(tmp_path)
    running.console = Console(file=shown, width=100, force_terminal=is_terminal, color_system=None)
    wrong = "```python\nfrom shop import subtract\n\ndef test_first():\n    assert add(1, 2) == 3\n```"
    right = "```python\ndef test_second():\n    assert add(1, 2) == 3\n```"
    running.engine = AnsweringEngine(wrong, right)
    await running.line("/file shop.py:1")
    await running.line("/tests")
    screen = pyte.Screen(100, 60)
    pyte.Stream(screen).feed(shown.getvalue().replace("\n", "\r\n"))
    seen = "\n".join(line.rstrip() for line in screen.display)
    assert "Once more: shop has no subtract to import." in seen
    assert "test_first" not in seen and "test_second" in seen.split("Once more")[1]
    assert seen.split("+++")[0].count("test_second") == 1
    assert "test_second" in (tmp_path / "tests" / "test_shop.py").read_text()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["/nothing"], "There is no /nothing"),
        (["/fix"], "say /file"),
        (["/file none.py"], "cannot be read"),
        (["/file ../outside.py"], "neither open nor in the workspace"),
        (["/file shop.py:x"], "names no lines"),
        (["/file .env"], "secrets"),
        (["/file shop.py", "/refactor"], "an instruction is needed"),
    ],
)
async def test_what_cannot_be_done_says_why(tmp_path: Path, lines: list[str], said: str):
    running, _ = chat(tmp_path, "x")
    with pytest.raises(Refusal, match=said):
        for line in lines:
            await running.line(line)


def test_the_verb_talks_with_the_starter_and_ends_with_its_input(tmp_path: Path):
    (tmp_path / "shop.py").write_text(SHOP)
    done = subprocess.run(
        [sys.executable, "-m", "lsp_server", "chat", "shop.py:1-2"],
        input="Explain what this function does.\n/nothing\n/help\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "shop.py, lines 1 to 2: 2 lines" in done.stdout and "There is no /nothing" in done.stdout
    assert "/docstring" in done.stdout
    history = tmp_path / ".local" / "state" / "deepseek-lsp" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0
