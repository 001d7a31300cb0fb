"""Whether the kernels and the captured graphs are right, and which sizes make them fastest."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import device_seconds
from benchmarks.gpu.shapes import Sequences, filled_pool, plain_path, random_model
from model_host.config import ModelConfig
from model_host.gpu import plain
from model_host.gpu.model import GpuModel
from model_host.models.deepseek_v2 import Block, MoE
from model_host.pages import PAGE_TOKENS

TUNING_LEAVES_S = 150.0
"""Of the budget, for the sections after it."""


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
