"""Several editors of one user, each with the installed command, and one process that holds the model for all of them."""

import asyncio

import psutil

from tests.e2e.test_starter_server import COMMAND, SHOP
from tests.editor import Editor, editor

SHARED = {"cache_mb": 64}
"""A choice that other tests do not make, so that the process is these tests' own."""


async def ready(running: Editor, **options: object) -> Editor:
    await running.start(SHARED | options)
    status = await running.until_ready()
    assert status["state"] == "ready", status["message"]
    running.open(SHOP)
    return running


def holds_torch(process: psutil.Process) -> bool:
    return any("libtorch" in mapped.path for mapped in process.memory_maps())


def keeper() -> psutil.Process:
    """The process that holds the model, which is a child of whoever started it first."""
    (found,) = (child for child in psutil.Process().children(recursive=True) if "model_host.keeper" in child.cmdline())
    return found


async def test_two_windows_hold_the_weights_once_and_the_second_one_finds_them_there():
    async with editor(*COMMAND) as first, editor(*COMMAND) as second:
        await ready(first)
        item = await first.ghost(6, 8)
        await ready(second)
        assert (await second.ghost(6, 8)).insert_text == item.insert_text
        one, other = await first.status(), await second.status()
        assert other["model"]["load_s"] < one["model"]["load_s"] / 2
        assert one["last"]["cost"]["cached_tokens"] == 0 and other["last"]["cost"]["computed_tokens"] <= 2
        servers = [child for child in psutil.Process().children(recursive=True) if "lsp_server" in child.cmdline()]
        assert len(servers) == 2 and not any(map(holds_torch, servers)) and holds_torch(keeper())


async def test_the_windows_left_go_on_when_the_one_that_loaded_the_model_is_closed():
    async with editor(*COMMAND) as second:
        async with editor(*COMMAND) as first:
            await ready(first)
            holder = keeper()
            await ready(second)
        assert await second.ghost(6, 8) and holder.is_running()
    await asyncio.to_thread(psutil.wait_procs, [holder], 30)
    assert not holder.is_running()


async def test_a_model_that_dies_is_said_and_back_with_the_next_keys_and_the_session_is_still_there():
    async with editor(*COMMAND) as running:
        await ready(running)
        assert await running.ghost(6, 8)
        keeper().kill()
        running.open(SHOP, "file:///project/other.py")  # what was suggested before is remembered
        reasons = set()
        async with asyncio.timeout(60):
            while await running.ghost(6, 8, "file:///project/other.py") is None:
                reasons.add((await running.status())["last"]["reason"])
                await asyncio.sleep(0.05)
        assert any("The model's process has ended" in reason for reason in reasons), reasons
        assert await running.ghost(6, 8)


async def test_with_share_model_off_the_server_holds_it_itself():
    async with editor(*COMMAND) as running:
        await ready(running, share_model=False)
        assert await running.ghost(6, 8)
        children = psutil.Process().children(recursive=True)
        assert not any("model_host.keeper" in child.cmdline() for child in children)
        assert any(holds_torch(child) for child in children if "lsp_server" in child.cmdline())
