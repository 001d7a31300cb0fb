"""Where an engine elsewhere listens, how it is asked, and what of the user's settings for that is wrong."""

import ssl
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from model_host.errors import EngineError

TOKEN_VARIABLE = "DEEPSEEK_ENGINE_TOKEN"

FimForm = Literal["tokens", "suffix", "infill", "none"]
Kind = Literal["hole", "chat", "text"]
"""What is to be filled, answered, or gone on with."""


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
    url = url.strip()
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets of IPv6 that do not match, a port that is none
        raise EngineError(no_address(url)) from None
    if not is_address or not url.isprintable() or " " in url:
        raise EngineError(no_address(url))
    if parts.query or parts.fragment:
        raise EngineError(f"remote.url is {url!r}: leave out what stands behind ? or #, so that it ends in /v1.")
    if parts.username or parts.password:
        raise EngineError(f"remote.url holds a password: put the token into {TOKEN_VARIABLE} or into remote.token_file instead.")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1") and not plain_http:
        raise EngineError(
            f"remote.url sends code to {parts.hostname} unencrypted: use https, or a tunnel (ssh -L 8000:localhost:8000 {parts.hostname})"
            " and http://localhost:8000/v1, or set remote.plain_http to true where the network is yours alone."
        )
    if ca_file and not expanded(ca_file).is_file():
        raise EngineError(f"remote.ca_file {ca_file!r} is not there: give a PEM file, or leave it empty for the system's certificates.")
    return Endpoint(
        url=url.rstrip("/"),
        model=model,
        fim=fim,
        token=checked_token(environment.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE) or read_token(token_file),
        ca_file=str(expanded(ca_file)) if ca_file else "",
        timeout_s=timeout_s,
        stall_s=stall_s,
    )


def no_address(url: str) -> str:
    return f"remote.url is {url!r}: set it to where the server listens, such as https://gpu.example.org/v1."


def expanded(file: str) -> Path:
    """The path with its `~` replaced, where that names somebody's home."""
    try:
        return Path(file).expanduser()
    except RuntimeError:
        return Path(file)


def checked_token(token: str, place: str) -> str:
    """The token, which goes into a header. Raises EngineError."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise EngineError(f"{place} holds no token: put it there, on one line and alone.")
    return token


def read_token(file: str) -> str:
    """The token in `file`, which nobody but its owner may read; none where no file is named. Raises EngineError."""
    if not file:
        return ""
    path = expanded(file)
    try:
        readable_by_others = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        if readable_by_others and sys.platform != "win32":  # which has no such bits, and sets them all
            raise EngineError(f"remote.token_file {path} can be read by others: chmod 600 {path}")
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"remote.token_file {path} cannot be read ({error}): put the token there, and chmod 600.") from error
    if not token:
        raise EngineError(f"remote.token_file {path} is empty: put the token there, on one line and alone.")
    return checked_token(token, f"remote.token_file {path}")


def tls(where: Endpoint) -> ssl.SSLContext:
    """Certificates and names are always checked."""
    try:
        return ssl.create_default_context(cafile=where.ca_file or None)
    except (ssl.SSLError, OSError) as error:
        raise EngineError(f"remote.ca_file {where.ca_file} cannot be read as certificates ({error}): give a PEM file.") from error


def headers(where: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {where.token}"} if where.token else {}
