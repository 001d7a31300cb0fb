"""Experts in worker processes, one a device: started, fed with each layer's tokens, summed up, noticed when they die.

Owns: the processes and the groups they talk in: rank 0 is the caller's process, which has everything but these experts. Groups reach
loopback only, and meet in a folder that nobody else can open. Between GPUs tokens go by NCCL, else by gloo through the host's memory: the
same calls, to a group of another name (`Wire`).

A worker keeps no state but its weights. After one has died or failed, all of them are started anew before the next step, and what
the caller has cached stays valid.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # groups of this process's own: torch.distributed has one of each for all

from model_host.config import ModelConfig
from model_host.errors import CheckpointError, EngineError
from model_host.generation import Progress

FOREVER = timedelta(days=365)
"""Workers wait for the next step as long as there is none; the death of a process ends the wait."""
MEETING = timedelta(seconds=120)
LAST_WORDS_S = 5.0
"""How long a broken worker may take to say why."""
LOST = 3
"""Exit status of a worker whose connection to the others broke: no failure of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What one worker holds, and where."""

    device: str
    first: int
    stop: int
    """Experts [first, stop) of every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Everything a worker is told when it starts."""

    folder: str
    precision: str
    dtype: str
    """That is computed in, where it is not the precision."""
    threads: int
    kernels: str
    rank: int
    post: Post
    meeting: str
    """The folder in which the ranks find each other."""
    world: int
    backend: str
    """Of what the tokens go over: nccl or gloo."""


@dataclass(slots=True)
class Worker:
    """A process, and what it has said so far."""

    rank: int
    process: subprocess.Popen[str]
    ready: threading.Event = field(default_factory=threading.Event)
    """It has its weights, or never will."""
    weight_bytes: int = 0
    failure: str = ""
    reader: threading.Thread | None = None

    def listen(self, told: Progress) -> None:
        """Reads what the worker says, line by line, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                continue  # a library's own words
            if "share" in said:
                told(f"reading weights, rank {self.rank}", float(said["share"]))
            if "failure" in said:
                self.failure = said["failure"]
            if "weight_bytes" in said:
                self.weight_bytes = int(said["weight_bytes"])
                self.ready.set()
        self.ready.set()

    def why(self) -> str:
        """What has become of it, for the user; to be asked once it is known that something has."""
        if self.reader is not None:
            self.reader.join(LAST_WORDS_S)
        if self.failure:
            return self.failure
        try:
            code = self.process.wait(LAST_WORDS_S if self.reader is None or not self.reader.is_alive() else 0)
        except subprocess.TimeoutExpired:  # it is well
            return ""
        if code == LOST:  # it was left alone by another
            return ""
        return f"it was ended by signal {-code}" if code < 0 else f"it ended with status {code}"


class Ranks:
    """Satisfies model_host.experts.Elsewhere. Used by one thread."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        posts: list[Post],
        *,
        home: torch.device,
        precision: str,
        dtype: torch.dtype,
        threads: int,
        kernels: str,
    ) -> None:
        """`home` is the device of rank 0."""
        self._folder, self._config, self._posts = folder, config, posts
        self._precision, self._dtype, self._threads, self._kernels = precision, dtype, threads, kernels
        cards = {(device.type, device.index or 0) for device in (home, *(torch.device(post.device) for post in posts))}
        apart = len(cards) == len(posts) + 1 and all(kind == "cuda" for kind, _ in cards)  # NCCL wants a card for each rank
        self._home, self._backend = home, "nccl" if apart and dist.is_nccl_available() else "gloo"
        self._workers: list[Worker] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self._control: Group | None = None
        self._wire: Wire | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(worker.weight_bytes for worker in self._workers)

    @property
    def is_running(self) -> bool:
        return self._control is not None

    def begin(self, tokens: int) -> None:
        """Says how many tokens the next step has; starts the workers where they do not run. Raises CheckpointError, EngineError."""
        if not self.is_running:
            self.start(lambda what, share: None)
        assert self._control is not None
        self._tokens = tokens
        try:
            awaited(self._control.broadcast(torch.tensor([tokens]), 0))
        except ConnectionLost as error:
            raise self.failed(error) from error

    def send(self, x: Tensor, weights: Tensor, experts: Tensor) -> None:
        assert self._wire is not None and len(x) == self._tokens
        message = torch.cat((x.float(), weights.float(), experts.float()), dim=-1)  # [T, D+2K]; ids are exact in float32
        try:
            self._wire.broadcast(message)
        except ConnectionLost as error:
            raise self.failed(error) from error

    def added(self, own: Tensor) -> Tensor:
        assert self._wire is not None
        try:
            return self._wire.reduce(own).to(own.device)
        except ConnectionLost as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> EngineError:
        """Ends the workers, and says what has happened to the first that had something happen to it."""
        reasons = [(worker.failure == "", worker.rank, why) for worker in self._workers if (why := worker.why())]
        devices = {rank: post.device for rank, post in enumerate(self._posts, start=1)}
        self.close()
        if not reasons:
            return EngineError(f"The connection to the experts' processes was lost ({error}): they are started anew with the next request.")
        _, rank, why = min(reasons)  # one with a traceback first
        return EngineError(
            f"The experts' process of rank {rank} on {devices[rank]} failed: {why.strip()}\n"
            "All of them are started anew with the next request."
        )

    def close(self) -> None:
        """Ends the workers. Harmless when there are none."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        self._control = self._wire = None
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def start(self, progress: Progress) -> None:
        """Starts the workers and waits for them. Raises CheckpointError, EngineError."""
        self._meeting = tempfile.TemporaryDirectory(prefix="deepseek-lsp-")
        world = len(self._posts) + 1
        for rank, post in enumerate(self._posts, start=1):
            orders = Orders(
                folder=str(self._folder),
                precision=self._precision,
                dtype=str(self._dtype).removeprefix("torch."),
                threads=self._threads,
                kernels=self._kernels,
                rank=rank,
                post=post,
                meeting=self._meeting.name,
                world=world,
                backend=self._backend,
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "model_host.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert process.stdin is not None
            worker = Worker(rank, process)
            self._workers.append(worker)
            worker.reader = threading.Thread(target=worker.listen, args=(progress,), daemon=True)
            worker.reader.start()
            try:
                process.stdin.write(json.dumps(asdict(orders)) + "\n")
                process.stdin.flush()  # and left open: a worker ends when this end of the pipe does
            except BrokenPipeError:
                continue  # it has something to say about that
        for worker in self._workers:
            worker.ready.wait()
            if not worker.weight_bytes:
                rank, why = worker.rank, worker.why()
                self.close()
                raise CheckpointError(f"The experts' process of rank {rank} could not start: {why.strip()}")
        try:
            self._control, data = meet(Path(self._meeting.name), 0, world, self._backend)
        except RuntimeError as error:
            raise self.failed(error) from error
        self._wire = Wire(data, self._backend, self._home, self._any_gone)

    def _any_gone(self) -> bool:
        return any(worker.process.poll() is not None for worker in self._workers)


class ConnectionLost(Exception):
    """A rank is gone, and which is for its own words to tell."""


def awaited(work: Any) -> None:
    """Waits for what a group was asked to do. Raises ConnectionLost."""
    try:
        work.wait()
    except RuntimeError as error:
        raise ConnectionLost(str(error).splitlines()[0]) from error


class Group(Protocol):
    """What ranks talk in; each call returns something to wait for."""

    def broadcast(self, tensor: Tensor, root: int) -> Any: ...

    def reduce(self, tensor: Tensor, root: int) -> Any: ...

    def abort(self) -> None: ...


class Wire:
    """What the tokens of a step go over, from and to rank 0."""

    def __init__(self, group: Group, backend: str, device: torch.device, gone: Callable[[], bool]) -> None:
        """`device` is this rank's; `gone` says whether a rank that this one waits for has ended."""
        self._group, self._gone = group, gone
        self._notices = backend == "gloo"
        self._device = torch.device("cpu") if backend == "gloo" else device

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What rank 0 gives, which the others have memory for."""
        tensor = tensor.to(self._device)
        self._await(self._group.broadcast(tensor, 0))
        return tensor

    def reduce(self, tensor: Tensor) -> Tensor:
        """On rank 0 the sum of what all give."""
        tensor = tensor.to(self._device)
        self._await(self._group.reduce(tensor, 0))
        return tensor

    def _await(self, work: Any) -> None:
        """gloo notices that a rank has gone. NCCL does not, and its waiting only queues: there this rank looks itself, and frees its
        stream of what would never end."""
        while not self._notices and not work.is_completed():
            if self._gone():
                self._group.abort()
                raise ConnectionLost("a process has ended")
        awaited(work)


def meet(folder: Path, rank: int, world: int, backend: str) -> tuple[Group, Group]:
    """The groups of all ranks: one that says how many tokens the next step has, one for the tokens."""
    control = _gloo(folder / "control", rank, world)
    if backend == "gloo":
        return control, control
    nccl: Any = c10d.ProcessGroupNCCL
    data: Group = nccl(c10d.FileStore(str(folder / "data"), world), rank, world, nccl.Options())
    return control, data


def _gloo(file: Path, rank: int, world: int) -> Group:
    gloo: Any = c10d.ProcessGroupGloo
    store = c10d.FileStore(str(file), world)
    store.set_timeout(MEETING)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = FOREVER
    group: Group = gloo(store, rank, world, options)
    return group
