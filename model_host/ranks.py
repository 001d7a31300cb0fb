"""The processes of a model whose heads and experts are divided over devices: started, told what to do, summed with, noticed when they
die.

Owns: the processes and the group they talk in. Rank 0 is the caller's process; each of the others has a portion of every layer, and a
copy of the latents. Groups reach loopback only, and meet in a folder that nobody else can open. Between GPUs sums go by NCCL, else by
gloo through the host's memory. What the others are told goes to their stdin.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # groups of this process's own: torch.distributed has one of each for all

from model_host.errors import CheckpointError, RankLost
from model_host.generation import Progress
from model_host.orders import Command, Orders, Post, written

FOREVER = timedelta(days=365)
"""Workers wait for the next sum as long as there is none; the death of a process ends the wait."""
MEETING = timedelta(seconds=120)
LAST_WORDS_S = 5.0
"""How long a broken worker may take to say why."""
LAUNCH_S = 1.0
"""How long launching sums may take, which returns at once unless it waits for a rank that has died."""
LOST = 3
"""Exit status of a worker whose connection to the others broke: no failure of its own."""
OF_NCCL = {
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "500",
}
"""Where the user has not set them: to meet on loopback; and that torch's own watchdog neither ends this process, which is the user's
server, nor writes files. Deaths are noticed here."""


@dataclass(slots=True, eq=False)
class Worker:
    """A process, and what it has said so far."""

    rank: int
    process: subprocess.Popen[str]
    ready: threading.Event = field(default_factory=threading.Event)
    """It has its weights, or never will."""
    weight_bytes: int = 0
    failure: str = ""
    reader: threading.Thread | None = None

    def listen(self, told: Progress, gone: Callable[["Worker"], None]) -> None:
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
        gone(self)

    def say(self, line: str) -> None:
        """Raises ConnectionLost when it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise ConnectionLost("a process has ended") from error

    def why(self) -> str:
        """What has become of one that has ended, for the user; nothing, if it was left alone by another."""
        if self.failure:
            return self.failure
        try:
            code = self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:  # it has closed its stdout and is well
            return ""
        if code == LOST:
            return ""
        return f"it was ended by signal {-code}" if code < 0 else f"it ended with status {code}"


class Ranks:
    """Rank 0's side of them. Used by one thread."""

    def __init__(
        self,
        folder: Path,
        posts: Sequence[Post],
        *,
        home: torch.device,
        precision: str,
        dtype: torch.dtype,
        threads: int,
        kernels: str,
        captures: bool = False,
    ) -> None:
        """`home` is the device of rank 0; `captures` says whether it would run captured graphs, which it then may (`self.captures`)."""
        self._folder, self._posts, self._home = folder, tuple(posts), home
        self._precision, self._dtype, self._threads, self._kernels = precision, dtype, threads, kernels
        self._backend = backend_for([home, *(torch.device(post.device) for post in posts)])
        self.captures = captures and self._backend == "nccl"
        self._workers: list[Worker] = []
        self._gone: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self.wire: Wire | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(worker.weight_bytes for worker in self._workers)

    @property
    def is_running(self) -> bool:
        return self.wire is not None

    def tell(self, command: Command) -> None:
        """Has all others do it, after what they were told before. Raises ConnectionLost."""
        assert self.wire is not None
        self.wire.check()
        line = written(command)
        for worker in self._workers:
            worker.say(line)

    def failed(self, error: BaseException) -> RankLost:
        """Ends the workers, and says what has happened to the first that had something happen to it."""
        reasons: list[tuple[bool, int, str]] = []
        for _ in self._workers:
            try:
                worker = self._gone.get(timeout=0 if reasons else LAST_WORDS_S)
            except queue.Empty:
                break
            if why := worker.why():
                reasons.append((worker.failure == "", worker.rank, why))
        self.close()
        if not reasons:
            return RankLost(f"The connection to the model's processes was lost ({error}): they are started anew with the next request.")
        _, rank, why = min(reasons)  # one with a traceback first
        device = self._posts[rank - 1].device
        return RankLost(
            f"The model's process of rank {rank} on {device} failed: {why.strip()}\nAll of them are started anew with the next request."
        )

    def close(self) -> None:
        """Ends the workers. Harmless when there are none. Graphs that sums were captured in have to be gone by now."""
        wire, self.wire = self.wire, None
        if wire is not None:
            wire.lose()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def start(self, progress: Progress) -> None:
        """Starts the workers and waits for them. Raises CheckpointError, RankLost."""
        self._meeting = tempfile.TemporaryDirectory(prefix="deepseek-lsp-")
        self._gone = queue.SimpleQueue()
        world = len(self._posts) + 1
        for rank, post in enumerate(self._posts, start=1):
            orders = Orders(
                folder=str(self._folder),
                precision=self._precision,
                dtype=str(self._dtype).removeprefix("torch."),
                threads=self._threads,
                kernels=self._kernels,
                captures=self.captures,
                rank=rank,
                post=post,
                meeting=self._meeting.name,
                world=world,
                backend=self._backend,
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "model_host.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            worker = Worker(rank, process)
            self._workers.append(worker)
            worker.reader = threading.Thread(target=worker.listen, args=(progress, self._notice), daemon=True)
            worker.reader.start()
            try:
                worker.say(orders.written())  # and stdin is left open: a worker ends when this end of the pipe does
            except ConnectionLost:
                continue  # it has something to say about that
        for worker in self._workers:
            worker.ready.wait()
            if not worker.weight_bytes:
                rank, why = worker.rank, worker.why()
                self.close()
                raise CheckpointError(f"The model's process of rank {rank} could not start: {why.strip()}")
        try:
            self.wire = Wire(meet(Path(self._meeting.name), 0, world, self._backend), self._backend, self._home)
            self.wire.open()
        except (RuntimeError, ConnectionLost) as error:
            raise self.failed(error) from error

    def _notice(self, worker: Worker) -> None:
        """In the thread that listened to a worker which has ended."""
        if worker in self._workers:
            self._gone.put(worker)
            if self.wire is not None:
                self.wire.lose()


def backend_for(devices: Sequence[torch.device]) -> str:
    """NCCL wants a card for each rank."""
    cards = {(device.type, device.index or 0) for device in devices}
    apart = len(cards) == len(devices) and all(kind == "cuda" for kind, _ in cards)
    return "nccl" if apart and dist.is_nccl_available() else "gloo"


class ConnectionLost(Exception):
    """A rank is gone, and which is for its own words to tell."""


class Group(Protocol):
    """What ranks talk in; each call returns something to wait for."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any: ...

    def broadcast(self, tensor: Tensor, root: int) -> Any: ...

    def abort(self) -> None: ...


class Wire:
    """What sums go over. Satisfies model_host.models.deepseek_v2.Together.

    gloo notices that a rank has gone, and raises. NCCL does not: what was launched waits on the device, and whoever waits for the device
    with it. So whoever notices calls `lose`, from a thread of its own: the sums end, with any numbers, and `check` raises. What was
    captured may not be launched from then on, for the memory that it uses is gone.
    """

    def __init__(self, group: Group, backend: str, device: torch.device) -> None:
        """`device` is this rank's."""
        self._group, self._device, self._notices = group, device, backend == "gloo"
        self._launching = threading.Lock()
        self.is_lost = False
        self._sum = c10d.AllreduceOptions()
        self._sum.asyncOp = self._notices  # on a GPU in the stream of what comes before and after

    def open(self) -> None:
        """The first sum, for which the ranks connect. Raises ConnectionLost."""
        self.summed(torch.zeros(1, device=self._device))
        self.wait()

    def summed(self, part: Tensor) -> Tensor:
        """Raises ConnectionLost."""
        if not self._notices:
            self._do(lambda: self._group.allreduce([part], self._sum))
            return part
        message = part.to("cpu", torch.float32)
        self._do(lambda: self._group.allreduce([message], self._sum))
        return message.to(part.device, part.dtype)

    def give(self, tensor: Tensor) -> Tensor:
        """What rank 0 gives, which the others have memory for. Raises ConnectionLost."""
        message = tensor.to("cpu") if self._notices else tensor.contiguous()
        self._do(lambda: self._group.broadcast(message, 0))
        return message.to(tensor.device)

    def launch(self, run: Callable[[], None]) -> None:
        """Raises ConnectionLost."""
        with self._launching:
            self._check()
            run()

    def wait(self) -> None:
        """Until this rank's device has done all it was given. Raises ConnectionLost."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self.check()

    def check(self) -> None:
        """Raises ConnectionLost if a rank is."""
        with self._launching:
            self._check()

    def lose(self) -> None:
        """Ends the connection; from any thread. Returns once captured graphs are gone too."""
        has_lock = self._launching.acquire(timeout=LAUNCH_S)
        was_lost, self.is_lost = self.is_lost, True
        if has_lock:
            self._launching.release()
        if not was_lost and not self._notices:
            self._group.abort()

    def _check(self) -> None:
        if self.is_lost:
            raise ConnectionLost("a process has ended")

    def _do(self, begin: Callable[[], Any]) -> None:
        try:
            with self._launching:
                self._check()
                work = begin()
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise ConnectionLost(str(error).splitlines()[0]) from error


def meet(folder: Path, rank: int, world: int, backend: str) -> Group:
    """The group of all ranks."""
    store = c10d.FileStore(str(folder / backend), world)
    store.set_timeout(MEETING)
    if backend == "nccl":
        for name, value in OF_NCCL.items():
            os.environ.setdefault(name, value)
        nccl: Any = c10d.ProcessGroupNCCL
        cards: Group = nccl(store, rank, world, nccl.Options())
        return cards
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = FOREVER
    group: Group = gloo(store, rank, world, options)
    return group
