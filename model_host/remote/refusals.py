"""A sentence for everything that can go wrong with an engine elsewhere: what it means to the user, and what to do."""

import json
import re

import httpx2

from model_host.remote.endpoint import TOKEN_VARIABLE, Endpoint

NO_ROOM = re.compile("context (length|size|window)", re.IGNORECASE)
"""How vLLM, SGLang and llama-server say that a prompt is too long."""


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
