"""python -m benchmarks.server [--quick]: what the server itself costs, with the model taken out and with it running.

Overhead is the time from a ghost-text request written to its answer read, with an engine that answers at once: pipes, JSON, pygls and our
own code, both ways (a client of plain bytes, so that no second LSP library is timed). The ceiling is 0 ms; the goal is 2 ms.
The hop is what answers to the same warm request of one token take longer over the socket of the process that editors share than within
this one, taking turns. Loop lag is how much later a status request is answered while the starter model generates than while it rests.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

import psutil

from benchmarks.apart import apart
from benchmarks.report import Goal, report
from model_host import shared, wanted
from model_host.generation import Engine, Fim, Request
from model_host.wanted import Wanted
from tests.wire import Wire, wire

GOALS = (Goal("overhead_p50_ms", "<=", 2.0), Goal("overhead_p99_ms", "<=", 2.0), Goal("initialize_ms", "<=", 500.0))
SOURCE = Path(__file__).read_text("utf-8")
SCRIPTED = (sys.executable, "-m", "tests.scripted", '{"pieces": ["return 1"]}')
REAL = (sys.executable, "-m", "lsp_server")
LONG = {"inline": {"max_new_tokens": 2000, "max_lines": 200, "deadline_s": 60, "temperature": 1.0}}


def milliseconds(started: float) -> float:
    return 1000 * (time.perf_counter() - started)


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


async def status_ms(server: Wire, id: int) -> float:
    started = time.perf_counter()
    await server.send(id=id, method="deepseek/status", params=None)
    await server.answer(id)
    return milliseconds(started)


async def overhead(requests: int) -> dict[str, float]:
    async with wire(*SCRIPTED) as server:
        await server.start()
        await server.open(SOURCE)
        times = []
        for id in range(10, 10 + requests):
            started = time.perf_counter()
            await server.ghost(id, 30, 0)
            await server.answer(id)
            times.append(milliseconds(started))
    settled = times[len(times) // 10 :]
    return {"overhead_p50_ms": statistics.median(settled), "overhead_p99_ms": p99(settled)}


async def start() -> dict[str, float]:
    """The server of a user's first editor window, then that of the second: time to initialize, to the first completion,
    and memory."""
    began = time.perf_counter()
    async with wire(*REAL) as first:
        found = await begun(first, began)
        began = time.perf_counter()
        async with wire(*REAL) as second:
            found |= {f"second_window_{name}": value for name, value in (await begun(second, began)).items()}
            window = psutil.Process(second.process.pid)
            (model,) = psutil.Process(first.process.pid).children()
            return found | {"window_mb": megabytes(window), "model_process_mb": megabytes(model)}


def megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


async def begun(server: Wire, began: float) -> dict[str, float]:
    await server.start()
    initialize = milliseconds(began)
    await server.open(SOURCE)
    id = 10
    while True:
        await server.ghost(id, 30, 0)
        await server.answer(id)
        await server.send(id=id + 1, method="deepseek/status", params=None)
        status = (await server.answer(id + 1))["result"]
        if status["state"] == "failed":
            raise SystemExit(status["message"])
        if status["last"]["cost"]:
            return {"initialize_ms": initialize, "first_completion_ms": milliseconds(began)}
        id += 2
        await asyncio.sleep(0.02)


async def hop(requests: int) -> dict[str, float]:
    choice = Wanted(model="starter", device="cpu", dtype="float32")
    request = Request(prompt=Fim(prefix=SOURCE, suffix=""), max_new_tokens=1)
    there = await asyncio.to_thread(shared.connect, choice, keep_s=0.0, progress=silent)
    here = await asyncio.to_thread(wanted.load, choice, silent)
    times: dict[Engine, list[float]] = {here: [], there: []}
    for _ in range(requests):
        for engine, took in times.items():
            began = time.perf_counter()
            await engine.submit(request).finished()
            took.append(milliseconds(began))
    medians = [statistics.median(took[len(took) // 10 :]) for took in times.values()]
    here.close()
    there.close()
    return {"answer_within_ms": medians[0], "answer_over_socket_ms": medians[1], "hop_ms": medians[1] - medians[0]}


def silent(what: str, share: float) -> None: ...


async def loop_lag(requests: int) -> dict[str, float]:
    async with wire(*REAL) as server:
        await server.send(id=1, method="initialize", params={"capabilities": {}, "initializationOptions": LONG})
        await server.answer(1)
        await server.send(method="initialized", params={})
        await server.open(SOURCE)
        id = 10
        while True:
            await server.send(id=id, method="deepseek/status", params=None)
            if (await server.answer(id))["result"]["state"] == "ready":
                break
            id += 1
            await asyncio.sleep(0.05)
        resting = [await status_ms(server, 10_000 + n) for n in range(requests)]
        busy: list[float] = []
        while len(busy) < requests:
            id += 1
            await server.ghost(id, 1 + id % 20, 0)  # never awaited: status requests are answered beside it
            for _ in range(10):
                busy.append(await status_ms(server, 20_000 + len(busy)))
                await asyncio.sleep(0.005)
    return {
        "status_resting_p50_ms": statistics.median(resting),
        "status_generating_p50_ms": statistics.median(busy),
        "status_generating_p99_ms": p99(busy),
        "loop_lag_p50_ms": statistics.median(busy) - statistics.median(resting),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests and starts")
    quick = parser.parse_args().quick
    with apart():
        await measured(quick)


async def measured(quick: bool) -> None:
    metrics = await overhead(100 if quick else 1000)
    starts = [await start() for _ in range(1 if quick else 5)]
    metrics |= {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    metrics |= await hop(50 if quick else 500)
    metrics |= await loop_lag(50 if quick else 500)
    report("server", metrics, GOALS)


if __name__ == "__main__":
    asyncio.run(main())
