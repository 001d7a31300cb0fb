"""python -m benchmarks.gpu --out DIR [--tiny] [--budget-s S]: what the engine's model does on a GPU, held against its ceilings.

Random weights in the shapes of DeepSeek-Coder-V2-Lite, bfloat16; last in fewer bits, and the 236B in 4. First whether the kernels and
the captured graphs are right, then how fast they are: decode beside the plain torch path, transformers' model (which shares the
weights), and the bytes of a token over the bandwidth measured in the same run; prefill beside the operations of a prompt over the
measured rate of large matmuls.

Every section stands alone: what it finds, or the error that ended it, is in DIR/gpu.json and DIR/gpu.md before the next one starts,
and what does not fit into the budget is left out and named. Needs torch, pydantic, Triton, and transformers for the comparison.
`--tiny` runs all of it with a tiny model, on a CPU too, where the figures mean nothing.
"""

import argparse
import json
import math
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_host.batch import Span, Step
from model_host.catalogue import LARGE, Precision
from model_host.config import ModelConfig
from model_host.experts import Spread, TorchExperts
from model_host.footprint import CHUNK_TOKENS, groups
from model_host.gpu import plain
from model_host.gpu.model import MAX_ROWS, SHORT_TOKENS, GpuModel
from model_host.holders import empty_dense
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Block, Model, MoE
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.quantized import PackedLinear, Stack

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163_840, "rope_theta": 10_000.0, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 100_000, "eos_token_id": 100_001,
}  # fmt: skip
TINY = LITE | {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


TUNING_LEAVES_S = 150.0
"""Of the budget, for the sections after it."""


@dataclass(slots=True)
class Bench:
    """What the sections share and what they have found."""

    shape: dict[str, Any]
    device: torch.device
    out: Path
    budget_s: float
    is_tiny: bool
    started: float = field(default_factory=time.perf_counter)
    sections: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    operations: Any = plain
    """Kernels, once it is known that they can be loaded; with the sizes that were fastest, once these have been tried."""
    model: Model | None = None
    gpu: GpuModel | None = None
    latents: LatentPool | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.started)

    @property
    def contexts(self) -> tuple[int, ...]:
        return (20, 50) if self.is_tiny else (512, 8192, 32_768)

    @property
    def prompts(self) -> tuple[int, ...]:
        return (32, 64) if self.is_tiny else (1024, 8192, 32_768)

    def run(self, name: str, section: Callable[["Bench"], Any], needs_s: float) -> None:
        """Runs a section if the budget allows it, and writes down what is known so far."""
        began = time.perf_counter()
        if self.left_s < needs_s:
            self.sections[name] = {"left out": f"needs about {needs_s:.0f} s, {self.left_s:.0f} s are left"}
        else:
            self.sections[name] = {}
            try:
                with torch.inference_mode():
                    section(self)
            except Exception:  # whatever goes wrong here, the other sections are worth having
                self.sections[name]["error"] = traceback.format_exc(limit=-6)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.sections[name]["seconds"] = time.perf_counter() - began
        print(f"{name}: {time.perf_counter() - began:.1f} s{' ERROR' if 'error' in self.sections[name] else ''}", flush=True)
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": "gpu", "metrics": self.metrics, "sections": self.sections}
        (self.out / "gpu.json").write_text(json.dumps(result, indent=1, default=str))
        (self.out / "gpu.md").write_text("\n".join(as_markdown(self.sections)) + "\n")


def as_markdown(sections: dict[str, Any]) -> Iterator[str]:
    for name, found in sections.items():
        yield f"## {name}\n"
        for key, value in found.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(dict.fromkeys(column for row in value for column in row))
                yield f"\n{key}:\n"
                yield "| " + " | ".join(columns) + " |"
                yield "|" + "---|" * len(columns)
                for row in value:
                    yield "| " + " | ".join(as_text(row.get(column, "")) for column in columns) + " |"
                yield ""
            elif key == "error":
                yield f"```\n{value}```"
            else:
                yield f"- {key}: {as_text(value)}"
        yield ""


def as_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


# Time


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `work`, after one run that warms up; the device is waited for each time."""
    took = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[repeats // 2]


def device_seconds(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    """Mean time of `work` on the device alone, replayed from a captured graph."""
    if device.type != "cuda":
        return seconds(device, work, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return replay_seconds(graph.replay, repeats)


def replay_seconds(replay: Callable[[], object], repeats: int = 10) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replay()
    begin.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


# The model and its sequences


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """A model whose activations stay of about unit size, filled where it lies."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=1.0 if name == "embed_tokens.weight" else parameter.shape[-1] ** -0.5)
    return model


class Sequences:
    """Some sequences of equal length in scattered pages of a pool, and the steps that make them longer."""

    def __init__(self, count: int, context: int, room: int, pool_pages: int, vocab: int) -> None:
        order = torch.randperm(pool_pages, generator=torch.Generator().manual_seed(7)).tolist()
        each = pages_for(context + room)
        assert count * each <= pool_pages
        self.pages = [tuple(order[i * each : (i + 1) * each]) for i in range(count)]
        self.context, self.vocab = context, vocab

    def step(self, ids: Sequence[int]) -> Step:
        """The step of the next tokens, the same number for every sequence."""
        tokens = len(ids) // len(self.pages)
        self.context += tokens
        held = pages_for(self.context)
        spans = tuple(Span(tokens=tokens, context=self.context, pages=pages[:held]) for pages in self.pages)
        return Step(ids=tuple(ids), spans=spans, wanted=tuple(range(tokens - 1, len(ids), tokens)))


def filled_pool(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> LatentPool:
    """Latents as large as real ones are: c_kv leaves a norm."""
    latents = LatentPool(config, pages_for(tokens), dtype, device)
    latents.c_kv.normal_()
    latents.k_pe.normal_()
    return latents


Forward = Callable[[Step], Tensor]


def plain_path(model: Model, latents: LatentPool) -> Forward:
    def forward(step: Step) -> Tensor:
        logits: Tensor = model(Layout.of(step, latents.c_kv.device, SHORT_TOKENS), latents)
        return logits

    return forward


def decode_seconds(forward: Forward, sequences: Sequences, tokens: int, warm_up: int = 3) -> float:
    """Median time of a greedy step, from one sampled token on the host to the next."""
    ids = [5 + i for i in range(len(sequences.pages))]
    took = []
    for _ in range(tokens + warm_up):
        began = time.perf_counter()
        ids = forward(sequences.step(ids)).argmax(dim=-1).tolist()
        took.append(time.perf_counter() - began)
    return sorted(took[warm_up:])[tokens // 2]


# Sections


def machine(bench: Bench) -> None:
    found = bench.sections["machine"]
    found |= {"torch": torch.__version__, "python": platform.python_version(), "tiny": bench.is_tiny}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    if bench.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        import triton  # noqa: PLC0415

        from model_host.gpu import kernels  # noqa: PLC0415

        found["triton"] = triton.__version__
        bench.operations = kernels


def build(bench: Bench) -> None:
    found, config = bench.sections["build"], bench.config
    bench.model = random_model(config, bench.dtype, bench.device)
    longest = bench.contexts[-1] + 64
    bench.latents = filled_pool(config, MAX_ROWS * longest, bench.dtype, bench.device)
    wait(bench.device)
    found["weights GB"] = sum(p.numel() * p.element_size() for p in bench.model.parameters()) / 1e9
    found["latents GB"] = sum(t.numel() * t.element_size() for t in (bench.latents.c_kv, bench.latents.k_pe)) / 1e9


def ceilings(bench: Bench) -> None:
    """The best of some simple ways to read much memory, and to multiply large matrices."""
    found, device = bench.sections["ceilings"], bench.device
    size = 2**22 if bench.is_tiny else 2**31
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    reads = {"copy": 2 * size / device_seconds(device, lambda: target.copy_(source))}
    wide = source.view(torch.bfloat16).view(-1, 2048).zero_()
    vector = torch.ones(1, 2048, dtype=torch.bfloat16, device=device)
    reads["torch matrix times vector"] = size / device_seconds(device, lambda: F.linear(vector, wide))
    reads["sum"] = size / device_seconds(device, lambda: source.view(torch.float32).sum())
    if isinstance(bench.operations, ModuleType) and bench.operations is not plain and device.type == "cuda":
        for tile in bench.operations.Tile(4, 2048, 4), bench.operations.Tile(8, 512, 4), bench.operations.Tile(16, 256, 8):
            tuning = replace(bench.operations.DEFAULT, linear=tile)
            took = device_seconds(device, partial(bench.operations.linear, vector, wide, tuning))
            reads[f"kernel, matrix times vector, {tile}"] = size / took
    found["bandwidth GB/s"] = [{"way": way, "GB/s": rate / 1e9} for way, rate in reads.items()]
    rates = {}
    for rows, inner, columns in [(64, 64, 64)] if bench.is_tiny else [(8192, 8192, 8192), (16384, 8192, 8192), (32768, 2048, 10944)]:
        a = torch.randn(rows, inner, dtype=bench.dtype, device=device)
        b = torch.randn(columns, inner, dtype=bench.dtype, device=device)
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / device_seconds(device, partial(F.linear, a, b))
    found["matmul TFLOP/s"] = [{"shape": shape, "TFLOP/s": rate / 1e12} for shape, rate in rates.items()]
    bench.metrics["bandwidth_gb_s"] = max(reads.values()) / 1e9
    bench.metrics["matmul_tflop_s"] = max(rates.values()) / 1e12


@dataclass(frozen=True, slots=True)
class Case:
    """An operation of a layer with arguments of the model's shapes."""

    name: str
    rows: int
    arguments: tuple[Any, ...]


def cases(bench: Bench, dtype: torch.dtype, rows: int, context: int, layer: int) -> Iterator[Case]:
    """The operations of a layer with experts, on random inputs. The weights are the model's where the types agree."""
    assert bench.model and bench.latents
    config, device = bench.config, bench.device
    block = list(bench.model.blocks())[layer]
    assert isinstance(block, Block) and isinstance(block.mlp, MoE) and block.mlp.shared_experts
    attention, mlp, shared = block.self_attn, block.mlp, block.mlp.shared_experts
    heads, rank, rope, hidden = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, config.hidden_size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def integers(numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    x = drawn(rows, hidden)
    shares, ids = plain.route(x, mlp.gate.weight, mlp.gate.top_k, 1.0, config.n_shared_experts or 0)
    sequences = Sequences(rows, context, 1, len(bench.latents.c_kv[0]) // PAGE_TOKENS, config.vocab_size)
    c_kv, k_pe = (pool[layer].to(dtype) for pool in (bench.latents.c_kv, bench.latents.k_pe))
    kv_b = attention.kv_b_proj.weight.to(dtype).view(heads, -1, rank)
    angles = torch.rand(rows, rope // 2, device=device)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=-1)
    slots = integers([pages[0] * PAGE_TOKENS for pages in sequences.pages])
    norm = attention.kv_a_layernorm
    projected = drawn(rows, heads * config.qk_head_dim + rank + rope)
    tables, owners = integers(sequences.pages), integers(range(rows))
    lengths = integers([context - i % 3 for i in range(rows)])
    yield Case("add_norm", rows, (x, torch.randn(rows, shares.shape[1], hidden, device=device), shares, drawn(hidden), norm.eps))
    yield Case("latent_queries", rows, (projected, rotation, slots, norm.weight.to(dtype), norm.eps, kv_b, c_kv, k_pe))
    yield Case("attend", rows, (drawn(rows, heads, rank) * 0.3, drawn(rows, heads, rope), c_kv, k_pe, tables, owners, lengths, 0.1))
    yield Case("values", rows, (drawn(rows, heads, rank), kv_b, config.qk_nope_head_dim))
    yield Case("route", rows, (x, mlp.gate.weight.to(dtype), mlp.gate.top_k, 1.0, config.n_shared_experts or 0))
    every = tuple(m.weight.to(dtype) for m in (shared.gate_proj, shared.up_proj, shared.down_proj))
    yield Case("experts", rows, (x, ids, mlp.experts.gate_up_proj.to(dtype), mlp.experts.down_proj.to(dtype), every))
    yield Case("linear", rows, (x, attention.q_proj.weight.to(dtype)))
    yield Case("linear", rows, (drawn(rows, heads * config.v_head_dim), attention.o_proj.weight.to(dtype)))
    if layer == 1:
        yield Case("linear", rows, (x, bench.model.lm_head.weight.to(dtype)))


def correctness(bench: Bench) -> None:
    """Every kernel against its plain form, whose sums are float32 here: the largest difference in standard deviations."""
    found, rows_found = bench.sections["kernels against their plain forms"], []
    for dtype in {bench.dtype, torch.float32}:
        for rows in (1, 2, 5, 16):
            for case in cases(bench, dtype, rows, bench.contexts[-1] if rows == 1 else bench.contexts[0] + 5, layer=1):
                row: dict[str, Any] = {"operation": case.name, "type": str(dtype).removeprefix("torch."), "rows": rows}
                try:
                    actual = getattr(bench.operations, case.name)(*case.arguments)
                    widened = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.arguments[:-1]]
                    last = case.arguments[-1]
                    last = tuple(t.float() for t in last) if case.name == "experts" else last
                    last = last.float() if isinstance(last, Tensor) and last.is_floating_point() else last
                    wanted = getattr(plain, case.name)(*widened, last)
                    pairs = zip(actual, wanted, strict=True) if isinstance(actual, tuple) else [(actual, wanted)]
                    row["off"] = max(float((a.float() - w.float()).abs().max() / w.float().std().clamp_min(1e-9)) for a, w in pairs)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                rows_found.append(row)
                found["differences"] = rows_found
    worst = max((row for row in rows_found if "off" in row), key=lambda row: row["off"])
    found["worst"], found["failed"] = str(worst), sum("error" in row for row in rows_found)
    bench.metrics["kernels_worst_off"] = worst["off"]


def candidates(kernels: Any, is_tiny: bool) -> Iterator[tuple[str, int, str, Any]]:
    """(operation, rows, which field of the tuning, value to try)"""
    tile = kernels.Tile
    few = [tile(4, 512, 4), tile(8, 512, 4), tile(16, 512, 8), tile(8, 256, 4), tile(16, 256, 4), tile(4, 1024, 4), tile(4, 2048, 4)]
    many = [tile(32, 128, 4, 4), tile(16, 128, 4, 4), tile(32, 64, 4, 5), tile(16, 256, 4, 3), tile(64, 64, 4, 4), tile(32, 128, 8, 4)]
    parts = [
        tile(64, 0, 4, 2),
        tile(32, 0, 4, 3),
        tile(32, 0, 8, 3),
        tile(32, 0, 8, 5),
        tile(64, 0, 8, 2),
        tile(64, 0, 8, 3),
        tile(16, 0, 4, 5),
    ]
    plan = [("linear", 1, "linear", few), ("experts", 1, "few_up", few), ("experts", 1, "few_down", few)]
    plan += [("experts", 4, "many_up", many), ("experts", 4, "many_down", many), ("attend", 1, "attend", parts)]
    plan += [("attend", 1, "programs", [128, 256, 512, 64])]
    for operation, rows, name, values in plan:
        for value in values[:1] if is_tiny else values:
            yield operation, rows, name, value


def tuning(bench: Bench) -> None:
    """Tries sizes one after the other and keeps what is fastest for the next; each time over all layers, as a step runs them, so
    that weights come from memory."""
    kernels, found = bench.operations, bench.sections["tuning"]
    if kernels is plain:
        found["left out"] = "no Triton"
        return
    best, tried = kernels.DEFAULT, list[dict[str, Any]]()
    found["tried"] = tried
    fastest: dict[tuple[str, int], float] = {}
    layers = range(1, bench.config.num_hidden_layers)
    given: dict[tuple[str, int], list[tuple[Any, ...]]] = {}

    def microseconds(operation: str, rows: int, sizes: Any, what: str) -> float:
        """Time a layer with these sizes; infinite when they do not work."""
        if (operation, rows) not in given:
            at = bench.contexts[-1] if operation == "attend" else bench.contexts[0]
            drawn = (case for layer in layers for case in cases(bench, bench.dtype, rows, at, layer))
            given[operation, rows] = [case.arguments for case in drawn if case.name == operation]
        row: dict[str, Any] = {"operation": operation, "rows": rows, "sizes": what}
        tried.append(row)
        try:
            work = partial(over_layers, getattr(kernels, operation), given[operation, rows], sizes)
            took = device_seconds(bench.device, work)
            row |= {"us a layer": took / len(layers) * 1e6, "GB/s": bytes_read(operation, given[operation, rows]) / took / 1e9}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        return float(row.get("us a layer", math.inf))

    for operation, rows, name, value in candidates(kernels, bench.is_tiny):
        if bench.left_s < TUNING_LEAVES_S:
            found["cut short"] = name
            break
        with_it, key = replace(best, **{name: value}), (operation, rows)
        took = microseconds(operation, rows, with_it, f"{name}={value}")
        if took < math.inf and (with_it == best or took < fastest.get(key, math.inf)):
            best, fastest[key] = with_it, took
    for operation, name in (("experts", "few_rows"), ("linear", "linear_rows")):
        best = replace(best, **{name: 0})
        for rows in (1,) if bench.is_tiny else (1, 2, 4, 8):
            with_it = replace(best, **{name: rows})
            if microseconds(operation, rows, with_it, f"{name}={rows}") > microseconds(operation, rows, best, f"{name} less"):
                break
            best = with_it
    found["best"] = str(best)
    bench.operations = SimpleNamespace(**{name: getattr(kernels, name) for name in ("add_norm", "latent_queries", "values", "route")})
    for name in ("linear", "attend", "experts"):
        setattr(bench.operations, name, partial(getattr(kernels, name), tuning=best))


def bytes_read(operation: str, arguments: list[tuple[Any, ...]]) -> float:
    """Of weights or latents, each counted once."""
    total = 0.0
    for given in arguments:
        if operation == "linear":
            total += given[1].nbytes
        elif operation == "attend":
            total += int(given[6].sum()) * (given[2][0].nbytes + given[3][0].nbytes)
        else:
            _, ids, gate_up, down, shared = given
            total += int(ids.unique().numel()) * (gate_up[0].nbytes + down[0].nbytes) + sum(matrix.nbytes for matrix in shared)
    return total


def over_layers(operation: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Any) -> None:
    for given in arguments:
        operation(*given, sizes)


def agreement(bench: Bench) -> None:
    """Graph and plain path decode from the same prompts. In float32 the tokens have to be the same; bfloat16 rounds differently
    in the two, so there both get the plain path's tokens and their next ones are compared."""
    assert bench.model
    found, rows = bench.sections["graph against plain"], list[dict[str, Any]]()
    small = ModelConfig.model_validate(bench.shape | {"num_hidden_layers": 3})
    exact = random_model(small, torch.float32, bench.device)
    steps = 4 if bench.is_tiny else 24
    for label, model in (("float32, 3 layers", exact), ("model's type, all layers", bench.model)):
        gpu = GpuModel(model, bench.operations)
        dtype = model.lm_head.weight.dtype
        for count, context, tokens in ((1, bench.contexts[0], 1), (3, 37, 1), (1, bench.contexts[1], 1), (2, 77, 4)):
            latents = [filled_pool(model.config, count * (context + 128) + 64, dtype, bench.device) for _ in range(2)]
            latents[1].c_kv.copy_(latents[0].c_kv)
            latents[1].k_pe.copy_(latents[0].k_pe)
            sequences = Sequences(count, context, steps * tokens, len(latents[0].c_kv[0]) // PAGE_TOKENS, small.vocab_size)
            ids, same, off = list(range(5, 5 + count * tokens)), 0, 0.0
            for _ in range(steps):
                step = sequences.step(ids)
                ours, wanted = gpu.forward(step, latents[0]), plain_path(model, latents[1])(step)
                off = max(off, float((ours - wanted).abs().max() / wanted.std()))
                ids = [id for id in wanted.argmax(dim=-1).tolist() for _ in range(tokens)]
                same += int((ours.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
            row = {"model": label, "sequences": count, "context": context, "tokens a step": tokens}
            rows.append(row | {"same tokens": same, "of": count * steps, "logits off": off})
            found["tokens"] = rows
    same, total = (sum(row[key] for row in rows if row["model"].startswith("float32")) for key in ("same tokens", "of"))
    bench.metrics["float32_same_tokens_percent"] = 100 * same / total


def token_bytes(config: ModelConfig, rows: int, context: int, itemsize: int) -> float:
    """Bytes that a decode step of `rows` sequences has to read: every weight but the embeddings and the experts nobody chose, with
    uniform routing, and every sequence's latents."""
    hidden, experts, chosen = config.hidden_size, config.n_routed_experts or 0, config.num_experts_per_tok or 0
    heads = config.num_attention_heads
    attention = hidden * (heads * config.qk_head_dim + config.latent_dim) + heads * config.v_head_dim * hidden
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    expert = 3 * hidden * config.moe_intermediate_size
    touched = experts * (1 - (1 - chosen / experts) ** rows) + (config.n_shared_experts or 0)
    sparse = config.num_hidden_layers - config.first_k_dense_replace
    weights = config.num_hidden_layers * attention + sparse * (touched * expert + experts * hidden)
    weights += config.first_k_dense_replace * 3 * hidden * config.intermediate_size + config.vocab_size * hidden
    return (weights + rows * context * config.latent_dim * config.num_hidden_layers) * itemsize


def decode(bench: Bench) -> None:
    assert bench.model and bench.latents
    found, rows_found, latents = bench.sections["decode"], [], bench.latents
    bench.gpu = gpu = GpuModel(bench.model, bench.operations)
    pool_pages = len(latents.c_kv[0]) // PAGE_TOKENS
    began = time.perf_counter()
    gpu.prepare(latents)
    wait(bench.device)
    found["seconds to capture all graphs"] = time.perf_counter() - began
    bandwidth = bench.metrics.get("bandwidth_gb_s", math.nan) * 1e9
    for count in (1, 4, 16):
        for context in bench.contexts:
            row: dict[str, Any] = {"sequences": count, "context": context}
            sequences = Sequences(count, context, 32, pool_pages, bench.config.vocab_size)
            took = decode_seconds(lambda step: gpu.forward(step, latents), sequences, 2 if bench.is_tiny else 20)
            floor = token_bytes(bench.config, count, context, bench.dtype.itemsize) / bandwidth
            row |= {"ms a step": took * 1e3, "tokens/s": count / took, "floor ms": floor * 1e3, "share of ceiling": floor / took}
            wait(bench.device)
            began = time.perf_counter()
            gpu.forward(sequences.step(range(5, 5 + count)), latents)
            row["host's part ms"] = (time.perf_counter() - began) * 1e3
            if bench.device.type == "cuda":
                alone = replay_seconds(gpu._graphs[count][0].replay)
                row |= {"graph alone ms": alone * 1e3, "graph's share of ceiling": floor / alone}
            rows_found.append(row)
            found["steps"] = rows_found
            if count in (1, 16):
                bench.metrics[f"decode_{count}x{context}_tokens_s"] = count / took
                bench.metrics[f"decode_{count}x{context}_share_of_ceiling"] = floor / took


def verify(bench: Bench) -> None:
    """What drafted tokens cost: a step of several tokens of one sequence."""
    assert bench.gpu and bench.latents
    found, rows_found, gpu, latents = bench.sections["several tokens of one sequence"], [], bench.gpu, bench.latents
    pages = len(latents.c_kv[0]) // PAGE_TOKENS
    for context in bench.contexts:
        for tokens in (1, 2, 4, 8, 16):
            sequences = Sequences(1, context, 16 * 20, pages, bench.config.vocab_size)

            def work(sequences: Sequences = sequences, tokens: int = tokens) -> object:
                return gpu.forward(sequences.step(range(5, 5 + tokens)), latents).argmax(dim=-1).tolist()

            rows_found.append({"context": context, "tokens": tokens, "ms": seconds(bench.device, work, 1 if bench.is_tiny else 7) * 1e3})
            found["steps"] = rows_found


def decode_plain(bench: Bench) -> None:
    assert bench.model and bench.latents
    found, rows_found = bench.sections["decode, plain torch"], []
    pages = len(bench.latents.c_kv[0]) // PAGE_TOKENS
    for count, context in [(1, context) for context in bench.contexts] + [(16, bench.contexts[0])]:
        sequences = Sequences(count, context, 32, pages, bench.config.vocab_size)
        took = decode_seconds(plain_path(bench.model, bench.latents), sequences, 8)
        rows_found.append({"sequences": count, "context": context, "ms a step": took * 1e3, "tokens/s": count / took})
        found["steps"] = rows_found
        bench.metrics[f"plain_decode_{count}x{context}_tokens_s"] = count / took


def prompt_operations(config: ModelConfig, tokens: int) -> float:
    """Floating point operations of a prompt: two for each active weight and token, and causal attention over expanded keys."""
    weights = token_bytes(config, 1, 0, 1) - config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * tokens**2
    return 2 * weights * tokens + attention


def prefill(bench: Bench) -> None:
    assert bench.model and bench.latents
    found, rows_found = bench.sections["prefill"], []
    forward, rate = plain_path(bench.model, bench.latents), bench.metrics.get("matmul_tflop_s", math.nan) * 1e12
    pages = len(bench.latents.c_kv[0]) // PAGE_TOKENS
    longest = bench.prompts[-1]
    plan: list[tuple[int, int, SDPBackend | None]] = [(tokens, tokens, None) for tokens in bench.prompts]
    plan += [(longest, longest // 4, None), (longest, longest // 16, None)]
    if bench.device.type == "cuda":
        plan += [(longest, longest, SDPBackend.CUDNN_ATTENTION), (longest, longest, SDPBackend.EFFICIENT_ATTENTION)]
    for tokens, chunk, backend in plan:
        ids = torch.randint(0, bench.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()

        def work(ids: list[int] = ids, chunk: int = chunk) -> object:
            sequences = Sequences(1, 0, len(ids), pages, bench.config.vocab_size)
            return [forward(sequences.step(ids[at : at + chunk])) for at in range(0, len(ids), chunk)][-1].argmax().item()

        row: dict[str, Any] = {"tokens": tokens, "chunk": chunk, "attention": str(backend)}
        rows_found.append(row)
        found["prompts"] = rows_found
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                took = seconds(bench.device, work, 3 if tokens < longest else 1)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        operations = prompt_operations(bench.config, tokens)
        row |= {"ms": took * 1e3, "tokens/s": tokens / took, "TFLOP/s": operations / took / 1e12}
        row |= {"floor ms": operations / rate * 1e3, "share of ceiling": operations / rate / took}
        if chunk == tokens and backend is None:
            bench.metrics[f"prefill_{tokens}_tokens_s"] = tokens / took
            bench.metrics[f"prefill_{tokens}_share_of_ceiling"] = operations / rate / took


def prompt_attention(bench: Bench) -> None:
    """Which of torch's attention forms is the fastest for keys of 192 and values of 128 numbers a head."""
    found, rows_found, config, device = bench.sections["attention of a prompt"], [], bench.config, bench.device
    for tokens, context in [(n, n) for n in bench.prompts[1:]] + [(bench.prompts[0], bench.prompts[-1])]:
        q = torch.randn(1, config.num_attention_heads, tokens, config.qk_head_dim, dtype=bench.dtype, device=device)
        k = torch.randn(1, config.num_attention_heads, context, config.qk_head_dim, dtype=bench.dtype, device=device)
        v = torch.randn(1, config.num_attention_heads, context, config.v_head_dim, dtype=bench.dtype, device=device)
        widened = F.pad(v, (0, config.qk_head_dim - config.v_head_dim))
        mask = torch.ones(tokens, context, dtype=torch.bool, device=device).tril(context - tokens)
        whole = tokens == context
        flops = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (2 * context - tokens) * tokens
        for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            for label, values, causal in (("values 128", v, None), ("values 192", widened, None), ("mask", v, mask)):
                row: dict[str, Any] = {"tokens": tokens, "context": context, "backend": str(backend), "form": label}
                attend = partial(attention_of, backend, q, k, values, mask if not whole else causal)
                try:
                    row["ms"] = (took := seconds(device, attend, 3)) * 1e3
                    row["TFLOP/s"] = flops / took / 1e12
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
                rows_found.append(row)
                found["forms"] = rows_found
        row = {"tokens": tokens, "context": context, "backend": "causal_lower_right", "form": "values 192"}
        try:
            row["ms"] = seconds(device, partial(lower_right_attention, q, k, widened), 3) * 1e3
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
        rows_found.append(row)


def attention_of(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def lower_right_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))


def profile(bench: Bench) -> None:
    """Where a step's time goes on the device."""
    if bench.device.type != "cuda" or not bench.gpu or not bench.latents:
        return
    for count, context in ((1, bench.contexts[1]), (16, bench.contexts[0])):
        sequences = Sequences(count, context, 16, len(bench.latents.c_kv[0]) // PAGE_TOKENS, bench.config.vocab_size)
        bench.gpu.forward(sequences.step(range(5, 5 + count)), bench.latents)
        repeats = 5
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            for _ in range(repeats):
                bench.gpu._graphs[count][0].replay()
            wait(bench.device)
        events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
        bench.sections["profile"][f"{count} sequences at {context} tokens"] = [
            {"kernel": e.key[:70], "launches": e.count / repeats, "us": e.self_device_time_total / repeats} for e in events
        ]


def transformers_model(bench: Bench) -> Any:
    """transformers' own model over the very same tensors."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # noqa: PLC0415

    assert bench.model
    shape = {key: value for key, value in bench.shape.items() if key not in ("rope_scaling", "rope_theta", "model_type")}
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0} | {k: v for k, v in bench.shape["rope_scaling"].items() if k != "type"}
    config = DeepseekV2Config(**shape, rope_parameters=rope)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        peer: Any = DeepseekV2ForCausalLM(config)
        peer = peer.to(bench.dtype)
    tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in bench.model.state_dict().items()}
    missing = peer.load_state_dict(tensors, strict=False, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(bench.device)
    bench.sections["transformers"]["missing tensors"] = str(missing)
    return peer.eval()


def transformers(bench: Bench) -> None:
    import transformers as library  # noqa: PLC0415

    assert bench.model and bench.latents
    found, device, config = bench.sections["transformers"], bench.device, bench.config
    found["version"] = library.__version__
    peer = transformers_model(bench)
    ids = torch.randint(0, config.vocab_size, (1, 40), device=device, generator=torch.Generator(device).manual_seed(1))
    sequences = Sequences(1, 0, 40, len(bench.latents.c_kv[0]) // PAGE_TOKENS, config.vocab_size)
    ours, theirs = plain_path(bench.model, bench.latents)(sequences.step(ids[0].tolist())), peer(ids).logits[:, -1].float()
    found["our logits off theirs"] = float((ours - theirs).abs().max() / theirs.std())
    prompts, steps = [], []
    for context in bench.contexts:
        if bench.left_s < 45 and not bench.is_tiny:
            found["cut short"] = context
            break
        prompt = torch.randint(0, config.vocab_size, (1, context), device=device)
        cache = library.DynamicCache(config=peer.config)
        for _ in range(2 if context < 32_768 else 1):
            cache = library.DynamicCache(config=peer.config)
            wait(device)
            began = time.perf_counter()
            token = peer(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            took = time.perf_counter() - began
        prompts.append({"tokens": context, "ms": took * 1e3, "tokens/s": context / took})
        found["prefill"] = prompts
        for experts in ("grouped_mm", "batched_mm"):
            row: dict[str, Any] = {"context": context, "experts": experts}
            try:
                peer.set_experts_implementation(experts)
                times = []
                for _ in range(10):
                    began = time.perf_counter()
                    token = peer(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                    token.tolist()
                    times.append(time.perf_counter() - began)
                took = sorted(times[3:])[3]
                row |= {"ms a step": took * 1e3, "tokens/s": 1 / took}
                name = f"transformers_decode_1x{context}_tokens_s"
                bench.metrics[name] = max(bench.metrics.get(name, 0.0), 1 / took)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            steps.append(row)
            found["decode"] = steps
        with suppress(Exception):
            peer.set_experts_implementation("grouped_mm")


def short_spans(bench: Bench) -> None:
    """How long a span is worth attending over latents: one step of a few hundred new tokens on a long context, in both forms."""
    assert bench.model and bench.latents
    found, rows_found = bench.sections["short spans, plain torch"], []
    pages = len(bench.latents.c_kv[0]) // PAGE_TOKENS
    for context in bench.contexts[1:]:
        for tokens in (32, 64, 128, 256):
            row: dict[str, Any] = {"context": context, "tokens": tokens}
            for form, limit in (("over latents ms", tokens), ("expanded ms", 0)):
                sequences = Sequences(1, context, tokens, pages, bench.config.vocab_size)
                step = sequences.step(range(tokens)) if bench.config.vocab_size >= tokens else sequences.step([5] * tokens)

                def work(step: Step = step, limit: int = limit) -> object:
                    assert bench.model and bench.latents
                    return bench.model(Layout.of(step, bench.device, limit), bench.latents)

                row[form] = seconds(bench.device, work, 3) * 1e3
            rows_found.append(row)
            found["steps"] = rows_found


def random_packed_model(config: ModelConfig, precision: str, dtype: torch.dtype, device: torch.device) -> Model:
    """As `random_model`, in fewer bits: codes are drawn, not rounded to, which nothing but the sums can tell."""
    held = TorchExperts(config, range(config.n_routed_experts or 0), precision, dtype, device)
    model = empty_dense(config, Spread([held]), precision=precision, dtype=dtype, device=device).eval()
    torch.manual_seed(0)
    for module in (*held.modules(), *model.modules()):
        if isinstance(module, PackedLinear | Stack) and module.bits:
            columns = module.in_features if isinstance(module, PackedLinear) else module.columns
            module.codes.random_(*((-127, 128) if module.bits == 8 else (0, 256)))
            module.scales.fill_((columns**-0.5) / (73.6 if module.bits == 8 else 4.64))  # over the codes' standard deviation
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if "norm" in name:
            parameter.fill_(1.0)
        elif kind not in ("codes", "scales"):
            parameter.normal_(std=1.0 if name == "embed_tokens.weight" else parameter.shape[-1] ** -0.5)
    return model


def formats(bench: Bench) -> None:
    """Decode with weights in fewer bits, and what of a large card is left beside the largest model. The bf16 model goes first."""
    found, rows_found, fits_found = bench.sections["formats"], list[dict[str, Any]](), list[dict[str, Any]]()
    bench.model = bench.gpu = bench.latents = None
    bandwidth = bench.metrics.get("bandwidth_gb_s", math.nan) * 1e9
    large = LARGE
    if bench.is_tiny:
        grouped = {"q_lora_rank": 48, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        large = ModelConfig.model_validate(TINY | grouped)
    for shape, config, precision in (
        ("Coder-V2-Lite", bench.config, Precision.BFLOAT16),
        ("Coder-V2-Lite", bench.config, Precision.INT8),
        ("Coder-V2-Lite", bench.config, Precision.INT4),
        ("236B", large, Precision.INT4),
    ):
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        plainly = precision is Precision.BFLOAT16
        model = (
            random_model(config, bench.dtype, bench.device)
            if plainly
            else random_packed_model(config, precision.value, bench.dtype, bench.device)
        )
        longest = bench.contexts[-1] + 64
        latents = filled_pool(config, longest, bench.dtype, bench.device)
        gpu = GpuModel(model, bench.operations)
        read = sum(group.read_bytes for group in groups(config, precision))
        fits: dict[str, Any] = {"shapes": shape, "weights in": precision.value, "room for tokens": longest}
        for count, context in [*((1, context) for context in bench.contexts), (MAX_ROWS, bench.contexts[0])]:
            if count * (context + 32) > longest:
                continue
            sequences = Sequences(count, context, 24, pages_for(longest), config.vocab_size)
            took = decode_seconds(partial(gpu.forward, latents=latents), sequences, 2 if bench.is_tiny else 16)
            cached = count * context * config.latent_dim * config.num_hidden_layers * bench.dtype.itemsize
            row: dict[str, Any] = {"shapes": shape, "weights in": precision.value, "sequences": count, "context": context}
            row |= {"ms a step": took * 1e3, "tokens/s": count / took}
            if bench.device.type == "cuda":
                row["graph alone ms"] = replay_seconds(gpu._graphs[count][0].replay) * 1e3
            if count == 1:
                row |= {"GB a token": (read + cached) / 1e9, "share of ceiling": (read + cached) / bandwidth / took}
                bench.metrics[f"{shape}_{precision.value}_decode_{context}_tokens_s"] = 1 / took
                bench.metrics[f"{shape}_{precision.value}_decode_{context}_share_of_ceiling"] = (read + cached) / bandwidth / took
            rows_found.append(row)
            found["steps"] = rows_found
        chunk = min(CHUNK_TOKENS, bench.contexts[-1])
        sequences = Sequences(1, bench.contexts[-1] - chunk, chunk, pages_for(longest), config.vocab_size)
        began = time.perf_counter()
        gpu.forward(sequences.step([5] * chunk), latents).sum().item()
        fits[f"ms, {chunk} more tokens at {bench.contexts[-1]}"] = (time.perf_counter() - began) * 1e3
        if bench.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            fits |= {"card GB": total / 1e9, "most GB allocated": torch.cuda.max_memory_allocated() / 1e9, "GB never taken": free / 1e9}
        fits_found.append(fits)
        found["fits"] = fits_found
        del model, gpu, latents


SECTIONS: tuple[tuple[str, Callable[[Bench], None], float], ...] = (
    ("machine", machine, 0),
    ("build", build, 0),
    ("ceilings", ceilings, 0),
    ("decode, plain torch", decode_plain, 0),
    ("prefill", prefill, 0),
    ("transformers", transformers, 60),
    ("kernels against their plain forms", correctness, 0),  # an invalid access here would end everything after it
    ("tuning", tuning, TUNING_LEAVES_S + 30),
    ("graph against plain", agreement, 45),
    ("decode", decode, 0),
    ("profile", profile, 5),
    ("several tokens of one sequence", verify, 5),
    ("attention of a prompt", prompt_attention, 20),
    ("short spans, plain torch", short_spans, 20),
    ("formats", formats, 120),
)
"""Name, what it does, and the seconds it should have left to start."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    parser.add_argument("--budget-s", type=float, default=450.0, help="sections that do not fit into what is left of it are left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="sections whose names contain one of these words")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("there is no GPU; --tiny runs the benchmark with a tiny model on the CPU")
    bench = Bench(TINY if given.tiny else LITE, device, given.out, given.budget_s, given.tiny)
    for name, section, needs_s in SECTIONS:
        if not given.only or name in ("machine", "build", "ceilings") or any(word in name for word in given.only):
            bench.run(name, section, 0 if given.tiny else needs_s)
    print("\n".join(as_markdown(bench.sections)))
    about = {key: bench.sections["machine"].get(key, "none") for key in ("gpu", "torch", "triton", "python")}
    print(json.dumps({"benchmark": "gpu", "machine": about, "metrics": bench.metrics, "goals": {}}))


if __name__ == "__main__":
    main()
