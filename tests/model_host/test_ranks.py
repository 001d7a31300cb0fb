"""A portion of every layer on each of several ranks: they say what the whole model says, with and without what was computed before; and
whatever becomes of one of them is a sentence to the request that ran, and nothing to the next."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from model_host import hot, ranks, runner
from model_host import wire as wire_module
from model_host.batch import Copy, Shift, Span, Step
from model_host.catalogue import LARGE, LITE, Entry, Precision
from model_host.checkpoints import STARTER, checked_shards, tensors
from model_host.config import ModelConfig, Portion
from model_host.devices import Device
from model_host.divided import RankedModel
from model_host.eager import TRIED_CONTEXT
from model_host.engine import Disk, LocalEngine, load_engine
from model_host.errors import CheckpointError, EngineClosed, RankLost
from model_host.footprint import groups, working_bytes
from model_host.generation import Cost, Fim, Request, Reuse
from model_host.latents import LatentPool
from model_host.native.library import available_levels
from model_host.orders import Begin, Fill, Orders, Post, read, written
from model_host.pages import pages_for
from model_host.placement import RESERVED_BYTES, Demand, Plan, plan
from model_host.ranks import Ranks
from model_host.wire import ConnectionLost, Group, Wire, backend_for, meet
from tests.model_host import twins
from tests.model_host.loaded import CPU, divided, greedy, in_ranks, quiet, whole

UNEVEN = {"intermediate_size": 320, "moe_intermediate_size": 64}
"""Sizes that int4 can be cut at; heads that no number of ranks here divides evenly but two."""


@pytest.fixture(scope="module", params=[LITE, LARGE], ids=["greedy", "group limited"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one with plain queries, the other with low-rank ones."""
    entry = Entry(name="twin", shape=request.param, context_tokens=1)
    config = twins.hub_config(entry, num_attention_heads=16 if entry.shape is LITE else 7, **UNEVEN)
    return twins.write(tmp_path_factory.mktemp("ranks") / "twin", config, dtype=torch.float32)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = twins.hub_config(Entry(name="twin", shape=LITE, context_tokens=1), **UNEVEN)
    return twins.write(tmp_path_factory.mktemp("one") / "twin", config, dtype=torch.float32)


@pytest.fixture
def ranked() -> Iterator[Callable[..., RankedModel]]:
    models: list[RankedModel] = []

    def made(*arguments, **more) -> RankedModel:
        models.append(in_ranks(*arguments, **more))
        return models[-1]

    yield made
    for model in models:
        model.close()


def pid_of(model: RankedModel, rank: int) -> int:
    return model._ranks._workers[rank - 1].process.pid


@pytest.mark.parametrize(("world", "precision"), [(2, "int8"), (3, "int4"), (4, "float32")])
def test_ranks_say_token_for_token_what_the_whole_model_says(folder: Path, world: int, precision: str, ranked: Callable[..., RankedModel]):
    wanted, logits = greedy(whole(folder, precision))
    said, ours = greedy(ranked(folder, precision, world))
    assert said == wanted and torch.allclose(ours, logits, atol=1e-4)


def test_sixteen_heads_over_three_ranks_and_all_experts_in_compiled_kernels(folder: Path, ranked: Callable[..., RankedModel]):
    assert [len(heads) for heads in divided(16, 3)] == [6, 5, 5]
    assert greedy(ranked(folder, "float32", 3, "auto" if available_levels() else "torch"))[0] == greedy(whole(folder, "float32"))[0]


def test_experts_in_the_cpus_memory_beside_rank_0_are_moved_and_the_answers_stay(
    one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hot, "CHECKED_STEPS", 2)
    monkeypatch.setattr(hot, "MIN_USES", 1.0)
    model = ranked(one_folder, "float32", 2, on_cpu=6)
    assert greedy(model)[0] == greedy(whole(one_folder, "float32"))[0]
    assert model.own.hot is not None and model.own.hot.moves


FEW_TOKENS = 64
"""Of context that is planned for: what is read of more would be read by every rank."""


def cards(count: int, room: float) -> tuple[Device, ...]:
    """So slow that ranks are worth it, each with room for such a share of the routed experts; all are this machine's CPU."""
    config = ModelConfig.read(STARTER)
    *others, routed = groups(config, Precision.FLOAT32)
    rest = sum(group.bytes for group in others) + working_bytes(config, Precision.FLOAT32, FEW_TOKENS)
    rest += FEW_TOKENS * config.num_hidden_layers * config.latent_dim * 4
    free = RESERVED_BYTES["gpu"] + rest + int(room * routed.bytes)
    return tuple(Device(name="cpu", kind="gpu", free_bytes=free, bytes_per_s=1e9) for _ in range(count))


@pytest.fixture
def on_cards(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[Device, ...]], None]:
    """Has models be loaded as planned for such devices."""

    def put(devices: tuple[Device, ...]) -> None:
        monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
        monkeypatch.setattr(runner, "USUAL_CONTEXT_TOKENS", FEW_TOKENS)
        monkeypatch.setattr(runner, "LEAST_TOKENS", 8192)  # of cache, whatever was planned for
        monkeypatch.setattr(runner, "real_devices", lambda: devices)

    return put


def test_ranks_take_the_bytes_that_the_plan_says(on_cards: Callable[[tuple[Device, ...]], None]):
    devices = cards(3, 0.1)
    entry = Entry(name="starter", shape=ModelConfig.read(STARTER), context_tokens=1)
    made = plan(Demand(entry=entry, precision=Precision.FLOAT32, context_tokens=FEW_TOKENS), devices)
    assert isinstance(made, Plan) and len(made.shares) == 3
    on_cards(devices)
    shares: list[float] = []
    model = runner.load(
        STARTER, device="auto", dtype="float32", threads=1, kernels="torch", progress=lambda what, share: shares.append(share)
    )  # fmt: skip
    assert isinstance(model, RankedModel)
    assert shares == sorted(set(shares)) and 0 < shares[0] < shares[-1] == pytest.approx(1), "the slowest one's, all that it reads"
    try:
        assert [worker.weight_bytes for worker in model._ranks._workers] == [share.weight_bytes for share in made.shares[1:]]
        assert model.own.weight_bytes == made.shares[0].weight_bytes
    finally:
        model.close()


async def said(engine: LocalEngine, request: Request) -> tuple[str, Cost]:
    generation = engine.submit(request)
    spoken = "".join([piece async for piece in generation])
    assert generation.cost is not None
    return spoken, generation.cost


TEXT = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n\n\n" * 10
FIRST = Request(prompt=Fim(prefix=TEXT + "def mean(values):\n", suffix=""), max_new_tokens=8)


async def test_ranks_reuse_what_was_computed_like_one_device(tmp_path: Path, on_cards: Callable[[tuple[Device, ...]], None]):
    """Copied, shifted, kept on disk and taken back, the same on every rank; and after one was killed in between."""
    edited = Fim(prefix="import math\n" + TEXT + "def mean(values):\n", suffix="")
    again = replace(FIRST, prompt=edited, reuse=Reuse.SHIFTED)
    answers, costs = [], []
    for name, devices in (("whole", ()), ("ranks", cards(2, 0.7)), ("ranks", cards(2, 0.7))):
        on_cards(devices)
        engine = load_engine(STARTER, dtype="float32", threads=1, kernels="torch", disk=Disk(tmp_path / name, 10**9))
        try:
            assert isinstance(engine._runner.model, RankedModel) == bool(devices)
            found = [await said(engine, request) for request in (FIRST, FIRST, again)]
            await asyncio.to_thread(engine.rested.wait, 60)
            if isinstance(model := engine._runner.model, RankedModel):
                os.kill(pid_of(model, 1), signal.SIGKILL)
                with pytest.raises(RankLost, match=r"process of rank 1 on cpu failed: it was ended by signal 9"):
                    await engine.submit(FIRST).finished()
            found.append(await said(engine, again))
        finally:
            engine.close()
        answers.append([spoken for spoken, _ in found])
        costs.append([cost for _, cost in found])
    assert answers[0] == answers[1] == answers[2]
    assert [cost.computed_tokens for cost in costs[0]] == [cost.computed_tokens for cost in costs[1]], "the last one after the death too"
    assert costs[1][1].computed_tokens <= 1 and costs[1][2].shifted_tokens and costs[1][3].computed_tokens <= 1
    assert costs[2][0].computed_tokens < 20, "taken back from disk"


async def test_a_rank_killed_while_it_serves_is_a_sentence_to_its_request_and_nothing_to_the_next(
    on_cards: Callable[[tuple[Device, ...]], None],
):
    on_cards(cards(3, 0.1))
    engine = load_engine(STARTER, dtype="float32", threads=1, kernels="torch")
    try:
        model = engine._runner.model
        assert isinstance(model, RankedModel)
        generation = engine.submit(replace(FIRST, max_new_tokens=2000))
        async for _ in generation:
            os.kill(pid_of(model, 2), signal.SIGKILL)
            break
        with pytest.raises(RankLost, match=r"process of rank 2 on cpu failed: it was ended by signal 9"):
            await generation.finished()
        cost = await engine.submit(replace(FIRST, max_new_tokens=2)).finished()
        assert cost.new_tokens == 2 and cost.computed_tokens <= 16, "what was computed is still there"
    finally:
        engine.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds for what may take two minutes."""
    monkeypatch.setattr(ranks, "STILL_S", 3.0)
    monkeypatch.setattr(ranks, "LAST_WORDS_S", 1.0)


@pytest.mark.usefixtures("impatient")
async def test_a_rank_that_hangs_is_told_and_ended_and_the_next_request_is_answered(on_cards: Callable[[tuple[Device, ...]], None]):
    """Stopped, as by a driver that does not return: in a step, then, those that were started anew, between steps."""
    exact = replace(FIRST, reuse=Reuse.EXACT)
    on_cards(())
    whole = load_engine(STARTER, dtype="float32", threads=1, kernels="torch")
    wanted, _ = await said(whole, exact)
    whole.close()
    on_cards(cards(3, 0.1))
    engine = load_engine(STARTER, dtype="float32", threads=1, kernels="torch")
    model = engine._runner.model
    assert isinstance(model, RankedModel)
    try:
        await engine.submit(FIRST).finished()
        for when in ("in a step", "between steps"):
            processes = [worker.process for worker in model._ranks._workers]
            if when == "between steps":
                os.kill(processes[1].pid, signal.SIGSTOP)
            generation = engine.submit(replace(FIRST, max_new_tokens=2000))
            if when == "in a step":
                async for _ in generation:
                    os.kill(processes[1].pid, signal.SIGSTOP)
                    break
            stopped = time.monotonic()
            with pytest.raises(
                RankLost, match=r"(?s)rank 2 on cpu has come no further in 3 seconds: it does not answer.*dmesg.*next request"
            ):
                await generation.finished()
            assert time.monotonic() - stopped < 12
            assert not any(psutil.pid_exists(process.pid) for process in processes), "ended and waited for"
            spoken, cost = await said(engine, exact)
            assert spoken == wanted and cost.computed_tokens <= 16, f"what was computed is still there ({when})"
    finally:
        engine.close()


STUCK = """
import time
from model_host import worker
from model_host.divided import SpreadModel
SpreadModel.forward = lambda self, step, latents: time.sleep(1000)
worker.main()
"""


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_is_stuck_while_others_wait_for_it_says_where(
    one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    """As in a device's call that does not return."""
    start, started = subprocess.Popen, count(1)

    def second_is_stuck(command: list[str], **more) -> subprocess.Popen[str]:
        return start([*command[:2], "-c", STUCK] if next(started) == 2 else command, **more)

    monkeypatch.setattr(ranks.subprocess, "Popen", second_is_stuck)
    model = ranked(one_folder, "float32", 3)
    pool = model.pool(64)
    model.prepare(pool)
    with pytest.raises(
        RankLost, match=r"(?s)rank 2 on cpu has come no further in 3 seconds: it stands in\n.*in follow.*<lambda>.*\nIf that"
    ):
        model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("when", ["told", "given latents", "prepared anew", "given them anew"])
def test_a_rank_that_hangs_outside_of_a_step_is_ended_too(
    when: str, one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    model = ranked(one_folder, "float32", 2)
    pool = model.pool(1024)
    model.prepare(pool)
    step = Step(ids=tuple(range(20)), spans=(Span(tokens=20, context=20, pages=(0, 1)),), wanted=(19,))
    wanted = model.forward(step, pool)
    stopped = model._ranks._workers[0].process

    def stop() -> None:
        nonlocal stopped
        stopped = model._ranks._workers[0].process
        os.kill(stopped.pid, signal.SIGSTOP)

    with monkeypatch.context() as patched:
        if when == "told":
            stop()
            many = tuple(range(2, 1002))
            for _ in range(20):  # more than a pipe holds
                pool.shift(Shift(source=many, source_start=0, target=many, target_start=0, tokens=1))
        elif when == "given latents":
            stop()
            pool.put_in(list(range(2, 1002)), *pool.take_out(list(range(2, 1002))))
        else:
            os.kill(stopped.pid, signal.SIGKILL)
            with pytest.raises(RankLost, match="ended by signal 9"):
                model.forward(step, pool)
            part, name = (model.own, "prepare") if when == "prepared anew" else (pool, "give_all")
            work = getattr(part, name)

            def with_one_stopped(*arguments) -> None:
                stop()
                work(*arguments)
                assert model._ranks.wire is not None
                model._ranks.wire.summed(torch.ones(1))  # as where it captures graphs, in which there are sums

            patched.setattr(part, name, with_one_stopped)
        with pytest.raises(RankLost, match="rank 1 on cpu has come no further in 3 seconds: it does not answer"):
            model.forward(step, pool)
    assert stopped.poll() == -signal.SIGKILL
    assert torch.allclose(model.forward(step, pool), wanted, atol=1e-5)


@pytest.mark.usefixtures("impatient")
def test_the_death_of_one_rank_is_told_where_another_one_hangs(one_folder: Path, ranked: Callable[..., RankedModel]):
    """What hangs never notices the death, so that rank 0 waits for it."""
    model = ranked(one_folder, "float32", 3)
    pool = model.pool(64)
    model.prepare(pool)
    os.kill(pid_of(model, 1), signal.SIGSTOP)
    os.kill(pid_of(model, 2), signal.SIGKILL)
    with pytest.raises(RankLost, match="rank 2 on cpu failed: it was ended by signal 9"):
        model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    assert not model._ranks.is_running


@pytest.mark.parametrize("when", ["in a step", "while they are started anew"])
async def test_an_engine_is_closed_at_once_even_where_it_waits_for_a_rank(
    when: str, on_cards: Callable[[tuple[Device, ...]], None], monkeypatch: pytest.MonkeyPatch
):
    on_cards(cards(2, 0.7))
    engine = load_engine(STARTER, dtype="float32", threads=1, kernels="torch")
    try:
        model = engine._runner.model
        assert isinstance(model, RankedModel)
        others = model._ranks
        if when == "while they are started anew":
            os.kill(pid_of(model, 1), signal.SIGKILL)
            with pytest.raises(RankLost, match="ended by signal 9"):
                await engine.submit(FIRST).finished()
            start = subprocess.Popen
            monkeypatch.setattr(
                ranks.subprocess, "Popen", lambda command, **more: start([*command[:2], "-c", "import time; time.sleep(1000)"], **more)
            )
        else:
            os.kill(pid_of(model, 1), signal.SIGSTOP)
        generation = engine.submit(FIRST)
        while not (others._is_watched or (others._workers and not others.is_running)):
            await asyncio.sleep(0.1)
        [process] = [worker.process for worker in others._workers]
    finally:
        closed = time.monotonic()
        await asyncio.to_thread(engine.close)
    assert time.monotonic() - closed < 10
    engine.close()  # harmless
    with pytest.raises(EngineClosed):
        await generation.finished()
    assert process.poll() == -signal.SIGKILL


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_cannot_even_be_killed_is_left_behind(
    one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    """As one that waits within the system for a device or a disk."""
    model = ranked(one_folder, "float32", 2)
    pool = model.pool(64)
    model.prepare(pool)
    step = Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,))
    wanted = model.forward(step, pool)
    process = model._ranks._workers[0].process
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(process, "kill", lambda: None)
        with pytest.raises(RankLost, match="rank 1 on cpu has come no further in 3 seconds: it does not answer"):
            model.forward(step, pool)
    assert process.poll() is None
    assert torch.allclose(model.forward(step, pool), wanted, atol=1e-5)
    process.kill()
    process.wait()


def test_a_rank_that_fails_in_a_step_brings_its_traceback_home(one_folder: Path, ranked: Callable[..., RankedModel]):
    model = ranked(one_folder, "float32", 2)
    wanted, _ = greedy(model, new=2)
    pool = model.pool(64)
    model.prepare(pool)
    model._ranks.tell(Copy(0, 10_000, 16))  # a page that is not there
    with pytest.raises(RankLost, match=r"(?s)rank 1 on cpu failed: Traceback.*in follow.*latents.copy"):
        model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    assert not model._ranks.is_running
    config = (one_folder / "config.json").rename(one_folder / "elsewhere")
    with pytest.raises(RankLost, match=r"(?s)rank 1 on cpu could not start: Traceback.*holds no config.json.*with the next request"):
        model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    config.rename(one_folder / "config.json")
    logits = model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    assert logits.shape == (1, model.config.vocab_size) and greedy(model, new=2)[0] == wanted


def test_a_step_that_breaks_here_starts_the_others_anew(one_folder: Path, ranked: Callable[..., RankedModel]):
    model = ranked(one_folder, "float32", 2)
    wanted, _ = greedy(model, new=2)
    pool = model.pool(64)
    model.prepare(pool)
    with pytest.raises(IndexError):
        model.forward(Step(ids=(9_999_999,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    assert not model._ranks.is_running
    model.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool)
    assert greedy(model, new=2)[0] == wanted


def test_a_rank_that_dies_again_while_it_is_started_anew_spoils_nothing(
    one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    model = ranked(one_folder, "float32", 2)
    pool = model.pool(pages_for(TRIED_CONTEXT))
    model.prepare(pool)
    model.forward(Step(ids=tuple(range(20)), spans=(Span(tokens=20, context=20, pages=(0, 1)),), wanted=()), pool)
    following = Step(ids=(20,), spans=(Span(tokens=1, context=21, pages=(0, 1)),), wanted=(0,))
    wanted = model.forward(following, pool)
    prepare = model.own.prepare

    def dying(latents: LatentPool) -> None:
        os.kill(pid_of(model, 1), signal.SIGKILL)
        prepare(latents)
        assert model._ranks.wire is not None
        model._ranks.wire.summed(torch.ones(1))  # as where it captures graphs, in which there are sums

    os.kill(pid_of(model, 1), signal.SIGKILL)
    with monkeypatch.context() as patched:
        patched.setattr(model.own, "prepare", dying)
        for _ in range(2):  # the first finds out about the first death, the second starts it anew
            with pytest.raises(RankLost, match="ended by signal 9"):
                model.forward(following, pool)
    assert torch.allclose(model.forward(following, pool), wanted, atol=1e-5)


def test_ranks_that_were_started_anew_in_vain_are_not_left_behind(
    one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch
):
    model = ranked(one_folder, "float32", 2)
    pool = model.pool(64)
    model.prepare(pool)
    step = Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,))
    wanted = model.forward(step, pool)
    os.kill(pid_of(model, 1), signal.SIGKILL)
    with pytest.raises(RankLost, match="ended by signal 9"):
        model.forward(step, pool)

    def no_room() -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(model._ranks, "join", no_room)
        with pytest.raises(MemoryError):
            model.forward(step, pool)
    assert not model._ranks._workers
    assert torch.allclose(model.forward(step, pool), wanted, atol=1e-5)


def test_ranks_that_were_given_half_are_started_anew(one_folder: Path, ranked: Callable[..., RankedModel], monkeypatch: pytest.MonkeyPatch):
    """The others wait for what rank 0 cannot give."""
    model = ranked(one_folder, "float32", 2)
    pool = model.pool(pages_for(TRIED_CONTEXT))
    model.prepare(pool)
    step = Step(ids=tuple(range(20)), spans=(Span(tokens=20, context=20, pages=(0, 1)),), wanted=(19,))
    wanted = model.forward(step, pool)

    def full(pages: list[int]) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kept = pool.take_out([0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(pool, "of_pages", full)
        with pytest.raises(torch.OutOfMemoryError):
            pool.put_in([2, 3], *kept)
    with pytest.raises(RankLost, match="connection to the model's processes was lost"):
        model.forward(step, pool)
    assert torch.allclose(model.forward(step, pool), wanted, atol=1e-5)


@pytest.fixture
def other(one_folder: Path) -> Iterator[Ranks]:
    """One more rank beside this process, not started."""
    with_one = of_one(one_folder)
    yield with_one
    with_one.close()


def of_one(folder: Path) -> Ranks:
    post = Post(device="cpu", portion=Portion(heads=range(1), inner=range(1), shared=range(0)), experts=range(3))
    return Ranks(folder, [post], home=CPU, precision="float32", dtype=torch.float32, threads=1, kernels="torch")


def heard(other: Ranks, what: Callable[[ranks.Worker], object]) -> ranks.Worker:
    """The one rank, once that is true of it."""
    [worker] = other._workers
    with other._news:
        assert other._news.wait_for(lambda: what(worker), 60)
    return worker


def test_a_rank_that_cannot_start_says_why(tmp_path: Path):
    broken = of_one(tmp_path / "nowhere")
    broken.start(quiet)
    with pytest.raises(CheckpointError, match=r"(?s)process of rank 1 on cpu could not start: Traceback.*holds no config.json"):
        broken.join()
    assert not broken.is_running and not broken._workers


def test_code_in_the_folder_that_an_editor_was_started_in_is_run_by_no_rank(
    one_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranked: Callable[..., RankedModel]
):
    for name in ("model_host", "torch", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    ranked(one_folder, "float32", 2)
    assert not (tmp_path / "run").exists()


BABBLING = """
import os
os.write(1, b"3\\n[]\\nnull\\n\\xff\\n" + b"loading a library\\n" * 100_000)
os._exit(7)
"""


def test_a_rank_whose_libraries_babble_on_stdout_is_heard_all_the_same(other: Ranks, monkeypatch: pytest.MonkeyPatch):
    start = subprocess.Popen
    monkeypatch.setattr(ranks.subprocess, "Popen", lambda command, **more: start([*command[:2], "-c", BABBLING], **more))
    monkeypatch.setattr(ranks, "SILENCE_S", 20.0)
    other.start(quiet)
    with pytest.raises(CheckpointError, match="rank 1 on cpu could not start: it ended with status 7"):
        other.join()


def test_an_interrupt_from_the_terminal_is_for_rank_0_alone(other: Ranks):
    """It stops an answer there; the terminal gives it to every process of the foreground."""
    other.start(quiet)
    assert os.getpgid(other._workers[0].process.pid) != os.getpgid(0)


def test_rank_0_need_not_go_on_reading_when_another_one_has_died(other: Ranks, one_folder: Path):
    """It reads while they read."""
    other.start(quiet)
    process = heard(other, lambda worker: not worker.weight_bytes).process
    process.kill()
    heard(other, lambda worker: worker.is_gone)
    shares: list[float] = []

    def told(what: str, share: float) -> None:
        shares.append(share)
        other.beside(what, share)

    with pytest.raises(CheckpointError, match=r"rank 1 on cpu could not start: it was ended by signal 9, as the system does"):
        for _ in tensors(checked_shards(one_folder, ModelConfig.read(one_folder)), told):
            pass
    assert len(shares) == 1, "at the first sign"


@pytest.mark.parametrize("moment", ["before they meet", "when they meet", "when they have met"])
def test_a_rank_that_dies_once_it_has_its_weights_is_noticed_at_once(moment: str, other: Ranks, monkeypatch: pytest.MonkeyPatch):
    other.start(quiet)
    process = heard(other, lambda worker: worker.weight_bytes).process

    def meeting(*arguments) -> Group:
        if moment == "when they meet":
            process.kill()
        group = meet(*arguments)
        if moment == "when they have met":
            process.kill()
        return group

    monkeypatch.setattr(ranks, "meet", meeting)
    if moment == "before they meet":
        process.kill()
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"process of rank 1 on cpu could not start: it was ended by signal 9"):
        other.join()
    assert time.monotonic() - started < 20, "where looking for it would take 120 s, and connecting a year"


def test_ranks_that_do_not_come_to_the_meeting_are_told_and_ended(other: Ranks, monkeypatch: pytest.MonkeyPatch):
    other.start(quiet)
    process = heard(other, lambda worker: worker.weight_bytes).process
    os.kill(process.pid, signal.SIGSTOP)
    for module in (ranks, wire_module):
        monkeypatch.setattr(module, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(ranks, "LAST_WORDS_S", 1.0)
    with pytest.raises(CheckpointError, match=r"processes could not connect \(.*\)\. With device set to a single one"):
        other.join()
    assert process.poll() == -signal.SIGKILL


def test_a_rank_that_reads_nothing_any_more_is_told_and_ended(other: Ranks, monkeypatch: pytest.MonkeyPatch):
    """As one does whose disk is somewhere in the network, and gone."""
    other.start(quiet)
    process = other._workers[0].process
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(ranks, "SILENCE_S", 1.0)
    with pytest.raises(CheckpointError, match=r"rank 1 on cpu has read nothing for .* after 0% .* the disk of .*twin does not answer"):
        other.join()
    assert process.poll() == -signal.SIGKILL


LOADING = """
import sys
from pathlib import Path
from tests.model_host.loaded import in_ranks
in_ranks(Path(sys.argv[1]), "int4", 2, progress=lambda what, share: print(share, flush=True))
"""


def test_ranks_end_when_the_one_that_started_them_is_killed_while_they_read(tmp_path: Path):
    slow = {"hidden_size": 1024, "moe_intermediate_size": 384, "n_routed_experts": 64, "intermediate_size": 1024}
    folder = twins.write(tmp_path / "twin", twins.hub_config(Entry(name="twin", shape=LITE, context_tokens=1), **slow), blank=True)
    host = subprocess.Popen([sys.executable, "-c", LOADING, str(folder)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    share = float(host.stdout.readline())
    [worker] = psutil.Process(host.pid).children()
    host.kill()
    host.wait()
    host.stdout.close()
    worker.wait(20)
    assert share < 0.5, "it was reading"


def test_ranks_end_when_the_one_that_started_them_is_gone(one_folder: Path, ranked: Callable[..., RankedModel]):
    model = ranked(one_folder, "float32", 2)
    process = model._ranks._workers[0].process
    assert process.stdin is not None
    process.stdin.close()  # as the system does for a process that has died
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        (("cuda:0", "cuda:1", "cuda:2"), "nccl"),
        (("cuda:0", "cuda:0"), "gloo"),
        (("cuda", "cuda"), "gloo"),
        (("cuda:0", "cuda:1", "cpu"), "gloo"),
        (("cpu", "cpu"), "gloo"),
    ],
)
def test_nccl_is_taken_where_every_rank_has_a_card_of_its_own(devices: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model_host.wire.dist.is_nccl_available", lambda: True)
    assert backend_for([torch.device(device) for device in devices]) == backend


def test_a_connection_that_is_lost_launches_no_more_and_says_so(tmp_path: Path):
    """As with NCCL, whose sums would never end; gloo's group is asked in the same words."""
    group = meet(tmp_path, 0, 1, "gloo")
    aborted: list[bool] = []

    class Cards:
        def allreduce(self, tensors: list[Tensor], options: object) -> None:
            group.allreduce(tensors, options).wait()

        def broadcast(self, tensor: Tensor, root: int) -> object:
            return group.broadcast(tensor, root)

        def abort(self) -> None:
            aborted.append(True)

    wire = Wire(Cards(), "nccl", CPU)
    wire._sum.asyncOp = True
    assert torch.equal(wire.summed(torch.ones(2)), torch.ones(2))
    launched: list[bool] = []
    wire.launch(lambda: launched.append(True))
    wire.lose()
    wire.lose()
    assert aborted == launched == [True]
    for use in (wire.check, wire.wait, lambda: wire.summed(torch.ones(2)), lambda: wire.launch(lambda: launched.append(True))):
        with pytest.raises(ConnectionLost, match="a process has ended"):
            use()
    assert launched == [True]


def test_what_is_told_is_what_is_done():
    span = Span(tokens=2, context=18, pages=(4, 7))
    step = Step(ids=(1, 2, 3), spans=(span, replace(span, tokens=1)), wanted=(2,))
    shift = Shift(source=(1, 2), source_start=3, target=(5,), target_start=0, tokens=4)
    for command in (step, shift, Copy(1, 2, 3), Fill((3, 4)), Begin(9)):
        assert read(written(command)) == command and "\n" not in written(command)
    portion = Portion(heads=range(2, 3), inner=range(64, 96), shared=range(1, 1))
    orders = Orders(
        folder="f", precision="int8", dtype="float32", threads=1, kernels="auto", captures=True, rank=1,
        post=Post(device="cpu", portion=portion, experts=range(3, 9)), meeting="m", world=2, backend="gloo",
    )  # fmt: skip
    assert Orders.read(orders.written()) == orders
