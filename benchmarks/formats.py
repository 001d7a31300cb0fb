"""python -m benchmarks.formats [--quick] [--device cpu]: what weights in fewer bits lose, and what reading them takes, in our formats and
in those of bitsandbytes, where that is installed (pip install -e ".[bitsandbytes]").

Lost: the relative error of normally distributed weights; and with the starter's own weights rounded, everything else being float32, the
divergence from float32 in nats a token over code that it was not trained on, what the text that stood in holes costs in bits a byte, and
how often the hole's first line comes out exactly. In all formats the vocabulary, the routers, the norms and kv_b_proj stay as they are and,
where the others have 4 bits, attention has 8.

Taken: one token through 6 experts of Coder-V2-Lite's shape: here by the compiled kernels on a CPU and by those that the captured
graphs use on a GPU; by bitsandbytes through a call for every matrix.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.infilling import Case, filled
from benchmarks.layout import Hole, anchored, bits, holes
from benchmarks.report import Goal, report
from model_host.batch import Span, Step
from model_host.catalogue import LITE
from model_host.checkpoints import STARTER, checked_shards, tensors
from model_host.config import ModelConfig
from model_host.engine import load_engine
from model_host.experts import TorchExperts
from model_host.native.library import why_unavailable
from model_host.native.model import NativeExperts
from model_host.pages import pages_for
from model_host.quantized import pack, unpack
from model_host.runner import Runner, load
from model_host.tokenizer import Tokenizer

KEPT = ("kv_b_proj", "lm_head", "embed_tokens", "norm", "mlp.gate.")
HOLES, QUICK_HOLES = 60, 10
READ, TOKENS = (argparse, asyncio, json, shutil, subprocess, tempfile), 500
"""Modules over whose first tokens divergence is measured."""
EXPERTS, CHOSEN = 16, (1, 3, 6, 8, 11, 14)
"""More experts than a cache holds, and those that one token chooses."""
TIMED_S = 1.0
GOALS = (
    Goal("int4_weight_error_over_nf4", "<=", 1.0),
    Goal("int4_divergence_over_nf4", "<=", 1.25),  # with a quarter of a bit less
    Goal("int4_time_over_nf4", "<=", 1.0),
    Goal("int8_weight_error_over_llm_int8", "<=", 1.05),
)

Rounding = Callable[[Tensor], Tensor]
"""A matrix to what is left of it."""


def by(bits: Any) -> Rounding:
    return lambda weight: unpack(*pack(weight, bits), weight.shape[1], torch.float32)


def nf4(weight: Tensor) -> Tensor:
    import bitsandbytes.functional as foreign  # noqa: PLC0415  # an option

    found: Tensor = foreign.dequantize_4bit(*foreign.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4"))
    return found


def llm_int8(weight: Tensor) -> Tensor:
    import bitsandbytes.functional as foreign  # noqa: PLC0415

    codes, scales, _ = foreign.int8_vectorwise_quant(weight.half())
    found: Tensor = codes.float() * scales[:, None] / 127
    return found


BITS_A_WEIGHT = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 4 + 16 / 64, "nf4": 4 + 32 / 64, "llm_int8": 8.0}
"""Scales of groups included, those of whole rows not."""


def roundings() -> dict[str, tuple[Rounding, Rounding]]:
    """By format: what becomes of attention's matrices, and of the others'."""
    found: dict[str, tuple[Rounding, Rounding]] = {
        "float32": (lambda weight: weight, lambda weight: weight),
        "bfloat16": (lambda weight: weight.bfloat16().float(), lambda weight: weight.bfloat16().float()),
        "int8": (by(8), by(8)),
        "int4": (by(8), by(4)),
    }
    if find_spec("bitsandbytes"):
        found |= {"llm_int8": (llm_int8, llm_int8), "nf4": (llm_int8, nf4)}
    return found


def rounded(folder: Path, attention: Rounding, others: Rounding) -> Path:
    """The starter in float32, its matrices rounded."""
    folder.mkdir()
    weights = {}
    for name, stored in tensors(checked_shards(STARTER, ModelConfig.read(STARTER)), lambda what, share: None):
        weight = stored.float()
        if not any(part in name for part in KEPT):
            weight = (attention if "self_attn" in name else others)(weight)
        weights[name] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STARTER / name, folder / name)
    return folder


def log_probabilities(runner: Runner, ids: tuple[int, ...]) -> Tensor:
    span = Span(tokens=len(ids), context=len(ids), pages=tuple(range(pages_for(len(ids)))))
    return runner.run(Step(ids=ids, spans=(span,), wanted=tuple(range(len(ids))))).log_softmax(-1)


async def exact_share(folder: Path, some: list[Hole]) -> float:
    """How often the rest of a hole's line comes out as it stood there."""
    engine = load_engine(folder, device="cpu", dtype="float32")
    try:
        right = 0
        for hole in some:
            case = Case("".join(hole.above) + hole.before, hole.below, hole.middle, "", "")
            said, _ = await filled(engine, case, one_line=True)
            right += said.rstrip("\n") == hole.middle
        return right / len(some)
    finally:
        engine.close()


def lost(count: int) -> Iterator[tuple[str, float]]:
    tokenizer, some = Tokenizer(STARTER), list(holes(count, seed=1))
    texts = [tuple(tokenizer.encode(Path(str(module.__file__)).read_text("utf-8"))[:TOKENS]) for module in READ]
    middle_bytes = sum(len(hole.middle.encode()) for hole in some)
    normal = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    reference: list[Tensor] = []
    with tempfile.TemporaryDirectory() as place:
        for name, (attention, others) in roundings().items():
            folder = rounded(Path(place) / name, attention, others)
            runner = Runner(
                load(folder, device="cpu", dtype="float32", threads=0, kernels="auto", progress=lambda what, share: None), 1 << 29
            )
            found = [log_probabilities(runner, ids) for ids in texts]
            reference = reference or found
            apart = [(sure.exp() * (sure - now)).sum(-1) for sure, now in zip(reference, found, strict=True)]
            yield f"{name}_bits_a_weight", BITS_A_WEIGHT[name]
            yield f"{name}_weight_error", float((others(normal) - normal).norm() / normal.norm())
            yield f"{name}_divergence", float(torch.cat(apart).mean())
            cost = sum(bits(runner, tokenizer, anchored(tokenizer, hole, heal=True), hole.middle) for hole in some)
            yield f"{name}_hole_bits_a_byte", cost / middle_bytes
            yield f"{name}_holes_exact", asyncio.run(exact_share(folder, some))
            shutil.rmtree(folder)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of several runs, after one that is not counted."""
    times: list[float] = []
    end = time.perf_counter() + TIMED_S
    work()
    while len(times) < 3 or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def taken(device: torch.device, config: ModelConfig) -> Iterator[tuple[str, float]]:
    """Milliseconds of one token in 6 experts of one layer."""
    draw = torch.Generator().manual_seed(0)
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    weights = [
        {kind: torch.randn(shape, generator=draw).bfloat16() / hidden**0.5 for kind, shape in shapes.items()} for _ in range(EXPERTS)
    ]
    x = torch.randn(1, hidden, generator=draw).to(device, torch.bfloat16)
    ids, shares = torch.tensor([CHOSEN], device=device), torch.full((1, len(CHOSEN)), 0.1, device=device)
    for name in ("bfloat16", "int8", "int4"):
        yield f"{name}_ms", 1000 * seconds(own(config, weights, name, x, shares, ids), device)
    if find_spec("bitsandbytes"):
        yield "nf4_ms", 1000 * seconds(foreign_nf4([weights[expert] for expert in CHOSEN], x), device)


def own(
    config: ModelConfig, weights: list[dict[str, Tensor]], precision: str, x: Tensor, shares: Tensor, ids: Tensor
) -> Callable[[], object]:
    if x.device.type == "cpu" and why_unavailable() is None:
        named = ((f"model.layers.1.mlp.experts.{i}.{kind}.weight", w) for i, one in enumerate(weights) for kind, w in one.items())
        native = NativeExperts(config, named, precision, range(EXPERTS), torch.get_num_threads())
        return lambda: native.partial(1, x, shares, ids)
    held = TorchExperts(config, range(EXPERTS), precision, torch.bfloat16, x.device)
    for expert, matrices in enumerate(weights):
        for kind, weight in matrices.items():
            held.put(1, expert, kind, weight.to(x.device))
    if x.device.type == "cpu":
        return lambda: held.partial(1, x, shares, ids)
    from model_host.gpu import kernels  # noqa: PLC0415  # Triton is there only where CUDA is

    gate_up, down = (stack.matrices for stack in held.stacks(1))
    few = ids.int()
    return lambda: kernels.experts(x, few, gate_up, down, None)


def foreign_nf4(chosen: list[dict[str, Tensor]], x: Tensor) -> Callable[[], object]:
    import bitsandbytes  # noqa: PLC0415
    import bitsandbytes.functional as foreign  # noqa: PLC0415

    packed = [
        {kind: foreign.quantize_4bit(weight.to(x.device), blocksize=64, quant_type="nf4") for kind, weight in one.items()} for one in chosen
    ]

    def product(one: Any, rows: Tensor) -> Tensor:
        codes, state = one
        found: Tensor = bitsandbytes.matmul_4bit(rows, codes.t(), state)
        return found

    def run() -> Tensor:
        out = torch.zeros_like(x)
        for one in packed:
            inner = torch.nn.functional.silu(product(one["gate_proj"], x)) * product(one["up_proj"], x)
            out += 0.1 * product(one["down_proj"], inner)
        return out

    return run


def importing() -> dict[str, float]:
    """What importing bitsandbytes takes beside torch, in a process of its own."""
    code = (
        "import json, time, torch, psutil; m = psutil.Process().memory_info; b = m().rss; t = time.perf_counter();"
        "import bitsandbytes; print(json.dumps([time.perf_counter() - t, (m().rss - b) / 1e6]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took_s, took_mb = json.loads(done.stdout.splitlines()[-1])
    return {"bitsandbytes_import_s": took_s, "bitsandbytes_import_mb": took_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_HOLES} holes instead of {HOLES}")
    parser.add_argument("--device", default="cpu", help="on which the time is taken; what is lost is the same everywhere")
    arguments = parser.parse_args()
    shape = LITE.model_copy(update={"num_hidden_layers": 2, "n_routed_experts": EXPERTS, "vocab_size": 64})
    metrics = dict(lost(QUICK_HOLES if arguments.quick else HOLES)) | dict(taken(torch.device(arguments.device), shape))
    if find_spec("bitsandbytes"):
        metrics |= importing()
        for name, (ours, theirs) in {
            "int4_weight_error_over_nf4": ("int4_weight_error", "nf4_weight_error"),
            "int4_divergence_over_nf4": ("int4_divergence", "nf4_divergence"),
            "int4_time_over_nf4": ("int4_ms", "nf4_ms"),
            "int8_weight_error_over_llm_int8": ("int8_weight_error", "llm_int8_weight_error"),
        }.items():
            metrics[name] = metrics[ours] / metrics[theirs]
    report("formats", metrics, tuple(goal for goal in GOALS if goal.metric in metrics))


if __name__ == "__main__":
    main()
