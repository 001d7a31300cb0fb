"""An engine elsewhere: a client of vLLM, SGLang, llama-server, or whatever else speaks OpenAI's protocol. Satisfies
model_host.generation.Engine.

Owns: the connection, and what is asked again. What leaves the machine is a request's prompt, and it goes to the one address that the user
named: redirects are not followed.
"""

import asyncio
import json
import random
import ssl
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace

import httpx2

from model_host.errors import EngineClosed, EngineError, RequestError
from model_host.generation import Facts, Finish, Generation, Request
from model_host.remote.answers import EventStream, Reading, code_in, parts_of
from model_host.remote.connection import closing_what_is_left, of_client, whole
from model_host.remote.endpoint import Endpoint, tls
from model_host.remote.questions import CHARS_PER_TOKEN, Question, question
from model_host.remote.refusals import asked_to_wait_s, is_no_room, message_in, readable, refusal, unreachable, without_chat
from model_host.remote.served import CONNECT_S, Served, served_at, why_without_chat, why_without_fim
from model_host.stops import StopStrings

ATTEMPTS = 4
BACKOFF_S = 0.25
"""Before the second attempt; doubled for each further one, and drawn between half and whole of it."""
LONGEST_WAIT_S = 10.0
"""More than this is not waited for, even when the server asks for it."""
AFTERWORD_S = 1.0
"""So long what a server may still tell of an answer that has ended is waited for: what it cost, and that this is all."""
CLOSING_S = 0.05
"""So long the end of the response itself is, which leaves the connection open for the next request."""
DONE = "[DONE]"
OF_JSON = {"Content-Type": "application/json"}
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def connect(where: Endpoint) -> "RemoteEngine":
    """An engine that asks `where`, once that has answered. Raises EngineError when it is not there, or does not serve the model."""
    started = time.monotonic()
    verify = tls(where)
    served = served_at(where, verify)
    facts = Facts(
        checkpoint=readable(served.model),
        device=where.host,
        dtype="its own type",
        parameters=0,
        weight_bytes=0,
        context_tokens=served.context_tokens,
        without_fim=why_without_fim(where, served),
        without_chat=why_without_chat(where, served),
        load_s=time.monotonic() - started,
    )
    return RemoteEngine(where, served, facts, verify)


class TryAgain(Exception):
    """Nothing was said yet, and a second attempt may go better."""

    def __init__(self, sentence: str, wait_s: float = 0.0, *, without_extras: bool = False) -> None:
        super().__init__(sentence)
        self.sentence, self.wait_s, self.without_extras = sentence, wait_s, without_extras


class NoRoom(RequestError):
    """The prompt is too long for the server. That of a hole can be cut shorter."""


class RemoteEngine:
    """Satisfies model_host.generation.Engine. One thread with an event loop of its own talks to the server."""

    def __init__(self, where: Endpoint, served: Served, facts: Facts, verify: ssl.SSLContext) -> None:
        self._where, self._served, self._facts, self._verify = where, served, facts, verify
        self._refuses_extras = False
        self._loop = asyncio.new_event_loop()
        patience = httpx2.Timeout(None, connect=CONNECT_S, write=where.timeout_s)  # reading has limits of its own
        self._client = httpx2.AsyncClient(**of_client(where, verify), timeout=patience)
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> Facts:
        return self._facts

    def submit(self, request: Request) -> Generation:
        generation = Generation()
        reading = Reading(StopStrings(request.stop), time.monotonic(), request.max_new_tokens)
        with self._lock:
            if self._is_closed:
                raise EngineClosed("The engine was shut down.")
            asking = asyncio.run_coroutine_threadsafe(self._ask(request, generation, reading), self._loop)

        def stop() -> None:
            """Has the task leave its stream, which closes the connection, which is what servers end the work at."""
            asking.cancel()

        generation.when_cancelled(stop)
        asking.add_done_callback(lambda asked: self._end(asked, generation, reading))
        return generation

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _end(self, asked: "Future[Finish]", generation: Generation, reading: Reading) -> None:
        """Feeds what ends the generation, whatever happened. Called once, by whichever thread ended it: at once when it is cancelled."""
        if asked.cancelled():
            is_wanted = generation.is_cancelled
            generation.feed(reading.cost(Finish.CANCELLED) if is_wanted else EngineClosed("The engine was shut down."))
        elif (error := asked.exception()) is None:
            if text := reading.rest():
                generation.feed(text)
            generation.feed(reading.cost(asked.result()))
        elif isinstance(error, EngineError):
            generation.feed(error)
        else:
            generation.feed(EngineError(f"The answer of {self._where.host} could not be read: {error!r}. Please report it."))

    async def _ask(self, request: Request, generation: Generation, reading: Reading) -> Finish:
        """Asks with as much of a hole's surroundings as there proves to be room for. A question is not cut."""
        asked, refused = None, None
        for chars_per_token in CHARS_PER_TOKEN:
            shorter = question(request, self._where, self._served, chars_per_token)
            if shorter == asked:
                continue
            asked = shorter
            try:
                return await self._insist(asked, generation, reading)
            except NoRoom as error:
                refused = error
        assert refused is not None
        raise refused

    async def _insist(self, asked: Question, generation: Generation, reading: Reading) -> Finish:
        """Asks as often as is worth it; once a word of the answer was shown there is no second attempt."""
        with_extras = bool(asked.extras) and not self._refuses_extras
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._read(asked, with_extras, generation, reading)
            except TryAgain as error:
                with_extras = with_extras and not error.without_extras
                backoff_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                wait_s = 0.0 if error.without_extras else max(backoff_s, error.wait_s)
                if attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                    raise EngineError(error.sentence) from error
                await asyncio.sleep(wait_s)
        raise AssertionError

    async def _read(self, asked: Question, with_extras: bool, generation: Generation, reading: Reading) -> Finish:
        where = self._where
        body = json.dumps(asked.body | asked.extras if with_extras else asked.body, ensure_ascii=False).encode("utf-8", "replace")
        reading.sent_at = time.monotonic()
        try:
            async with (
                asyncio.timeout(where.timeout_s) as patience,
                closing_what_is_left() as watched,
                self._client.stream("POST", asked.path, content=body, headers=OF_JSON, extensions=watched) as response,
            ):
                if not response.is_success:
                    await self._refused(response, asked, with_extras)
                if asked.extras and not with_extras:  # taken without them: it was them that was refused, not the request
                    self._refuses_extras = True
                async for event in self._events(response):
                    if not reading.is_done and self._take(event, generation, reading):
                        break  # which closes the connection
                    patience.reschedule(self._next_by(reading, patience.when() or 0.0))
        except (httpx2.HTTPError, TimeoutError) as error:
            if reading.finish is not None:  # it said that it ended, and then forgot to
                return reading.finish
            sentence = unreachable(where, error)
            if not reading.pieces:
                # who waited for a whole time-out is not asked to wait for three more
                raise EngineError(sentence) if isinstance(error, TimeoutError) else TryAgain(sentence) from error
            if isinstance(error, TimeoutError):
                sentence = f"{where.host} fell silent for {where.stall_s:g} s within its answer: see its log, or raise remote.stall_s."
            raise EngineError(sentence) from error
        if reading.finish is not None:
            return reading.finish
        lost = f"{where.host} ended the connection within its answer: see its log."
        raise EngineError(lost) if reading.pieces else TryAgain(lost)

    async def _refused(self, response: httpx2.Response, asked: Question, with_extras: bool) -> None:
        content, status = (await whole(response)).decode("utf-8", "replace"), response.status_code
        if asked.kind == "chat" and (reason := without_chat(self._where, status, content, is_listed=self._served.is_listed)):
            self._facts = replace(self._facts, without_chat=reason)
            raise RequestError(f"{reason} Ask again.")
        sentence = refusal(self._where, status, content, asked.kind)
        if is_no_room(status, content):
            raise NoRoom(sentence)
        if status in (400, 422):
            raise TryAgain(sentence, without_extras=True) if with_extras else RequestError(sentence)
        if status in TRY_AGAIN:
            raise TryAgain(sentence, asked_to_wait_s(response.headers.get("retry-after", "")))
        raise EngineError(sentence)

    async def _events(self, response: httpx2.Response) -> AsyncIterator[str]:
        """The data of every event; that of an answer which is not streamed is one."""
        kind = response.headers.get("content-type", "")
        if "html" in kind:
            raise EngineError(f"{self._where.host} answers with a web page: check remote.url, which ends in /v1.")
        if "json" in kind:
            yield (await whole(response)).decode("utf-8", "replace")
            yield DONE
            return
        stream = EventStream()
        async for chunk in response.aiter_bytes():
            for event in stream.add(chunk):
                yield event
        for event in stream.end():
            yield event

    def _next_by(self, reading: Reading, expected_by: float) -> float:
        """When the next event has to have come, on the loop's clock, after one that came now. Comments are no events, so a server that does
        nothing but keep the connection alive is given up."""
        now = asyncio.get_running_loop().time()
        if reading.is_done:
            return min(expected_by, now + CLOSING_S)
        if reading.finish is not None:
            return min(expected_by, now + AFTERWORD_S)
        by = now + self._where.stall_s
        return by if reading.pieces else max(by, expected_by)

    def _take(self, event: str, generation: Generation, reading: Reading) -> bool:
        """Feeds what one event says. Whether nothing that follows is of interest."""
        if event == DONE:
            reading.is_done, reading.finish = True, reading.finish or Finish.END
            return False
        try:
            said = json.loads(event)
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{self._where.host} answers with something that is not JSON: it does not speak OpenAI's protocol."
            ) from error
        if not isinstance(said, dict) or said.get("error"):
            status = code_in(said)
            if 400 <= status < 500:  # vLLM begins an answer before it has looked at all of the request
                raise RequestError(refusal(self._where, status, event))
            words = message_in(event) if isinstance(said, dict) else ""
            raise EngineError(f"{self._where.host} failed within its answer{words}: see the server's own log.")
        if isinstance(said.get("usage"), dict):
            reading.usage = said["usage"]
        text, ended, logprobs = parts_of(said)
        if text and reading.pieces == reading.max_pieces:
            reading.finish = Finish.LENGTH
            return True
        if text:
            reading.last_at = time.monotonic()
            reading.first_at = reading.first_at or reading.last_at
            reading.pieces += 1
        for logprob in logprobs:
            generation.feed(logprob)
        if shown := reading.stops.add(reading.ends.add(reading.whole(text))):
            generation.feed(shown)
        if reading.stops.has_come or reading.ends.has_come:
            reading.finish = Finish.STOP if reading.stops.has_come else Finish.END
            return True
        reading.finish = ended or reading.finish
        return False
