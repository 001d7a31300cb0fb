"""The engine of the process that all editors of a user share. Satisfies model_host.generation.Engine.

Owns: what is asked over the line to that process, and what becomes of it when the process dies: it fails with a sentence, and the next
request has it started anew. Knows nothing of torch.
"""

import itertools
import queue
import threading
import time
from dataclasses import replace
from typing import Any

from model_host.errors import EngineClosed, EngineError
from model_host.generation import Cost, Facts, Generation, Progress, Request
from model_host.line import read, read_error, read_logprob, written
from model_host.meeting import Line, Place, in_words, joined
from model_host.wanted import Wanted

RETRY_S = 30.0
"""A process that could not be started again is not tried at every keystroke."""


def connect(wanted: Wanted, *, keep_s: float, progress: Progress) -> "SharedEngine":
    """Raises EngineError, and OSError where there can be no such process (`meeting.why_alone`)."""
    began = time.monotonic()
    place = Place.of(wanted)
    line, facts = joined(wanted, place, keep_s, progress)
    return SharedEngine(wanted, place, keep_s, line, replace(facts, load_s=time.monotonic() - began))


class SharedEngine:
    """A thread hears what the process says; another one sends what there was no room for, so that the event loop never waits."""

    def __init__(self, wanted: Wanted, place: Place, keep_s: float, line: Line, facts: Facts) -> None:
        self._wanted, self._place, self._keep_s, self._facts = wanted, place, keep_s, facts
        self._lock = threading.Lock()
        self._running: dict[int, Generation] = {}
        self._ids = itertools.count(1)
        self._line: Line | None = None
        self._backlog: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._unsent = 0
        """Pieces of the backlog."""
        self._is_closed = False
        self._trouble = ""
        """Why nothing can be asked now."""
        self._restart_at = 0.0
        self._is_restarting = False
        self._talk(line)

    @property
    def facts(self) -> Facts:
        return self._facts

    def submit(self, request: Request) -> Generation:
        generation = Generation()
        with self._lock:
            if self._is_closed:
                raise EngineClosed("The engine was shut down.")
            if self._line is None:
                self._restart()
                generation.feed(EngineError(self._trouble))
                return generation
            number = next(self._ids)
            self._running[number] = generation
            self._send(self._line, written(ask=number, request=request))
        generation.when_cancelled(lambda: self._cancel(number))
        return generation

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            line, self._line = self._line, None
            waiting = self._forget()
        if line is not None:
            line.close()
            self._backlog.put(b"")
        for generation in waiting:
            generation.feed(EngineClosed("The engine was shut down."))

    def _cancel(self, number: int) -> None:
        with self._lock:
            if self._line is not None and number in self._running:
                self._send(self._line, written(cancel=number))

    def _forget(self) -> list[Generation]:
        waiting = list(self._running.values())
        self._running.clear()
        return waiting

    def _talk(self, line: Line) -> None:
        self._line, self._backlog, self._unsent = line, queue.SimpleQueue(), 0
        threading.Thread(target=self._send_rest, args=(line, self._backlog), name="to the model", daemon=True).start()
        threading.Thread(target=self._hear, args=(line,), name="from the model", daemon=True).start()

    def _send(self, line: Line, data: bytes) -> None:
        """What there is room for, at once. Called with the lock."""
        rest = data if self._unsent else data[line.send_now(data) :]
        if rest:
            self._unsent += 1
            self._backlog.put(rest)

    def _send_rest(self, line: Line, backlog: "queue.SimpleQueue[bytes]") -> None:
        while data := backlog.get():
            try:
                line.send(data)
            except OSError:
                return
            with self._lock:
                self._unsent -= 1

    def _hear(self, line: Line) -> None:
        for said in line:
            self._take(said)
        with self._lock:
            if self._line is not line:
                return
            self._line = None
            self._trouble = f"The model's process has ended{in_words(self._place)}; it is started anew with the next request."
            waiting = self._forget()
            self._backlog.put(b"")
        line.close()
        for generation in waiting:
            generation.feed(EngineError(self._trouble))

    def _take(self, said: dict[str, Any]) -> None:
        generation = self._running.get(said["answer"])
        if generation is None:
            return
        if "text" in said:
            generation.feed(said["text"])
        elif "logprob" in said:
            generation.feed(read_logprob(said["logprob"]))
        else:
            with self._lock:
                self._running.pop(said["answer"], None)
            generation.feed(read(Cost, said["cost"]) if "cost" in said else read_error(said["error"]))

    def _restart(self) -> None:
        """Has a thread start the process again, unless that is under way or has just failed."""
        if self._is_restarting or time.monotonic() < self._restart_at:
            return
        self._is_restarting, self._trouble = True, "The model's process has ended and is being started again."
        threading.Thread(target=self._rejoin, name="start the model again", daemon=True).start()

    def _rejoin(self) -> None:
        def progress(what: str, share: float) -> None:
            self._trouble = f"The model's process has ended and is being started again: {what}, {share:.0%}."

        try:
            place = Place.of(self._wanted)
            line, facts = joined(self._wanted, place, self._keep_s, progress)
        except (EngineError, OSError) as error:
            with self._lock:
                self._trouble = f"{error} It is tried again in a while."
                self._restart_at, self._is_restarting = time.monotonic() + RETRY_S, False
            return
        with self._lock:
            self._is_restarting = False
            if self._is_closed:
                line.close()
                return
            self._place, self._facts = place, facts
            self._talk(line)
