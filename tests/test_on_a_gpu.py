"""The engine on a GPU, where there is one: it says what it says on a CPU, and its caches keep their promises there too."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
import torch

from model_host import hot, placement, ranks, runner
from model_host.batch import Span, Step
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig, Portion
from model_host.devices import Device, Share
from model_host.divided import LayeredModel, RankedModel, SpreadModel
from model_host.engine import LocalEngine, load_engine
from model_host.errors import RankLost
from model_host.generation import Cost, Fim, Request, Reuse
from model_host.gpu.model import GpuModel
from model_host.machine import real_devices
from model_host.runner import Form, load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SUFFIX = "\n\ndef main():\n    print(Machine().step_1(2))\n"


def method(number: int, name: str = "step") -> str:
    return f"    def {name}_{number}(self, value):\n        self.total += value * {number}\n        return self.total\n\n"


def text(name: str = "step", methods: int = 40) -> str:
    return "class Machine:\n" + "".join(method(number, name) for number in range(methods))


def hole(prefix: str, middle: str = "    def st", tokens: int = 24) -> Request:
    return Request(prompt=Fim(prefix=prefix, suffix=SUFFIX, middle=middle), max_new_tokens=tokens)


def on(device: str, dtype: str = "float32", **choice: int) -> LocalEngine:
    return load_engine(STARTER, device=device, dtype=dtype, **choice)


async def ask(engine: LocalEngine, request: Request) -> tuple[str, Cost]:
    async with engine.submit(request) as generation:
        said = "".join([piece async for piece in generation])
    assert generation.cost
    return said, generation.cost


async def test_it_says_what_the_engine_on_the_cpu_says():
    requests = [hole(text(methods=n), middle) for n in (1, 3, 40) for middle in ("", "    def st", "    def step_41(self, ")]
    here, there = on("cpu"), on("cuda")
    try:
        alone = [(await ask(here, request))[0] for request in requests]
        assert [(await ask(there, request))[0] for request in requests] == alone
        together = await asyncio.gather(*(ask(there, replace(request, reuse=Reuse.OFF)) for request in requests))
    finally:
        here.close()
        there.close()
    assert [said for said, _ in together] == alone


async def test_typing_costs_the_tokens_typed_and_an_edit_above_becomes_exact_at_rest():
    engine, cold = on("cuda"), on("cuda")
    edited = replace(hole(text().replace("value * 7\n", "value * 7 + 1\n")), reuse=Reuse.SHIFTED)
    try:
        await ask(engine, hole(text()))
        _, typed = await ask(engine, hole(text(), "    def step_40(self, "))
        _, at_once = await ask(engine, edited)
        await asyncio.to_thread(engine.rested.wait, 60)
        said, rested = await ask(engine, edited)
        wanted, _ = await ask(cold, edited)
    finally:
        engine.close()
        cold.close()
    assert typed.computed_tokens <= 12
    assert at_once.shifted_tokens > 5 * at_once.computed_tokens
    assert said == wanted and rested.reuse is Reuse.EXACT and rested.computed_tokens == 1


async def test_what_leaves_the_gpu_stays_in_the_computers_memory():
    engine = on("cuda", cache_bytes=1, ram_bytes=10**9)
    names = ("step", "turn", "move", "draw", "push")
    try:
        for name in names:
            await ask(engine, hole(text(name, 25)))
            await asyncio.to_thread(engine.rested.wait, 60)
        costs = [(await ask(engine, hole(text(name, 25))))[1] for name in names]
    finally:
        engine.close()
    assert all(cost.computed_tokens < 40 for cost in costs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int4", "nf4"])
async def test_every_precision_answers(dtype: str):
    engine = on("cuda", dtype)
    try:
        said, _ = await ask(engine, hole(text()))
    finally:
        engine.close()
    assert said.startswith("ep_")


LAST = f"cuda:{torch.cuda.device_count() - 1}"


@pytest.mark.parametrize("devices", [("cuda:0", LAST), ("cuda:0", "cpu", LAST)], ids=["two parts", "the CPU between two"])
async def test_layers_on_several_devices_say_what_one_says(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """On cards of their own where there are several. Two parts on one card are two sets of captured graphs; with the CPU between them what
    goes from part to part moves there too."""
    cuts = (0, 3, 8) if len(devices) == 2 else (0, 3, 5, 8)
    shares = [
        Share(device=Device(name=name, kind="gpu", free_bytes=0, bytes_per_s=1.0), layers=range(a, b), experts=range(32), weight_bytes=0)
        for name, (a, b) in zip(devices, pairwise(cuts), strict=True)
    ]
    requests = [hole(text(methods=n), middle) for n in (1, 3, 40) for middle in ("", "    def step_41(self, ")]
    requests += [replace(hole(text().replace("value * 7\n", "value * 7 + 1\n")), reuse=Reuse.SHIFTED)]
    whole = on("cpu")
    form = Form(torch.device("cuda:0"), "float32", "", tuple(shares))
    monkeypatch.setattr(runner, "choose", lambda *whatever, **more: form)
    apart = on("cuda")
    try:
        model = apart._runner.model
        assert isinstance(model, LayeredModel) and [part.device for part in model.parts] == [torch.device(name) for name in devices]
        captured = [isinstance(part._stepping, GpuModel) for part in model.parts]
        assert captured == [name.startswith("cuda") for name in devices]
        for request in requests:
            assert (await ask(apart, request))[0] == (await ask(whole, request))[0]
    finally:
        whole.close()
        apart.close()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
async def test_with_experts_in_the_cpus_memory_it_says_what_the_cpu_says(kernels: str, monkeypatch: pytest.MonkeyPatch):
    """Between captured graphs the host computes what the next one needs; the most used experts are moved meanwhile."""
    card = Device(name="cuda:0", kind="gpu", free_bytes=0, bytes_per_s=1.0)
    shares = (
        Share(device=card, layers=range(8), experts=range(20), weight_bytes=0),
        Share(device=replace(card, name="cpu", kind="cpu"), layers=range(0), experts=range(20, 32), weight_bytes=0),
    )
    requests = [hole(text(methods=n), middle) for n in (1, 3, 40) for middle in ("", "    def st", "    def step_41(self, ")]
    whole = on("cpu")
    monkeypatch.setattr(runner, "choose", lambda *whatever, **more: Form(torch.device("cuda:0"), "float32", "", shares))
    monkeypatch.setattr(hot, "CHECKED_STEPS", 4)
    monkeypatch.setattr(hot, "MIN_USES", 1.0)
    apart = load_engine(STARTER, device="cuda", dtype="float32", kernels=kernels)
    try:
        model = apart._runner.model
        assert isinstance(model, SpreadModel) and isinstance(model._stepping, GpuModel) and model.hot
        for request in requests:
            assert (await ask(apart, request))[0] == (await ask(whole, request))[0]
        together = await asyncio.gather(*(ask(apart, replace(request, reuse=Reuse.OFF)) for request in requests))
        assert [said for said, _ in together] == [(await ask(whole, request))[0] for request in requests]
        assert model.hot.moves
    finally:
        whole.close()
        apart.close()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_fewer_bits_on_one_gpu_run_in_captured_graphs(dtype: str):
    model = load(STARTER, device="cuda", dtype=dtype, threads=0, kernels="auto", progress=lambda what, share: None)
    assert isinstance(model, SpreadModel) and isinstance(model._stepping, GpuModel)
    assert model.precision == dtype


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalEngine]]:
    """Engines of the starter with a portion on each of several ranks. Where there are fewer cards than ranks, all are on one. NCCL refuses
    that, unless the ranks say that they are of different hosts; then they take turns on the card and speak through sockets."""
    others = count(1)
    start = subprocess.Popen

    def elsewhere(*arguments: Any, **more: Any) -> subprocess.Popen[str]:
        environment = more.pop("env", None) or os.environ  # Triton starts processes too
        return start(*arguments, env={**environment, "NCCL_HOSTID": f"host {next(others)}"}, **more)

    engines: list[LocalEngine] = []

    def engine(
        *portions: tuple[range, range, range, range], backend: str = "nccl", on_cpu: range = range(0), dtype: str = "float32"
    ) -> LocalEngine:
        """Of heads, experts, shared experts and the inner dimension of dense layers; the first is rank 0's."""
        have_their_own = len(portions) <= torch.cuda.device_count()
        if not have_their_own:
            monkeypatch.setenv("NCCL_HOSTID", "host 0")
            monkeypatch.setenv("NCCL_NET", "Socket")
            monkeypatch.setenv("NCCL_IB_DISABLE", "1")
            monkeypatch.setattr(ranks.subprocess, "Popen", elsewhere)
        if not have_their_own or backend == "gloo":
            monkeypatch.setattr(ranks, "backend_for", lambda devices: backend)
        card = Device(name="cuda:0", kind="gpu", free_bytes=0, bytes_per_s=1.0)
        shares = [
            Share(
                device=replace(card, name=f"cuda:{rank if have_their_own else 0}"),
                layers=range(8),
                experts=experts,
                weight_bytes=0,
                portion=Portion(heads=heads, shared=shared, inner=inner),
            )
            for rank, (heads, experts, shared, inner) in enumerate(portions)
        ]
        if on_cpu:
            shares.append(Share(device=replace(card, name="cpu", kind="cpu"), layers=range(0), experts=on_cpu, weight_bytes=0))
        form = Form(torch.device("cuda:0"), dtype, "", tuple(shares))
        with monkeypatch.context() as patched:
            patched.setattr(runner, "choose", lambda *whatever, **more: form)
            engines.append(on("cuda", dtype))
        return engines[-1]

    yield engine
    for made in engines:
        made.close()


TWO = (range(5), range(20), range(1), range(640)), (range(5, 8), range(20, 32), range(1, 2), range(640, 1024))
THREE = (
    (range(3), range(12), range(1), range(512)),
    (range(3, 6), range(12, 20), range(1, 2), range(512, 768)),
    (range(6, 8), range(20, 32), range(2, 2), range(768, 1024)),
)


def of_ranks(engine: LocalEngine) -> RankedModel:
    model = engine._runner.model
    assert isinstance(model, RankedModel)
    return model


@pytest.mark.parametrize("portions", [TWO, THREE], ids=["two", "three"])
async def test_ranks_that_sum_in_captured_graphs_say_what_the_whole_model_says(ranked: Callable[..., LocalEngine], portions: Any):
    whole, apart = on("cuda"), ranked(*portions)
    few = len(portions) == 3  # which take long turns
    requests = [hole(text(methods=n), middle, 8) for n in ((3,) if few else (1, 40)) for middle in ("", "    def step_41(self, ")]
    requests += [replace(hole(text().replace("value * 7\n", "value * 7 + 1\n"), tokens=8), reuse=Reuse.SHIFTED)]
    try:
        stepping = of_ranks(apart).own._stepping
        assert isinstance(stepping, GpuModel) and len(stepping._graphs) == 5, "captured"
        for request in requests:
            (said, cost), (wanted, _) = await ask(apart, request), await ask(whole, request)
            assert said == wanted
        assert few or cost.shifted_tokens > 5 * cost.computed_tokens
    finally:
        whole.close()


async def test_ranks_of_packed_weights_give_the_logits_of_the_whole_model(ranked: Callable[..., LocalEngine]):
    """But for the rounding to bfloat16 of what is summed; a text would hang on which of two close choices that favours."""
    whole, apart = on("cuda", "int8"), ranked(*TWO, dtype="int8")
    pages, ids = tuple(range(4)), tuple(range(300, 340))
    steps = [Step(ids=ids, spans=(Span(tokens=40, context=40, pages=pages),), wanted=(39,))]
    steps += [Step(ids=(id,), spans=(Span(tokens=1, context=41 + n, pages=pages),), wanted=(0,)) for n, id in enumerate(ids[:16])]
    try:
        assert isinstance(of_ranks(apart).own._stepping, GpuModel)
        for step in steps:
            ours, wanted = apart._runner.run(step), whole._runner.run(step)
            assert float((ours - wanted).norm() / wanted.norm()) < 0.05
    finally:
        whole.close()


@pytest.mark.parametrize("on_cpu", [range(0), range(28, 32)], ids=["by gloo", "with experts in the CPU's memory"])
async def test_ranks_otherwise_connected_or_helped_say_what_the_whole_model_says(ranked: Callable[..., LocalEngine], on_cpu: range):
    """By gloo, as where cards are not NCCL's, without graphs; by NCCL, where rank 0 waits between its graphs for what the CPU computes."""
    (heads, experts, shared, inner), (others, _, *rest) = TWO
    rest_of = range(20, on_cpu.start) if on_cpu else range(20, 32)
    apart = ranked((heads, experts, shared, inner), (others, rest_of, *rest), backend="nccl" if on_cpu else "gloo", on_cpu=on_cpu)
    whole = on("cuda")
    try:
        assert isinstance(of_ranks(apart).own._stepping, GpuModel) == bool(on_cpu)
        for request in (hole(text(methods=3), tokens=6), hole(text(methods=3), "    def step_41(self, ", 6)):
            assert (await ask(apart, request))[0] == (await ask(whole, request))[0]
    finally:
        whole.close()


@pytest.mark.parametrize("when", ["in a step", "between steps"])
async def test_a_rank_that_dies_is_told_within_seconds_and_its_cache_is_as_it_was(ranked: Callable[..., LocalEngine], when: str):
    whole, engine = on("cuda"), ranked(*TWO)
    request = hole(text(), tokens=400)
    try:
        await ask(engine, hole(text(), tokens=2))
        process = of_ranks(engine)._ranks._workers[0].process
        if when == "between steps":
            process.kill()
            process.wait()
        generation = engine.submit(request)
        if when == "in a step":
            async for _ in generation:
                os.kill(process.pid, signal.SIGKILL)
                break
        killed = time.monotonic()
        with pytest.raises(RankLost, match=r"process of rank 1 on cuda:\d failed: it was ended by signal 9"):
            await generation.finished()
        assert time.monotonic() - killed < 8
        said, cost = await ask(engine, replace(request, max_new_tokens=8))
        assert said == (await ask(whole, replace(request, max_new_tokens=8)))[0]
        assert cost.computed_tokens < 20
    finally:
        whole.close()


async def test_a_rank_that_hangs_in_a_step_is_named_and_the_next_answer_is_right(
    ranked: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch
):
    whole, engine = on("cuda"), ranked(*TWO)
    request = hole(text(), tokens=400)
    process = of_ranks(engine)._ranks._workers[0].process
    monkeypatch.setattr(ranks, "STILL_S", 5.0)  # by now everything is compiled
    try:
        generation = engine.submit(request)
        async for _ in generation:
            os.kill(process.pid, signal.SIGSTOP)
            break
        with pytest.raises(RankLost, match=r"rank 1 on cuda:\d has come no further in 5 seconds: it does not answer"):
            await generation.finished()
        assert process.poll() is not None, "ended and waited for"
        monkeypatch.setattr(ranks, "STILL_S", 120.0)
        said, _ = await ask(engine, replace(request, max_new_tokens=8))
        assert said == (await ask(whole, replace(request, max_new_tokens=8)))[0]
    finally:
        whole.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
@pytest.mark.parametrize("slow", [False, True], ids=["layers apart, for want of room", "ranks, for want of speed"])
async def test_a_plan_over_all_cards_is_loaded_and_says_what_one_card_says(slow: bool, monkeypatch: pytest.MonkeyPatch):
    cards = [card for card in real_devices() if card.kind == "gpu"]
    whole = on("cuda:0")
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(placement, "WORTH", 1.0 if slow else placement.WORTH)  # dividing so small a model gains little
    for free_mb in range(700, 2000, 5):
        there = tuple(replace(card, free_bytes=free_mb * 10**6, bytes_per_s=1e9 if slow else card.bytes_per_s) for card in cards)
        monkeypatch.setattr(runner, "real_devices", lambda there=there: there)
        form = runner.choose(ModelConfig.read(STARTER), device="auto", dtype="float32", kernels="auto")
        if len(form.shares) == len(cards) and slow == (form.shares[0].portion is not None):
            break
    else:
        pytest.fail("no plan uses all cards")
    apart = on("auto")
    try:
        assert isinstance(apart._runner.model, RankedModel if slow else LayeredModel)
        for request in (hole(text(methods=3)), hole(text(methods=3), "    def step_41(self, ")):
            assert (await ask(apart, request))[0] == (await ask(whole, request))[0]
    finally:
        whole.close()
        apart.close()
