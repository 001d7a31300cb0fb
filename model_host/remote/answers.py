"""What a server's answer says: events found in bytes, and in each of the three forms the text, the end, and log-probabilities."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

from model_host.errors import EngineError
from model_host.generation import Cost, Finish, TokenLogprob
from model_host.remote.questions import NO_TEXT
from model_host.remote.refusals import MAX_BYTES, WITHOUT_END
from model_host.stops import StopStrings

LINE_END = re.compile(rb"\r\n|\n|\r")


class EventStream:
    """Server-sent events, found in bytes wherever those are cut (WHATWG HTML, 9.2.6); only the data of each."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[str] = []
        self._data_bytes = 0
        self._is_first = True
        self._ended_in_cr = False
        """Whether the last line did, which a line feed may still belong to."""

    def add(self, chunk: bytes) -> list[str]:
        """The data of the events that are complete now. A character is decoded once its line is there as a whole."""
        if not chunk:
            return []
        if self._ended_in_cr:
            chunk = chunk.removeprefix(b"\n")
        self._ended_in_cr = chunk.endswith(b"\r")
        events: list[str] = []
        *ends, begun = LINE_END.split(chunk)
        for end in ends:
            self._line += end
            self._take(self._line.decode("utf-8", "replace"), events)
            self._line.clear()
        self._line += begun
        if len(self._line) + self._data_bytes > MAX_BYTES:
            raise EngineError(WITHOUT_END)
        return events

    def _take(self, line: str, events: list[str]) -> None:
        if self._is_first:
            line, self._is_first = line.removeprefix("\ufeff"), False
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
            self._data_bytes += len(self._line) + 1
        elif not line and self._data:
            events.append("\n".join(self._data))
            self._data.clear()
            self._data_bytes = 0

    def end(self) -> list[str]:
        """An event whose empty line did not come before the end. Half a line is none."""
        self._line.clear()
        self._ended_in_cr = False
        return self.add(b"\n")


@dataclass(slots=True)
class Reading:
    """What has come of one answer."""

    stops: StopStrings
    started_at: float
    max_pieces: int
    """A server that gives more did not heed the request's limit: each has one token at least."""
    ends: StopStrings = field(default_factory=lambda: StopStrings(NO_TEXT))
    sent_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    pieces: int = 0
    finish: Finish | None = None
    is_done: bool = False
    """Whether the server said that nothing follows."""
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
