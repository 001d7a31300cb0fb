"""The engine: what it says, what it reuses, and that it stops when told to."""

import asyncio
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_host.checkpoints import STARTER
from model_host.engine import LocalEngine, load_engine
from model_host.errors import EngineClosed, RequestError
from model_host.generation import Chat, Cost, Fim, Finish, Message, Request, Sampling

PREFIX = "import os\n\n\nclass Shop:\n    def __init__(self, name):\n        self.name = name\n\n    def label(self):\n"
SUFFIX = "\n\ndef main():\n    print(Shop('a').label())\n"


def fresh() -> LocalEngine:
    return load_engine(STARTER, device="cpu", dtype="float32", threads=0, progress=lambda what, share: None)


@pytest.fixture(scope="module")
def engine():
    running = fresh()
    yield running
    running.close()


async def ask(engine: LocalEngine, request: Request) -> tuple[str, Cost]:
    async with engine.submit(request) as generation:
        text = "".join([piece async for piece in generation])
    assert generation.cost is not None
    return text, generation.cost


def hole(middle: str = "", prefix: str = PREFIX, suffix: str = SUFFIX, tokens: int = 8, **sampling: float) -> Request:
    return Request(prompt=Fim(prefix=prefix, suffix=suffix, middle=middle), max_new_tokens=tokens, sampling=Sampling(**sampling))


async def test_typing_on_reuses_everything_before_the_line_and_computes_only_what_was_typed(engine: LocalEngine):
    _, first = await ask(engine, hole("        "))
    _, second = await ask(engine, hole("        return self"))
    _, third = await ask(engine, hole("        return self."))
    assert first.cached_tokens + first.computed_tokens > 40
    assert second.computed_tokens <= 3 and third.computed_tokens <= 2
    assert second.cached_tokens + second.computed_tokens >= first.cached_tokens + first.computed_tokens


async def test_a_word_half_typed_is_completed_and_only_the_rest_of_it_is_given(engine: LocalEngine):
    text, _ = await ask(engine, hole("        return self.na"))
    assert text.startswith("me")


edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from(["", "x", "self.", "\n", " = 1", "é🙂"])), max_size=5)


@settings(max_examples=12, deadline=None)
@given(edits=edits)
def test_any_chain_of_edits_gives_what_a_cold_engine_gives(engine: LocalEngine, edits: list[tuple[int, int, str]]):
    async def both() -> None:
        text = PREFIX
        for chosen, removed, added in edits:
            place = chosen % (len(text) + 1)
            text = text[:place] + added + text[place + removed :]
            warm, _ = await ask(engine, hole("    ", prefix=text))
        cold_engine = fresh()
        try:
            warm, cost = await ask(engine, hole("    ", prefix=text))
            cold, cold_cost = await ask(cold_engine, hole("    ", prefix=text))
        finally:
            cold_engine.close()
        assert warm == cold
        assert cold_cost.cached_tokens == 0
        assert cost.cached_tokens + cost.computed_tokens == cold_cost.computed_tokens

    asyncio.run(both())


async def test_files_one_goes_back_and_forth_between_keep_their_caches(engine: LocalEngine):
    files = [f"# file {n}\n" + "".join(random.Random(n).choices("abcdef = 12\n", k=300)) + "\n" for n in range(3)]
    for prefix in files:
        await ask(engine, hole(prefix=prefix, tokens=1))
    for prefix in files:
        _, cost = await ask(engine, hole(prefix=prefix, tokens=1))
        assert cost.computed_tokens == 1


async def test_a_cancelled_request_stops_within_one_decode_step_and_the_next_one_is_served(engine: LocalEngine):
    generation = engine.submit(hole("        # ", tokens=4000, temperature=1.0))
    pieces = 0
    async for _ in generation:
        pieces += 1
        if pieces == 3:
            generation.cancel()
    assert generation.cost is not None and generation.cost.finish is Finish.CANCELLED
    assert generation.cost.new_tokens < 60
    _, cost = await ask(engine, hole("        "))
    assert cost.new_tokens > 0


async def test_a_request_cancelled_while_it_waits_computes_nothing(engine: LocalEngine):
    running = engine.submit(hole("        # ", tokens=200, temperature=1.0))
    waiting = engine.submit(hole(prefix="import a_very_different_file\n" * 50))
    waiting.cancel()
    running.cancel()
    cost = await waiting.finished()
    assert (cost.finish, cost.computed_tokens, cost.new_tokens) == (Finish.CANCELLED, 0, 0)
    await running.finished()


async def test_greedy_says_the_same_twice_and_a_seed_decides_what_sampling_says(engine: LocalEngine):
    assert (await ask(engine, hole("        ")))[0] == (await ask(engine, hole("        ")))[0]
    hot = [(await ask(engine, hole("        ", tokens=20, temperature=1.5, seed=seed)))[0] for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1] and len(set(hot)) > 1


async def test_a_chat_is_answered(engine: LocalEngine):
    ask_for = Chat(
        messages=(Message(role="user", content="Explain what this function does.\n\n```python\ndef add(a, b):\n    return a + b\n```"),)
    )
    text, cost = await ask(engine, Request(prompt=ask_for, max_new_tokens=24))
    assert text.strip() and cost.new_tokens > 1


async def test_a_question_longer_than_the_context_says_so(engine: LocalEngine):
    long = Chat(messages=(Message(role="user", content="word " * 20_000),))
    with pytest.raises(RequestError, match="select less code"):
        await ask(engine, Request(prompt=long, max_new_tokens=10))


async def test_a_file_longer_than_the_context_is_completed_from_its_nearest_part(edited_config):
    engine = load_engine(
        edited_config(max_position_embeddings=256), device="cpu", dtype="float32", threads=0, progress=lambda what, share: None
    )
    try:
        _, cost = await ask(engine, hole("    ", prefix="x = 1\n" * 2000))
    finally:
        engine.close()
    assert cost.cached_tokens + cost.computed_tokens + 8 <= 256


async def test_running_out_of_memory_fails_the_request_and_not_the_engine(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "step", no_memory)
        with pytest.raises(RequestError, match="ran out of memory"):
            await ask(engine, hole())
    assert (await ask(engine, hole()))[1].new_tokens > 0


async def test_closing_ends_what_runs_and_what_waits():
    engine = fresh()
    running, waiting = engine.submit(hole("        # ", tokens=4000, temperature=1.0)), engine.submit(hole())
    await anext(running)
    await asyncio.to_thread(engine.close)
    for generation in (running, waiting):
        with pytest.raises(EngineClosed):
            await generation.finished()
    with pytest.raises(EngineClosed):
        engine.submit(hole())
