"""A sentence for everything that can go wrong with an engine elsewhere: what it means to the user, and what to do."""

import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from model_host.remote.endpoint import TOKEN_VARIABLE, Endpoint, Kind, no_address

MAX_BYTES = 8_000_000
"""Of an event, or of an answer that is no stream."""
WITHOUT_END = "The server sends an answer without end: it does not speak OpenAI's protocol."
NO_ROOM = re.compile("context (length|size|window)", re.IGNORECASE)
"""How vLLM, SGLang and llama-server say that a prompt is too long."""
NO_TEMPLATE = re.compile("chat.?template", re.IGNORECASE)
"""How vLLM and SGLang say that the model has none, in transformers' words."""
BY_EXAMPLE = "so actions are asked by example and their answers are worse"


def unreachable(where: Endpoint, error: Exception) -> str:
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        cause = error.__cause__ or error.__context__ or error
        why = f"{type(error).__name__}: {error}" if str(error) else type(cause).__name__
        if any(word in str(error).lower() for word in ("certificate", "ssl", "tls")):
            return untrusted(where, error)
        return f"Nothing answers at {where.url} ({why}): start the server there, or correct remote.url."
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return f"{where.host} did not answer within {where.timeout_s:g} s: it may be loading its model, or raise remote.timeout_s."
    if isinstance(error, httpx2.InvalidURL):
        return no_address(where.url)
    if isinstance(error, httpx2.ProxyError):
        return proxied(where, error)
    if isinstance(error, httpx2.RemoteProtocolError) and "illegal" in str(error):
        return f"{where.host} does not answer in HTTP: correct remote.url, which may have to begin with https or name another port."
    return f"The connection to {where.host} was lost ({type(error).__name__}): it may have been restarted. Try again."


def untrusted(where: Endpoint, error: Exception) -> str:
    """Why there is no encrypted connection, in OpenSSL's words and in what to do."""
    said = str(error).lower()
    if "certificate" not in said:
        return (
            f"{where.host} does not speak TLS here ({error}): correct remote.url, which may have to begin with http or name another port."
        )
    if "mismatch" in said or "not valid for" in said:
        return f"The certificate of {where.host} is for another name ({error}): set remote.url to the name that it is for."
    if "expired" in said or "not yet valid" in said:
        return f"The certificate of {where.host} is out of date ({error}): have it renewed, or set this machine's clock."
    return f"The certificate of {where.host} is not trusted ({error}): set remote.ca_file to the one it was signed with."


def proxied(where: Endpoint, error: Exception) -> str:
    way_round = f"correct HTTPS_PROXY and ALL_PROXY, or name {where.host} in NO_PROXY"
    return f"The proxy that the environment names is of no use for {where.host} ({readable(str(error))}): {way_round}."


def refusal(where: Endpoint, status: int, body: str, kind: Kind | None = None) -> str:
    """What an answer that is no success means to the user."""
    said = message_in(body)
    if kind == "hole" and where.fim in ("suffix", "infill") and status in (400, 404, 501) and not is_no_room(status, body):
        return f"{where.host} may not know remote.fim = {where.fim!r} ({status}{said}): set it to 'tokens', and check remote.url."
    if status in (401, 403):
        return f"{where.host} refuses the token ({status}): put the right one into {TOKEN_VARIABLE} or remote.token_file."
    if status == 404:
        return f"{where.host} has no such address or model (404{said}): check remote.url, which ends in /v1, and remote.model."
    if status == 429:
        return f"{where.host} has too much to do (429): try again later."
    if 300 <= status < 400:
        return f"{where.host} sends elsewhere ({status}), which is not followed: set remote.url to the place itself."
    if status == 500 and kind == "chat" and not said:  # all that transformers serve says of a model without a chat template
        hint = "where that says that the model has no chat template, serve one whose name ends in Instruct or Chat"
        return f"{where.host} failed on this question (500): see the server's own log; {hint}."
    if status == 503:
        return f"{where.host} cannot answer now (503{said}): it may still be loading its model, try again in a while."
    if status >= 500:
        return f"{where.host} failed on this request ({status}{said}): see the server's own log."
    if is_no_room(status, body):
        return f"{where.host} has no room for so long a prompt ({status}{said}): select less code, or serve the model with more context."
    return f"{where.host} does not take this request ({status}{said})."


def without_chat(where: Endpoint, status: int, body: str, *, is_listed: bool) -> str | None:
    """Why the server does not converse, where that is what its answer to a question means. Where it lists the model, it is the address for
    questions that is not there; else it may be any."""
    said = message_in(body)
    if NO_TEMPLATE.search(said):
        instead = "serve one whose name ends in Instruct or Chat, or give the server its template (--chat-template)"
        return f"{where.host} has no chat template for its model ({status}), {BY_EXAMPLE}: {instead}."
    if is_listed and status in (404, 405, 501) and "model" not in said.lower():
        return f"{where.host} has no /chat/completions ({status}), {BY_EXAMPLE}: set remote.url to a server that has, for them."
    return None


def is_no_room(status: int, body: str) -> bool:
    return status == 413 or (status == 400 and NO_ROOM.search(message_in(body)) is not None)


def message_in(body: str) -> str:
    """The server's own words, where they are short enough to be read."""
    try:
        content = json.loads(body)
        said = content.get("message") or content.get("detail") or content["error"]
        said = said.get("message", "") if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    words = readable(" ".join(str(said).split()))
    return f": {words[:300].removesuffix('.')}" if words else ""


def readable(said: str) -> str:
    """What a server says of itself, fit to be shown: it may hold what moves a terminal's cursor, or halves of characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in said)


def asked_to_wait_s(retry_after: str) -> float:
    """Of a Retry-After header (RFC 9110, 10.2.3), which is a number of seconds or a date; 0 where it is neither."""
    if re.fullmatch(r"[0-9]+", retry_after):
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return max(((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds(), 0.0)
