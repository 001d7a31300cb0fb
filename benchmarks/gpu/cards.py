"""One model on several cards: as ranks, each with a portion of every layer, or with its layers apart; beside one card alone."""

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import device_seconds
from benchmarks.gpu.shapes import TINY, Forward, Sequences, fill
from model_host.batch import Step
from model_host.catalogue import LARGE, Precision
from model_host.config import ModelConfig
from model_host.devices import Device
from model_host.divided import LayeredModel, SpreadModel
from model_host.experts import Spread, TorchExperts
from model_host.holders import empty_dense
from model_host.latents import LatentPool
from model_host.pages import pages_for
from model_host.placement import portions
from model_host.runner import LEAST_TOKENS
from model_host.wire import Wire, backend_for, meet

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured, in words that go to another process."""

    config: ModelConfig
    precision: str
    cards: tuple[str, ...]
    """Where each rank, or each part of the layers, lies."""
    contexts: tuple[int, ...]
    steps: int = 16

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in."""
        return torch.float32 if self.cards[0] == "cpu" else torch.bfloat16

    @property
    def pages(self) -> int:
        return pages_for(max(*self.contexts, LEAST_TOKENS) + 64)


def cards(bench: Bench) -> None:
    found, steps, sums = bench.sections["several cards"], list[dict[str, Any]](), list[dict[str, Any]]()
    count = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    if count < 2:
        found["left out"] = "there is one card"
        return
    found |= {"steps": steps, "sums over ranks": sums}
    bench.model = bench.gpu = bench.latents = None
    large = LARGE
    if bench.is_tiny:
        large = ModelConfig.model_validate(TINY | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2})
    names = tuple(f"cuda:{number}" if bench.device.type == "cuda" else "cpu" for number in range(count))
    models = (
        ("236B", large, Precision.INT4),
        ("Coder-V2-Lite", bench.config, Precision.BFLOAT16),
        ("Coder-V2-Lite", bench.config, Precision.INT8),
        ("Coder-V2-Lite", bench.config, Precision.INT4),
    )
    for shapes, config, precision in models[:2] if bench.is_tiny else models:
        ways: tuple[tuple[str, Callable[[Work], dict[str, Any]], tuple[str, ...]], ...] = (
            ("one card", in_layers, names[:1]),
            (f"layers on {count} cards", in_layers, names),
            (f"{count} ranks", as_ranks, names),
        )
        for way, measure, places in ways:
            named = {"shapes": shapes, "weights in": precision.value, "on": way}
            try:
                result = measure(Work(config, precision.value, places, bench.contexts[:2], 2 if bench.is_tiny else 16))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                steps.append(named | {"left out": str(error).splitlines()[0][:120]})
                continue
            finally:
                if bench.device.type == "cuda":
                    torch.cuda.empty_cache()
            steps.extend(named | row for row in result["steps"])
            sums.extend(named | row for row in result.get("sums", []))
            for row in result["steps"]:
                bench.metrics[f"{shapes}_{precision.value}_{way.replace(' ', '_')}_{row['context']}_tokens_s"] = row["tokens/s"]


def in_layers(work: Work) -> dict[str, Any]:
    """The layers evenly over the cards, all of them in this process."""
    config, count = work.config, len(work.cards)
    cuts = [config.num_hidden_layers * number // count for number in range(count + 1)]
    parts = [on_card(work, card, range(*cut)) for card, cut in zip(work.cards, pairwise(cuts), strict=True)]
    whole = LayeredModel(config, parts)
    latents = whole.pool(work.pages)
    for own in latents.parts:
        drawn(own)
    whole.prepare(latents)
    return {"steps": list(decoded(work, lambda step: whole.forward(step, latents)))}


def on_card(work: Work, card: str, layers: range) -> SpreadModel:
    """Some layers, with all of their experts, on one card."""
    config, device = work.config, torch.device(card)
    held = TorchExperts(config.of(layers), range(config.n_routed_experts or 0), work.precision, work.dtype, device)
    spread = Spread([held])
    model = empty_dense(config, spread, layers, precision=work.precision, dtype=work.dtype, device=device).eval()
    fill(held, model)
    return SpreadModel(model, spread, work.precision)


def drawn(latents: LatentPool) -> None:
    latents.c_kv.normal_()
    latents.k_pe.normal_()


def decoded(work: Work, forward: Forward) -> Iterator[dict[str, Any]]:
    """One sequence at every context, in tokens that all ranks know; median time of a step, until its logits are on the host."""
    for context in work.contexts:
        sequences = Sequences(1, context, work.steps + WARM_UP, work.pages, work.config.vocab_size)
        took = []
        for number in range(work.steps + WARM_UP):
            began = time.perf_counter()
            forward(sequences.step([number])).argmax(dim=-1).tolist()
            took.append(time.perf_counter() - began)
        median = sorted(took[WARM_UP:])[work.steps // 2]
        yield {"context": context, "ms a step": median * 1e3, "tokens/s": 1 / median}


def as_ranks(work: Work) -> dict[str, Any]:
    """A process for each card, as `model_host.ranks` has them, with the same model and the same sums in the same graphs. All of them know
    the steps beforehand. Raises RuntimeError when one of them fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        ends = [context.Pipe(duplex=False) for _ in work.cards]
        processes = [context.Process(target=rank_main, args=(work, rank, meeting, end), daemon=True) for rank, (_, end) in enumerate(ends)]
        for process in processes:
            process.start()
        for _, end in ends:
            end.close()
        waiting, found = [here for here, _ in ends], dict[str, Any]()
        try:
            while waiting:
                for here in wait(waiting):
                    assert isinstance(here, Connection)
                    said = here.recv()
                    if isinstance(said, str):
                        raise RuntimeError(said)
                    waiting.remove(here)
                    found = said if here is ends[0][0] else found
        except EOFError as error:
            raise RuntimeError("a rank has ended without a word") from error
        finally:
            for process in processes:
                process.kill()
                process.join()
    return found


def rank_main(work: Work, rank: int, meeting: str, end: Connection) -> None:
    try:
        with torch.inference_mode():
            end.send(ranked(work, rank, meeting))
    except Exception as error:
        end.send(f"rank {rank}: {type(error).__name__}: {error}")
    threading.Event().wait()  # until it is killed: the others may still be in the group


def ranked(work: Work, rank: int, meeting: str) -> dict[str, Any]:
    config, device = work.config, torch.device(work.cards[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    divided = portions(config, [Device(name=card, kind="gpu", free_bytes=0, bytes_per_s=1.0) for card in work.cards])
    assert divided is not None
    experts, world = config.n_routed_experts or 0, len(work.cards)
    held = TorchExperts(config, range(experts * rank // world, experts * (rank + 1) // world), work.precision, work.dtype, device)
    how: dict[str, Any] = {"precision": work.precision, "dtype": work.dtype, "device": device}
    spread = Spread([held])
    model = empty_dense(config, spread, portion=divided[rank], ends=rank == 0, **how).eval()
    fill(held, model)
    own = SpreadModel(model, spread, work.precision)
    backend = backend_for([torch.device(card) for card in work.cards])
    wire = Wire(meet(Path(meeting), rank, world, backend), backend, device)
    wire.open()
    own.work_with(wire)
    latents = own.pool(work.pages)
    drawn(latents)
    own.prepare(latents)

    def forward(step: Step) -> Tensor:
        out = own.forward(step, latents)
        wire.wait()
        return out

    return {"steps": list(decoded(work, forward)), "sums": list(summed(wire, device, work))}


def summed(wire: Wire, device: torch.device, work: Work) -> Iterator[dict[str, Any]]:
    """What one sum takes, of as many rows as a step has, in a captured graph where there are graphs."""
    for rows in (1, 16, 2048):
        x = torch.ones(rows, work.config.hidden_size, dtype=work.dtype, device=device)
        many = 2 * work.config.num_hidden_layers

        def work_of_a_step(x: Tensor = x, many: int = many) -> None:
            for _ in range(many):
                wire.summed(x)

        yield {"rows": rows, "us a sum": device_seconds(device, work_of_a_step) / many * 1e6}
