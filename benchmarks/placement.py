"""python -m benchmarks.placement [--shape mid|tiny|lite] [--device cuda]: what loading takes; what each format and number of ranks gives.

A checkpoint with random weights is written to a temporary folder and loaded by every form, each in a process of its own: the memory of
the process (of a GPU: of the card) at most while loading over what the weights take, the time over that of a plain read of the files
(from the system's cache, as the loading reads them), decode tokens a second at 512 tokens of context, and the bytes a token reads. Then
the plain torch model as 1, 2 and 4 ranks, each with a portion of every layer, by gloo on a CPU and on as many GPUs as there are: their
loading (with the start of their processes) and decoding. The ceiling of decode is the bytes of a
token over the bandwidth that the same run measures there. Then the same model with its layers in 2 and 4 parts, one after the other in
one process; and, with a GPU, with a part of the experts in the CPU's memory. How many bits lose how much is measured by benchmarks.formats.

`lite` are the shapes of DeepSeek-Coder-V2-Lite: 31 GB on a disk, and a GPU that holds as much.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.engine import MID, TINY, in_own_process, read_bytes_per_s
from benchmarks.gpu.clock import device_seconds
from benchmarks.report import Goal, report
from model_host import nf4
from model_host.batch import Span, Step
from model_host.catalogue import LITE, Precision
from model_host.checkpoints import checked_shards
from model_host.config import ModelConfig, Portion
from model_host.devices import Device, Share
from model_host.divided import RankedModel
from model_host.footprint import groups
from model_host.holders import load_spread
from model_host.latents import LayeredPool
from model_host.native.library import available_levels
from model_host.native.model import NativeModel, random_weights
from model_host.pages import pages_for
from model_host.quantized import BITS, FEWER_BITS, pack, unpack
from model_host.runner import LEAST_TOKENS, StepModel

SHAPES = {"mid": MID, "tiny": TINY, "lite": LITE}
SHARD_BYTES = 5_000_000_000
"""Of a file of a checkpoint."""
CONTEXT_TOKENS, STEPS = 512, 40
THREADS = 2
SAMPLED_EVERY_S = 0.002
OFFLOADED = (("bfloat16", 0.25), ("bfloat16", 0.5), ("int8", 0.5), ("int4", 0.5))
"""Formats, and the part of the experts that lies in the CPU's memory."""
FORMATS = ("bfloat16", "int8", "int4", "nf4")
GOALS = tuple(Goal(f"{form}_{kind}_peak_over_final", "<=", 1.15) for form in ("native", "torch") for kind in FORMATS)


Metrics = Iterator[tuple[str, float]]


def written(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint of bfloat16 weights, in files as the hub has them."""
    folder.mkdir()
    raw = config.model_dump(exclude={"yarn"}) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def save() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in random_weights(config, 0):
        held[name] = tensor.to(torch.bfloat16, copy=True).contiguous()
        if sum(weight.nbytes for weight in held.values()) > SHARD_BYTES:
            save()
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def native(folder: Path, precision: str) -> StepModel:
    return NativeModel.load(folder, precision, lambda what, share: None, THREADS)


def cuts(whole: int, parts: int) -> list[range]:
    return [range(whole * part // parts, whole * (part + 1) // parts) for part in range(parts)]


def spread(folder: Path, precision: str, device: str, ranks: int, kernels: str) -> StepModel:
    """Heads, experts and the inner dimension of dense layers divided evenly over the ranks."""
    config = ModelConfig.read(folder)
    divided = zip(
        cuts(config.num_attention_heads, ranks),
        cuts(config.intermediate_size, ranks),
        cuts(config.n_shared_experts or 0, ranks),
        cuts(config.n_routed_experts or 0, ranks),
        strict=True,
    )
    shares = [
        Share(
            device=place(device, rank),
            layers=range(config.num_hidden_layers),
            experts=experts,
            weight_bytes=0,
            portion=Portion(heads=heads, inner=inner, shared=shared) if ranks > 1 else None,
        )
        for rank, (heads, inner, shared, experts) in enumerate(divided)
    ]
    return loaded(folder, shares, precision, kernels, max(THREADS // ranks, 1))


def layered(folder: Path, precision: str, device: str, parts: int, kernels: str) -> StepModel:
    """The layers divided evenly over parts, each on a card of its own if there are as many."""
    config = ModelConfig.read(folder)
    experts = range(config.n_routed_experts or 0)
    shares = [
        Share(device=place(device, part), layers=layers, experts=experts, weight_bytes=0)
        for part, layers in enumerate(cuts(config.num_hidden_layers, parts))
    ]
    return loaded(folder, shares, precision, kernels, THREADS)


def offloaded(folder: Path, precision: str, device: str, on_cpu: float) -> StepModel:
    """A part of the experts in the CPU's memory."""
    config = ModelConfig.read(folder)
    experts, cpu = config.n_routed_experts or 0, Device(name="cpu", kind="cpu", free_bytes=0, bytes_per_s=1.0)
    here = experts - round(experts * on_cpu)
    shares = [
        Share(device=place(device, 0), layers=range(config.num_hidden_layers), experts=range(here), weight_bytes=0),
        Share(device=cpu, layers=range(0), experts=range(here, experts), weight_bytes=0),
    ]
    return loaded(folder, shares, precision, "auto", 0)


def place(device: str, number: int) -> Device:
    """The card of a rank or part, where the device is a GPU."""
    name = f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device
    return Device(name=name, kind="gpu", free_bytes=0, bytes_per_s=1.0)


def loaded(folder: Path, shares: list[Share], precision: str, kernels: str, threads: int) -> StepModel:
    compute = torch.bfloat16 if precision in FEWER_BITS else getattr(torch, precision)
    torch.set_num_threads(threads or torch.get_num_threads())
    return load_spread(
        folder, shares, precision=precision, dtype=compute, threads=threads, kernels=kernels, progress=lambda what, share: None
    )  # fmt: skip


def owned_bytes() -> int:
    """Memory that belongs to this process alone; pages of the mapped files are the system's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def measured(load: Callable[[], StepModel], begin: Callable[[], object]) -> dict[str, float]:
    """Loads a model and lets it decode, in a process that has done nothing else but `begin`."""
    begin()
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    before, most, loaded = owned_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not loaded.is_set():
            most = max(most, owned_bytes() - before)
            time.sleep(SAMPLED_EVERY_S)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    model = load()
    load_s = time.perf_counter() - started
    loaded.set()
    sampler.join()
    of_process = {}
    if model.device.type == "cuda":
        of_process = {"ram_peak_mb": most / 1e6}
        most = sum(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
    pages = pages_for(CONTEXT_TOKENS)
    latents = model.pool(pages_for(LEAST_TOKENS))
    if isinstance(model, RankedModel):
        model.prepare(latents)
    for part in latents.parts if isinstance(latents, LayeredPool) else (latents,):
        part.c_kv.normal_()
        part.k_pe.normal_()
    step = Step(ids=(1,), spans=(Span(tokens=1, context=CONTEXT_TOKENS, pages=tuple(range(pages))),), wanted=(0,))
    times = []
    for number in range(STEPS):
        started = time.perf_counter()
        model.forward(Step(ids=(number + 1,), spans=step.spans, wanted=(0,)), latents).cpu()
        times.append(time.perf_counter() - started)
    if isinstance(model, RankedModel):
        model.close()
    return {
        "peak_over_final": max(most, 1) / model.weight_bytes,
        "load_s": load_s,
        "weights_mb": model.weight_bytes / 1e6,
        "decode_tokens_per_s": 1 / sorted(times)[STEPS // 2],
    } | of_process


def gpu_read_bytes_per_s() -> float:
    """How fast a GPU's memory is: 2 GiB are read and written."""
    numbers = torch.ones(1 << 29, device="cuda")
    copy = torch.empty_like(numbers)
    return 2 * numbers.nbytes / device_seconds(numbers.device, lambda: copy.copy_(numbers))


def alone(load: Callable[[], StepModel], begin: Callable[[], object] = torch.get_num_threads) -> dict[str, float]:
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measured, (load, begin))


def plain_read_s(folder: Path, config: ModelConfig) -> float:
    started = time.perf_counter()
    for part in checked_shards(folder, config):
        with part.file.open("rb", buffering=0) as opened:
            memory = bytearray(1 << 24)
            while opened.readinto(memory):
                pass
    return time.perf_counter() - started


def read_mb_per_token(config: ModelConfig, precision: str) -> float:
    return sum(group.read_bytes for group in groups(config, Precision(precision))) / 1e6


def errors() -> dict[str, float]:
    """Relative error of weights drawn from a normal distribution, whose squares are summed over a matrix."""
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    found = {"bfloat16": weight.bfloat16().float()}
    found |= {kind: unpack(*pack(weight, bits), weight.shape[1], torch.float32) for kind, bits in BITS.items()}
    return {f"{kind}_weight_error": float((back - weight).norm() / weight.norm()) for kind, back in found.items()}


@dataclass(frozen=True, slots=True)
class Files:
    """The checkpoint, and what the machine does with it at best."""

    folder: Path
    config: ModelConfig
    device: str
    read_s: float
    bandwidth: float
    """Bytes a second of the device's memory."""


def formats(files: Files) -> Metrics:
    forms: dict[str, Callable[[str], Callable[[], StepModel]]] = {
        "torch": lambda kind: partial(spread, files.folder, kind, files.device, 1, "torch")
    }
    if available_levels() and files.device == "cpu":
        forms = {"native": lambda kind: partial(native, files.folder, kind)} | forms
    for kind in FORMATS:
        read_mb = read_mb_per_token(files.config, kind)
        yield f"{kind}_read_mb_per_token", read_mb
        for form, load in forms.items():
            if (form, kind) == ("native", "nf4"):
                continue  # the compiled kernels have none
            found = alone(load(kind), nf4.bitsandbytes if kind == "nf4" else torch.get_num_threads)
            found["load_over_plain_read"] = found.pop("load_s") / files.read_s
            found["share_of_ceiling"] = found["decode_tokens_per_s"] * read_mb * 1e6 / files.bandwidth
            yield from ((f"{form}_{kind}_{name}", value) for name, value in found.items())


def of_ranks(files: Files) -> Metrics:
    for ranks in (1, 2, 4):
        if files.device == "cuda" and ranks > torch.cuda.device_count():
            break
        found = alone(partial(spread, files.folder, "bfloat16", files.device, ranks, "auto"))
        yield from ((f"ranks_{ranks}_{name}", found[name]) for name in ("load_s", "decode_tokens_per_s"))


def of_layers(files: Files) -> Metrics:
    for parts in (2, 4):
        found = alone(partial(layered, files.folder, "bfloat16", files.device, parts, "auto"))
        yield f"layers_in_{parts}_decode_tokens_per_s", found["decode_tokens_per_s"]


def offload(files: Files) -> Metrics:
    """With a GPU. The ceiling is what the CPU reads of a token over the bandwidth of its memory, by all cores."""
    if files.device == "cpu":
        return
    bandwidth = in_own_process(partial(read_bytes_per_s, os.cpu_count() or 1))
    yield "cpu_bandwidth_gb_per_s", bandwidth / 1e9
    for kind, on_cpu in OFFLOADED:
        *_, routed = groups(files.config, Precision(kind))
        found = alone(partial(offloaded, files.folder, kind, files.device, on_cpu))
        name = f"{kind}_{on_cpu:.0%}_on_cpu"
        yield from ((f"{name}_{what}", found[what]) for what in ("load_s", "decode_tokens_per_s"))
        yield f"{name}_share_of_ceiling", found["decode_tokens_per_s"] * routed.read_bytes * on_cpu / bandwidth


PARTS: dict[str, Callable[[Files], Metrics]] = {"formats": formats, "ranks": of_ranks, "layers": of_layers, "offload": offload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--layers", type=int, help="so many of the shape's layers instead of all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the torch forms")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="which parts")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the server does, for the processes that are started from here
    config = SHAPES[arguments.shape]
    config = config.model_copy(update={"num_hidden_layers": arguments.layers or config.num_hidden_layers})
    metrics = errors()
    with tempfile.TemporaryDirectory() as place:
        folder = written(Path(place) / "checkpoint", config)
        read_s = min(plain_read_s(folder, config) for _ in range(3))
        bandwidth = in_own_process(read_bytes_per_s if arguments.device == "cpu" else gpu_read_bytes_per_s)
        metrics |= {"plain_read_s": read_s, "bandwidth_gb_per_s": bandwidth / 1e9}
        for part in arguments.only:
            metrics |= dict(PARTS[part](Files(folder, config, arguments.device, read_s, bandwidth)))
    report("placement", metrics, tuple(goal for goal in GOALS if goal.metric in metrics))


if __name__ == "__main__":
    main()
