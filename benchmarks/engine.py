"""The model host's speed and memory against transformers and against what the machine can do: `python -m benchmarks.engine`.

Random weights, 2 threads, every engine at its best precision in each place. Prefill and decode of all engines alternate, in one
run, because the machine is shared; ratios are of medians.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median

import torch

from benchmarks import llama_cpp_peer
from benchmarks.peers import CHUNK_TOKENS, Timing, Worker, working
from benchmarks.report import Goal, report
from model_host.catalogue import LITE
from model_host.config import ModelConfig

CONTEXTS = (512, 2048, 8192)
PRECISIONS = {"ours": ("float32", "bfloat16", "int8"), "transformers": ("float32", "bfloat16")}
if llama_cpp_peer.is_installed():
    PRECISIONS["llama_cpp"] = llama_cpp_peer.PRECISIONS
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
THREADS = 2
SHAPE = LITE.model_copy(
    update={
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "yarn": None,
        "max_position_embeddings": 16_384,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)
TINY = SHAPE.model_copy(
    update={
        "vocab_size": 16_384,
        "hidden_size": 256,
        "intermediate_size": 704,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 24,
        "moe_intermediate_size": 128,
    }
)
MID = SHAPE.model_copy(
    update={
        "vocab_size": 32_768,
        "hidden_size": 512,
        "intermediate_size": 2560,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "moe_intermediate_size": 256,
    }
)
LITE4 = LITE.model_copy(update={"num_hidden_layers": 4})
"""The true layers of Coder-V2-Lite, 4 of 27."""

GOALS = (  # issue 3, "Measured, in one run, as ratios"
    *(Goal(f"mid_{c}_decode_ratio", ">=", goal) for c, goal in zip(CONTEXTS, (6.5, 10, 22), strict=True)),
    *(Goal(f"mid_{c}_prefill_ratio", ">=", goal) for c, goal in zip(CONTEXTS, (2.4, 4, 8), strict=True)),
    Goal("mid_8192_memory_share", "<=", 1 / 8),
    *(Goal(f"tiny_{c}_decode_ratio", ">=", goal) for c, goal in zip(CONTEXTS, (4, 8, 14), strict=True)),
    *(Goal(f"lite4_{c}_{what}_ceiling_share", ">=", 0.6) for what in ("decode", "prefill") for c in CONTEXTS),
)


def against_transformers(name: str, config: ModelConfig, contexts: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Tokens a second of both, their ratios, and the share of memory, at every context."""
    metrics: dict[str, float] = {}
    with ExitStack() as stack:
        workers: dict[tuple[str, str], Worker] = {
            (kind, precision): stack.enter_context(working(kind, config, precision, THREADS, max(contexts)))
            for kind, precisions in PRECISIONS.items()
            for precision in precisions
        }
        for context in contexts:
            times = alternated(workers, context, rounds if context < 8192 else 1)
            metrics |= described(f"{name}_{context}", context, times)
            for what, seconds in (("prefill", lambda t: t.prefill_s), ("decode", lambda t: t.decode_s)):
                theirs, ours = best(times, "transformers", seconds), best(times, "ours", seconds)
                metrics[f"{name}_{context}_{what}_ratio"] = theirs[0] / ours[0]
                if "llama_cpp" in PRECISIONS:
                    metrics[f"{name}_{context}_{what}_ratio_to_llama_cpp"] = best(times, "llama_cpp", seconds)[0] / ours[0]
            lightest = {kind: min(most_above(t) for key, t in times.items() if key[0] == kind) for kind in PRECISIONS}
            metrics[f"{name}_{context}_memory_share"] = lightest["ours"] / lightest["transformers"]
    return metrics


def against_the_ceiling(name: str, config: ModelConfig, contexts: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Tokens a second, and which share that is of what bandwidth and arithmetic allow."""
    bandwidth, rate = in_own_process(read_bytes_per_s), in_own_process(operations_per_s)
    metrics: dict[str, float] = {"read_gb_per_s": bandwidth / 1e9, "matmul_gflop_per_s": rate / 1e9}
    found: dict[int, dict[tuple[str, str], list[Timing]]] = {}
    for precision in ("bfloat16", "int8"):  # one after the other: float32 weights of this size are not for 2 threads
        with working("ours", config, precision, THREADS, max(contexts)) as worker:
            for context in contexts:
                times = alternated({("ours", precision): worker}, context, rounds if context < 8192 else 1)
                metrics |= described(f"{name}_{context}", context, times)
                found[context] = found.get(context, {}) | times
    for context, times in found.items():
        prefill_s, precision = best(times, "ours", lambda t: t.prefill_s)
        least = prefill_bytes(config, context, precision) / bandwidth + prefill_operations(config, context) / rate
        metrics[f"{name}_{context}_prefill_ceiling_share"] = least / prefill_s
        decode_s, precision = best(times, "ours", lambda t: t.decode_s)
        least = decode_bytes(config, context, precision) / bandwidth + decode_operations(config, context) / rate
        metrics[f"{name}_{context}_decode_ceiling_share"] = least / decode_s
    return metrics


def alternated(workers: dict[tuple[str, str], Worker], context: int, rounds: int) -> dict[tuple[str, str], list[Timing]]:
    times: dict[tuple[str, str], list[Timing]] = {key: [] for key in workers}
    for _ in range(rounds):
        for key, worker in workers.items():
            times[key].append(worker.time(context, decode_tokens=24 if key[0] == "ours" else 8))
    return times


def best(times: dict[tuple[str, str], list[Timing]], kind: str, seconds: Callable[[Timing], float]) -> tuple[float, str]:
    """The median of the precision that was fastest, and its name."""
    return min((median(map(seconds, timings)), precision) for (k, precision), timings in times.items() if k == kind)


def described(name: str, context: int, times: dict[tuple[str, str], list[Timing]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for (kind, precision), timings in times.items():
        stem = f"{name}_{kind}_{precision}"
        metrics[f"{stem}_prefill_tokens_per_s"] = context / median(t.prefill_s for t in timings)
        metrics[f"{stem}_decode_tokens_per_s"] = 1 / median(t.decode_s for t in timings)
        metrics[f"{stem}_mb_above_weights"] = most_above(timings) / 1e6
    return metrics


def most_above(timings: list[Timing]) -> int:
    """Rounds after the first find the memory of the first still there."""
    return max(timing.bytes_above for timing in timings)


def read_bytes_per_s(threads: int = THREADS) -> float:
    """How fast memory is read by so many threads: the best of many, since neighbours share it."""
    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 28)  # 1 GiB
    return max(numbers.nbytes / seconds(read) for read in (numbers.sum, numbers.max) for _ in range(20))


def operations_per_s() -> float:
    """How fast torch multiplies matrices with THREADS threads, the best of float32 and bfloat16."""
    torch.set_num_threads(THREADS)
    factors = [(torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    return max(2 * 1024 * 2048 * 2048 / seconds(partial(torch.matmul, a, b)) for a, b in factors for _ in range(30))


def in_own_process(measure: Callable[[], float]) -> float:
    """As the peers run: with threads that wait passively, and nothing else in the process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def decode_bytes(config: ModelConfig, context: int, precision: str) -> float:
    """What one token has to read: its weights, and the latents of its context."""
    return config.active_parameters * WEIGHT_BYTES[precision] + context * config.num_hidden_layers * config.latent_dim * 2


def decode_operations(config: ModelConfig, context: int) -> float:
    """Two for every weight, and absorbed attention (DeepSeek-V2, section 2.1.2): scores over R + P numbers, sums over R."""
    per_layer = 2 * config.num_attention_heads * context * (config.latent_dim + config.kv_lora_rank)
    return 2 * config.active_parameters + config.num_hidden_layers * per_layer


def prefill_bytes(config: ModelConfig, tokens: int, precision: str) -> float:
    """All weights once a chunk: some token of a chunk takes each expert."""
    return -(-tokens // CHUNK_TOKENS) * config.parameters * WEIGHT_BYTES[precision]


def prefill_operations(config: ModelConfig, tokens: int) -> float:
    """Two for every weight and token, but the head's for one token only; expanded attention over half of the square."""
    head = config.vocab_size * config.hidden_size
    widths = config.qk_head_dim + config.v_head_dim
    per_layer = config.num_attention_heads * tokens * tokens * widths
    return 2 * (config.active_parameters - head) * tokens + 2 * head + config.num_hidden_layers * per_layer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the tiny shape at one context, no goals")
    parser.add_argument("--only", choices=("tiny", "mid", "lite4"), help="one shape, no other")
    choice = parser.parse_args()
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # of all processes below: torch's threads wait actively, ruinous beside anything else
    if choice.quick:
        return report("engine", against_transformers("tiny", TINY, (512,), rounds=1))
    metrics: dict[str, float] = {}
    if choice.only in (None, "tiny"):
        metrics |= against_transformers("tiny", TINY, CONTEXTS, rounds=3)
    if choice.only in (None, "mid"):
        metrics |= against_transformers("mid", MID, CONTEXTS, rounds=3)
    if choice.only in (None, "lite4"):
        metrics |= against_the_ceiling("lite4", LITE4, CONTEXTS, rounds=3)
    report("engine", metrics, GOALS)


if __name__ == "__main__":
    main()
