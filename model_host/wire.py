"""What sums go over between the ranks of a model: how they meet, and the connection while it lasts.

Owns: the group. Groups reach loopback only, and meet in a folder that nobody else can open. Between GPUs sums go by NCCL, else by gloo
through the host's memory. Knows nothing of processes, of who is in them, or of what is summed.
"""

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # groups of this process's own: torch.distributed has one of each for all

FOREVER = timedelta(days=365)
"""Workers wait for rank 0 as long as there is nothing to do; its death, or theirs, ends the wait."""
MEETING = timedelta(seconds=120)
"""How long rank 0 may look for the others, which all have their weights by then: of eight cards NCCL takes some seconds."""
LAUNCH_S = 1.0
"""How long launching sums may take, which returns at once unless it waits for a rank that has died."""
OF_NCCL = {
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "500",
}
"""Where the user has not set them: to meet on loopback; and that torch's own watchdog neither ends this process, which is the user's
server, nor writes files. Deaths are noticed here."""


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

    def set_timeout(self, timeout: timedelta) -> None: ...


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
        self.moves = 0
        """Changes whenever this rank has come further."""
        self._sum = c10d.AllreduceOptions()
        self._sum.asyncOp = self._notices  # on a GPU in the stream of what comes before and after

    def open(self, patience: timedelta = FOREVER) -> None:
        """The first sum, for which the ranks connect; from then on gloo waits so long for one. Raises ConnectionLost."""
        self.summed(torch.zeros(1, device=self._device))
        self.wait()
        if self._notices:
            self._group.set_timeout(patience)

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
        self.moves += 1

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
            self.moves += 1
        except RuntimeError as error:
            raise ConnectionLost(str(error).splitlines()[0]) from error


def meet(folder: Path, rank: int, world: int, backend: str) -> Group:
    """The group of all ranks, once they are all there. Raises ConnectionLost."""
    patience = FOREVER if rank else MEETING
    store = c10d.FileStore(str(folder / backend), world)
    store.set_timeout(patience)
    group: Group
    try:
        if backend == "nccl":
            for name, value in OF_NCCL.items():
                os.environ.setdefault(name, value)
            nccl: Any = c10d.ProcessGroupNCCL
            group = nccl(store, rank, world, nccl.Options())
        else:
            gloo: Any = c10d.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = patience
            group = gloo(store, rank, world, options)
    except RuntimeError as error:
        raise ConnectionLost(str(error).splitlines()[0]) from error
    return group
