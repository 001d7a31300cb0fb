"""The engine elsewhere: what it is asked, what becomes of its answers, and of a server that breaks every promise."""

import asyncio
import json
import math
import os
import shutil
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_host.checkpoints import STARTER
from model_host.errors import EngineClosed, EngineError, RequestError
from model_host.generation import Chat, Fim, Finish, Grammar, Message, Request, Sampling
from model_host.remote import engine as remote_engine
from model_host.remote.answers import EventStream
from model_host.remote.endpoint import Endpoint, endpoint
from model_host.remote.engine import RemoteEngine, connect
from model_host.remote.questions import BOS, FIM_BEGIN, NO_TEXT, Question, question
from model_host.remote.refusals import MAX_BYTES, asked_to_wait_s, unreachable
from model_host.remote.served import Served, inspect
from tests.model_host.misbehaving import (
    GOOD,
    HEAD,
    Behaviour,
    Misbehaving,
    event,
    hangs_up,
    listing,
    says,
    speaks_forever,
    status,
)

HOLE = Request(prompt=Fim(prefix="def f():\n    ", suffix="\n", middle="re"), max_new_tokens=8)
PROMPT = "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f():\n    <｜fim▁hole｜>\n<｜fim▁end｜>re"


@pytest.fixture
def open_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[RemoteEngine, Misbehaving]]]:
    """Starts a scripted server and an engine that asks it."""
    monkeypatch.setattr(remote_engine, "BACKOFF_S", 0.01)
    opened: list[tuple[RemoteEngine, Misbehaving]] = []

    def open(*script: Behaviour, models: Behaviour | None = None, **changes: Any) -> tuple[RemoteEngine, Misbehaving]:
        server = Misbehaving(list(script) or [says(*GOOD)], models)
        server.__enter__()
        engine = connect(Endpoint(**{"url": server.url, "timeout_s": 2.0, "stall_s": 0.3} | changes))
        opened.append((engine, server))
        return engine, server

    yield open
    for engine, server in opened:
        engine.close()
        server.__exit__()


async def text_of(engine: RemoteEngine, request: Request = HOLE) -> str:
    return "".join([piece async for piece in engine.submit(request)])


async def test_an_answer_comes_in_pieces_with_what_it_cost(open_engine: Any):
    engine, server = open_engine()
    generation = engine.submit(HOLE)
    assert [piece async for piece in generation] == ["a =", " 1", "\n"]
    cost = generation.cost
    assert cost and (cost.finish, cost.cached_tokens, cost.computed_tokens, cost.new_tokens) == (Finish.END, 4, 5, 3)
    assert cost.first_token_s > 0
    (asked,) = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/completions")
    assert asked.body["prompt"] == PROMPT and asked.body["model"] == "served"
    assert asked.body["max_tokens"] == 8 and asked.body["stream"] is True and "authorization" not in asked.headers


async def test_the_token_goes_into_the_header_and_nowhere_else(open_engine: Any):
    engine, server = open_engine(token="secret")
    await text_of(engine)
    assert server.asked[0].headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(engine._where)


async def test_a_question_becomes_a_chat(open_engine: Any):
    said = b'data: {"choices": [{"delta": {"role": "assistant", "content": "It "}}]}\n\n'
    more = b'data: {"choices": [{"delta": {"content": "adds."}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    engine, server = open_engine(says(said, more))
    chat = Chat(messages=(Message(role="user", content="explain <｜fim▁end｜>"),))
    assert await text_of(engine, Request(prompt=chat, max_new_tokens=9, sampling=Sampling(temperature=0.5, top_k=4, seed=3))) == "It adds."
    asked = server.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.body["messages"] == [{"role": "user", "content": "explain <|fim▁end|>"}]
    assert (asked.body["temperature"], asked.body["seed"], asked.body["top_k"]) == (0.5, 3, 4)


def test_text_of_the_user_never_spells_a_special_token():
    hostile = Request(prompt=Fim(prefix="a<｜fim▁hole｜>", suffix="<｜end▁of▁sentence｜>b", middle="c｜>"), max_new_tokens=1)
    prompt = question(hostile, Endpoint(url="http://x/v1"), Served(model="m")).body["prompt"]
    assert prompt.count("｜>") == 4 and prompt.endswith("<｜fim▁hole｜><|end▁of▁sentence|>b<｜fim▁end｜>c|>")


def test_every_server_is_asked_in_its_own_way():
    def asked(owner: str = "", **changes: Any) -> Question:
        return question(HOLE, Endpoint(**{"url": "http://x/v1"} | changes), Served(model="m", owner=owner))

    vllm = asked("vllm").body
    assert vllm["add_special_tokens"] is vllm["skip_special_tokens"] is False and vllm["prompt"].startswith(BOS)
    assert vllm["stream_options"] == {"include_usage": True, "continuous_usage_stats": True} and asked("vllm").extras == {}
    for owner in ("llamacpp", "sglang"):
        assert asked(owner).body["prompt"].startswith(FIM_BEGIN)
    suffix = asked(fim="suffix").body
    assert (suffix["prompt"], suffix["suffix"]) == ("def f():\n    re", "\n")
    infill = asked(fim="infill")
    assert infill.path == "http://x/infill" and infill.body["input_prefix"] == "def f():\n    " and infill.body["n_predict"] == 8


def test_what_is_known_of_other_files_comes_before_the_prefix_and_is_always_cut_alike():
    def asked(prefix: str = "a", context_tokens: int = 16_384, **changes: Any) -> dict[str, Any]:
        hole = Fim(repository="# b.py\n<｜fim▁hole｜>" + "b" * 500, prefix=prefix, suffix="s", middle="m")
        where = Endpoint(**{"url": "http://x/v1"} | changes)
        return question(Request(prompt=hole, max_new_tokens=10), where, Served(model="m", context_tokens=context_tokens)).body

    assert asked()["prompt"].startswith(f"{BOS}{FIM_BEGIN}# b.py\n<|fim▁hole|>bbb") and "ba<｜fim▁hole｜>" in asked()["prompt"]
    assert asked(fim="suffix")["prompt"].startswith("# b.py\n") and asked(fim="suffix")["prompt"].endswith("bam")
    infill = asked(fim="infill")
    assert infill["input_prefix"] == "a" and infill["input_extra"][0]["text"].startswith("# b.py\n")
    assert asked("a", 110, fim="infill")["input_extra"] == asked("a" * 1000, 110, fim="infill")["input_extra"]
    assert "input_extra" not in question(HOLE, Endpoint(url="http://x/v1", fim="infill"), Served(model="m")).body


def test_a_hole_in_a_long_file_loses_what_is_farthest_from_it():
    long = Request(prompt=Fim(prefix="p" * 5000 + "P", suffix="S" + "s" * 5000, middle="m"), max_new_tokens=10)
    prompt = question(long, Endpoint(url="http://x/v1"), Served(model="m", context_tokens=110)).body["prompt"]
    assert "pP<" in prompt and ">Ss" in prompt and prompt.count("p") + prompt.count("s") < 320


def test_only_a_schema_constrains_an_answer_there():
    schema = Request(prompt=HOLE.prompt, max_new_tokens=1, grammar=Grammar(kind="json_schema", source='{"type": "object"}'))
    body = question(schema, Endpoint(url="http://x/v1"), Served(model="m")).body
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    with pytest.raises(RequestError, match="regex"):
        question(
            Request(prompt=HOLE.prompt, max_new_tokens=1, grammar=Grammar(kind="regex", source="a")), Endpoint(url="u"), Served(model="m")
        )


async def test_cancelling_closes_the_connection_so_that_the_server_stops(open_engine: Any):
    engine, server = open_engine(speaks_forever)
    generation = engine.submit(replace(HOLE, max_new_tokens=9999))
    async for _ in generation:
        break
    generation.cancel()
    started = time.monotonic()
    cost = await generation.finished()
    assert cost.finish is Finish.CANCELLED and time.monotonic() - started < 5
    assert await asyncio.to_thread(server.was_left.wait, 2.0)


@pytest.mark.parametrize("behaviour", [says(9.0), says(9.0, head=b""), says(b": ping\n\n", 9.0)], ids=["headers", "nothing", "a comment"])
async def test_cancelling_works_before_a_word_has_come(open_engine: Any, behaviour: Behaviour):
    engine, server = open_engine(behaviour, timeout_s=30.0, stall_s=30.0)
    generation = engine.submit(HOLE)
    await asyncio.sleep(0.1)
    generation.cancel()
    assert (await generation.finished()).finish is Finish.CANCELLED
    assert await asyncio.to_thread(server.was_left.wait, 2.0)


async def test_cancelling_works_between_attempts(open_engine: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_engine, "BACKOFF_S", 8.0)
    engine, server = open_engine(status(503))
    generation = engine.submit(HOLE)
    await asyncio.sleep(0.1)
    generation.cancel()
    assert (await generation.finished()).finish is Finish.CANCELLED and len(server.asked) == 1


async def test_cancelling_within_a_tls_handshake_closes_the_connection(open_engine: Any):
    engine, server = open_engine()
    engine._where = replace(engine._where, url=server.url.replace("http", "https"))  # it waits for words that are not encrypted
    generation = engine.submit(HOLE)
    await asyncio.sleep(0.2)
    generation.cancel()
    assert (await generation.finished()).finish is Finish.CANCELLED
    assert await asyncio.to_thread(server.was_left.wait, 2.0)


async def test_an_engine_that_waits_for_its_server_does_nothing_until_it_is_cancelled(open_engine: Any, monkeypatch: pytest.MonkeyPatch):
    engine, _ = open_engine(says(9.0), timeout_s=30.0)
    generation = engine.submit(HOLE)
    await asyncio.sleep(0.2)
    timers: list[float] = []
    call_at = engine._loop.call_at
    monkeypatch.setattr(engine._loop, "call_at", lambda when, *rest, **more: timers.append(when) or call_at(when, *rest, **more))
    await asyncio.sleep(0.3)
    assert timers == []
    generation.cancel()
    assert (await generation.finished()).finish is Finish.CANCELLED


async def test_a_request_that_is_cancelled_or_closed_as_soon_as_it_is_made_ends(open_engine: Any):
    engine, _ = open_engine(says(9.0))
    generation = engine.submit(HOLE)
    generation.cancel()
    assert (await asyncio.wait_for(generation.finished(), 5)).finish is Finish.CANCELLED
    generation = engine.submit(HOLE)
    engine.close()
    with pytest.raises(EngineClosed):
        await asyncio.wait_for(generation.finished(), 5)
    generation.cancel()


@pytest.mark.parametrize(
    "failure",
    [status(429), status(429, headers="Retry-After: 0\r\n"), status(500), status(503), hangs_up, says(), says(b"data: ")],
    ids=["429", "429 with Retry-After", "500", "503", "hangs up", "ends at once", "ends in a line"],
)
async def test_what_may_go_better_is_tried_again_until_a_word_was_said(open_engine: Any, failure: Behaviour):
    engine, server = open_engine(failure, failure, says(*GOOD))
    assert await text_of(engine) == "a = 1\n"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("script", "said", "attempts"),
    [
        ([status(429)], "too much to do", 4),
        ([status(429, headers="Retry-After: 3600\r\n")], "too much to do", 1),
        ([status(500, '{"error": {"message": "CUDA is gone"}}')], "failed on this request (500: CUDA is gone)", 4),
        ([status(401)], "refuses the token (401)", 1),
        ([status(404, '{"detail": "no"}')], "no such address or model (404: no)", 1),
        ([status(302, headers="Location: http://elsewhere/\r\n")], "sends elsewhere (302), which is not followed", 1),
        ([status(413)], "has no room for so long a prompt (413)", 1),
        ([hangs_up], "connection to 127.0.0.1", 4),
        ([says(event("a"))], "ended the connection within its answer", 1),
        ([says(event("a"), 3.0)], "fell silent for 0.3 s", 1),
        ([says(b"data: {nonsense\n\n")], "not JSON", 1),
        ([says(b"data: 3\n\n")], "failed within its answer", 1),
        ([says(b'data: {"hello": 1}\n\n')], "has no 'choices'", 1),
        ([says(event("a"), b'data: {"error": {"message": "out of memory"}}\n\n')], "failed within its answer: out of memory", 1),
    ],
)
async def test_what_does_not_go_better_is_told_in_a_sentence(open_engine: Any, script: list[Behaviour], said: str, attempts: int):
    engine, server = open_engine(*script)
    with pytest.raises(EngineError) as told:
        await text_of(engine)
    assert said in str(told.value) and str(told.value).endswith((".", ")."))
    assert len(server.asked) == attempts
    server.script[:] = [says(*GOOD)]
    assert await text_of(engine) == "a = 1\n", "the engine goes on"


async def test_a_server_that_never_begins_is_given_up_after_its_time(open_engine: Any):
    engine, server = open_engine(says(9.0, head=b""), timeout_s=0.4)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0.4 s"):
        await text_of(engine)
    assert time.monotonic() - started < 6 and len(server.asked) == 1


async def test_fields_that_a_server_does_not_know_are_left_out_from_then_on(open_engine: Any):
    engine, server = open_engine(status(422, '{"detail": "Unexpected fields"}'), says(*GOOD))
    assert await text_of(engine) == await text_of(engine) == "a = 1\n"
    assert ["stream_options" in asked.body for asked in server.asked] == [True, False, False]


async def test_a_request_that_is_refused_for_itself_says_why_and_the_next_one_keeps_its_fields(open_engine: Any):
    engine, server = open_engine(status(400, '{"error": {"message": "seed: Input should be less than 9", "code": 400}}'))
    with pytest.raises(RequestError, match=r"does not take this request \(400: seed: Input should be less than 9\)"):
        await text_of(engine)
    server.script[:] = [says(*GOOD)]
    assert await text_of(engine) == "a = 1\n"
    assert ["stream_options" in asked.body for asked in server.asked] == [True, False, True]


TOO_LONG = """This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens, which exceeds \
this limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_text, value=0)"""
NO_ROOM = status(400, json.dumps({"error": {"message": TOO_LONG, "type": "BadRequestError", "code": 400}}))


async def test_a_hole_that_proves_too_long_is_asked_again_with_less_around_it(open_engine: Any):
    engine, server = open_engine(NO_ROOM, NO_ROOM, says(*GOOD), models=listing("coder", owned_by="vllm", max_model_len=110))
    dense = Request(prompt=Fim(prefix="1" * 500 + "P", suffix="S" + "2" * 500, middle="m"), max_new_tokens=10)
    assert await text_of(engine, dense) == "a = 1\n"
    chars = [asked.body["prompt"].count("1") + asked.body["prompt"].count("2") for asked in server.asked]
    assert chars == [297, 147, 72] and all("1P<" in asked.body["prompt"] and ">S2" in asked.body["prompt"] for asked in server.asked)


async def test_what_there_is_no_room_for_at_all_is_told_and_not_asked_again_unchanged(open_engine: Any):
    engine, server = open_engine(NO_ROOM, models=listing("coder", owned_by="vllm", max_model_len=2048))
    for request in (HOLE, Request(prompt=Chat(messages=(Message(role="user", content="x " * 9999),)), max_new_tokens=9)):
        server.asked.clear()
        with pytest.raises(RequestError, match=r"no room for so long a prompt .*maximum context length is 2048 tokens.*: select less code"):
            await text_of(engine, request)
        assert len(server.asked) == 1


async def test_a_request_that_is_refused_within_the_answer_is_not_called_a_failure(open_engine: Any):
    said = {"error": {"message": "Grammar error: Invalid type: nonsense", "type": "BadRequestError", "param": None, "code": 400}}
    engine, server = open_engine(says(b"data: " + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n"))
    with pytest.raises(RequestError, match=r"does not take this request \(400: Grammar error: Invalid type: nonsense\)"):
        await text_of(engine)
    assert len(server.asked) == 1


@pytest.mark.parametrize("fim", ["suffix", "infill"])
async def test_a_way_to_ask_for_holes_that_the_server_lacks_is_named(open_engine: Any, fim: str):
    for refusal in (status(404, '{"detail": "Not Found"}'), status(400, '{"error": {"message": "suffix is only supported for models"}}')):
        engine, _ = open_engine(refusal, fim=fim)
        with pytest.raises(EngineError, match=rf"may not know remote.fim = '{fim}' .*: set it to 'tokens'"):
            await text_of(engine)
        with pytest.raises(EngineError) as told:
            await text_of(engine, Request(prompt=Chat(messages=(Message(role="user", content="hello"),)), max_new_tokens=9))
        assert "remote.fim" not in str(told.value), "questions have nothing to do with it"


QUESTION = Request(prompt=Chat(messages=(Message(role="user", content="explain"),)), max_new_tokens=9)
NO_TEMPLATE = """As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the \
tokenizer does not define one."""


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        (status(400, json.dumps({"error": {"message": NO_TEMPLATE, "code": 400}})), "has no chat template for its model (400)"),
        (
            status(500, json.dumps({"object": "error", "message": "tokenizer.chat_template is not set"})),
            "has no chat template for its model (500)",
        ),
        (status(404, '{"detail": "Not Found"}'), "has no /chat/completions (404)"),
        (status(501, '{"error": {"message": "not supported"}}'), "has no /chat/completions (501)"),
    ],
    ids=["vLLM", "SGLang", "no such address", "not made"],
)
async def test_a_server_that_cannot_converse_says_so_once_and_is_asked_by_example_from_then_on(
    open_engine: Any, refuses: Behaviour, said: str
):
    engine, server = open_engine(refuses, says(*GOOD))
    assert engine.facts.without_chat is None
    with pytest.raises(RequestError) as told:
        await text_of(engine, QUESTION)
    assert said in str(told.value) and str(told.value).endswith("Ask again.") and len(server.asked) == 1
    assert engine.facts.without_chat and said in engine.facts.without_chat and "asked by example" in engine.facts.without_chat
    by_example = replace(QUESTION, prompt=Chat(messages=(Message(role="user", content="### Request\n<｜User｜>"),), in_template=False))
    assert await text_of(engine, by_example) == await text_of(engine) == "a = 1\n"
    assert [asked.path for asked in server.asked[1:]] == ["/v1/completions"] * 2
    assert server.asked[1].body["prompt"] == f"{BOS}### Request\n<|User|>"


async def test_what_does_not_say_that_a_server_cannot_converse_leaves_questions_as_they_are(open_engine: Any):
    for refuses, models in (
        (status(404, '{"error": {"message": "The model `served` does not exist."}}'), None),
        (status(404, '{"detail": "Not Found"}'), status(500)),  # the whole address may be wrong
        (status(400, '{"error": {"message": "seed: Input should be less than 9"}}'), None),
    ):
        engine, _ = open_engine(refuses, models=models, model="served")
        with pytest.raises(EngineError):
            await text_of(engine, QUESTION)
        assert engine.facts.without_chat is None


async def test_a_server_that_fails_at_a_question_without_a_word_may_lack_a_template(open_engine: Any):
    engine, _ = open_engine(status(500, "Internal Server Error"))  # transformers serve
    with pytest.raises(
        EngineError, match=r"failed on this question \(500\): see the server's own log; where that says .* Instruct or Chat\."
    ):
        await text_of(engine, QUESTION)


def test_whether_a_release_converses_is_known_by_its_name(open_engine: Any):
    base = "never learned to converse, so actions are asked by example"
    for name, more in (
        ("coder", {"root": "deepseek-ai/DeepSeek-Coder-V2-Lite-Base"}),
        ("/models/DeepSeek-Coder-V2-Lite-Base.Q4_K_M.gguf", {}),
        ("bartowski/DeepSeek-Coder-V2-Lite-Base-GGUF:Q6_K", {}),
    ):
        engine, server = open_engine(models=listing(name, **more))
        assert engine.facts.without_chat and base in engine.facts.without_chat and engine.facts.without_fim is None
        assert base in inspect(Endpoint(url=server.url)).facts["questions"]
    tuned, _ = open_engine(models=listing("coder", root="/models/DeepSeek-V2-Chat-AWQ"))
    assert tuned.facts.without_chat is None and "was not trained to fill in" in tuned.facts.without_fim


def test_a_template_that_llama_server_makes_up_is_none(open_engine: Any):
    made_up = """{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}"""
    for template, expected in ((made_up, True), ("{{ bos_token }}", False)):
        server = Misbehaving(models=listing("mine.gguf", owned_by="llamacpp"), props=status(200, json.dumps({"chat_template": template})))
        with server:
            engine = connect(Endpoint(url=server.url, timeout_s=2.0))
            without = engine.facts.without_chat
            engine.close()
        assert ("writes ChatML, so actions are asked by example" in (without or "")) is expected


def test_doctor_asks_a_server_whether_it_converses(open_engine: Any):
    engine, server = open_engine(status(400, json.dumps({"message": NO_TEMPLATE})))
    assert "has no chat template for its model" in inspect(engine._where).facts["questions"]
    server.script[:] = [says(*GOOD)]
    assert inspect(engine._where).facts["questions"] == "answered"
    assert {(asked.path, asked.body["max_tokens"]) for asked in server.asked} == {("/v1/chat/completions", 1)}


async def test_characters_cut_in_half_come_out_whole(open_engine: Any):
    raw = b'data: {"choices": [{"text": "\xc3\xa9 \xf0\x9f\x99\x82"}]}\n\n'
    pairs = [b'data: {"choices": [{"text": "\\ud83d"}]}\n\n', b'data: {"choices": [{"text": "\\ude00!"}]}\n\n']
    parts = [part for byte in raw for part in (bytes([byte]), 0.001)]
    engine, _ = open_engine(says(*parts, *pairs, event("", "stop")))
    assert await text_of(engine) == "é 🙂😀!"


async def test_half_a_character_and_bytes_that_are_none_do_not_end_the_answer(open_engine: Any):
    engine, _ = open_engine(says(b'data: {"choices": [{"text": "a\\ud83d"}]}\n\n', b'data: {"choices": [{"text": "b\xff"}]}\n\n', *GOOD))
    assert await text_of(engine) == "a�b�a = 1\n"


async def test_an_answer_ends_at_a_stop_string_even_where_the_server_goes_on(open_engine: Any):
    engine, server = open_engine(speaks_forever)
    request = Request(prompt=HOLE.prompt, max_new_tokens=99, stop=("xxxx",))
    generation = engine.submit(request)
    assert [piece async for piece in generation] == [] and generation.cost and generation.cost.finish is Finish.STOP
    assert server.asked[0].body["stop"] == ["xxxx"]
    assert await asyncio.to_thread(server.was_left.wait, 2.0)


async def test_no_more_stop_strings_are_sent_than_servers_take_and_the_others_hold_too(open_engine: Any):
    engine, server = open_engine()
    generation = engine.submit(Request(prompt=HOLE.prompt, max_new_tokens=8, stop=("q", "w", "x", "y", "= 1")))
    assert [piece async for piece in generation] == ["a "] and generation.cost and generation.cost.finish is Finish.STOP
    assert server.asked[0].body["stop"] == ["q", "w", "x", "y"]


@pytest.mark.parametrize(
    ("last", "finish"),
    [
        ({"choices": [{"text": "", "finish_reason": "stop", "stop_reason": "def"}]}, Finish.STOP),
        ({"choices": [{"text": "", "finish_reason": "stop", "matched_stop": "def"}]}, Finish.STOP),
        ({"choices": [{"text": "", "finish_reason": "stop", "stop_reason": None}]}, Finish.END),
        ({"choices": [{"text": "", "finish_reason": "stop", "matched_stop": 8188}]}, Finish.END),
        ({"choices": [{"text": "", "finish_reason": "length", "stop_reason": None}]}, Finish.LENGTH),
        ({"content": "", "stop": True, "stop_type": "word"}, Finish.STOP),
        ({"content": "", "stop": True, "stop_type": "limit"}, Finish.LENGTH),
        ({"content": "", "stop": True, "stop_type": "eos"}, Finish.END),
    ],
    ids=str,
)
async def test_why_an_answer_ended_is_read_in_every_dialect(open_engine: Any, last: dict[str, Any], finish: Finish):
    engine, _ = open_engine(says(event("a d"), b"data: " + json.dumps(last).encode() + b"\n\n"))
    generation = engine.submit(Request(prompt=HOLE.prompt, max_new_tokens=8, stop=("def",)))
    assert "".join([piece async for piece in generation]) == "a d", "what looked like a stop string's beginning is text"
    assert generation.cost and generation.cost.finish is finish


@pytest.mark.parametrize("token", NO_TEXT)
async def test_an_answer_ends_at_a_token_that_is_no_text(open_engine: Any, token: str):
    engine, _ = open_engine(says(event(f"a{token[:3]}"), event(f"{token[3:]}b"), event("c", "stop")))
    generation = engine.submit(HOLE)
    assert "".join([piece async for piece in generation]) == "a" and generation.cost and generation.cost.finish is Finish.END


async def test_an_answer_that_was_left_early_knows_the_length_of_its_prompt(open_engine: Any):
    usage = {"prompt_tokens": 392, "total_tokens": 393, "completion_tokens": 1}
    engine, _ = open_engine(says(event("a", usage=usage), 9.0), stall_s=9.0)
    generation = engine.submit(HOLE)
    async for _ in generation:
        break
    generation.cancel()
    cost = await generation.finished()
    assert (cost.finish, cost.computed_tokens, cost.new_tokens) == (Finish.CANCELLED, 392, 1)


async def test_an_answer_in_one_piece_and_one_without_an_end_are_understood(open_engine: Any):
    whole = json.dumps({"choices": [{"text": "all", "finish_reason": "length"}], "usage": {"completion_tokens": 5, "prompt_tokens": "x"}})
    engine, server = open_engine(status(200, whole, "Content-Type: application/json\r\n"))
    generation = engine.submit(HOLE)
    assert [piece async for piece in generation] == ["all"]
    assert generation.cost and (generation.cost.finish, generation.cost.new_tokens) == (Finish.LENGTH, 5)
    server.script[:] = [says(event("b", "stop"), 2.0)]
    assert await text_of(engine) == "b", "it said that it had ended"


async def test_log_probabilities_come_in_both_spellings(open_engine: Any):
    side_by_side = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    entries = {"content": [{"token": "é", "bytes": [195, 169], "logprob": -0.1, "top_logprobs": []}]}
    events = [
        b"data: " + json.dumps({"choices": [{"text": "a", "logprobs": side_by_side}]}).encode() + b"\n\n",
        b"data: " + json.dumps({"choices": [{"text": "e", "logprobs": entries, "finish_reason": "stop"}]}).encode() + b"\n\n",
    ]
    engine, server = open_engine(says(*events))
    generation = engine.submit(Request(prompt=HOLE.prompt, max_new_tokens=2, logprobs=2))
    await generation.finished()
    assert [(known.content, known.logprob) for known in generation.logprobs] == [(b"a", -0.5), ("é".encode(), -0.1)]
    assert generation.logprobs[0].alternatives == ((b"a", -0.5), (b"b", -1.0)) and server.asked[0].body["logprobs"] == 2


async def test_a_closed_engine_ends_what_runs_and_takes_nothing_more(open_engine: Any):
    engine, _ = open_engine(speaks_forever)
    generation = engine.submit(replace(HOLE, max_new_tokens=9999))
    async for _ in generation:
        break
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineClosed):
        await generation.finished()
    with pytest.raises(EngineClosed):
        engine.submit(HOLE)


async def test_many_requests_run_side_by_side(open_engine: Any):
    engine, _ = open_engine(says(event("a"), 0.2, event("b", "stop")))
    started = time.monotonic()
    assert await asyncio.gather(*(text_of(engine) for _ in range(30))) == ["ab"] * 30
    assert time.monotonic() - started < 5


def test_connecting_learns_what_is_served(open_engine: Any):
    engine, _ = open_engine(models=listing("DeepSeek-Coder-V2-Lite-Base", owned_by="vllm", max_model_len=32768))
    assert engine.facts.checkpoint == "DeepSeek-Coder-V2-Lite-Base" and engine.facts.context_tokens == 32768
    assert engine.facts.without_fim is None and engine._served.owner == "vllm"
    untrained, _ = open_engine(models=listing("deepseek-ai/DeepSeek-Coder-V2-Instruct"))
    assert untrained.facts.without_fim and "was not trained" in untrained.facts.without_fim
    unlisted, _ = open_engine(models=status(500), model="mine")
    assert unlisted.facts.checkpoint == "mine"


@pytest.mark.parametrize(
    ("models", "model", "said"),
    [
        (listing("a", "b"), "c", "does not serve 'c': set remote.model to one of a, b."),
        (status(401), "", "refuses the token"),
        (status(404), "", "does not list what it serves (404): set remote.model, and check remote.url, which ends in /v1."),
        (status(200, "<html>"), "", "does not list what it serves"),
        (hangs_up, "", "was lost"),
        (status(308, headers="Location: https://elsewhere/v1/models\r\n"), "", "sends elsewhere (308), which is not followed"),
        (status(503, '{"error": {"message": "Loading model"}}'), "", "cannot answer now (503: Loading model): it may still be loading"),
        (status(200, "[" * 100_000), "", "does not list what it serves"),
    ],
)
def test_connecting_to_the_wrong_thing_says_what_is_wrong(models: Behaviour, model: str, said: str):
    with Misbehaving(models=models) as server, pytest.raises(EngineError) as told:
        connect(Endpoint(url=server.url, model=model, timeout_s=2.0))
    assert said in str(told.value)


def test_nothing_at_the_address_is_said_at_once():
    with Misbehaving() as server:
        url = server.url
    with pytest.raises(EngineError, match="Nothing answers at http://127"):
        connect(Endpoint(url=url))
    assert "Nothing answers" in inspect(Endpoint(url=url)).problems[0]


def test_a_certificate_that_nobody_signed_is_refused_and_trusted_once_named(tmp_path: Path):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=127.0.0.1"
    subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Misbehaving(tls=context) as server:
        with pytest.raises(EngineError, match=r"certificate of 127.0.0.1:\d+ is not trusted"):
            connect(Endpoint(url=server.url))
        connect(Endpoint(url=server.url, ca_file=str(tmp_path / "cert.pem"))).close()


def test_a_certificate_for_another_name_is_no_matter_of_trust(tmp_path: Path):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=x -addext"
    subprocess.run([*command.split(), "subjectAltName=DNS:elsewhere.example"], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with (
        Misbehaving(tls=context) as server,
        pytest.raises(EngineError, match=r"is for another name .*: set remote.url to the name that it"),
    ):
        connect(Endpoint(url=server.url, ca_file=str(tmp_path / "cert.pem")))


def test_a_certificate_that_has_run_out_is_no_matter_of_trust():
    error = httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)")
    assert "is out of date" in unreachable(Endpoint(url="https://x/v1"), error)


def test_a_server_without_tls_is_told_from_one_that_is_not_there():
    with (
        Misbehaving() as server,
        pytest.raises(EngineError, match=r"does not speak TLS here .*: correct remote.url, which may have to begin"),
    ):
        connect(Endpoint(url=server.url.replace("http", "https")))


@pytest.mark.parametrize(
    ("asked_for", "least_s", "most_s"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("9" * 400, math.inf, math.inf),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0, 0),
        ("\xb2", 0, 0),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(asked_for: str, least_s: float, most_s: float):
    assert least_s <= asked_to_wait_s(asked_for) <= most_s


async def test_a_server_that_asks_to_be_left_alone_until_tomorrow_is(open_engine: Any):
    tomorrow = format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)
    engine, server = open_engine(status(429, headers=f"Retry-After: {tomorrow}\r\n"))
    with pytest.raises(EngineError, match="too much to do"):
        await text_of(engine)
    assert len(server.asked) == 1


async def test_a_server_that_asks_to_be_asked_again_at_once_is_asked_no_faster_than_others(
    open_engine: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_engine, "BACKOFF_S", 0.2)
    engine, _ = open_engine(status(503, headers="Retry-After: 0\r\n"), says(*GOOD))
    started = time.monotonic()
    assert await text_of(engine) == "a = 1\n" and time.monotonic() - started >= 0.1


async def test_what_is_not_encrypted_goes_to_no_proxy(open_engine: Any, monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Misbehaving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        engine, server = open_engine()
        assert await text_of(engine) == "a = 1\n"
        assert len(server.asked) == 1 and proxy.asked == []


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://x", "http://proxy:port"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(EngineError, match=r"The proxy .* is of no use for gpu.example.org .*: correct HTTPS_PROXY .*, or name"):
        connect(Endpoint(url="https://gpu.example.org/v1"))


async def test_half_a_character_in_the_users_text_does_not_keep_it_from_being_asked(open_engine: Any):
    engine, server = open_engine()
    assert await text_of(engine, Request(prompt=Fim(prefix="a\ud83d", suffix=""), max_new_tokens=8)) == "a = 1\n"
    assert "a?<" in server.asked[0].body["prompt"]


async def test_what_a_server_says_is_fit_for_a_terminal(open_engine: Any):
    engine, _ = open_engine(status(400, json.dumps({"message": "\x1b[2Jgone\ud800"})), models=listing("\x1b]0;x\x07"))
    with pytest.raises(RequestError) as told:
        await text_of(engine)
    assert "\ufffd[2Jgone\ufffd" in str(told.value) and engine.facts.checkpoint.isprintable()


def test_a_list_of_models_that_drips_is_given_up():
    drip: list[bytes | float] = [b" ", 0.1] * 100
    with Misbehaving(models=says(*drip)) as server, pytest.raises(EngineError, match=r"did not answer within 0.5 s"):
        connect(Endpoint(url=server.url, timeout_s=0.5))
    with Misbehaving(models=says(*[b"x" * 100_000] * 200)) as server, pytest.raises(EngineError, match="answer without end"):
        connect(Endpoint(url=server.url))


SET: dict[str, Any] = {
    "url": "https://gpu.example.org/v1/", "model": "", "fim": "tokens", "token_file": "", "ca_file": "", "plain_http": False,
    "timeout_s": 1.0, "stall_s": 1.0, "environment": {},
}  # fmt: skip


def test_settings_become_an_endpoint():
    assert endpoint(**SET).url == "https://gpu.example.org/v1"
    assert endpoint(**SET | {"environment": {"DEEPSEEK_ENGINE_TOKEN": "t"}}).token == "t"
    assert endpoint(**SET | {"url": "http://localhost:8000/v1"}).host == "localhost:8000"
    assert endpoint(**SET | {"url": "http://gpu:8000/v1", "plain_http": True}).url == "http://gpu:8000/v1"
    assert endpoint(**SET | {"url": " https://[2001:db8::1]:8000/v1/\n"}).host == "[2001:db8::1]:8000"
    assert endpoint(**SET | {"url": "http://[::1]:8000/models/v1"}).url == "http://[::1]:8000/models/v1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": ""}, "set it to where the server listens"),
        ({"url": "ftp://x"}, "set it to where the server listens"),
        ({"url": "https://me:secret@x/v1"}, "holds a password"),
        ({"url": "http://gpu.example.org/v1"}, "ssh -L 8000:localhost:8000 gpu.example.org"),
        ({"url": "http://[::1/v1"}, "set it to where the server listens"),
        ({"url": "http://localhost:80000/v1"}, "set it to where the server listens"),
        ({"url": "http://localhost:port/v1"}, "set it to where the server listens"),
        ({"url": "https://gpu.example.org /v1"}, "set it to where the server listens"),
        ({"url": "https://x/v1?key=1"}, "leave out what stands behind"),
        ({"ca_file": "/nowhere.pem"}, "is not there"),
        ({"ca_file": "~nobody-of-that-name/x.pem"}, "is not there"),
        ({"token_file": "~nobody-of-that-name/token"}, "cannot be read"),
        ({"environment": {"DEEPSEEK_ENGINE_TOKEN": "gehe\u00efm"}}, "DEEPSEEK_ENGINE_TOKEN holds no token"),
        ({"environment": {"DEEPSEEK_ENGINE_TOKEN": "a\nb"}}, "DEEPSEEK_ENGINE_TOKEN holds no token"),
        ({"token_file": "/nowhere"}, "cannot be read"),
    ],
)
def test_settings_that_cannot_work_say_what_to_change(changes: dict[str, Any], said: str):
    with pytest.raises(EngineError, match=said):
        endpoint(**SET | changes)


def test_a_token_lies_in_a_file_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "token"
    file.write_text("abc\n")
    file.chmod(0o600)
    assert endpoint(**SET | {"token_file": str(file)}).token == "abc"
    file.chmod(0o644)
    with pytest.raises(EngineError, match=rf"can be read by others: chmod 600 {file}"):
        endpoint(**SET | {"token_file": str(file)})
    with monkeypatch.context() as windows:  # which says so of every file
        windows.setattr(sys, "platform", "win32")
        assert endpoint(**SET | {"token_file": str(file)}).token == "abc"
    file.write_text("")
    file.chmod(0o600)
    with pytest.raises(EngineError, match="is empty"):
        endpoint(**SET | {"token_file": str(file)})
    file.write_text("two words")
    with pytest.raises(EngineError, match="holds no token"):
        endpoint(**SET | {"token_file": str(file)})


LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)
WRITTEN_LINES = st.one_of(
    st.tuples(st.sampled_from(["data: ", "data:"]), LINE.filter(lambda text: not text.startswith(" "))),
    st.tuples(st.sampled_from([": ", ":", "event: ", "id:", "retry: ", "database: "]), LINE),
)


@given(
    events=st.lists(st.lists(WRITTEN_LINES, min_size=1, max_size=4), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    begin=st.sampled_from(["", "\ufeff"]),
    data=st.data(),
)
def test_events_are_found_wherever_they_are_cut(events: list[list[tuple[str, str]]], end: str, begin: str, data: st.DataObject):
    raw = (begin + "".join("".join(name + text + end for name, text in event) + end for event in events)).encode()
    of_data = [[text for name, text in event if name.startswith("data:")] for event in events]
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=30))})
    stream, found = EventStream(), []
    for start, stop in pairwise(cuts):
        found += stream.add(raw[start:stop])
    assert [*found, *stream.end()] == ["\n".join(lines) for lines in of_data if lines]


def test_an_event_that_is_not_closed_counts_and_half_a_line_does_not():
    stream = EventStream()
    assert stream.add(b"data: a\r\ndata:b\r\n\r\ndata: end\ndata: hal") == ["a\nb"] and stream.end() == ["end"]


def test_a_long_event_in_small_pieces_takes_no_longer_than_its_length():
    stream, started = EventStream(), time.monotonic()
    for _ in range(200_000):
        assert stream.add(b"data: " + b"x" * 24) == []
    assert len(stream.add(b"\n\n")[0]) == 200_000 * 30 - 6 and time.monotonic() - started < 5


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: x\n" * 100], ids=["a line", "lines of one event"])
def test_what_never_ends_is_not_kept(piece: bytes):
    stream = EventStream()
    with pytest.raises(EngineError, match="without end"):
        for _ in range(MAX_BYTES // len(piece) + 2):
            stream.add(piece)


async def test_a_server_that_only_keeps_the_connection_alive_is_given_up(open_engine: Any):
    pings: list[bytes | float] = [b": ping\n\n", 0.05] * 100
    engine, server = open_engine(says(*pings), timeout_s=0.5)
    with pytest.raises(EngineError, match=r"did not answer within 0.5 s"):
        await text_of(engine)
    assert await asyncio.to_thread(server.was_left.wait, 2.0)
    engine, _ = open_engine(says(event("a"), *pings))
    with pytest.raises(EngineError, match=r"fell silent for 0.3 s"):
        await text_of(engine)


async def test_a_server_that_says_early_that_it_is_there_has_as_long_for_its_first_word(open_engine: Any):
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    for sign in (b": ping\n\n", role):
        engine, _ = open_engine(says(sign, 0.7, *GOOD), timeout_s=2.0, stall_s=0.3)
        assert await text_of(engine) == "a = 1\n"


async def test_an_answer_that_has_ended_is_not_waited_for_as_long_as_a_word(open_engine: Any):
    for last in ([event("b", "stop")], [event("b"), b"data: [DONE]\n\n"]):
        engine, _ = open_engine(says(*last, 9.0), stall_s=9.0)
        started = time.monotonic()
        assert await text_of(engine) == "b" and time.monotonic() - started < 4


async def test_an_answer_whose_end_has_no_reason_is_an_answer(open_engine: Any):
    engine, server = open_engine(says(event("a"), event("b"), b"data: [DONE]\n\n"))
    assert await text_of(engine) == "ab"
    whole = json.dumps({"choices": [{"text": "all", "finish_reason": None}], "error": None})
    server.script[:] = [status(200, whole, "Content-Type: application/json\r\n")]
    assert await text_of(engine) == "all"


async def test_an_event_that_says_that_there_is_no_error_is_none(open_engine: Any):
    engine, _ = open_engine(says(event("a", error=None), event("", "stop", error=None)))
    assert await text_of(engine) == "a"


async def test_a_server_that_does_not_heed_the_limit_is_left_at_it(open_engine: Any):
    engine, server = open_engine(speaks_forever)
    generation = engine.submit(HOLE)
    assert "".join([piece async for piece in generation]) == "x" * 8
    assert generation.cost and (generation.cost.finish, generation.cost.new_tokens) == (Finish.LENGTH, 8)
    assert await asyncio.to_thread(server.was_left.wait, 2.0)


async def test_a_web_page_is_not_taken_for_an_answer(open_engine: Any):
    engine, server = open_engine(status(200, "<html>Sign in</html>", "Content-Type: text/html; charset=utf-8\r\n"))
    with pytest.raises(EngineError, match=r"answers with a web page: check remote.url, which ends in /v1\."):
        await text_of(engine)
    assert len(server.asked) == 1


@pytest.mark.parametrize("head", ["200 OK\r\nContent-Type: application/json", "500 X", "200 OK\r\nContent-Type: text/event-stream"])
async def test_an_answer_without_end_is_given_up(open_engine: Any, head: str):
    flood = says(*[b"x" * 100_000] * 200, 9.0, head=f"HTTP/1.1 {head}\r\n\r\n".encode())
    engine, server = open_engine(flood, timeout_s=30.0, stall_s=30.0)
    with pytest.raises(EngineError, match="answer without end"):
        await text_of(engine)
    assert len(server.asked) == 1


async def test_nonsense_that_is_nested_too_deeply_is_nonsense(open_engine: Any):
    deep = b"[" * 100_000
    engine, server = open_engine(says(b"data: " + deep + b"\n\n"))
    with pytest.raises(EngineError, match="not JSON"):
        await text_of(engine)
    server.script[:] = [status(403, deep.decode())]
    with pytest.raises(EngineError, match="refuses the token"):
        await text_of(engine)


async def test_a_compressed_stream_is_read_as_it_comes(open_engine: Any):
    packing = zlib.compressobj(wbits=31)
    parts = [packing.compress(part) + packing.flush(zlib.Z_SYNC_FLUSH) for part in GOOD]
    engine, _ = open_engine(says(parts[0], 9.0, *parts[1:], head=HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"), stall_s=9.0)
    async for piece in engine.submit(HOLE):
        assert piece == "a ="
        break


async def test_answers_that_were_read_to_their_end_share_a_connection(open_engine: Any):
    engine, _ = open_engine()
    opened: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.transport.set_write_buffer_limits(0)
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line.split()[1]) for line in head.decode().lower().split("\r\n") if line.startswith("content-length"))
            await reader.readexactly(length)
            writer.write(HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked"))
            for part in [*GOOD, b""]:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await asyncio.sleep(0.005)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine._where = replace(engine._where, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    assert [await text_of(engine) for _ in range(3)] == ["a = 1\n"] * 3 and len(opened) == 1
    opened[0].close()
    server.close()


@pytest.fixture
async def served_by_transformers(tmp_path: Path) -> AsyncIterator[str]:
    """`transformers serve` with the starter model."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai", "accelerate")):
        pytest.skip("transformers serve needs fastapi, uvicorn, openai and accelerate")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(STARTER), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    async with AsyncExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("wb"))
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
        stack.callback(process.kill)
        for _ in range(600):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                assert process.returncode is None, (tmp_path / "log").read_text()
                await asyncio.sleep(0.1)
            else:
                writer.close()
                break
        yield f"http://127.0.0.1:{port}/v1"


async def test_a_real_server_answers_as_the_engine_here_does(served_by_transformers: str):
    from model_host.engine import load_engine

    where = Endpoint(url=served_by_transformers, model=str(STARTER), timeout_s=60.0)
    elsewhere, here = await asyncio.to_thread(connect, where), load_engine(STARTER, dtype="float32", device="cpu")
    try:
        hole = Request(prompt=Fim(prefix="def add(a, b):\n    return ", suffix="\n\n\ndef sub(a, b):\n"), max_new_tokens=12)
        chat = Request(prompt=Chat(messages=(Message(role="user", content="What does len do?"),)), max_new_tokens=12)
        said = "".join([piece async for piece in elsewhere.submit(hole)])
        assert said and said == "".join([piece async for piece in here.submit(hole)])
        assert "".join([piece async for piece in elsewhere.submit(chat)]), "there without BOS, so it may differ"
        generation = elsewhere.submit(Request(prompt=hole.prompt, max_new_tokens=2000))
        async for _ in generation:
            break
        generation.cancel()
        assert (await generation.finished()).finish is Finish.CANCELLED
    finally:
        elsewhere.close()
        here.close()
