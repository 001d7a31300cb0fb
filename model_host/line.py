"""What goes over the line between a model's process and those who use it: JSON, one line for each thing said.

Owns: how values of `generation` are written and read back. Knows neither sockets nor engines.

To the process:
    {"keep_s": 300}                            who I am: how long to stay when I have left
    {"ask": 1, "request": {...}}               a Request
    {"cancel": 1}
    {"leave": true}                            end, if nobody uses you: another model needs the room
From it:
    {"doing": "reading weights", "share": 0.5} while it loads, at once to who has just come
    {"facts": {...}}                           it is ready
    {"failed": [kind, sentence]}               it will never be
    {"leaving": true}                          the connection ends when it has gone
    {"answer": 1, "text": "..."}               also "logprob", and last "cost" or "error": [kind, sentence]
"""

import json
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from model_host import errors
from model_host.errors import EngineError
from model_host.generation import TokenLogprob

MAX_LINE_BYTES = 1 << 26


def written(**said: Any) -> bytes:
    return json.dumps(said, default=plain).encode() + b"\n"


def plain(value: Any) -> Any:
    """Dataclasses as tables, bytes as the characters of the same numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    assert isinstance(value, bytes), f"{value!r} cannot be written"
    return value.decode("latin-1")


def read(kind: Any, said: Any) -> Any:
    """A dataclass of this kind from the table it was written as; raises pydantic's ValidationError where it is no such table."""
    return adapter(kind).validate_python(said)


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_logprob(said: dict[str, Any]) -> TokenLogprob:
    alternatives = tuple((content.encode("latin-1"), logprob) for content, logprob in said["alternatives"])
    return TokenLogprob(content=said["content"].encode("latin-1"), logprob=said["logprob"], alternatives=alternatives)


def written_error(error: EngineError) -> list[str]:
    return [type(error).__name__, str(error)]


def read_error(said: list[str]) -> EngineError:
    kind, sentence = said
    found = getattr(errors, kind, EngineError)
    error: EngineError = found(sentence)
    return error
