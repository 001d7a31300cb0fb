"""The second engine: there when needed, gone when not."""

import asyncio
import gc
import threading
import weakref
from dataclasses import dataclass, field

import pytest

from lsp_server.errors import Refusal
from lsp_server.host import Host
from lsp_server.second import Second
from lsp_server.settings import Settings
from model_host.errors import CheckpointError
from model_host.generation import Chat, Message, Progress, Request
from tests.scripted import ScriptedEngine


@dataclass
class Loads:
    """Counts what is loaded, and remembers which."""

    models: list[str] = field(default_factory=list)

    def __call__(self, settings, progress):
        self.models.append(settings.model)
        if settings.model == "broken":
            raise CheckpointError("It is broken.")
        return ScriptedEngine([])


def settings(**more: object) -> Settings:
    return Settings(chat_model=more.pop("chat_model", "big"), **more)


async def test_it_is_loaded_once_when_first_needed_and_let_go_when_idle():
    loads = Loads()
    second = Second(Host(load=loads), is_short=lambda: False)

    async def use() -> None:
        async with second.engine(settings(chat_idle_s=1), lambda what, share: None) as engine:
            assert engine is second.host.engine

    await asyncio.gather(use(), use())
    assert loads.models == ["big"]
    async with asyncio.timeout(5):
        while second.host.engine is not None:
            await asyncio.sleep(0.05)
    await use()
    assert loads.models == ["big", "big"]
    second.host.close()


async def test_short_memory_lets_it_go_but_not_within_an_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lsp_server.second.LOOK_EVERY_S", 0.01)
    second = Second(Host(load=Loads()), is_short=lambda: True)
    async with second.engine(settings(), lambda what, share: None):
        await asyncio.sleep(0.1)
        assert second.host.engine is not None
    await asyncio.sleep(0.1)
    assert second.host.engine is None


async def test_one_that_cannot_be_loaded_is_a_refusal_in_its_words():
    with pytest.raises(Refusal, match="It is broken"):
        async with Second(Host(load=Loads())).engine(settings(chat_model="broken"), lambda what, share: None):
            pass


async def test_one_that_could_not_be_loaded_is_not_tried_with_every_question_but_with_other_settings():
    loads = Loads()
    second = Second(Host(load=loads), is_short=lambda: False)
    broken = settings(chat_model="broken")
    with pytest.raises(Refusal):
        async with second.engine(broken, lambda what, share: None):
            pass
    assert second.has_failed(broken) and not second.has_failed(settings())
    async with second.engine(settings(), lambda what, share: None):
        assert not second.has_failed(broken)


async def test_when_memory_is_short_nothing_of_a_real_engine_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lsp_server.second.LOOK_EVERY_S", 0.01)
    second = Second(is_short=lambda: True)
    chat = Chat(messages=(Message(role="user", content="def f():"),))
    async with second.engine(settings(chat_model="starter"), lambda what, share: None) as engine:
        async with engine.submit(Request(prompt=chat, max_new_tokens=4)) as generation:
            assert (await generation.finished()).new_tokens
        gone = weakref.ref(engine)
        del engine, generation
    async with asyncio.timeout(60):
        while second.host.engine is not None or gone() is not None:
            await asyncio.sleep(0.02)
            gc.collect()
    assert "Memory ran short" in second.host.message and second.host.state == "waiting"


async def test_a_loading_that_is_cancelled_leaves_no_engine_behind():
    begun, may_end, was_closed = threading.Event(), threading.Event(), threading.Event()

    class Late(ScriptedEngine):
        def close(self) -> None:
            was_closed.set()

    def load(settings: Settings, progress: Progress) -> Late:
        begun.set()
        may_end.wait(10)
        return Late([])

    host = Host(load=load)
    loading = asyncio.ensure_future(host.start(settings(), lambda what, share: None))
    await asyncio.to_thread(begun.wait, 10)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert host.state == "waiting" and "was stopped" in host.message
    may_end.set()
    assert await asyncio.to_thread(was_closed.wait, 10) and host.engine is None


async def test_who_stops_waiting_leaves_no_engine_behind():
    second = Second(Host(load=Loads()), is_short=lambda: False)

    async def use() -> None:
        async with second.engine(settings(chat_idle_s=1), lambda what, share: None):
            pass

    waiting = asyncio.ensure_future(use())
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(5):
        while second.host.engine is None:
            await asyncio.sleep(0.01)
        while second.host.engine is not None:
            await asyncio.sleep(0.05)
