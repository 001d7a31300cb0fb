"""One rank of `ranks`: reads its portion of a model, then does what rank 0 does, step by step, until it is ended.

Run as `python -m model_host.worker`. On stdin come its orders, then commands, a line each. What it says goes to stdout, a line of JSON
each: shares of loading, {"weight_bytes": ...} once it is ready, {"failure": ...} with the traceback when it fails, {"lost": ...} when its
connection breaks, mostly by another's failure, {"waits": ..., "stands": ...} when it is asked. It ends when stdin does.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from model_host.batch import Copy, Shift, Step
from model_host.config import ModelConfig
from model_host.divided import SpreadModel
from model_host.holders import load_rank
from model_host.latents import LatentPool
from model_host.orders import ASKED, Begin, Command, Fill, Orders, read
from model_host.ranks import LOST
from model_host.wire import ConnectionLost, Wire, meet


def main() -> None:
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print lands on stderr

    def say(**said: Any) -> None:
        wire.write(json.dumps(said) + "\n")
        wire.flush()

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(lines, say), daemon=True).start()
    try:
        work(Orders.read(lines.get()), lines, say)
    except ConnectionLost as error:
        say(lost=str(error))
        os._exit(LOST)
    except BaseException:
        say(failure=traceback.format_exc())
        os._exit(1)  # groups wait for each other when they are taken down


def listen(lines: queue.SimpleQueue[str], say: Any) -> None:
    """In a thread of its own: a rank may wait for others when stdin ends, or when it is asked."""
    for line in sys.stdin:
        if line.strip() == ASKED:
            say(**standing())
        else:
            lines.put(line)
    os._exit(0)


def standing() -> dict[str, Any]:
    """Where the main thread is, and whether that is waiting: for something to do, or in a sum for others."""
    innermost = sys._current_frames()[threading.main_thread().ident or 0]
    return {"waits": innermost.f_code in (work.__code__, Wire._do.__code__), "stands": "".join(traceback.format_stack(innermost))}


def work(orders: Orders, lines: queue.SimpleQueue[str], say: Any) -> None:
    device = torch.device(orders.post.device)
    if orders.threads:
        torch.set_num_threads(orders.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = load_rank(
        Path(orders.folder),
        ModelConfig.read(Path(orders.folder)),
        orders.post,
        precision=orders.precision,
        dtype=getattr(torch, orders.dtype),
        threads=orders.threads,
        kernels=orders.kernels,
        captures=orders.captures,
        progress=lambda what, share: say(share=share),
    )
    say(weight_bytes=model.weight_bytes)
    wire = Wire(meet(Path(orders.meeting), orders.rank, orders.world, orders.backend), orders.backend, device)
    wire.open()
    model.work_with(wire)
    latents: LatentPool | None = None
    while True:
        latents = follow(read(lines.get()), model, latents, wire)


def follow(command: Command, model: SpreadModel, latents: LatentPool | None, wire: Wire) -> LatentPool:
    """Does what rank 0 does; returns the latents there are from then on."""
    if isinstance(command, Begin):
        latents = model.pool(command.pages)
        model.prepare(latents)
        return latents
    assert latents is not None, f"{command} before there are latents"
    match command:
        case Step():
            model.forward(command, latents)
        case Copy():
            latents.copy(command.source, command.target, command.tokens)
        case Shift():
            latents.shift(command)
        case Fill():
            latents.put_in(list(command.pages), *(wire.give(part) for part in latents.of_pages(list(command.pages))))
    return latents


if __name__ == "__main__":
    main()
