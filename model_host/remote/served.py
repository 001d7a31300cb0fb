"""What a server says of the model it serves."""

import ssl
from dataclasses import dataclass

import httpx2

from model_host import catalogue
from model_host.catalogue import Infilling
from model_host.errors import EngineError
from model_host.remote.endpoint import Endpoint, headers, tls
from model_host.remote.refusals import refusal, unreachable

USUAL_CONTEXT_TOKENS = 16_384
"""Where the server does not say."""
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of the model it serves."""

    model: str
    owner: str = ""
    context_tokens: int = USUAL_CONTEXT_TOKENS


def why_without_fim(where: Endpoint, model: str) -> str | None:
    if where.fim == "none":
        return "remote.fim is 'none', so holes are not filled: set it to 'tokens', 'suffix' or 'infill' where the model can infill."
    known = catalogue.named(model.rpartition("/")[2])
    if known is not None and known.infilling is Infilling.UNTRAINED:
        return f"{known.name} was not trained to fill in the middle: serve {catalogue.RECOMMENDED.name} for completions."
    return None


def served_at(where: Endpoint, verify: ssl.SSLContext) -> Served:
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


@dataclass(frozen=True, slots=True)
class Inspection:
    facts: dict[str, str]
    problems: list[str]


def inspect(where: Endpoint) -> Inspection:
    """What the server says of itself, for doctor."""
    facts = {"engine": where.url}
    try:
        served = served_at(where, tls(where))
    except EngineError as error:
        return Inspection(facts, [str(error)])
    without = why_without_fim(where, served.model)
    facts |= {
        "model": f"{served.model}, served by {served.owner or 'an unnamed server'}",
        "context": f"{served.context_tokens:,} tokens",
        "fill-in-the-middle": "no" if without else f"asked for with {where.fim}",
    }
    return Inspection(facts, [without] if without else [])
