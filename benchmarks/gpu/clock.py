"""How long work takes, on the wall and on the device."""

import time
from collections.abc import Callable

import torch


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
