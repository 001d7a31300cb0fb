"""One worker process of `ranks`: reads its experts, then computes them for every layer of every step until it is ended.

Run as `python -m model_host.worker`, with its orders as a line of JSON on stdin. What it says goes to stdout, a line of JSON each: shares
of loading, {"weight_bytes": ...} once it is ready, {"failure": ...} with the traceback when it fails. It ends when stdin does.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from model_host.config import ModelConfig
from model_host.experts import Held
from model_host.holders import load_experts
from model_host.ranks import LOST, ConnectionLost, Orders, Post, Wire, awaited, meet


def main() -> None:
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print lands on stderr

    def say(**said: Any) -> None:
        wire.write(json.dumps(said) + "\n")
        wire.flush()

    first = json.loads(sys.stdin.readline())
    orders = Orders(**first | {"post": Post(**first["post"])})
    threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        work(orders, say)
    except ConnectionLost:
        os._exit(LOST)
    except BaseException:
        say(failure=traceback.format_exc())
        os._exit(1)  # groups wait for each other when they are taken down


def end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def work(orders: Orders, say: Any) -> None:
    config = ModelConfig.read(Path(orders.folder))
    device = torch.device(orders.post.device)
    if orders.threads:
        torch.set_num_threads(orders.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    held = load_experts(
        Path(orders.folder),
        config,
        range(orders.post.first, orders.post.stop),
        precision=orders.precision,
        dtype=getattr(torch, orders.dtype),
        device=device,
        threads=orders.threads,
        kernels=orders.kernels,
        progress=lambda what, share: say(share=share),
    )
    say(weight_bytes=held.weight_bytes)
    control, data = meet(Path(orders.meeting), orders.rank, orders.world, orders.backend)
    wire = Wire(data, orders.backend, device, lambda: False)  # when rank 0 goes, so does stdin, and this process
    tokens = torch.zeros(1, dtype=torch.long)
    while True:
        awaited(control.broadcast(tokens, 0))
        step(held, config, int(tokens), wire)


@torch.inference_mode()
def step(held: Held, config: ModelConfig, tokens: int, wire: Wire) -> None:
    """Computes this rank's experts of every layer, as the layers' tokens come."""
    hidden, chosen = config.hidden_size, config.num_experts_per_tok or 0
    message = torch.empty(tokens, hidden + 2 * chosen)  # [T, D+2K]
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        message = wire.broadcast(message)
        x, weights, experts = message.split((hidden, chosen, chosen), dim=-1)
        wire.reduce(held.partial(layer, x, weights, experts.long()))


if __name__ == "__main__":
    main()
