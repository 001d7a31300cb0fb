"""The installed command with the real starter model, over stdio, as an editor runs it."""

import asyncio
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lsprotocol import types

from model_host.checkpoints import STARTER
from tests.editor import URI, Editor, editor

COMMAND = [sys.executable, "-m", "lsp_server", "--stdio"]
SHOP = """class Item:
    def __init__(self, name, price):
        self.name = name
        self.price = price

    def label(self):
        
"""


@pytest.fixture
async def fresh():
    async with editor(*COMMAND) as running:
        yield running


async def ready(fresh: Editor, **options: object) -> Editor:
    await fresh.start(options)
    assert (await fresh.until_ready())["state"] == "ready"
    return fresh


async def test_initialize_is_answered_before_the_model_is_there_and_progress_tells_of_it(fresh: Editor):
    await fresh.start()
    fresh.open(SHOP)
    status = await fresh.status()
    assert status["state"] in ("waiting", "loading")
    assert await fresh.ghost(6, 8) is None
    assert "Loading" in (await fresh.status())["last"]["reason"]
    status = await fresh.until_ready()
    assert status["state"] == "ready" and status["model"]["parameters"] > 1_000_000
    (reports,) = fresh.client.progress_reports.values()
    assert isinstance(reports[0], types.WorkDoneProgressBegin) and isinstance(reports[-1], types.WorkDoneProgressEnd)


async def test_ghost_text_of_the_starter_is_python_about_the_code_around_it(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP)
    item = await fresh.ghost(6, 8)
    assert "self." in item.insert_text
    compile(SHOP.replace("        \n", f"        {item.insert_text}\n"), "shop.py", "exec")


async def test_a_keystroke_computes_only_what_was_typed(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP)
    await fresh.ghost(6, 8)
    fresh.type(6, 8, "total = self.")  # what was suggested would be served without the model
    item = await fresh.ghost(6, 21)
    cost = (await fresh.status())["last"]["cost"]
    assert item.insert_text.startswith(("name", "price"))
    assert cost["computed_tokens"] <= 4 and cost["cached_tokens"] > 40


async def test_an_edit_above_costs_little_at_once_and_the_status_says_what_kind_of_reuse_it_was(fresh: Editor):
    await ready(fresh)
    methods = "".join(
        f"    def step_{n}(self, value):\n        self.total += value * {n}\n        return self.total\n\n" for n in range(40)
    )
    fresh.open(f"class Machine:\n{methods}    def st\n\n\nMachine().step_1(2)\n")
    await fresh.ghost(161, 10)
    fresh.type(30, 8, "self.count += 1; ")
    fresh.type(161, 10, "a")  # what was suggested does not hold any more
    await fresh.ghost(161, 11)
    cost = (await fresh.status())["last"]["cost"]
    assert cost["reuse"] == "shifted" and cost["shifted_tokens"] > 4 * cost["computed_tokens"]


async def test_a_half_typed_word_is_completed_as_a_word(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP.replace("        \n", "        return self.pri\n"))
    item = await fresh.ghost(6, 23)
    assert item.insert_text.startswith("ce")


async def test_emoji_before_the_cursor_and_line_endings_of_windows_are_right(fresh: Editor):
    await ready(fresh)
    text = 'names = ["🙂🙂"]; total = 0\r\nfor name in names:\r\n    '
    fresh.open(text)
    item = await fresh.ghost(2, 4)
    assert item.range == types.Range(types.Position(2, 4), types.Position(2, 4))
    assert "\n" not in item.insert_text.replace("\r\n", "")
    fresh.type(0, 19, "# 🙂")  # behind the closing quote and bracket, in UTF-16 units
    assert await fresh.ghost(2, 4) is not None


async def test_typing_on_cancels_the_older_request_and_the_newest_is_answered(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP)
    requests = []  # the first computes the whole prompt, and the others arrive meanwhile
    for index, letter in enumerate("return self.n"):
        fresh.type(6, 8 + index, letter)
        requests.append(asyncio.ensure_future(fresh.ghost(6, 9 + index)))
    *older, newest = await asyncio.wait_for(asyncio.gather(*requests), 30)
    assert older.count(None) >= len(older) / 2  # a fast machine may answer some before the next arrives
    assert newest.insert_text.startswith("ame")


async def test_special_tokens_in_a_file_are_text(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP.replace("class Item", 'END = "<｜fim▁end｜><｜end▁of▁sentence｜>"\n\n\nclass Item'))
    item = await fresh.ghost(9, 8)
    assert item is not None and "｜" not in item.insert_text


@pytest.mark.parametrize(
    ("text", "line", "character", "reason"),
    [
        ("x = 1\n" * 9_000_000, 3, 5, "more than inline.max_document_chars"),
        ("x" * 2_000_000, 0, 10, "lines of more than"),
        ("x = 1\n\0\0\0\ny = \n", 2, 4, "NUL bytes"),
        ("x = 1\n", 99, 0, "outside the document"),
    ],
    ids=["54 MB", "2 MB in one line", "NUL", "outside"],
)
async def test_a_document_that_is_not_completed_says_why_and_the_next_one_is(
    fresh: Editor, text: str, line: int, character: int, reason: str
):
    await ready(fresh)
    fresh.open(text, uri="file:///project/odd.py")
    assert await fresh.ghost(line, character, uri="file:///project/odd.py") is None
    assert reason in (await fresh.status())["last"]["reason"]
    assert any(reason in message.message for message in fresh.client.log_messages)
    fresh.open(SHOP)
    assert await fresh.ghost(6, 8) is not None


async def test_a_character_behind_the_end_of_the_line_means_its_end(fresh: Editor):
    await ready(fresh)
    fresh.open(SHOP)
    item = await fresh.ghost(6, 4000)
    assert item.range.start == types.Position(6, 8)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def of_another_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def with_a_truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "give a folder that exists"),
        (without_config, "holds no config.json"),
        (of_another_family, "a model of type 'llama'"),
        (without_a_shard, "lacks 1 of"),
        (with_a_truncated_shard, "is truncated or damaged"),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_said_on_the_screen_and_the_server_stays(
    fresh: Editor, tmp_path: Path, damage: Callable[[Path], None], said: str
):
    folder = Path(shutil.copytree(STARTER, tmp_path / "model"))
    damage(folder)
    await fresh.start({"model": str(folder)})
    status = await fresh.until_ready()
    assert status["state"] == "failed" and said in status["message"]
    assert any(said in message.message for message in fresh.client.messages)
    fresh.open(SHOP)
    assert await fresh.ghost(6, 8) is None
    assert said in (await fresh.status())["last"]["reason"]


async def test_a_model_without_fim_tokens_loads_and_says_why_nothing_is_shown(fresh: Editor, tmp_path: Path):
    folder = Path(shutil.copytree(STARTER, tmp_path / "model"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<｜fim▁", "<｜was▁"), "utf-8")
    await fresh.start({"model": str(folder)})
    assert (await fresh.until_ready())["state"] == "ready"
    fresh.open(SHOP)
    assert await fresh.ghost(6, 8) is None
    assert "no fill-in-the-middle tokens" in (await fresh.status())["last"]["reason"]


async def test_the_process_ends_when_the_client_goes_away_in_the_middle_of_a_generation():
    async with editor(*COMMAND) as running:
        await ready(running, inline={"max_new_tokens": 4000, "max_lines": 200})
        running.open(SHOP, uri=URI)
        asking = asyncio.ensure_future(running.ghost(6, 8))
        await running.status()
        process = running.client._server
        process._transport.get_pipe_transport(0).close()
        await asyncio.wait_for(process.wait(), 20)
        asking.cancel()


async def test_shutdown_while_the_model_loads_is_answered_and_the_process_ends():
    async with editor(*COMMAND) as running:
        await running.start()
        async with asyncio.timeout(20):
            await running.client.shutdown_session()
            await running.client._server.wait()
