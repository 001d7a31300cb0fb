"""One process for a model: found or started, shared, left, killed. Real processes with the starter."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from model_host import meeting, shared
from model_host.checkpoints import STARTER
from model_host.engine import load_engine
from model_host.errors import CheckpointError, EngineClosed, EngineError, RequestError
from model_host.generation import Chat, Cost, Fim, Finish, Grammar, Message, Request, Sampling
from model_host.meeting import Place
from model_host.shared import SharedEngine
from model_host.wanted import Wanted

WANTED = Wanted(model="starter", device="cpu", dtype="float32", threads=1, kernels="torch")
HOLE = Request(prompt=Fim(prefix="def add(a, b):\n    ", suffix="\n", middle="re"), max_new_tokens=12)
LONG = Request(prompt=Fim(prefix="import os\n\n", suffix=""), max_new_tokens=4000)
GONE_S = 30.0


@pytest.fixture(autouse=True)
def rooms(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to meet in for each test."""
    place = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place


def silent(what: str, share: float) -> None: ...


@pytest.fixture
def connect() -> Iterator[Callable[..., SharedEngine]]:
    opened: list[SharedEngine] = []

    def open(wanted: Wanted = WANTED, keep_s: float = 0.0, progress: Callable[[str, float], None] = silent) -> SharedEngine:
        opened.append(shared.connect(wanted, keep_s=keep_s, progress=progress))
        return opened[-1]

    yield open
    for engine in opened:
        engine.close()


def keepers(wanted: Wanted = WANTED) -> list[psutil.Process]:
    """The processes that hold a model for this test: those that have its lock open."""
    lock = str(Place.of(wanted).lock)
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path == lock for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def text_of(engine: SharedEngine, request: Request = HOLE) -> str:
    return "".join([piece async for piece in engine.submit(request)])


async def in_thread(connect: Callable[..., SharedEngine], *arguments: object) -> SharedEngine:
    return await asyncio.to_thread(connect, *arguments)


async def test_what_it_says_is_what_an_engine_of_ones_own_says(connect: Callable[..., SharedEngine]):
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}'
    requests = [
        HOLE,
        dataclasses.replace(HOLE, sampling=Sampling(temperature=0.8, seed=3, top_k=20)),
        dataclasses.replace(HOLE, logprobs=2),
        dataclasses.replace(HOLE, stop=("+",)),
        Request(prompt=Chat(messages=(Message(role="user", content="Grüße, 🙂"),)), max_new_tokens=8),
        Request(prompt=Fim(prefix="x = ", suffix="\n"), max_new_tokens=30, grammar=Grammar(kind="json_schema", source=schema)),
    ]
    there, here = await in_thread(connect), load_engine(STARTER, device="cpu", dtype="float32", threads=1, kernels="torch")
    try:
        for request in requests:
            ours, theirs = here.submit(request), there.submit(request)
            assert [p async for p in ours] == [p async for p in theirs]
            assert ours.cost and theirs.cost
            assert [len(g.logprobs) for g in (ours, theirs)] == [ours.cost.new_tokens if request.logprobs else 0] * 2
            for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert (mine.content, [a for a, _ in mine.alternatives]) == (other.content, [a for a, _ in other.alternatives])
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            timed = {"queued_s": 0.0, "first_token_s": 0.0, "decode_s": 0.0}
            assert dataclasses.replace(ours.cost, **timed) == dataclasses.replace(theirs.cost, **timed)
        same = [dataclasses.replace(engine.facts, load_s=0.0) for engine in (here, there)]
        assert same[0] == same[1]
    finally:
        here.close()


async def test_a_second_editor_finds_the_model_loaded_and_warm(connect: Callable[..., SharedEngine]):
    heard: list[float] = []
    first = await asyncio.to_thread(connect, WANTED, 0.0, lambda what, share: heard.append(share))
    assert heard and heard == sorted(heard)
    await text_of(first)
    second = await in_thread(connect)
    generation = second.submit(HOLE)
    cost: Cost = await generation.finished()
    assert cost.computed_tokens == 1 and cost.cached_tokens > 5
    assert second.facts.load_s < first.facts.load_s / 2
    assert len(keepers()) == 1


async def test_editors_that_start_together_start_one_process(connect: Callable[..., SharedEngine]):
    engines = await asyncio.gather(*(in_thread(connect) for _ in range(4)))
    assert len(keepers()) == 1
    assert len(set(await asyncio.gather(*map(text_of, engines)))) == 1


async def test_the_process_ends_with_the_last_who_uses_it(connect: Callable[..., SharedEngine]):
    first, second = await asyncio.gather(in_thread(connect), in_thread(connect))
    (process,) = keepers()
    first.close()
    assert await text_of(second)
    second.close()
    await asyncio.to_thread(process.wait, GONE_S)
    assert list(Place.of(WANTED).socket.parent.iterdir()) == []
    third = await in_thread(connect)
    assert await text_of(third)


async def test_the_process_stays_as_long_as_the_last_one_wished(connect: Callable[..., SharedEngine]):
    first = await in_thread(connect, WANTED, 60.0)
    (process,) = keepers()
    first.close()
    second = await in_thread(connect)
    assert keepers() == [process]
    second.close()
    await asyncio.to_thread(process.wait, GONE_S)


async def test_who_wants_it_otherwise_has_another_process(connect: Callable[..., SharedEngine]):
    other = dataclasses.replace(WANTED, dtype="bfloat16")
    engines = [await in_thread(connect), await in_thread(connect, other)]
    assert [engine.facts.dtype for engine in engines] == ["float32", "bfloat16"]
    assert len(keepers()) == len(keepers(other)) == 1 and keepers() != keepers(other)


async def test_a_model_that_nobody_uses_any_more_makes_room_for_another_and_one_in_use_stays(connect: Callable[..., SharedEngine]):
    others = [dataclasses.replace(WANTED, cache_bytes=n << 20) for n in (64, 128)]
    first, second = await in_thread(connect, others[0]), await in_thread(connect, others[1], 600.0)
    (unused,) = keepers(others[1])
    second.close()
    third = await in_thread(connect)
    assert not unused.is_running() and not Place.of(others[1]).log.exists(), "it had nothing to complain about"
    assert len(keepers(others[0])) == len(keepers()) == 1
    assert await text_of(first) == await text_of(third)


async def test_a_cancelled_answer_ends_there_and_says_what_it_cost(connect: Callable[..., SharedEngine]):
    engine = await in_thread(connect)
    generation = engine.submit(LONG)
    await anext(generation)
    generation.cancel()
    cost = await generation.finished()
    assert cost.finish is Finish.CANCELLED and cost.new_tokens < 1000


async def test_an_error_of_a_request_is_the_same_sentence_and_harms_nobody(connect: Callable[..., SharedEngine]):
    engine = await in_thread(connect)
    with pytest.raises(RequestError, match="unclosed group"):
        await text_of(engine, dataclasses.replace(HOLE, grammar=Grammar(kind="regex", source="(")))
    assert await text_of(engine)


async def test_a_model_that_cannot_be_loaded_is_told_as_ever_and_tried_anew_when_it_is_mended(
    connect: Callable[..., SharedEngine], tmp_path: Path
):
    folder = tmp_path / "model"
    folder.mkdir()
    wanted = dataclasses.replace(WANTED, model=str(folder))
    with pytest.raises(CheckpointError) as first:
        await in_thread(connect, wanted)
    with pytest.raises(CheckpointError) as alone:
        load_engine(folder)
    assert str(first.value) == str(alone.value)
    for file in STARTER.iterdir():
        (folder / file.name).symlink_to(file)
    assert await text_of(await in_thread(connect, wanted))


async def test_a_killed_process_fails_its_answers_with_a_sentence_and_is_started_anew(connect: Callable[..., SharedEngine]):
    engine = await in_thread(connect)
    generation = engine.submit(LONG)
    await anext(generation)
    (process,) = keepers()
    process.kill()
    with pytest.raises(EngineError, match=r"has ended, without a word.*started anew with the next request"):
        await generation.finished()
    with pytest.raises(EngineError, match="being started again"):
        await text_of(engine)
    async with asyncio.timeout(GONE_S):
        while True:
            try:
                assert await text_of(engine)
                break
            except EngineError as error:
                assert "being started again" in str(error)
                await asyncio.sleep(0.05)
    assert keepers() != [process]


async def test_a_crash_is_named_and_where_its_trace_is(connect: Callable[..., SharedEngine]):
    engine = await in_thread(connect)
    generation = engine.submit(LONG)
    await anext(generation)
    keepers()[0].send_signal(signal.SIGSEGV)
    with pytest.raises(EngineError, match=r"has ended \(Fatal Python error: Segmentation fault; see .*\.log\)"):
        await generation.finished()


async def test_an_editor_that_is_killed_leaves_no_work_and_no_process_behind():
    program = (
        "import asyncio\n"
        "from model_host import shared\n"
        "from tests.model_host.test_shared import LONG, WANTED\n"
        "async def main():\n"
        "    engine = await asyncio.to_thread(lambda: shared.connect(WANTED, keep_s=0, progress=lambda what, share: None))\n"
        "    async for piece in engine.submit(LONG):\n"
        "        print('began', flush=True)\n"
        "asyncio.run(main())\n"
    )
    editor = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert editor.stdout
    await editor.stdout.readline()
    (process,) = keepers()
    editor.kill()
    await editor.wait()
    await asyncio.to_thread(process.wait, GONE_S)


async def test_a_process_killed_while_it_loads_is_told_at_once():
    def kill(what: str, share: float) -> None:
        if what == "starting torch":
            keepers()[0].kill()

    with pytest.raises(EngineError, match=r"ended while it loaded, without a word.*deepseek-lsp doctor"):
        await asyncio.to_thread(lambda: shared.connect(WANTED, keep_s=0, progress=kill))


async def test_after_closing_nothing_is_asked_and_what_ran_ends(connect: Callable[..., SharedEngine]):
    engine = await in_thread(connect)
    generation = engine.submit(LONG)
    await anext(generation)
    engine.close()
    with pytest.raises(EngineClosed):
        await generation.finished()
    with pytest.raises(EngineClosed):
        engine.submit(HOLE)


def test_a_folder_that_others_can_open_is_not_met_in(rooms: Path):
    place = rooms / "deepseek-lsp"
    place.mkdir()
    place.chmod(0o755)
    assert "can be opened by others" in (meeting.why_alone() or "")
    place.chmod(0o700)
    assert meeting.why_alone() is None


async def test_what_a_dead_process_left_does_not_matter(connect: Callable[..., SharedEngine]):
    place = Place.of(WANTED)
    for file in (place.socket, place.lock, place.log):
        file.write_text("rest")
    assert await text_of(await in_thread(connect))
    assert place.socket.stat().st_mode & 0o077 == 0


async def test_code_in_the_folder_that_an_editor_was_started_in_is_not_run(
    connect: Callable[..., SharedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("model_host", "torch", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    assert await text_of(await in_thread(connect))
    assert not (tmp_path / "run").exists()


async def test_a_process_that_stands_still_holds_up_nobody_who_asks(connect: Callable[..., SharedEngine]):
    """Prompts that no socket has room for wait beside the event loop."""
    engine = await in_thread(connect)
    (process,) = keepers()
    process.suspend()
    asked = [engine.submit(dataclasses.replace(HOLE, prompt=Fim(prefix="x = 1\n" * 70_000, suffix=""))) for _ in range(3)]
    for one in asked:
        one.cancel()
    last = engine.submit(HOLE)
    process.resume()
    assert (await last.finished()).new_tokens == HOLE.max_new_tokens
    for one in asked:
        with contextlib.suppress(RequestError):  # of so long a prompt, where that is noticed first
            assert (await one.finished()).finish is Finish.CANCELLED
