"""python -m benchmarks.llama_server --server PATH/TO/llama-server: whether our client and the real llama-server understand each other.

The starter is written as a GGUF file (`pip install gguf`) and served; the same holes are filled there, by DeepSeek's tokens and by
/infill, and by the engine here, all greedily and in float32. What is counted is how many come out the same, whether a cancelled answer
ends there too, and what is told once the server is gone. llama-server is built from llama.cpp's sources, which llama-cpp-python brings
along in vendor/llama.cpp: `cmake -B build -DLLAMA_OPENSSL=OFF && cmake --build build --target llama-server`.
"""

import argparse
import asyncio
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from benchmarks.layout import holes
from benchmarks.llama_cpp_peer import Numbers, write
from benchmarks.report import Goal, report
from model_host.checkpoints import STARTER, checked_shards, tensors
from model_host.config import ModelConfig
from model_host.engine import load_engine
from model_host.errors import EngineError
from model_host.generation import Engine, Fim, Finish, Request
from model_host.remote import Endpoint, FimForm, connect

HOLES, NEW_TOKENS, CONTEXT_TOKENS = 20, 24, 8192
STARTED_S, STOPPED_S = 120.0, 10.0
GOALS = (
    Goal("tokens_same", ">=", 0.9),
    Goal("infill_same", ">=", 0.9),
    Goal("cancelled_ends_there", ">=", 1.0),
    Goal("gone_is_told", ">=", 1.0),
)


def starter() -> Iterator[tuple[str, Numbers]]:
    for name, tensor in tensors(checked_shards(STARTER, ModelConfig.read(STARTER)), lambda what, share: None):
        yield name, tensor.float().numpy()


@contextmanager
def served(server: str, file: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "-m", str(file), "-c", str(CONTEXT_TOKENS), "--port", str(port), "--parallel", "1", "--no-webui", "--slots"]
    with log.open("wb") as written, subprocess.Popen(command, stdout=written, stderr=written) as process:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTED_S
        try:
            while not answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"llama-server did not start:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.2)
            yield url, process
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").is_success
    except httpx2.HTTPError:
        return False


async def said(engine: Engine, request: Request) -> str:
    return "".join([piece async for piece in engine.submit(request)])


async def stops_there(engine: Engine, url: str, request: Request) -> bool:
    """Whether the server's one slot is free soon after a long answer was cancelled."""
    generation = engine.submit(request)
    async for _ in generation:
        break
    generation.cancel()
    cancelled = (await generation.finished()).finish is Finish.CANCELLED
    end = time.monotonic() + STOPPED_S
    while time.monotonic() < end:
        if not httpx2.get(f"{url}/slots").json()[0]["is_processing"]:
            return cancelled
        await asyncio.sleep(0.05)
    return False


async def compared(server: str) -> dict[str, float]:
    requests = [
        Request(prompt=Fim(prefix="".join(hole.above), suffix=hole.below), max_new_tokens=NEW_TOKENS)  # no word to begin anew
        for hole in holes(HOLES, seed=3)
    ]
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        file, log = Path(place) / "starter.gguf", Path(place) / "log"
        write(ModelConfig.read(STARTER), "float32", file, starter(), STARTER / "tokenizer.json")
        here = load_engine(STARTER, device="cpu", dtype="float32")
        wanted = [(await said(here, request)) for request in requests]
        here.close()
        with served(server, file, log) as (url, process):
            forms: tuple[FimForm, ...] = ("tokens", "infill")
            for fim in forms:
                there = await asyncio.to_thread(connect, Endpoint(url=f"{url}/v1", fim=fim))
                found = [await said(there, request) for request in requests]
                metrics[f"{fim}_same"] = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
                if fim == "tokens":
                    long = Request(prompt=requests[0].prompt, max_new_tokens=4000)
                    metrics["cancelled_ends_there"] = float(await stops_there(there, url, long))
                    metrics["context_tokens_told"] = there.facts.context_tokens
                there.close()
            there = await asyncio.to_thread(connect, Endpoint(url=f"{url}/v1"))
            process.kill()
            process.wait()
            try:
                await said(there, requests[0])
                metrics["gone_is_told"] = 0.0
            except EngineError as error:
                metrics["gone_is_told"] = float(bool(re.search("Nothing answers at|connection to .* was lost", str(error))))
            there.close()
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the program llama-server")
    report("llama_server", asyncio.run(compared(parser.parse_args().server)), GOALS)


if __name__ == "__main__":
    main()
