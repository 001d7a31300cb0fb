"""Tokens one after the other: in captured graphs and in plain torch, held against the bytes that a token reads."""

import math
import time
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import replay_seconds, seconds, wait
from benchmarks.gpu.shapes import Sequences, decode_seconds, plain_path
from model_host.config import ModelConfig
from model_host.gpu.model import GpuModel
from model_host.pages import PAGE_TOKENS


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
                alone = replay_seconds(gpu._graphs[count].replay)
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
                bench.gpu._graphs[count].replay()
            wait(bench.device)
        events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
        bench.sections["profile"][f"{count} sequences at {context} tokens"] = [
            {"kernel": e.key[:70], "launches": e.count / repeats, "us": e.self_device_time_total / repeats} for e in events
        ]
