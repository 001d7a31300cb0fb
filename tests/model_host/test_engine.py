"""The engine: what it says, what it reuses, and that it stops when told to."""

import asyncio
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_host import engine as engine_module
from model_host.checkpoints import STARTER
from model_host.engine import LocalEngine, load_engine
from model_host.errors import EngineClosed, RequestError
from model_host.generation import Chat, Cost, Fim, Finish, Generation, Grammar, Message, Priority, Request, Reuse, Sampling

PREFIX = "import os\n\n\nclass Shop:\n    def __init__(self, name):\n        self.name = name\n\n    def label(self):\n"
SUFFIX = "\n\ndef main():\n    print(Shop('a').label())\n"


def fresh(**choice: int) -> LocalEngine:
    """In float32, where neither a cache nor a batch can change a word."""
    return load_engine(STARTER, device="cpu", dtype="float32", **choice)


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


def endless() -> Request:
    """What goes on until it is stopped, whatever the model would like to say."""
    return replace(hole("        # ", tokens=4000), grammar=Grammar(kind="regex", source="[a-z ]{9999}"))


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


def method(number: int) -> str:
    return f"    def step_{number}(self, value):\n        self.total += value * {number}\n        return self.total\n\n"


LONG = "class Machine:\n" + "".join(method(number) for number in range(40))


async def test_after_an_edit_above_the_cursor_little_is_computed_and_at_rest_it_becomes_exact():
    running, cold = fresh(), fresh()
    edited = replace(hole("    def st", prefix=LONG.replace("value * 7\n", "value * 7 + self.offset\n"), tokens=16), reuse=Reuse.SHIFTED)
    typed = replace(edited, prompt=replace(edited.prompt, middle="    def step_40(self, "))
    try:
        await ask(running, hole("    def st", prefix=LONG))
        _, at_once = await ask(running, edited)
        await asyncio.to_thread(running.rested.wait, 60)
        after, rested = await ask(running, typed)
        wanted, cost = await ask(cold, typed)
    finally:
        running.close()
        cold.close()
    assert at_once.reuse is Reuse.SHIFTED and rested.reuse is Reuse.EXACT and cost.reuse is Reuse.OFF
    assert at_once.computed_tokens < 0.2 * at_once.shifted_tokens
    assert after == wanted
    assert rested.shifted_tokens == 0 and rested.computed_tokens <= 8
    assert rested.cached_tokens + rested.computed_tokens == cost.computed_tokens


async def test_a_choice_too_close_for_shifted_latents_waits_for_exact_ones_if_there_is_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "CLOSE_CALL_NATS", 2.0)
    running, cold = fresh(), fresh()
    edited = replace(hole("    def st", prefix=LONG.replace("value * 7\n", "value * 7 + self.offset\n"), tokens=24), reuse=Reuse.SHIFTED)
    try:
        await ask(running, hole("    def st", prefix=LONG))
        settled, cost = await ask(running, edited)
        wanted, _ = await ask(cold, replace(edited, reuse=Reuse.OFF))
        await asyncio.to_thread(running.rested.wait, 60)
        _, again = await ask(running, edited)
        other = replace(edited.prompt, prefix=LONG.replace("value * 9\n", "9\n"))
        _, hurried = await ask(running, replace(edited, prompt=other, settle_s=0))
    finally:
        running.close()
        cold.close()
    assert hurried.reuse is Reuse.SHIFTED and hurried.settled_tokens == 0
    assert settled == wanted
    assert cost.reuse is Reuse.SHIFTED and cost.shifted_tokens > 0 and cost.settled_tokens > 0
    assert again.reuse is Reuse.EXACT and again.settled_tokens == 0


async def test_whoever_wants_exact_answers_gets_them_beside_those_who_do_not(engine: LocalEngine):
    prefix = LONG.replace("step_", "turn_")
    edited = hole("    def tu", prefix=prefix.replace("value * 7\n", "7 * value - 1\n"), tokens=16)
    await ask(engine, hole("    def tu", prefix=prefix))
    _, nearly = await ask(engine, replace(edited, reuse=Reuse.SHIFTED))
    exact, cost = await ask(engine, edited)
    cold, nothing = await ask(engine, replace(edited, reuse=Reuse.OFF))
    assert nearly.shifted_tokens and not cost.shifted_tokens
    assert exact == cold and nothing.computed_tokens == cost.computed_tokens + cost.cached_tokens


async def test_rest_gives_way_to_whoever_asks_and_goes_on_afterwards(engine: LocalEngine):
    prefix = LONG.replace("step_", "move_")
    edited = replace(hole("    def mo", prefix=prefix.replace("value * 2\n", "2\n"), tokens=4), reuse=Reuse.SHIFTED)
    await ask(engine, hole("    def mo", prefix=prefix))
    _, nearly = await ask(engine, edited)
    for _ in range(5):
        await ask(engine, hole("        "))
    await asyncio.to_thread(engine.rested.wait, 60)
    _, cost = await ask(engine, edited)
    assert nearly.shifted_tokens and not cost.shifted_tokens and cost.computed_tokens == 1


async def test_files_one_goes_back_and_forth_between_keep_their_caches(engine: LocalEngine):
    files = [f"# file {n}\n" + "".join(random.Random(n).choices("abcdef = 12\n", k=300)) + "\n" for n in range(3)]
    for prefix in files:
        await ask(engine, hole(prefix=prefix, tokens=1))
    for prefix in files:
        _, cost = await ask(engine, hole(prefix=prefix, tokens=1))
        assert cost.computed_tokens == 1


async def test_a_cancelled_request_stops_within_one_decode_step_and_the_next_one_is_served(engine: LocalEngine):
    generation = engine.submit(endless())
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
    running = engine.submit(endless())
    waiting = engine.submit(hole(prefix="import a_very_different_file\n" * 50))
    waiting.cancel()
    running.cancel()
    cost = await waiting.finished()
    assert (cost.finish, cost.computed_tokens, cost.new_tokens) == (Finish.CANCELLED, 0, 0)
    await running.finished()


async def test_a_request_that_comes_while_the_engine_is_closed_hears_that(monkeypatch: pytest.MonkeyPatch):
    running = fresh()

    def late() -> Generation:
        running.close()  # as another thread may, just then
        return Generation()

    monkeypatch.setattr(engine_module, "Generation", late)
    with pytest.raises(EngineClosed):
        await asyncio.wait_for(running.submit(hole()).finished(), 30)


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
    engine = load_engine(edited_config(max_position_embeddings=256), device="cpu")
    try:
        _, cost = await ask(engine, hole("    ", prefix="x = 1\n" * 2000))
    finally:
        engine.close()
    assert cost.cached_tokens + cost.computed_tokens + 8 <= 256


async def test_running_out_of_memory_fails_the_request_and_not_the_engine(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "run", no_memory)
        with pytest.raises(RequestError, match="ran out of memory"):
            await ask(engine, hole())
    assert (await ask(engine, hole()))[1].new_tokens > 0


async def test_closing_ends_what_runs_and_what_waits():
    engine = fresh()
    running, waiting = engine.submit(endless()), engine.submit(hole())
    await anext(running)
    await asyncio.to_thread(engine.close)
    for generation in (running, waiting):
        with pytest.raises(EngineClosed):
            await generation.finished()
    with pytest.raises(EngineClosed):
        engine.submit(hole())


async def test_requests_in_one_batch_say_what_each_says_alone(engine: LocalEngine):
    asked = [hole("        return ", prefix=PREFIX + f"# part {number}\n", tokens=12) for number in range(5)]
    asked += [hole("        ", tokens=12, temperature=1.0, seed=seed) for seed in range(3)]
    alone = [(await ask(engine, request))[0] for request in asked]
    together = await asyncio.gather(*(ask(engine, request) for request in asked))
    assert [text for text, _ in together] == alone


async def test_candidates_share_their_prompt_and_differ():
    engine = fresh()
    try:
        request = hole("        ", prefix=PREFIX * 10, tokens=16, temperature=1.2)
        answers = await asyncio.gather(*(ask(engine, candidate) for candidate in request.candidates(4)))
    finally:
        engine.close()
    assert len({text for text, _ in answers}) > 1
    prompt = answers[0][1].cached_tokens + answers[0][1].computed_tokens
    assert sum(cost.computed_tokens for _, cost in answers) < 1.5 * prompt


async def test_typing_overtakes_a_chat_with_a_long_prompt(engine: LocalEngine):
    chat = Chat(messages=(Message(role="user", content="x = 1\n" * 1500),))
    slow = engine.submit(Request(prompt=chat, max_new_tokens=2, priority=Priority.CHAT))
    _, cost = await ask(engine, hole("        ", tokens=3))
    assert slow.cost is None and cost.new_tokens > 0
    await slow.finished()


async def test_an_answer_ends_before_a_stop_string_even_across_tokens(engine: LocalEngine):
    whole, _ = await ask(engine, hole("        return ", tokens=24))
    at = len(whole) // 2
    stop = whole[at : at + 6]
    request = replace(hole("        return ", tokens=24), stop=("never seen", stop))
    text, cost = await ask(engine, request)
    assert text == whole[: whole.index(stop)] and cost.finish is Finish.STOP


async def test_a_grammar_decides_what_an_answer_looks_like(engine: LocalEngine):
    schema = '{"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"], "additionalProperties": false}'
    request = replace(hole(tokens=60, temperature=1.0), grammar=Grammar(kind="json_schema", source=schema))
    text, cost = await ask(engine, request)
    assert isinstance(json.loads(text)["a"], int) and cost.finish is Finish.END
    text, _ = await ask(engine, replace(request, grammar=Grammar(kind="regex", source="[a-c]{4}")))
    assert re.fullmatch("[a-c]{4}", text)


async def test_a_grammar_that_cannot_be_understood_is_refused_with_the_reason(engine: LocalEngine):
    with pytest.raises(RequestError, match="unclosed group"):
        await ask(engine, replace(hole(), grammar=Grammar(kind="regex", source="a(")))


async def test_log_probabilities_are_those_of_the_words_said(engine: LocalEngine):
    async with engine.submit(replace(hole("        return ", tokens=6), logprobs=3)) as generation:
        text = "".join([piece async for piece in generation])
    assert generation.cost is not None and len(generation.logprobs) == generation.cost.new_tokens
    assert b"".join(token.content for token in generation.logprobs).decode().strip() == text.strip()
    for token in generation.logprobs[1:]:  # the first may be held to the word being typed
        assert token.alternatives[0] == (token.content, token.logprob) and token.logprob < 0
        assert len(token.alternatives) == 3


async def test_a_suggestion_asked_for_again_is_verified_in_few_steps_and_says_the_same(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine._pay, "is_worth_it", lambda: True)  # else how fast the machine happens to be would decide
    request = hole("        for ", tokens=40)
    said, first = await ask(engine, request)
    again, second = await ask(engine, replace(request, likely=said))
    wrong, third = await ask(engine, replace(request, likely="import nothing, of this\nsort = 3"))
    assert again == wrong == said and third.new_tokens == first.new_tokens
    assert second.accepted_tokens > second.new_tokens / 2 and third.accepted_tokens < second.accepted_tokens


async def test_a_repetition_penalty_changes_what_is_repeated(engine: LocalEngine):
    plain, _ = await ask(engine, hole("        x = x + x + x + ", tokens=16))
    varied, _ = await ask(engine, hole("        x = x + x + x + ", tokens=16, repetition_penalty=3.0))
    assert plain != varied


async def test_a_chat_that_the_cache_cannot_hold_is_refused_with_numbers():
    engine = fresh(cache_bytes=1)
    try:
        with pytest.raises(RequestError, match=r"\d MB of cache for [\d,]+ tokens, and \d+ MB"):
            await ask(engine, Request(prompt=Chat(messages=(Message(role="user", content="word " * 1500),)), max_new_tokens=10))
        texts = [await ask(engine, hole("        ", prefix=f"# {number}\n" + PREFIX * 20, tokens=4)) for number in range(4)]
        assert all(cost.new_tokens for _, cost in texts)
    finally:
        engine.close()


async def test_answers_that_need_more_pages_than_there_are_take_turns_and_say_what_they_say_alone():
    engine = fresh(cache_bytes=1)
    try:
        asked = [
            replace(hole("        ", prefix=f"# {number}\n" + PREFIX * 8, tokens=30, temperature=0.8, seed=number), priority=priority)
            for number, priority in enumerate([Priority.CHAT, Priority.BACKGROUND, Priority.INLINE, Priority.MENU])
        ]
        together = await asyncio.gather(*(ask(engine, request) for request in asked))
        alone = [await ask(engine, request) for request in asked]
    finally:
        engine.close()
    assert [text for text, _ in together] == [text for text, _ in alone]


BLOCK = "".join(
    f"# part_{number}.py\nclass Part{number}:\n    def turn(self, angle, speed): ...\n    size = {number}\n" for number in range(24)
)


def told(name: str, block: str = BLOCK, **more: object) -> Request:
    """A hole in a file of a workspace, behind what is known of the others."""
    asked = hole("    def ", prefix=f"# {name}.py\n" + LONG.replace("step", name)[:2000], tokens=4)
    return replace(asked, prompt=replace(asked.prompt, repository=block), **more)


async def test_what_is_known_of_other_files_is_computed_once_for_all_files_of_a_workspace(engine: LocalEngine):
    trunk = len(engine._tokenizer.encode_lines(BLOCK))
    _, first = await ask(engine, told("one"))
    for name in ("two", "three"):
        _, cost = await ask(engine, told(name))
        whole = cost.cached_tokens + cost.computed_tokens
        assert cost.cached_tokens >= 2 + trunk and cost.computed_tokens <= whole - 2 - trunk
    assert first.computed_tokens > trunk > 500


async def test_when_memory_is_short_files_go_and_what_they_share_stays():
    running = fresh(cache_bytes=16_000_000)
    try:
        trunk = len(running._tokenizer.encode_lines(BLOCK))
        costs = [(await ask(running, told(f"file_{number}")))[1] for number in range(5)]
        _, again = await ask(running, told("file_0"))
    finally:
        running.close()
    whole = costs[0].computed_tokens
    assert running.facts.cache_tokens < trunk + 5 * (whole - trunk), "or nothing had to go"
    assert all(cost.cached_tokens >= 2 + trunk for cost in costs[1:])
    assert trunk + 2 <= again.cached_tokens < whole / 2 + trunk


async def test_when_more_is_known_of_other_files_a_file_is_shifted_at_once_and_exact_at_rest():
    running, cold = fresh(), fresh()
    grown = told("one", BLOCK + "# new.py\ndef added(value): ...\n", reuse=Reuse.SHIFTED)
    try:
        await ask(running, told("one"))
        _, at_once = await ask(running, grown)
        await asyncio.to_thread(running.rested.wait, 60)
        after, rested = await ask(running, grown)
        wanted, _ = await ask(cold, replace(grown, reuse=Reuse.OFF))
    finally:
        running.close()
        cold.close()
    assert at_once.shifted_tokens > 300 and at_once.computed_tokens < at_once.cached_tokens / 2
    assert after == wanted and rested.reuse is Reuse.EXACT and rested.computed_tokens == 1


async def test_the_starter_is_told_nothing_of_other_files_unless_the_user_says(engine: LocalEngine):
    assert engine.facts.repository_tokens == 0
