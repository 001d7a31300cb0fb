"""One checkpoint that completes and another that is asked for actions, both real, each in a process of its own."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from lsprotocol import types

from model_host.checkpoints import STARTER
from tests.e2e.test_starter_server import COMMAND, SHOP
from tests.editor import Editor, editor, plain


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """A checkpoint of its own: the starter's files under another name."""
    return Path(shutil.copytree(STARTER, tmp_path / "instruct"))


async def begun(running: Editor, second: Path | str, **options: Any) -> Editor:
    await running.start({"chat_model": str(second), "actions": {"max_new_tokens": 16}, **options})
    assert (await running.until_ready())["state"] == "ready"
    running.open(SHOP)
    return running


async def notes(running: Editor) -> list[str]:
    """Asks something, and gives what is said about who answered."""
    answer = plain(await running.client.protocol.send_request_async("deepseek/chat", {"text": "What is a list?"}))
    assert answer["text"]
    return [note for note in answer["notes"] if "cut off" not in note]


def titles(running: Editor) -> list[str]:
    return [reports[0].title for reports in running.client.progress_reports.values() if isinstance(reports[0], types.WorkDoneProgressBegin)]


async def test_the_second_is_loaded_when_first_asked_said_in_the_status_and_let_go_when_idle(second: Path):
    async with editor(*COMMAND) as running:
        await begun(running, second, chat_idle_s=4)
        status = await running.status()
        assert status["chat"]["state"] == "waiting" and status["chat"]["model"] is None and status["model"]["checkpoint"] != str(second)
        assert await notes(running) == []
        status = await running.status()
        assert status["chat"]["state"] == "ready" and status["chat"]["model"]["checkpoint"] == str(second)
        assert titles(running).count(f"Loading {second}") == 1
        assert (await running.ghost(6, 8)) is not None
        async with asyncio.timeout(60):
            while (status := await running.status())["chat"]["state"] == "ready":
                await asyncio.sleep(0.05)
        assert "so it was let go" in status["chat"]["message"] and status["state"] == "ready"
        assert await notes(running) == [] and titles(running).count(f"Loading {second}") == 2


async def test_where_the_second_cannot_be_loaded_the_first_answers_and_says_why(second: Path):
    (second / "tokenizer.json").unlink()
    async with editor(*COMMAND) as running:
        await begun(running, second)
        for _ in range(2):
            (note,) = await notes(running)
            assert note.startswith("starter answers, since chat_model cannot be loaded.") and "tokenizer.json" in note
        assert titles(running).count(f"Loading {second}") == 1  # not tried anew with every question
        status = await running.status()
        assert status["chat"]["state"] == "failed" and "tokenizer.json" in status["chat"]["message"] and status["state"] == "ready"


async def test_without_a_second_the_status_knows_of_none():
    async with editor(*COMMAND) as running:
        await running.start({})
        assert (await running.status())["chat"] is None
