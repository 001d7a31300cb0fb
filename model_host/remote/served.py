"""What a server says of the model it serves."""

import json
import re
import ssl
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from model_host import catalogue
from model_host.catalogue import Entry, Infilling
from model_host.errors import EngineError
from model_host.remote.connection import of_client
from model_host.remote.endpoint import Endpoint, tls
from model_host.remote.refusals import (
    BY_EXAMPLE,
    MAX_BYTES,
    WITHOUT_END,
    message_in,
    proxied,
    readable,
    refusal,
    unreachable,
    without_chat,
)

USUAL_CONTEXT_TOKENS = 16_384
"""Where the server does not say."""
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of the model it serves."""

    model: str
    root: str = ""
    """What vLLM loaded, where `model` is a name that its owner gave it."""
    owner: str = ""
    is_listed: bool = False
    """Whether it told so itself."""
    writes_chatml: bool = False
    """As llama-server does where a file has no chat template of its own."""
    context_tokens: int = USUAL_CONTEXT_TOKENS


PACKED = re.compile(r"([-.:](gguf|awq|gptq|fp8|i?q\d\w*|bf16|f16|f32|\d+-of-\d+))+$", re.IGNORECASE)
"""What those who pack a release add to its name."""
CHATML = (
    "{%- for message in messages -%} {{- '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|> ' -}} {%- endfor -%}"
    " {%- if add_generation_prompt -%} {{- '<|im_start|>assistant ' -}} {%- endif -%}"
)
"""What llama-server says its chat template is where there is none (common/chat.cpp), with every line break and indentation a blank."""


def release(served: Served) -> Entry | None:
    """The release that is served, where its name tells."""
    names = (PACKED.sub("", name.rpartition("/")[2]) for name in (served.root, served.model))
    return next((known for name in names if (known := catalogue.named(name))), None)


def why_without_chat(where: Endpoint, served: Served) -> str | None:
    """What is known before a question is asked; the engine learns the rest."""
    known = release(served)
    if known is not None and known.chat is False:
        return f"{known.name} never learned to converse, {BY_EXAMPLE}: serve one whose name ends in Instruct or Chat for them."
    if served.writes_chatml:
        instead = "serve one whose name ends in Instruct or Chat, or start llama-server with the model's own (--chat-template-file)"
        return f"{where.host} has no chat template for its model and writes ChatML, {BY_EXAMPLE}: {instead}."
    return None


def why_without_fim(where: Endpoint, served: Served) -> str | None:
    if where.fim == "none":
        return "remote.fim is 'none', so holes are not filled: set it to 'tokens', 'suffix' or 'infill' where the model can infill."
    known = release(served)
    if known is not None and known.infilling is Infilling.UNTRAINED:
        return f"{known.name} was not trained to fill in the middle: serve {catalogue.RECOMMENDED.name} for completions."
    return None


def ask(where: Endpoint, verify: ssl.SSLContext, method: str, url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """The status and the body of an answer, whole and in time. Raises EngineError, also where there is none."""
    began, content = time.monotonic(), bytearray()
    try:
        client = httpx2.Client(**of_client(where, verify), timeout=httpx2.Timeout(where.timeout_s, connect=CONNECT_S))
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        raise EngineError(proxied(where, error)) from error
    try:
        with client, client.stream(method, url, json=body) as answer:
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise EngineError(WITHOUT_END)
                if time.monotonic() - began > where.timeout_s:
                    raise EngineError(unreachable(where, TimeoutError()))
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise EngineError(unreachable(where, error)) from error
    return answer.status_code, content.decode("utf-8", "replace")


def served_at(where: Endpoint, verify: ssl.SSLContext) -> Served:
    """Asks /models. A server that has no such list is believed to serve the model that is named."""
    status, content = ask(where, verify, "GET", f"{where.url}/models")
    if status in (401, 403) or 300 <= status < 400:
        raise EngineError(refusal(where, status, content))
    try:
        listed = [entry for entry in json.loads(content)["data"] if isinstance(entry["id"], str)] if 200 <= status < 300 else []
    except (ValueError, KeyError, TypeError, RecursionError):
        listed = []
    found = next((entry for entry in listed if entry["id"] == where.model), None) if where.model else next(iter(listed), None)
    if found is None and listed:
        names = ", ".join(readable(entry["id"]) for entry in listed[:5])
        raise EngineError(f"{where.host} does not serve {where.model!r}: set remote.model to one of {names}.")
    if found is None:
        if not where.model:
            if status == 429 or status >= 500:
                raise EngineError(refusal(where, status, content))
            unlisted = f"{where.host} does not list what it serves ({status}{message_in(content)})"
            raise EngineError(f"{unlisted}: set remote.model, and check remote.url, which ends in /v1.")
        return Served(model=where.model)
    meta = found.get("meta") if isinstance(found.get("meta"), dict) else {}
    owner = str(found.get("owned_by", ""))
    context = found.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    return Served(
        model=found["id"],
        root=str(found.get("root", "")),
        owner=owner,
        is_listed=True,
        writes_chatml=owner == "llamacpp" and writes_chatml(where, verify),
        context_tokens=context if isinstance(context, int) and context > 0 else USUAL_CONTEXT_TOKENS,
    )


def writes_chatml(where: Endpoint, verify: ssl.SSLContext) -> bool:
    """Asks llama-server for its chat template."""
    try:
        _, content = ask(where, verify, "GET", f"{where.url.removesuffix('/v1')}/props")
        template: Any = json.loads(content)["chat_template"]
    except (EngineError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(template, str) and " ".join(template.split()) == CHATML


def asked_why_without_chat(where: Endpoint, served: Served, verify: ssl.SSLContext) -> str | None:
    """Asks for one token of an answer, to hear whether the server converses. Other failures say nothing of that."""
    body = {"model": served.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        status, content = ask(where, verify, "POST", f"{where.url}/chat/completions", body)
    except EngineError:
        return None
    return None if 200 <= status < 300 else without_chat(where, status, content, is_listed=served.is_listed)


@dataclass(frozen=True, slots=True)
class Inspection:
    facts: dict[str, str]
    problems: list[str]


def inspect(where: Endpoint) -> Inspection:
    """What the server says of itself, for doctor."""
    facts = {"engine": where.url}
    try:
        verify = tls(where)
        served = served_at(where, verify)
    except EngineError as error:
        return Inspection(facts, [str(error)])
    without = why_without_fim(where, served)
    facts |= {
        "model": readable(f"{served.model}, served by {served.owner or 'an unnamed server'}"),
        "context": f"{served.context_tokens:,} tokens",
        "fill-in-the-middle": "no" if without else f"asked for with {where.fim}",
        "questions": why_without_chat(where, served) or asked_why_without_chat(where, served, verify) or "answered",
    }
    return Inspection(facts, [without] if without else [])
