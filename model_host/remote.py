"""An engine elsewhere: a client of vLLM, SGLang, llama-server, or whatever else speaks OpenAI's protocol. Satisfies
model_host.generation.Engine.

Owns: the connection, what a request looks like there, retries, and a sentence for everything that can go wrong with it. Holes are
written with DeepSeek's own tokens on this side, since few servers know them. What leaves the machine is a request's prompt, and it
goes to the one address that the user named: redirects are not followed.
"""

import asyncio
import json
import random
import re
import ssl
import stat
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from model_host import catalogue
from model_host.catalogue import Infilling
from model_host.errors import EngineClosed, EngineError, RequestError
from model_host.generation import Chat, Cost, Facts, Fim, Finish, Generation, Request, TokenLogprob
from model_host.stops import StopStrings

TOKEN_VARIABLE = "DEEPSEEK_ENGINE_TOKEN"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
NO_TEXT = (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)
"""What is never part of an answer: it ends there, as that of the engine here does."""
BAR = "｜"
ADDS_BOS = frozenset({"llamacpp"})
"""Servers, by what they say `owned_by` is, that begin every prompt with BOS themselves."""
OF_VLLM: dict[str, Any] = {
    "skip_special_tokens": False,  # else it leaves them out of the text and writes on, where our engine ends
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},  # most answers are left before the last event
}
MOST_STOPS = 4
"""OpenAI's limit, and vLLM's (0.32). What stands behind it is looked for on this side alone."""
CHARS_PER_TOKEN = (3.0, 1.5, 0.75, 0.3)
"""Of code, of numbers and signs, of Chinese, of Chinese in a small vocabulary: the tokenizer is on the other side, so a hole is cut by
these in turn until there is room for it."""
NO_ROOM = re.compile("context (length|size|window)", re.IGNORECASE)
"""How vLLM, SGLang and llama-server say that a prompt is too long."""
USUAL_CONTEXT_TOKENS = 16_384
"""Where the server does not say."""

ATTEMPTS = 4
BACKOFF_S = 0.25
"""Before the second attempt; doubled for each further one, and drawn between half and whole of it."""
LONGEST_WAIT_S = 10.0
"""More than this is not waited for, even when the server asks for it."""
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
CONNECT_S = 5.0
CANCEL_CHECK_S = 0.02
MAX_EVENT_BYTES = 8_000_000

FimForm = Literal["tokens", "suffix", "infill", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server and how to talk to it."""

    url: str
    """Up to and with /v1."""
    model: str = ""
    fim: FimForm = "tokens"
    token: str = field(default="", repr=False)
    ca_file: str = ""
    timeout_s: float = 60.0
    stall_s: float = 20.0

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]


def endpoint(
    *,
    url: str,
    model: str,
    fim: FimForm,
    token_file: str,
    ca_file: str,
    plain_http: bool,
    timeout_s: float,
    stall_s: float,
    environment: Mapping[str, str],
) -> Endpoint:
    """Checks what the user set. Raises EngineError with what to change."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineError(f"remote.url is {url!r}: set it to where the server listens, such as https://gpu.example.org/v1.")
    if parts.username or parts.password:
        raise EngineError(f"remote.url holds a password: put the token into {TOKEN_VARIABLE} or into remote.token_file instead.")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1") and not plain_http:
        raise EngineError(
            f"remote.url sends code to {parts.hostname} unencrypted: use https, or a tunnel (ssh -L 8000:localhost:8000 {parts.hostname})"
            " and http://localhost:8000/v1, or set remote.plain_http to true where the network is yours alone."
        )
    if ca_file and not Path(ca_file).expanduser().is_file():
        raise EngineError(f"remote.ca_file {ca_file!r} is not there: give a PEM file, or leave it empty for the system's certificates.")
    return Endpoint(
        url=url.rstrip("/"),
        model=model,
        fim=fim,
        token=environment.get(TOKEN_VARIABLE, "").strip() or read_token(token_file),
        ca_file=str(Path(ca_file).expanduser()) if ca_file else "",
        timeout_s=timeout_s,
        stall_s=stall_s,
    )


def read_token(file: str) -> str:
    """The token in `file`, which nobody but its owner may read; none where no file is named. Raises EngineError."""
    if not file:
        return ""
    path = Path(file).expanduser()
    try:
        readable_by_others = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        if readable_by_others:
            raise EngineError(f"remote.token_file {path} can be read by others: chmod 600 {path}")
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"remote.token_file {path} cannot be read ({error}): put the token there, and chmod 600.") from error
    if not token or not token.isascii() or any(character.isspace() for character in token):
        raise EngineError(f"remote.token_file {path} holds no token: put it there, on one line and alone.")
    return token


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of the model it serves."""

    model: str
    owner: str = ""
    context_tokens: int = USUAL_CONTEXT_TOKENS


def connect(where: Endpoint) -> "RemoteEngine":
    """An engine that asks `where`, once that has answered. Raises EngineError when it is not there, or does not serve the model."""
    started = time.monotonic()
    verify = tls(where)
    served = _served(where, verify)
    facts = Facts(
        checkpoint=served.model,
        device=where.host,
        dtype="its own type",
        parameters=0,
        weight_bytes=0,
        context_tokens=served.context_tokens,
        without_fim=why_without_fim(where, served.model),
        load_s=time.monotonic() - started,
    )
    return RemoteEngine(where, served, facts, verify)


def tls(where: Endpoint) -> ssl.SSLContext:
    """Certificates and names are always checked."""
    try:
        return ssl.create_default_context(cafile=where.ca_file or None)
    except (ssl.SSLError, OSError) as error:
        raise EngineError(f"remote.ca_file {where.ca_file} cannot be read as certificates ({error}): give a PEM file.") from error


def why_without_fim(where: Endpoint, model: str) -> str | None:
    if where.fim == "none":
        return "remote.fim is 'none', so holes are not filled: set it to 'tokens', 'suffix' or 'infill' where the model can infill."
    known = catalogue.named(model.rpartition("/")[2])
    if known is not None and known.infilling is Infilling.UNTRAINED:
        return f"{known.name} was not trained to fill in the middle: serve {catalogue.RECOMMENDED.name} for completions."
    return None


def headers(where: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {where.token}"} if where.token else {}


def _served(where: Endpoint, verify: ssl.SSLContext) -> Served:
    """Asks /models. A server that has no such list is believed to serve the model that is named."""
    patience = httpx2.Timeout(where.timeout_s, connect=CONNECT_S)
    try:
        answer = httpx2.get(f"{where.url}/models", headers=headers(where), verify=verify, timeout=patience, follow_redirects=False)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise EngineError(unreachable(where, error)) from error
    if answer.status_code in (401, 403):
        raise EngineError(refusal(where, answer.status_code, answer.text))
    try:
        listed = [entry for entry in answer.json()["data"] if isinstance(entry["id"], str)] if answer.is_success else []
    except (ValueError, KeyError, TypeError):
        listed = []
    found = next((entry for entry in listed if entry["id"] == where.model), None) if where.model else next(iter(listed), None)
    if found is None and listed:
        names = ", ".join(str(entry["id"]) for entry in listed[:5])
        raise EngineError(f"{where.host} does not serve {where.model!r}: set remote.model to one of {names}.")
    if found is None:
        if not where.model:
            unlisted = f"{where.host} does not list what it serves ({answer.status_code})"
            raise EngineError(f"{unlisted}: set remote.model, and check remote.url, which ends in /v1.")
        return Served(model=where.model)
    meta = found.get("meta") if isinstance(found.get("meta"), dict) else {}
    context = found.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    return Served(
        model=found["id"],
        owner=str(found.get("owned_by", "")),
        context_tokens=context if isinstance(context, int) and context > 0 else USUAL_CONTEXT_TOKENS,
    )


def unreachable(where: Endpoint, error: Exception) -> str:
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        cause = error.__cause__ or error.__context__ or error
        why = f"{type(error).__name__}: {error}" if str(error) else type(cause).__name__
        if "certificate" in str(error).lower():
            return f"The certificate of {where.host} is not trusted ({error}): set remote.ca_file to the one it was signed with."
        return f"Nothing answers at {where.url} ({why}): start the server there, or correct remote.url."
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return f"{where.host} did not answer within {where.timeout_s:g} s: it may be loading its model, or raise remote.timeout_s."
    return f"The connection to {where.host} was lost ({type(error).__name__}): it may have been restarted. Try again."


def refusal(where: Endpoint, status: int, body: str, *, of_hole: bool = False) -> str:
    """What an answer that is no success means to the user."""
    said = message_in(body)
    if of_hole and where.fim in ("suffix", "infill") and status in (400, 404, 501) and not is_no_room(status, body):
        return f"{where.host} may not know remote.fim = {where.fim!r} ({status}{said}): set it to 'tokens', and check remote.url."
    if status in (401, 403):
        return f"{where.host} refuses the token ({status}): put the right one into {TOKEN_VARIABLE} or remote.token_file."
    if status == 404:
        return f"{where.host} has no such address or model (404{said}): check remote.url, which ends in /v1, and remote.model."
    if status == 429:
        return f"{where.host} has too much to do (429): try again later."
    if 300 <= status < 400:
        return f"{where.host} sends elsewhere ({status}), which is not followed: set remote.url to the place itself."
    if status >= 500:
        return f"{where.host} failed on this request ({status}{said}): see the server's own log."
    if is_no_room(status, body):
        return f"{where.host} has no room for so long a prompt ({status}{said}): select less code, or serve the model with more context."
    return f"{where.host} does not take this request ({status}{said})."


def is_no_room(status: int, body: str) -> bool:
    return status == 413 or (status == 400 and NO_ROOM.search(message_in(body)) is not None)


def message_in(body: str) -> str:
    """The server's own words, where they are short enough to be read."""
    try:
        content = json.loads(body)
        said = content.get("message") or content.get("detail") or content["error"]
        said = said.get("message", "") if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    words = " ".join(str(said).split())
    return f": {words[:300].removesuffix('.')}" if words else ""


@dataclass(frozen=True, slots=True)
class Question:
    """A request as the server understands it."""

    path: str
    body: dict[str, Any]
    extras: dict[str, Any]
    """Fields of one server's own, left out where the server refuses them."""


def question(request: Request, where: Endpoint, served: Served, chars_per_token: float = CHARS_PER_TOKEN[0]) -> Question:
    """Raises RequestError when the request cannot be asked there."""
    sampling = request.sampling
    body: dict[str, Any] = {"model": served.model, "stream": True, "temperature": sampling.temperature}
    extras: dict[str, Any] = {"stream_options": {"include_usage": True}}
    if served.owner == "vllm":
        body, extras = body | OF_VLLM, {}
    if sampling.temperature > 0:
        body |= {"top_p": sampling.top_p, "seed": sampling.seed}
        extras |= {name: value for name, value in (("top_k", sampling.top_k), ("min_p", sampling.min_p)) if value}
    if sampling.repetition_penalty != 1.0:
        extras["repetition_penalty"] = sampling.repetition_penalty
    if request.stop:
        body["stop"] = list(request.stop[:MOST_STOPS])
    if request.grammar is not None:
        if request.grammar.kind != "json_schema":
            raise RequestError(f"A remote engine takes JSON schemas, not a grammar of the kind {request.grammar.kind}.")
        schema = {"name": "answer", "schema": json.loads(request.grammar.source), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request.prompt, Chat):
        messages = [{"role": message.role, "content": defused(message.content)} for message in request.prompt.messages]
        body |= {"messages": messages, "max_tokens": request.max_new_tokens}
        if request.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.logprobs}
        return Question(f"{where.url}/chat/completions", body, extras)
    room = int(max(served.context_tokens - request.max_new_tokens, 0) * chars_per_token)
    fim = cut(request.prompt, room)
    if where.fim == "infill":
        infill = {"input_prefix": fim.prefix, "input_suffix": fim.suffix, "prompt": fim.middle, "n_predict": request.max_new_tokens}
        others = {"input_extra": [{"filename": "repository", "text": fim.repository}]} if fim.repository else {}
        return Question(f"{where.url.removesuffix('/v1')}/infill", body | infill | others, {"cache_prompt": True})
    body["max_tokens"] = request.max_new_tokens
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    if where.fim == "suffix":
        body |= {"prompt": fim.repository + fim.prefix + fim.middle, "suffix": fim.suffix}
        return Question(f"{where.url}/completions", body, extras)
    if served.owner == "vllm":  # it adds BOS where the tokenizer's settings say so, and can be told not to
        body["add_special_tokens"] = False
    begin = "" if served.owner in ADDS_BOS else BOS
    repository, prefix, suffix, middle = map(defused, (fim.repository, fim.prefix, fim.suffix, fim.middle))
    body["prompt"] = f"{begin}{FIM_BEGIN}{repository}{prefix}{FIM_HOLE}{suffix}{FIM_END}{middle}"
    return Question(f"{where.url}/completions", body, extras)


def defused(text: str) -> str:
    """User text in which no special token is spelled out: the server would read it as one. The wide bars of `<｜...｜>` become plain
    ones, which is as near as text can come to it."""
    return text.replace(f"<{BAR}", "<|").replace(f"{BAR}>", "|>") if BAR in text else text


def cut(prompt: Fim, room_chars: int) -> Fim:
    """A hole's surroundings without what is farthest from it, where there is too much of them. The repository has a quarter at most,
    however long the file is, so that it is always cut alike."""
    repository = prompt.repository[: room_chars // 4]
    room = max(room_chars - len(repository) - len(prompt.middle), 0)
    suffix = prompt.suffix[: max(room // 4, room - len(prompt.prefix))]
    prefix = prompt.prefix[max(len(prompt.prefix) + len(suffix) - room, 0) :]
    return Fim(repository=repository, prefix=prefix, suffix=suffix, middle=prompt.middle)


class EventStream:
    """Server-sent events, found in bytes wherever those are cut (WHATWG HTML, 9.2.6); only the data of each."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def add(self, chunk: bytes) -> list[str]:
        """The data of the events that are complete now. A character is decoded once its line is there as a whole."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EngineError("The server sends a line without end: it does not speak OpenAI's protocol.")
        events = []
        for line in lines:
            text = line.rstrip(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events

    def end(self) -> list[str]:
        """An event whose empty line did not come before the end. Half a line is none."""
        self._rest = b""
        return self.add(b"\n")


@dataclass(slots=True)
class Reading:
    """What has come of one answer."""

    stops: StopStrings
    started_at: float
    ends: StopStrings = field(default_factory=lambda: StopStrings(NO_TEXT))
    sent_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    pieces: int = 0
    finish: Finish | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    half: str = ""
    """The first half of a character that a server has written as two escapes in two events."""

    def whole(self, piece: str) -> str:
        """The text so far without half characters: `\\ud83d` waits for `\\ude00`."""
        text = self.half + piece
        self.half = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""
        return text[: len(text) - len(self.half)].encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def rest(self) -> str:
        """What was held back at the answer's end as the beginning of something that did not come."""
        return "" if self.stops.has_come else self.stops.add(self.ends.end()) + self.stops.end()

    def cost(self, finish: Finish) -> Cost:
        prompt, new = (count_in(self.usage, name) for name in ("prompt_tokens", "completion_tokens"))
        details = self.usage.get("prompt_tokens_details")
        cached = min(count_in(details, "cached_tokens"), prompt) if isinstance(details, dict) else 0
        return Cost(
            finish=finish,
            cached_tokens=cached,
            computed_tokens=prompt - cached,
            new_tokens=new or self.pieces,
            queued_s=(self.sent_at or time.monotonic()) - self.started_at,
            first_token_s=self.first_at - self.sent_at if self.first_at else 0.0,
            decode_s=self.last_at - self.first_at,
        )


def count_in(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value > 0 else 0


class TryAgain(Exception):
    """Nothing was said yet, and a second attempt may go better."""

    def __init__(self, sentence: str, wait_s: float | None = None, *, without_extras: bool = False) -> None:
        super().__init__(sentence)
        self.sentence, self.wait_s, self.without_extras = sentence, wait_s, without_extras


class NoRoom(RequestError):
    """The prompt is too long for the server. That of a hole can be cut shorter."""


class RemoteEngine:
    """Satisfies model_host.generation.Engine. One thread with an event loop of its own talks to the server."""

    def __init__(self, where: Endpoint, served: Served, facts: Facts, verify: ssl.SSLContext) -> None:
        self._where, self._served, self._facts, self._verify = where, served, facts, verify
        self._refuses_extras = False
        self._running: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        patience = httpx2.Timeout(None, connect=CONNECT_S, write=where.timeout_s)  # reading has limits of its own
        self._client = httpx2.AsyncClient(headers=headers(where), verify=verify, timeout=patience, follow_redirects=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> Facts:
        return self._facts

    def submit(self, request: Request) -> Generation:
        if self._closed.is_set():
            raise EngineClosed("The engine was shut down.")
        generation = Generation()
        self._loop.call_soon_threadsafe(self._begin, request, generation)
        return generation

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _begin(self, request: Request, generation: Generation) -> None:
        task = self._loop.create_task(self._answer(request, generation))
        self._running[id(generation)] = task
        task.add_done_callback(lambda _: self._running.pop(id(generation), None))

    async def _answer(self, request: Request, generation: Generation) -> None:
        """Feeds the generation to its end, whatever happens."""
        reading = Reading(StopStrings(request.stop), time.monotonic())
        asking = asyncio.create_task(self._ask(request, generation, reading))
        try:
            while not asking.done() and not generation.is_cancelled:
                await asyncio.wait({asking}, timeout=CANCEL_CHECK_S)
            if not asking.done():  # leaving the stream closes its connection, which is what servers end the work at
                asking.cancel()
                await asyncio.wait({asking})
                generation.feed(reading.cost(Finish.CANCELLED))
                return
            finish = asking.result()
            if text := reading.rest():
                generation.feed(text)
            generation.feed(reading.cost(finish))
        except EngineError as error:
            generation.feed(error)
        except asyncio.CancelledError:
            asking.cancel()
            generation.feed(EngineClosed("The engine was shut down."))
            raise
        except Exception as error:
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
                wait_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0) if error.wait_s is None else error.wait_s
                if attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                    raise EngineError(error.sentence) from error
                await asyncio.sleep(wait_s)
        raise AssertionError

    async def _read(self, asked: Question, with_extras: bool, generation: Generation, reading: Reading) -> Finish:
        where = self._where
        body = asked.body | asked.extras if with_extras else asked.body
        reading.sent_at = time.monotonic()
        try:
            async with asyncio.timeout(where.timeout_s) as patience, self._client.stream("POST", asked.path, json=body) as response:
                if not response.is_success:
                    await self._refused(response, with_extras)
                if asked.extras and not with_extras:  # taken without them: it was them that was refused, not the request
                    self._refuses_extras = True
                async for event in self._events(response, patience):
                    if self._take(event, generation, reading):
                        return reading.finish or Finish.END
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

    async def _refused(self, response: httpx2.Response, with_extras: bool) -> None:
        content, status = (await response.aread()).decode("utf-8", "replace"), response.status_code
        sentence = refusal(self._where, status, content, of_hole=not response.url.path.endswith("/chat/completions"))
        if is_no_room(status, content):
            raise NoRoom(sentence)
        if status in (400, 422):
            raise TryAgain(sentence, 0.0, without_extras=True) if with_extras else RequestError(sentence)
        if status in TRY_AGAIN:
            asked_for = response.headers.get("retry-after", "")
            raise TryAgain(sentence, float(asked_for) if asked_for.isdigit() else None)
        raise EngineError(sentence)

    async def _events(self, response: httpx2.Response, patience: asyncio.Timeout) -> AsyncIterator[str]:
        """The data of every event; that of an answer which is not streamed is one. Each must come within `stall_s` of the last."""
        if "json" in response.headers.get("content-type", ""):
            yield (await response.aread()).decode("utf-8", "replace")
            return
        stream = EventStream()
        async for chunk in response.aiter_bytes():
            patience.reschedule(asyncio.get_running_loop().time() + self._where.stall_s)
            for event in stream.add(chunk):
                yield event
        for event in stream.end():
            yield event

    def _take(self, event: str, generation: Generation, reading: Reading) -> bool:
        """Feeds what one event says. Whether nothing of interest can follow."""
        if event == "[DONE]":
            return reading.finish is not None
        try:
            said = json.loads(event)
        except ValueError as error:
            raise EngineError(
                f"{self._where.host} answers with something that is not JSON: it does not speak OpenAI's protocol."
            ) from error
        if not isinstance(said, dict) or "error" in said:
            status = code_in(said)
            if 400 <= status < 500:  # vLLM begins an answer before it has looked at all of the request
                raise RequestError(refusal(self._where, status, event))
            words = message_in(event) if isinstance(said, dict) else ""
            raise EngineError(f"{self._where.host} failed within its answer{words}: see the server's own log.")
        if isinstance(said.get("usage"), dict):
            reading.usage = said["usage"]
        text, ended, logprobs = parts_of(said)
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


def code_in(said: Any) -> int:
    """The status of an error that came as an event; 0 where it has none."""
    error = said.get("error") if isinstance(said, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 0


def parts_of(said: dict[str, Any]) -> tuple[str, Finish | None, list[TokenLogprob]]:
    """The text, why the answer ends here, and log-probabilities, of an event in any of the three forms. Raises EngineError."""
    if "content" in said and "choices" not in said:  # llama-server's own
        why = {"word": Finish.STOP, "limit": Finish.LENGTH}.get(str(said.get("stop_type")), Finish.END)
        return text_in(said, "content"), why if said.get("stop") else None, []
    choices = said.get("choices")
    if not isinstance(choices, list):
        raise EngineError("The server's answer has no 'choices': it does not speak OpenAI's protocol.")
    if not choices:  # the last event of some, with nothing but the usage
        return "", None, []
    choice = choices[0] if isinstance(choices[0], dict) else {}
    inner = choice.get("delta") or choice.get("message")
    text = text_in(inner, "content") if isinstance(inner, dict) else text_in(choice, "text")
    return text, finish_in(choice), list(logprobs_in(choice.get("logprobs")))


def finish_in(choice: dict[str, Any]) -> Finish | None:
    """Why the answer ends here, if it does. vLLM and SGLang name the stop string that came."""
    if not choice.get("finish_reason"):
        return None
    if choice["finish_reason"] == "length":
        return Finish.LENGTH
    return Finish.STOP if isinstance(choice.get("stop_reason") or choice.get("matched_stop"), str) else Finish.END


def text_in(said: dict[str, Any], name: str) -> str:
    text = said.get(name)
    return text if isinstance(text, str) else ""


def logprobs_in(said: Any) -> list[TokenLogprob]:
    """Of both spellings: lists side by side, or one entry a token."""
    if not isinstance(said, dict):
        return []
    if isinstance(entries := said.get("content"), list):
        return [
            TokenLogprob(
                content=bytes_of(entry),
                logprob=float(entry["logprob"]),
                alternatives=tuple((bytes_of(other), float(other["logprob"])) for other in entry.get("top_logprobs") or ()),
            )
            for entry in entries
        ]
    tokens, values, tops = (said.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    return [
        TokenLogprob(
            content=token.encode(),
            logprob=float(value),
            alternatives=tuple((other.encode(), float(its)) for other, its in (tops[place] if place < len(tops) else {}).items()),
        )
        for place, (token, value) in enumerate(zip(tokens, values, strict=False))
    ]


def bytes_of(entry: dict[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") else str(entry["token"]).encode()


@dataclass(frozen=True, slots=True)
class Inspection:
    facts: dict[str, str]
    problems: list[str]


def inspect(where: Endpoint) -> Inspection:
    """What the server says of itself, for doctor."""
    facts = {"engine": where.url}
    try:
        served = _served(where, tls(where))
    except EngineError as error:
        return Inspection(facts, [str(error)])
    without = why_without_fim(where, served.model)
    facts |= {
        "model": f"{served.model}, served by {served.owner or 'an unnamed server'}",
        "context": f"{served.context_tokens:,} tokens",
        "fill-in-the-middle": "no" if without else f"asked for with {where.fim}",
    }
    return Inspection(facts, [without] if without else [])
