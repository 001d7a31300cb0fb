"""Weights in fewer bits: what decoding gains by them, and what of a large card is left beside the largest model."""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import replay_seconds
from benchmarks.gpu.shapes import TINY, Sequences, decode_seconds, filled_pool, plain_path, random_model, random_packed_model
from model_host import nf4
from model_host.catalogue import LARGE, Precision
from model_host.config import ModelConfig
from model_host.footprint import CHUNK_TOKENS, groups
from model_host.gpu.model import MAX_ROWS, GpuModel
from model_host.latents import LatentPool
from model_host.models.deepseek_v2 import Model
from model_host.pages import pages_for


def formats(bench: Bench) -> None:
    """Each format by itself; the model of the sections before goes first."""
    found, steps, fits = bench.sections["formats"], list[dict[str, Any]](), list[dict[str, Any]]()
    found |= {"steps": steps, "fits": fits}
    bench.model = bench.gpu = bench.latents = None
    large = LARGE
    if bench.is_tiny:
        grouped = {"q_lora_rank": 48, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        large = ModelConfig.model_validate(TINY | grouped)
    for shapes, config, precision in (
        ("Coder-V2-Lite", bench.config, Precision.BFLOAT16),
        ("Coder-V2-Lite", bench.config, Precision.INT8),
        ("Coder-V2-Lite", bench.config, Precision.INT4),
        ("Coder-V2-Lite", bench.config, Precision.NF4),
        ("236B", large, Precision.INT4),
    ):
        name = {"shapes": shapes, "weights in": precision.value}
        if precision is Precision.NF4 and (reason := nf4.why_unavailable()):
            fits.append(name | {"left out": reason})
            continue
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model, latents = loaded(bench, config, precision)
        except torch.OutOfMemoryError as error:
            fits.append(name | {"left out": str(error).split(".")[0]})
            continue
        gpu = None if precision is Precision.NF4 else GpuModel(model, bench.operations)  # which reads no NF4
        for row in decoded(bench, model, gpu, latents, precision):
            steps.append(name | row)
            if row["sequences"] == 1:
                metric = f"{shapes}_{precision.value}_decode_{row['context']}"
                bench.metrics[f"{metric}_tokens_s"] = row["tokens/s"]
                bench.metrics[f"{metric}_share_of_ceiling"] = row["share of ceiling"]
        fits.append(name | room(bench, model, gpu, latents))
        del model, gpu, latents


def loaded(bench: Bench, config: ModelConfig, precision: Precision) -> tuple[Model, LatentPool]:
    latents = filled_pool(config, bench.contexts[-1] + 64, bench.dtype, bench.device)
    if precision is Precision.BFLOAT16:
        return random_model(config, bench.dtype, bench.device), latents
    return random_packed_model(config, precision.value, bench.dtype, bench.device), latents


def decoded(bench: Bench, model: Model, gpu: GpuModel | None, latents: LatentPool, precision: Precision) -> Iterator[dict[str, Any]]:
    """One sequence at every context, then as many as a graph takes; in plain torch where there is no `gpu`."""
    config, longest = model.config, bench.contexts[-1] + 64
    forward = partial(gpu.forward, latents=latents) if gpu else plain_path(model, latents)
    bandwidth = bench.metrics.get("bandwidth_gb_s", math.nan) * 1e9
    read = sum(group.read_bytes for group in groups(config, precision))
    for count, context in [*((1, context) for context in bench.contexts), (MAX_ROWS, bench.contexts[0])]:
        if count * (context + 32) > longest:
            continue
        sequences = Sequences(count, context, 24, pages_for(longest), config.vocab_size)
        took = decode_seconds(forward, sequences, 2 if bench.is_tiny else 16)
        row = {"sequences": count, "context": context, "ms a step": took * 1e3, "tokens/s": count / took}
        if gpu and bench.device.type == "cuda":
            row["graph alone ms"] = replay_seconds(gpu._graphs[count].replay) * 1e3
        if count == 1:
            cached = context * config.latent_dim * config.num_hidden_layers * bench.dtype.itemsize
            row |= {"GB a token": (read + cached) / 1e9, "share of ceiling": (read + cached) / bandwidth / took}
        yield row


def room(bench: Bench, model: Model, gpu: GpuModel | None, latents: LatentPool) -> dict[str, Any]:
    """What is left of the card beside the model, with the longest context full and a chunk of a prompt being computed."""
    longest = bench.contexts[-1] + 64
    forward = partial(gpu.forward, latents=latents) if gpu else plain_path(model, latents)
    chunk = min(CHUNK_TOKENS, bench.contexts[-1])
    sequences = Sequences(1, bench.contexts[-1] - chunk, chunk, pages_for(longest), model.config.vocab_size)
    began = time.perf_counter()
    forward(sequences.step([5] * chunk)).sum().item()
    found = {"room for tokens": longest, f"ms, {chunk} more tokens at {bench.contexts[-1]}": (time.perf_counter() - began) * 1e3}
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"card GB": total / 1e9, "most GB allocated": torch.cuda.max_memory_allocated() / 1e9, "GB never taken": free / 1e9}
    return found
