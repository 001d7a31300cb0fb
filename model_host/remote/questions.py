"""What a request looks like to a server: its fields, and a hole written with DeepSeek's own tokens, as long as there is room for it."""

import json
from dataclasses import dataclass
from typing import Any

from model_host.errors import RequestError
from model_host.generation import Fim, Request
from model_host.remote.endpoint import Endpoint, Kind
from model_host.remote.served import Served

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
NO_TEXT = (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)
"""What is never part of an answer: it ends there, as that of the engine here does."""
BAR = "｜"
ADDS_BOS = frozenset({"llamacpp", "sglang"})
"""Servers, by what they say `owned_by` is, that begin every prompt with BOS themselves: SGLang (0.5.23) has the tokenizer do as it is set,
and DeepSeek's are set to."""
OF_VLLM: dict[str, Any] = {
    "skip_special_tokens": False,  # else it leaves them out of the text and writes on, where our engine ends
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},  # most answers are left before the last event
}
MOST_STOPS = 4
"""OpenAI's limit, and vLLM's (0.32). What stands behind it is looked for on this side alone."""
CHARS_PER_TOKEN = (3.0, 1.5, 0.75, 0.3)
"""Of code, of numbers and signs, of Chinese, of Chinese in a small vocabulary: the tokenizer is on the other side, so a hole is cut by
these in turn until there is room for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request as the server understands it."""

    kind: Kind
    path: str
    body: dict[str, Any]
    extras: dict[str, Any]
    """Fields of one server's own, left out where the server refuses them."""


def question(request: Request, where: Endpoint, served: Served, chars_per_token: float = CHARS_PER_TOKEN[0]) -> Question:
    """Raises RequestError when the request cannot be asked there."""
    body, extras = fields(request, served)
    prompt = request.prompt
    if isinstance(prompt, Fim):
        room = int(max(served.context_tokens - request.max_new_tokens, 0) * chars_per_token)
        return of_hole(cut(prompt, room), request, where, served, body, extras)
    body["max_tokens"] = request.max_new_tokens
    if not prompt.in_template:
        text = "".join(defused(message.content) for message in prompt.messages)
        return Question(kind="text", path=f"{where.url}/completions", body=body | begun(text, request, served), extras=extras)
    body["messages"] = [{"role": message.role, "content": defused(message.content)} for message in prompt.messages]
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    return Question(kind="chat", path=f"{where.url}/chat/completions", body=body, extras=extras)


def fields(request: Request, served: Served) -> tuple[dict[str, Any], dict[str, Any]]:
    """What does not depend on the prompt, and of that what the server may not know. Raises RequestError."""
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
    return body, extras


def of_hole(fim: Fim, request: Request, where: Endpoint, served: Served, body: dict[str, Any], extras: dict[str, Any]) -> Question:
    if where.fim == "infill":
        infill = {"input_prefix": fim.prefix, "input_suffix": fim.suffix, "prompt": fim.middle, "n_predict": request.max_new_tokens}
        others = {"input_extra": [{"filename": "repository", "text": fim.repository}]} if fim.repository else {}
        path = f"{where.url.removesuffix('/v1')}/infill"
        return Question(kind="hole", path=path, body=body | infill | others, extras={"cache_prompt": True})
    body["max_tokens"] = request.max_new_tokens
    if where.fim == "suffix":
        body |= logprobs_of(request) | {"prompt": fim.repository + fim.prefix + fim.middle, "suffix": fim.suffix}
    else:
        repository, prefix, suffix, middle = map(defused, (fim.repository, fim.prefix, fim.suffix, fim.middle))
        body |= begun(f"{FIM_BEGIN}{repository}{prefix}{FIM_HOLE}{suffix}{FIM_END}{middle}", request, served)
    return Question(kind="hole", path=f"{where.url}/completions", body=body, extras=extras)


def begun(text: str, request: Request, served: Served) -> dict[str, Any]:
    """The prompt, with the beginning of the sequence where the server does not write it. vLLM does where the tokenizer's settings say so,
    and can be told not to."""
    prompt = text if served.owner in ADDS_BOS else BOS + text
    return logprobs_of(request) | {"prompt": prompt} | ({"add_special_tokens": False} if served.owner == "vllm" else {})


def logprobs_of(request: Request) -> dict[str, Any]:
    return {} if request.logprobs is None else {"logprobs": request.logprobs}


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
