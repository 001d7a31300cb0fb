"""Experts and layers on several devices, and weights in fewer bits: the same answers as whole, and a sentence when one is lost."""

import asyncio
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_host import hot, machine, runner
from model_host.batch import Step
from model_host.catalogue import LARGE, LITE, Entry, Precision
from model_host.checkpoints import STARTER, load_model
from model_host.config import ModelConfig
from model_host.devices import Device, Kind, Share
from model_host.divided import LayeredModel, SpreadModel
from model_host.eager import EagerModel
from model_host.engine import Disk, LocalEngine, load_engine
from model_host.errors import CheckpointError, EngineError
from model_host.experts import Spread, TorchExperts
from model_host.footprint import compiled_bytes, groups, working_bytes
from model_host.generation import Cost, Fim, Request, Reuse
from model_host.holders import expert_reader, load_dense, load_spread
from model_host.hot import HotExperts
from model_host.latents import LatentPool
from model_host.native.library import available_levels
from model_host.native.model import NativeExperts
from model_host.pages import pages_for
from model_host.placement import RESERVED_BYTES, USUAL_CONTEXT_TOKENS
from model_host.quantized import PackedLinear, Stack, linears, pack, unpack
from tests.model_host import twins
from tests.model_host.loaded import CPU, NEW, assembled, greedy, held, quiet, whole


@pytest.fixture(scope="module", params=[LITE, LARGE], ids=["greedy", "group limited"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    entry = Entry(name="twin", shape=request.param, context_tokens=1)
    return twins.write(tmp_path_factory.mktemp("spread") / "twin", twins.hub_config(entry), dtype=torch.float32)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entry = Entry(name="twin", shape=LITE, context_tokens=1)
    return twins.write(tmp_path_factory.mktemp("one") / "twin", twins.hub_config(entry), dtype=torch.float32)


def test_experts_held_apart_are_those_of_the_plain_model(folder: Path):
    plain = EagerModel(load_model(folder, device=CPU, dtype=torch.float32, progress=quiet))
    wanted, logits = greedy(plain)
    apart = assembled(
        folder, "float32", [held(folder, range(5), "float32"), held(folder, range(5, plain.config.n_routed_experts or 0), "float32")]
    )
    said, ours = greedy(apart)
    assert said == wanted and torch.allclose(ours, logits, atol=1e-4)
    assert apart.weight_bytes == plain.weight_bytes


def in_layers(folder: Path, precision: str, cuts: list[int], on_cpu: int = 0, kernels: str = "torch") -> LayeredModel:
    """Layers between `cuts` on devices of their own, which are all this CPU; the last experts of every layer where a plan puts what does
    not fit."""
    config = ModelConfig.read(folder)
    experts = config.n_routed_experts or 0
    held, device = range(experts - on_cpu), Device(name="cpu", kind="gpu", free_bytes=0, bytes_per_s=1.0)
    shares = [Share(device=device, layers=range(a, b), experts=held, weight_bytes=0) for a, b in pairwise(cuts)]
    if on_cpu:
        shares.append(Share(device=replace(device, kind="cpu"), layers=range(0), experts=range(held.stop, experts), weight_bytes=0))
    how = {"dtype": torch.float32, "threads": 1, "kernels": kernels, "progress": quiet}
    model = load_spread(folder, shares, precision=precision, **how)
    assert isinstance(model, LayeredModel)
    return model


@pytest.mark.parametrize("cuts", [[0, 1, 3], [0, 2, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_layers_on_several_devices_say_token_for_token_what_the_whole_model_says(folder: Path, cuts: list[int], precision: str):
    reference = whole(folder, precision)
    wanted, logits = greedy(reference)
    model = in_layers(folder, precision, cuts)
    said, ours = greedy(model)
    assert said == wanted and torch.equal(ours, logits)
    assert model.weight_bytes == reference.weight_bytes, "no weight is there twice"
    assert [len(part.c_kv) for part in model.pool(1).parts] == [b - a for a, b in pairwise(cuts)], "each part has its own latents only"


def test_four_devices_have_a_layer_each(tmp_path: Path):
    config = twins.hub_config(Entry(name="twin", shape=LARGE, context_tokens=1), num_hidden_layers=4)
    folder = twins.write(tmp_path / "twin", config, dtype=torch.float32)
    assert greedy(in_layers(folder, "float32", [0, 1, 2, 3, 4]))[0] == greedy(whole(folder, "float32"))[0]


def test_layers_on_several_devices_with_experts_in_the_cpus_memory_say_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hot, "CHECKED_STEPS", 2)
    monkeypatch.setattr(hot, "MIN_USES", 1.0)
    model = in_layers(folder, "float32", [0, 2, 3], on_cpu=9, kernels="auto")
    said, logits = greedy(model)
    wanted, whole_logits = greedy(whole(folder, "float32"))
    assert said == wanted and torch.allclose(logits, whole_logits, atol=1e-4)
    assert all(part.hot is not None and part.hot.moves for part in model.parts), "and the most used are moved, of each part"


def test_embeddings_that_are_the_output_too_lie_at_both_ends(tmp_path: Path):
    config = twins.hub_config(Entry(name="twin", shape=LITE, context_tokens=1), tie_word_embeddings=True)
    folder = twins.write(tmp_path / "twin", config, dtype=torch.float32)
    assert greedy(in_layers(folder, "float32", [0, 1, 3]))[0] == greedy(whole(folder, "float32"))[0]


@pytest.mark.skipif(not available_levels(), reason="the kernels were not compiled")
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_compiled_experts_are_those_of_torch(folder: Path, precision: str):
    config = ModelConfig.read(folder)
    one, other = (held(folder, range(3, 11), precision, kernels) for kernels in ("auto", "torch"))
    assert isinstance(one, NativeExperts) and isinstance(other, TorchExperts)
    draw = torch.Generator().manual_seed(1)
    for tokens in (1, 7, 600):
        x = torch.randn(tokens, config.hidden_size, generator=draw)
        experts = torch.rand(tokens, config.n_routed_experts or 0, generator=draw).topk(config.num_experts_per_tok or 0).indices
        weights = torch.rand(experts.shape, generator=draw)
        ours, theirs = (some.partial(2, x, weights, experts) for some in (one, other))
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if precision == "float32" else 0.02)
    none = torch.full_like(experts, 12)
    assert not one.partial(2, x, weights, none).any() and not other.partial(2, x, weights, none).any()


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_a_packed_model_takes_the_bytes_that_the_plan_says(folder: Path, precision: Precision):
    model = whole(folder, precision)
    planned = sum(group.bytes for group in groups(model.config, precision))
    plain = [
        group for group in groups(model.config, precision) if group.name in ("embeddings", "output", "latents to heads", "norms", "routers")
    ]
    assert model.weight_bytes == planned + sum(group.bytes for group in plain), "those in bfloat16 are in float32 here"


def test_attention_over_latents_keeps_its_matrix_and_nothing_else_stays_plain(folder: Path):
    config = ModelConfig.read(folder)
    model = load_dense(folder, config, Spread([]), precision="int4", dtype=torch.float32, device=CPU, progress=quiet)
    assert {name.rpartition(".")[2] for name, _ in linears(model)} == {"kv_b_proj", "lm_head"}
    packed = {name.rpartition(".")[2]: module.bits for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed["o_proj"] == packed["kv_a_proj_with_mqa"] == 8 and packed["down_proj"] == 4


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.009), (4, 0.095)])
@pytest.mark.parametrize("columns", [64, 100, 129])
def test_packing_loses_as_much_as_the_format_must(bits: int, bound: float, columns: int):
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    back = unpack(*pack(weight, bits), columns, torch.float32)
    assert float((back - weight).norm() / weight.norm()) < bound
    zero = unpack(*pack(torch.zeros(2, columns), bits), columns, torch.float32)
    assert not zero.any()


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_few_and_many_rows_are_multiplied_alike(precision: str):
    stack = Stack(5, 24, 70, precision, torch.float32, CPU)
    draw = torch.Generator().manual_seed(2)
    for expert in range(5):
        stack.put(expert, 0, torch.randn(10, 70, generator=draw))
        stack.put(expert, 10, torch.randn(14, 70, generator=draw))
    x, choices = torch.randn(60, 70, generator=draw), torch.arange(60) // 12
    together = stack.product(x, choices)
    for start in range(0, 60, 12):
        assert torch.allclose(stack.product(x[start : start + 12], choices[start : start + 12]), together[start : start + 12], atol=1e-4)


def small_devices(config: ModelConfig, precision: Precision, *shares: tuple[str, float]) -> tuple[Device, ...]:
    """Devices with room for such shares of the routed experts, and the first for everything else; all are this machine's CPU."""
    *others, routed = groups(config, precision)
    context = min(USUAL_CONTEXT_TOKENS, config.max_position_embeddings)
    rest = sum(group.bytes for group in others) + working_bytes(config, precision, context)
    rest += context * config.num_hidden_layers * config.latent_dim * (4 if precision is Precision.FLOAT32 else 2)
    rest += compiled_bytes(config, precision) if shares[0][0] == "cpu" else 0
    return tuple(
        Device(
            name="cpu",
            kind=kind,
            free_bytes=RESERVED_BYTES[kind] + int(share * routed.bytes) + (rest if place == 0 else 0) + 1000,
            bytes_per_s=1e9,
        )
        for place, (kind, share) in enumerate(shares)
    )


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.INT4])
def test_a_model_that_does_not_fit_the_gpu_is_loaded_over_it_and_the_cpu_as_planned(
    one_folder: Path,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
):
    config = ModelConfig.read(one_folder)
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(runner, "real_devices", lambda: small_devices(config, precision, ("gpu", 0.4), ("cpu", 0.7)))
    model = runner.load(one_folder, device="auto", dtype=precision.value, threads=1, kernels="auto", progress=quiet)
    assert isinstance(model, SpreadModel)
    assert len(model._spread.here) == 2
    assert model.precision == precision.value
    if precision is Precision.FLOAT32:
        assert greedy(model)[0] == greedy(whole(one_folder, "float32"))[0]
    else:
        assert len(greedy(model)[0]) == NEW
    form = runner.choose(config, device="auto", dtype=precision.value, kernels="auto")
    assert any("routed experts" in words for words in form.spread_in_words)


async def test_a_model_whose_layers_are_divided_as_planned_reuses_what_it_computed_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Copied, shifted, kept on disk and taken back: each device with its own part of the latents."""
    config = ModelConfig.read(STARTER)
    context = config.max_position_embeddings
    needed = sum(group.bytes for group in groups(config, Precision.FLOAT32)) + context * config.num_hidden_layers * config.latent_dim * 4
    free = RESERVED_BYTES["gpu"] + working_bytes(config, Precision.FLOAT32, context) + int(0.6 * needed)
    cards = (Device(name="cpu", kind="gpu", free_bytes=free, bytes_per_s=1e13),) * 2  # so fast that hops are what takes time
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    text = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n\n\n" * 12
    first = Request(prompt=Fim(prefix=text + "def mean(values):\n", suffix=""), max_new_tokens=12)
    again = replace(first, prompt=Fim(prefix="import math\n" + text + "def mean(values):\n", suffix=""), reuse=Reuse.SHIFTED)

    async def said(engine: LocalEngine, request: Request) -> tuple[str, Cost]:
        generation = engine.submit(request)
        spoken = "".join([piece async for piece in generation])
        assert generation.cost is not None
        return spoken, generation.cost

    answers, costs = [], []
    for devices in ((), cards, cards):
        monkeypatch.setattr(runner, "real_devices", lambda devices=devices: devices)
        folder = tmp_path / ("layers" if devices else "whole")
        engine = load_engine(STARTER, dtype="float32", threads=2, kernels="torch", disk=Disk(folder, 10**9))
        try:
            assert isinstance(engine._runner.model, LayeredModel) == bool(devices)
            found = [await said(engine, request) for request in (first, first, again)]
            await asyncio.to_thread(engine.rested.wait, 60)
            found.append(await said(engine, again))
        finally:
            engine.close()
        answers.append([spoken for spoken, _ in found])
        costs.append([cost for _, cost in found])
    assert answers[0] == answers[1] == answers[2]
    assert [cost.computed_tokens for cost in costs[0]] == [cost.computed_tokens for cost in costs[1]]
    assert costs[1][1].computed_tokens <= 1 and costs[1][2].shifted_tokens, "copied and shifted"
    assert costs[2][0].computed_tokens < 20, "taken back from disk"


def test_a_model_that_fits_nowhere_is_refused_with_numbers_and_the_nearest_plan(one_folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = ModelConfig.read(one_folder)
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(runner, "real_devices", lambda: small_devices(config, Precision.INT4, ("cpu", 0.3)))
    with pytest.raises(CheckpointError, match=r"does not fit: as int4 with [\d,]+ tokens .* are free\. It would fit"):
        runner.load(one_folder, device="auto", dtype="auto", threads=1, kernels="auto", progress=quiet)


@pytest.mark.parametrize("cache_bytes", [10**6, 10**9])
def test_the_cache_takes_what_the_weights_leave_and_no_more(
    cache_bytes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    config = ModelConfig.read(STARTER)
    devices = small_devices(config, Precision.FLOAT32, ("gpu", 0.4), ("cpu", 0.7))
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(runner, "real_devices", lambda: devices)
    form = runner.choose(config, device="auto", dtype="float32", kernels="auto")
    assert form.cache_bytes is not None and 10**6 < form.cache_bytes < 10**9
    assert form.ram_bytes == devices[1].free_bytes - RESERVED_BYTES["cpu"] - form.shares[1].weight_bytes
    engine = load_engine(STARTER, dtype="float32", threads=1, cache_bytes=cache_bytes)
    try:
        least = LatentPool.page_bytes(config, torch.float32) * pages_for(runner.LEAST_TOKENS)
        assert engine.facts.cache_bytes <= max(min(cache_bytes, form.cache_bytes), least)
        assert ("The weights leave room for" in caplog.text) == (cache_bytes > form.cache_bytes)
    finally:
        engine.close()


def test_a_device_that_is_too_small_alone_is_told_apart_from_a_machine_that_is(monkeypatch: pytest.MonkeyPatch):
    small, large = (Device(name=name, kind=kind, free_bytes=size, bytes_per_s=1e12) for name, kind, size in DEVICES)
    monkeypatch.setattr(runner, "real_devices", lambda: (large, small))
    problem = runner.choose(LITE, device="cpu", dtype="int8", kernels="torch").problem
    assert problem is not None and "does not fit: as int8" in problem and "GB of RAM" not in problem
    assert problem.endswith("That is of 'cpu' alone: with device set to 'auto' it fits as int8 on cuda:0.")


DEVICES: tuple[tuple[str, Kind, int], ...] = (("cpu", "cpu", 4 * 10**9), ("cuda:0", "gpu", 24 * 10**9))


def test_memory_that_is_gone_when_it_is_needed_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def full(model: object, pages: int) -> LatentPool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EagerModel, "pool", full)
    with pytest.raises(CheckpointError, match="was not there any more: end what else uses it, or lower cache_mb"):
        load_engine(STARTER, device="cpu", kernels="torch")


def test_a_gpu_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def lost(device: object) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: device unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert machine.free_bytes(torch.device("cuda", 1)) is None
    assert "cuda:1 does not answer and is left out: CUDA error: device unavailable" in caplog.text


def test_fewer_bits_are_taken_where_more_do_not_fit(one_folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = ModelConfig.read(one_folder)
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(runner, "real_devices", lambda: small_devices(config, Precision.INT8, ("cpu", 1.0)))
    assert runner.choose(config, device="auto", dtype="auto", kernels="torch").precision == "int8"


async def test_a_gpu_that_vanishes_is_told_and_other_requests_are_still_answered(monkeypatch: pytest.MonkeyPatch):
    engine = load_engine(STARTER, device="cpu")
    model = engine._runner.model
    works = model.forward

    def vanished(step: Step, latents: LatentPool) -> Tensor:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    try:
        monkeypatch.setattr(model, "forward", vanished)
        with pytest.raises(EngineError, match=r"cpu is lost to this process \(CUDA error: unspecified launch failure\): restart"):
            await engine.submit(Request(prompt=Fim(prefix="a = ", suffix=""), max_new_tokens=2)).finished()
        monkeypatch.setattr(model, "forward", works)
        assert (await engine.submit(Request(prompt=Fim(prefix="a = ", suffix=""), max_new_tokens=2)).finished()).new_tokens
    finally:
        engine.close()


@pytest.mark.parametrize("kernels", ["torch", *(["auto"] if available_levels() else [])])
def test_experts_that_are_used_most_move_to_the_gpu_and_the_answers_stay_the_same(
    one_folder: Path, kernels: runner.Kernels, monkeypatch: pytest.MonkeyPatch
):
    config = ModelConfig.read(one_folder)
    monkeypatch.setattr(runner, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(runner, "real_devices", lambda: small_devices(config, Precision.FLOAT32, ("gpu", 0.4), ("cpu", 0.7)))
    monkeypatch.setattr(hot, "CHECKED_STEPS", 2)
    monkeypatch.setattr(hot, "MIN_USES", 1.0)
    model = runner.load(one_folder, device="auto", dtype="float32", threads=1, kernels=kernels, progress=quiet)
    assert isinstance(model, SpreadModel) and model.hot is not None
    assert greedy(model)[0] == greedy(whole(one_folder, "float32"))[0]
    assert model.hot.moves > 4
    fast, slow = (held._slots >= 0 for held in model._spread.here)
    assert bool((fast ^ slow).all()), "each expert is in one place"


def test_experts_stay_where_they_are_while_no_other_is_used_much_more(one_folder: Path):
    config = ModelConfig.read(one_folder)
    fast, slow = held(one_folder, range(8), "float32"), held(one_folder, range(8, 16), "float32")
    uses = HotExperts(config, fast, slow, expert_reader(one_folder, config), CPU)
    for _ in range(hot.CHECKED_STEPS):
        for layer in range(1, config.num_hidden_layers):
            uses.note(layer, torch.arange(16)[None])
        uses.end_step()
    assert uses.moves == 0


def divided_in_two(folder: Path, kernels: str, read: hot.ReadExpert | None = None) -> tuple[SpreadModel, HotExperts]:
    """Half of the experts where they are fast and half where they are slow, both on this CPU."""
    config = ModelConfig.read(folder)
    fast, slow = held(folder, range(8), "float32"), held(folder, range(8, 16), "float32", kernels)
    return assembled(folder, "float32", [fast, slow]), HotExperts(config, fast, slow, read or expert_reader(folder, config), CPU)


def used_most(uses: HotExperts, layer: int, *experts: int) -> None:
    """Uses of one layer's experts, until they are looked at."""
    for _ in range(hot.CHECKED_STEPS):
        uses.note(layer, torch.tensor([experts]))
        uses.end_step()


def slots_of(model: SpreadModel) -> Tensor:
    """How many places each expert of each layer is in [L, E]."""
    return sum((one._slots >= 0).int() for one in model._spread.here)  # type: ignore[attr-defined, return-value]


@pytest.mark.parametrize("kernels", ["torch", *(["auto"] if available_levels() else [])])
def test_experts_may_move_there_and_back_any_number_of_times(one_folder: Path, kernels: str):
    model, uses = divided_in_two(one_folder, kernels)
    wanted = greedy(model)[0]
    draw = torch.Generator().manual_seed(7)
    for _ in range(40):
        slow_one, fast_one = (
            int(there[0].nonzero()[int(torch.randint(8, (1,), generator=draw))]) for there in (uses._is_slow, uses._is_fast)
        )
        uses._swap(0, slow_one, fast_one)
    assert uses.moves == 40 and bool((slots_of(model) == 1).all())
    assert greedy(model)[0] == wanted


@pytest.mark.parametrize("failing", [0, 1], ids=["the hot one", "the cold one"])
def test_an_expert_that_cannot_be_read_again_stays_and_so_do_all_others(one_folder: Path, failing: int, caplog: pytest.LogCaptureFixture):
    reads = expert_reader(one_folder, ModelConfig.read(one_folder))
    asked: list[int] = []

    def read(layer: int, expert: int) -> dict[str, Tensor]:
        asked.append(expert)
        if len(asked) - 1 == failing:
            raise OSError("the disk is gone")
        return dict(reads(layer, expert))

    model, uses = divided_in_two(one_folder, "torch", read)
    wanted = greedy(model)[0]
    used_most(uses, 1, 9, 10)
    assert "Experts stay where they are from now on, moving one failed: the disk is gone" in caplog.text
    used_most(uses, 1, 9, 10)
    assert uses.moves == 0 and len(asked) == failing + 1, "and it is not tried again"
    assert bool((slots_of(model) == 1).all()) and greedy(model)[0] == wanted


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_gpu_without_memory_in_the_middle_of_a_move_keeps_the_expert_it_had(
    one_folder: Path, written: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model, uses = divided_in_two(one_folder, "torch")
    wanted = greedy(model)[0]
    fast, _ = model._spread.here
    assert isinstance(fast, TorchExperts)
    puts, done = fast.put, []

    def put(layer: int, expert: int, kind: str, weight: Tensor) -> None:
        if len(done) == written:
            raise torch.OutOfMemoryError("no memory")
        done.append(kind)
        puts(layer, expert, kind, weight)

    monkeypatch.setattr(fast, "put", put)
    used_most(uses, 1, 9, 10)
    assert len(done) == written and uses.moves == 0 and "no memory" in caplog.text
    assert bool((slots_of(model) == 1).all()) and greedy(model)[0] == wanted


def test_files_that_were_replaced_while_in_use_are_not_read(one_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(one_folder, tmp_path / "twin"))
    config = ModelConfig.read(folder)
    read = expert_reader(folder, config)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.flatten() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="was replaced by another checkpoint's while it was in use"):
        read(1, 9)
