"""The processes of a model whose heads and experts are divided over devices: started, told what to do, noticed when they die or hang.

Owns: the processes, and what is told of them. Rank 0 is the caller's process; each of the others has a portion of every layer, and a copy
of the latents. What the others are told goes to their stdin; what sums go over is `wire`'s.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from model_host.errors import CheckpointError, RankLost
from model_host.generation import Progress
from model_host.orders import ASKED, Command, Orders, Post, written
from model_host.wire import MEETING, ConnectionLost, Wire, backend_for, meet

LAST_WORDS_S = 5.0
"""How long a broken worker may take to say why, and a killed one to be gone."""
SILENCE_S = 300.0
"""How long a worker that reads weights may say nothing. It speaks at least once a tensor (`checkpoints.SIGN_S`); the largest of the family,
the 236B's embeddings, are 1.05 GB, which a disk of 3.5 MB/s reads in that time. Starting Python and torch takes less."""
STILL_S = 120.0
"""How long the ranks may come no further in what they do together: no sum is done, or launched on a GPU. A step there is a fraction of a
second (`engine.CHUNK_S`); 256 tokens, the first chunk, over a layer of the 236B in a CPU's memory are a second or two."""
LOOKS = 20
"""So often is that looked at meanwhile."""
AGAIN = "If that happens again, the system's log (dmesg) may tell of a device that fails; the setting device leaves it out."
ANEW = "All of them are started anew with the next request."
OVER = "The model's processes were shut down."
LOST = 3
"""Exit status of a worker whose connection to the others broke: most likely no failure of its own."""


@dataclass(slots=True, eq=False)
class Worker:
    """A process, and what it has said so far."""

    rank: int
    device: str
    process: subprocess.Popen[str]
    said_at: float = field(default_factory=time.monotonic)
    share: float = 0.0
    """Of its weights, that it has read."""
    weight_bytes: int = 0
    """Not 0 once it has all of them."""
    failure: str = ""
    lost: str = ""
    """How its connection broke."""
    waits: bool = False
    stands: str = ""
    """Whether it waits for others, and where it is, once it was asked."""
    is_gone: bool = False

    def listen(self, heard: Callable[["Worker"], None]) -> None:
        """Reads what the worker says, line by line, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                said: Any = json.loads(line)
            except ValueError:
                said = None
            if not isinstance(said, dict):
                continue  # a library's own words
            self.said_at = time.monotonic()
            self.share = float(said.get("share", self.share))
            self.weight_bytes = int(said.get("weight_bytes", self.weight_bytes))
            self.failure, self.lost = said.get("failure", self.failure), said.get("lost", self.lost)
            self.waits, self.stands = said.get("waits", self.waits), said.get("stands", self.stands)
            heard(self)
        self.is_gone = True
        heard(self)

    def say(self, line: str) -> None:
        """Raises ConnectionLost when it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise ConnectionLost("a process has ended") from error

    def ask(self) -> None:
        """Has it say where it stands. In a thread of its own: nobody may read what it is told."""
        with suppress(ConnectionLost):
            self.say(ASKED)

    def why(self) -> tuple[int, str]:
        """What has become of one that is gone, for the user, and before it how likely that is the cause: 0 its own failure, 1 its end,
        2 what the end of another did to it."""
        if self.failure:
            return 0, self.failure.strip()
        try:
            code = self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return 1, "it has closed its stdout"
        if code == LOST:
            return 2, f"its connection to the others broke ({self.lost})"
        if code == -9:
            return 1, "it was ended by signal 9, as the system does with processes when memory runs out"
        return 1, f"it was ended by signal {-code}" if code < 0 else f"it ended with status {code}"


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
    ) -> None:
        """`home` is the device of rank 0."""
        self._folder, self._posts, self._home = folder, tuple(posts), home
        self._precision, self._dtype, self._threads, self._kernels = precision, dtype, threads, kernels
        self._backend = backend_for([home, *(torch.device(post.device) for post in posts)])
        self.captures = self._backend == "nccl"
        """Whether ranks may run captured graphs, in which there are sums."""
        self._workers: list[Worker] = []
        self._news = threading.Condition()
        """Something was heard of a worker."""
        self._progress: Progress = lambda what, share: None
        self._own_share = self._told = 0.0
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self.wire: Wire | None = None
        self._is_watched = False
        self._reason = ""
        """Why the workers were ended, where they did not end by themselves."""
        self._is_over = False

    @property
    def weight_bytes(self) -> int:
        return sum(worker.weight_bytes for worker in self._workers)

    @property
    def is_running(self) -> bool:
        return self.wire is not None

    def start(self, progress: Progress) -> None:
        """Starts the workers, which read their weights from now on. `progress` is told what the slowest rank has read. Raises
        CheckpointError."""
        self._meeting = tempfile.TemporaryDirectory(prefix="deepseek-lsp-", ignore_cleanup_errors=True)
        self._progress, self._own_share, self._told, self._reason = progress, 0.0, 0.0, ""
        for rank, post in enumerate(self._posts, start=1):
            try:
                worker = self._started(rank, post.device)
            except OSError as error:
                self.close()
                raise CheckpointError(f"The model's process of rank {rank} on {post.device} could not start: {error}.") from error
            threading.Thread(target=worker.listen, args=(self._heard,), daemon=True).start()
            with suppress(ConnectionLost):  # it has something to say about that
                worker.say(self._orders(rank, post).written())  # and stdin is left open: a worker ends when this end of the pipe does

    def _started(self, rank: int, device: str) -> Worker:
        with self._news:
            if self._is_over:
                raise CheckpointError(OVER)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "model_host.worker"],  # -P: never code from the folder that an editor was started in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in a terminal, which stops an answer, is not for them
            )
            self._workers.append(Worker(rank, device, process))
            return self._workers[-1]

    def _orders(self, rank: int, post: Post) -> Orders:
        assert self._meeting is not None
        return Orders(
            folder=str(self._folder),
            precision=self._precision,
            dtype=str(self._dtype).removeprefix("torch."),
            threads=self._threads,
            kernels=self._kernels,
            captures=self.captures,
            rank=rank,
            post=post,
            meeting=self._meeting.name,
            world=len(self._posts) + 1,
            backend=self._backend,
        )

    def beside(self, what: str, share: float) -> None:
        """To be told how much rank 0 has read of its own weights, while the others read theirs. Raises CheckpointError when one of them
        will never be done, so that rank 0 need not be either."""
        with self._news:
            self._check()
            self._own_share = share
            self._tell()

    def join(self) -> None:
        """Waits until the others have their weights, and connects with them. Raises CheckpointError."""
        with self._news:
            while not all(worker.weight_bytes for worker in self._workers):
                self._news.wait(self._check())
        assert self._meeting is not None
        met: Future[Wire] = Future()
        # In a thread that can be left: as long as ranks look for each other, nothing ends that but a time-out, and with NCCL not even one.
        threading.Thread(target=self._meet, args=(Path(self._meeting.name), met), daemon=True).start()
        with self._news:
            self._news.wait_for(lambda: met.done() or self._is_one_gone, MEETING.total_seconds())
            if met.done() and met.exception() is None and not self._is_one_gone:
                self.wire = met.result()
                threading.Thread(target=self._watch, args=(self.wire,), daemon=True).start()
                return
            error = met.exception() if met.done() else f"not in {MEETING.total_seconds():.0f} seconds"
            raise CheckpointError(
                self._end("could not start")
                or f"The model's processes could not connect ({error}). With device set to a single one there is nothing to connect."
            )

    def _meet(self, folder: Path, met: "Future[Wire]") -> None:
        try:
            if self._home.type == "cuda":
                torch.cuda.set_device(self._home)
            wire = Wire(meet(folder, 0, len(self._posts) + 1, self._backend), self._backend, self._home)
            wire.open(timedelta(seconds=2 * STILL_S))  # which ends the wait for one that cannot even be killed
            met.set_result(wire)
        except BaseException as error:
            met.set_exception(error)
        with self._news:
            self._news.notify_all()

    def _check(self) -> float:
        """How many seconds those that still read may be silent. Raises CheckpointError if one of the workers will never be ready."""
        if self._is_one_gone:
            raise CheckpointError(self._end("could not start"))
        reading = [worker for worker in self._workers if not worker.weight_bytes]
        worker = min(reading, key=lambda worker: worker.said_at, default=None)
        if worker is None:
            return SILENCE_S
        if (left := worker.said_at + SILENCE_S - time.monotonic()) <= 0:
            self.close()
            raise CheckpointError(
                f"The model's process of rank {worker.rank} on {worker.device} has read nothing for {SILENCE_S / 60:.0f} minutes, after"
                f" {worker.share:.0%} of its weights: the disk of {self._folder} does not answer. See whether its files can be read,"
                " and copy them to a disk of this machine if not."
            )
        return left

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around whatever may have to wait for the others. Where it comes no further, they are ended, which ends the wait."""
        if self.wire is not None:
            self.wire.moves += 1
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False

    def _watch(self, wire: Wire) -> None:
        """In a thread of its own, as long as there is this connection. Counts looks, not seconds, which pass too while the user
        has stopped all of this."""
        looks, moves = 0, -1
        while looks < LOOKS or not self._give_up(wire):
            with self._news:
                if self._news.wait_for(lambda: self.wire is not wire, STILL_S / LOOKS):
                    return
            looks = looks + 1 if self._is_watched and moves == wire.moves else 0
            moves = wire.moves

    def _give_up(self, wire: Wire) -> bool:
        """Ends the workers and what waits for them, unless they come further while they are asked."""
        moves, reason = wire.moves, self._where_they_stand()
        with self._news:
            if self.wire is not wire or wire.moves != moves:
                return False
            self._reason = self._of_the_gone("failed") or reason
            for worker in self._workers:
                worker.process.kill()
        wire.lose()
        return True

    def _where_they_stand(self) -> str:
        """Which worker hangs, as far as that can be told: one that does not answer, else one that does not wait for others."""
        workers = self._workers
        for worker in workers:
            worker.stands = ""
            threading.Thread(target=worker.ask, daemon=True).start()
        with self._news:
            self._news.wait_for(lambda: all(worker.stands or worker.is_gone for worker in workers), LAST_WORDS_S)
        silent = next((worker for worker in workers if not worker.stands and not worker.is_gone), None)
        busy = next((worker for worker in workers if not worker.waits), None)
        still = f"come no further in {STILL_S:.0f} seconds"
        if (stuck := silent or busy) is None:
            return f"The model's processes have {still} and wait for rank 0 on {self._home}, or a device for another. {AGAIN}"
        why = f"it stands in\n{stuck.stands}" if stuck.stands else "it does not answer, as when it was stopped, or its device fails. "
        return f"The model's process of rank {stuck.rank} on {stuck.device} has {still}: {why}{AGAIN}"

    @property
    def _is_one_gone(self) -> bool:
        return any(worker.is_gone for worker in self._workers)

    def tell(self, command: Command) -> None:
        """Has all others do it, after what they were told before. Raises ConnectionLost."""
        assert self.wire is not None
        self.wire.check()
        line = written(command)
        for worker in self._workers:
            worker.say(line)

    def failed(self, error: BaseException) -> RankLost:
        """Ends the workers, and says what has happened to the first that had something happen to it."""
        reason = self._end("failed") or f"The connection to the model's processes was lost ({error})."
        return RankLost(f"{reason}\n{ANEW}")

    def restart(self) -> None:
        """Starts them once more and connects with them. Raises RankLost."""
        try:
            self.start(lambda what, share: None)
            self.join()
        except CheckpointError as error:
            raise RankLost(f"{error}\n{ANEW}") from error
        finally:
            if not self.is_running:
                self.close()

    def _end(self, how: str) -> str:
        """Ends the workers, and says who of them was the cause of that and why; nothing if none was."""
        with self._news:
            self._news.wait_for(lambda: self._is_all_gone or any(likely < 2 for likely, *_ in self._reasons()), LAST_WORDS_S)
            reason = self._reason or self._of_the_gone(how)
        self.close()
        return reason

    def _of_the_gone(self, how: str) -> str:
        """Who of those that are gone was the cause of that and why; nothing if none is gone."""
        if not (reasons := self._reasons()):
            return ""
        _, rank, why = min(reasons)
        return f"The model's process of rank {rank} on {self._posts[rank - 1].device} {how}: {why}"

    def _reasons(self) -> list[tuple[int, int, str]]:
        """How likely, whose and which, of all that are gone."""
        whys = [(worker.rank, worker.why()) for worker in self._workers if worker.is_gone]
        return [(likely, rank, why) for rank, (likely, why) in whys]

    @property
    def _is_all_gone(self) -> bool:
        return all(worker.is_gone for worker in self._workers)

    def stop(self) -> None:
        """Ends the workers for good, from any thread: their deaths are noticed as any other."""
        with self._news:
            self._is_over, self._reason = True, OVER
            for worker in self._workers:
                worker.process.kill()

    def close(self) -> None:
        """Ends the workers. Harmless when there are none. Graphs that sums were captured in have to be gone by now."""
        with self._news:
            wire, self.wire = self.wire, None
            workers, self._workers = self._workers, []
            self._news.notify_all()
        if wire is not None:
            wire.lose()
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):  # where a disk does not answer, even a killed process may wait for it
                worker.process.wait(LAST_WORDS_S)
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def _heard(self, worker: Worker) -> None:
        """In the thread that listens to a worker, whenever it has said something, and once it is gone."""
        with self._news:
            if worker not in self._workers:
                return
            wire = self.wire if worker.is_gone else None
            self._tell()
            self._news.notify_all()
        if wire is not None:
            wire.lose()

    def _tell(self) -> None:
        share = min([self._own_share, *(worker.share for worker in self._workers)])
        if share > self._told:
            self._told = share
            self._progress("reading weights", share)
