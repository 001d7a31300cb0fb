"""Keeps one model for all who use it, and ends when nobody has used it for long enough.

Run as `python -m model_host.keeper` by `meeting`, which see; its orders stand on stdin. Owns: the engine, the connections, and how long it
stays. It listens before it loads, so that whoever comes meanwhile hears how far it is. What it says beside its answers goes to its log.
"""

import asyncio
import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from model_host.errors import EngineError
from model_host.generation import Engine, Generation, Request
from model_host.line import MAX_LINE_BYTES, read, written, written_error
from model_host.meeting import Place
from model_host.wanted import Wanted, load

FIRST_VISIT_S = 30.0
"""Whoever started it comes within this time, or is no more."""
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Visitor:
    """A connection, and what is being answered there."""

    writer: asyncio.StreamWriter
    running: dict[int, Generation] = field(default_factory=dict)
    keep_s: float = 0.0
    """How long to stay when this one was the last to leave."""

    def say(self, **said: Any) -> None:
        self.writer.write(written(**said))


class Keeper:
    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._engine: Engine | None = None
        self._news: dict[str, Any] = {"doing": "starting", "share": 0.0}
        """What whoever comes is told first."""
        self._visitors: set[Visitor] = set()
        self._keep_s = FIRST_VISIT_S
        self._visited, self._deserted = asyncio.Event(), asyncio.Event()
        self._deserted.set()
        self._end = asyncio.Event()
        self._answering: set[asyncio.Task[None]] = set()

    async def keep(self, place: Path) -> None:
        """Until nobody has been here for long enough, or the model cannot be loaded."""
        server = await asyncio.start_unix_server(self._receive, place, limit=MAX_LINE_BYTES)
        tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._left_alone())]
        await self._end.wait()
        place.unlink(missing_ok=True)
        server.close()
        for task in tasks:
            task.cancel()
        if self._engine is not None:
            self._engine.close()

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()

        def progress(what: str, share: float) -> None:
            loop.call_soon_threadsafe(self._tell, {"doing": what, "share": share})

        try:
            self._engine = await loop.run_in_executor(ThreadPoolExecutor(1, "load"), load, self._wanted, progress)
        except EngineError as error:
            self._tell({"failed": written_error(error)})
        except Exception as error:
            log.exception("The model cannot be loaded.")
            self._tell({"failed": ["EngineError", f"Loading {self._wanted.model} failed: {error!r}. Run: deepseek-lsp doctor"]})
        else:
            self._tell({"facts": self._engine.facts})
            return
        self._end.set()

    def _tell(self, news: dict[str, Any]) -> None:
        self._news = news
        for visitor in self._visitors:
            visitor.say(**news)

    async def _left_alone(self) -> None:
        while True:
            await self._deserted.wait()
            try:
                async with asyncio.timeout(self._keep_s):
                    await self._visited.wait()
            except TimeoutError:
                self._end.set()
                return

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitor = Visitor(writer)
        self._visitors.add(visitor)
        self._visited.set()
        self._deserted.clear()
        visitor.say(**self._news)
        try:
            while line := await reader.readline():
                self._take(visitor, json.loads(line))
        except (ConnectionError, ValueError) as error:  # broken off, maybe within a line
            log.warning("A connection broke off: %r", error)
        except asyncio.CancelledError:
            pass  # all is at its end, and Python 3.11 would complain of a task that says so
        finally:
            for generation in visitor.running.values():
                generation.cancel()
            self._visitors.discard(visitor)
            if not self._visitors:
                self._keep_s = visitor.keep_s
                self._visited.clear()
                self._deserted.set()
            writer.close()

    def _take(self, visitor: Visitor, said: dict[str, Any]) -> None:
        if "keep_s" in said:
            visitor.keep_s = said["keep_s"]
        elif "leave" in said:
            is_unused = self._visitors == {visitor}
            visitor.say(leaving=is_unused)
            if is_unused:
                self._end.set()
        elif "cancel" in said and (generation := visitor.running.get(said["cancel"])) is not None:
            generation.cancel()
        elif "ask" in said and self._engine is not None:
            number = said["ask"]
            try:
                visitor.running[number] = generation = self._engine.submit(read(Request, said["request"]))
            except EngineError as error:
                visitor.say(answer=number, error=written_error(error))
                return
            task = asyncio.create_task(self._answer(visitor, number, generation))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, visitor: Visitor, number: int, generation: Generation) -> None:
        told = 0
        try:
            async for text in generation:
                told = self._tell_logprobs(visitor, number, generation, told)
                visitor.say(answer=number, text=text)
                await visitor.writer.drain()
            self._tell_logprobs(visitor, number, generation, told)
            visitor.say(answer=number, cost=generation.cost)
        except EngineError as error:
            visitor.say(answer=number, error=written_error(error))
        except ConnectionError:
            generation.cancel()
        finally:
            visitor.running.pop(number, None)

    def _tell_logprobs(self, visitor: Visitor, number: int, generation: Generation, told: int) -> int:
        """Returns how many the visitor has then."""
        for logprob in generation.logprobs[told:]:
            visitor.say(answer=number, logprob=logprob)
        return len(generation.logprobs)


def held(lock: Path) -> TextIO | None:
    """The lock, or None where another process has it."""
    while True:
        opened = lock.open("w")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened.fileno()), lock.stat()):
                return opened
        opened.close()  # whoever had it before has just taken it away


def main() -> None:
    wanted, *names = json.load(sys.stdin)
    place = Place(*map(Path, names))
    os.umask(0o077)
    if (lock := held(place.lock)) is None:
        return  # another one is there
    with lock:
        place.log.open("w").close()
        faulthandler.enable()
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        place.socket.unlink(missing_ok=True)
        asyncio.run(Keeper(Wanted(**wanted)).keep(place.socket))
        sys.stderr.flush()
        if not place.log.stat().st_size:
            place.log.unlink()
        place.lock.unlink()
        os._exit(0)  # a thread that still loads would be waited for


if __name__ == "__main__":
    main()
