"""What outlives its place on the device: found again by those it was made for, and never a wrong answer, whatever happens to the files."""

import asyncio
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_host import tiers
from model_host.checkpoints import STARTER
from model_host.engine import Disk, LocalEngine, load_engine
from model_host.generation import Reuse
from model_host.tiers import DiskTier, Latents, RamTier, Tier, is_news, key_of
from tests.model_host.test_engine import BLOCK, LONG, ask, hole, told

IDS = tuple(range(512))


def latents(tokens: int, seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    return Latents(torch.randn(2, tokens, 8, generator=generator), torch.randn(2, tokens, 4, generator=generator))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    opened: list[DiskTier] = []

    def open_one(key: str = "key", max_bytes: int = 10**9) -> DiskTier:
        opened.append(DiskTier(tmp_path / "latents", key, max_bytes))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def kept(tier: DiskTier, ids: tuple[int, ...] = IDS, seed: int = 0) -> Path:
    """Keeps something, and waits for its file."""
    tier.keep(ids, latents(len(ids), seed))
    tier.close()
    [file] = [file for file in tier._folder.iterdir() if file.name == tiers._name(ids)]
    return file


def is_found(tier: Tier, ids: tuple[int, ...] = IDS, seed: int = 0) -> bool:
    longest, _ = tier.longest(ids)
    found = tier.get(longest) if longest else None
    wanted = latents(len(longest), seed)
    assert found is None or (torch.equal(found.c_kv, wanted.c_kv) and torch.equal(found.k_pe, wanted.k_pe))
    return found is not None


def test_what_was_kept_is_there_for_the_next_host_and_readable_by_its_owner_only(disk):
    file = kept(disk())
    assert is_found(disk())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_other_weights_find_nothing(disk, caplog):
    file = kept(disk("one"))
    other = disk("other")
    assert not is_found(other)
    file.rename(other._folder / file.name)
    assert not is_found(disk("other"))
    assert "another model" in caplog.text


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "text", "gone"])
def test_a_damaged_file_is_passed_over_with_a_line_in_the_log(disk, caplog, damage: str):
    file = kept(disk())
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    reader = disk()
    if damage == "gone":
        assert reader.longest(IDS)[1] == len(IDS)
        file.unlink()
        assert reader.get(IDS) is None
    else:
        file.write_bytes({"torn": bytes(content[:-100]), "empty": b"", "flipped": bytes(content), "text": b"hello" * 100}[damage])
        assert not is_found(reader)
    assert "passed over" in caplog.text


def test_a_write_that_is_cut_off_leaves_nothing_that_is_ever_read(disk, monkeypatch: pytest.MonkeyPatch, caplog):
    tier = disk()

    def die(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", die)
    tier.keep(IDS, latents(len(IDS)))
    tier.close()
    monkeypatch.undo()
    assert "not kept on disk: no space left" in caplog.text
    assert not list(tier._folder.iterdir()) and not is_found(disk())


def test_what_a_killed_host_left_half_written_is_cleared_away_once_it_is_old(disk):
    tier = disk()
    fresh, old = tier._folder / ".a.part", tier._folder / ".b.part"
    fresh.write_bytes(b"1")
    old.write_bytes(b"1")
    os.utime(old, (time.time() - 7200,) * 2)
    kept(tier)
    assert fresh.exists() and not old.exists()


def test_a_folder_that_cannot_be_made_is_told_and_nothing_else_happens(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    tier = DiskTier(tmp_path / "file", "key", 10**9)
    tier.keep(IDS, latents(len(IDS)))
    tier.close()
    assert tier.longest(IDS) == ((), 0) and "cannot be made" in caplog.text


def test_two_hosts_on_one_folder_find_what_either_kept(disk):
    here, there = disk(), disk()
    assert not is_found(there)
    kept(here)
    assert is_found(there)
    kept(there)
    assert is_found(here)


def test_a_later_state_of_a_text_takes_the_place_of_the_earlier_one(disk):
    kept(disk())
    kept(disk(), (*IDS, *range(1000, 1016)), seed=1)
    assert len([file for file in disk()._folder.iterdir() if file.suffix == ".latents"]) == 1


def test_the_size_is_bounded_and_what_was_used_last_stays(disk):
    texts = [tuple(range(number * 1000, number * 1000 + 512)) for number in range(4)]
    room = int(2.5 * kept(disk(), texts[0]).stat().st_size)
    for number, ids in enumerate(texts[1:]):
        os.utime(kept(disk(max_bytes=room), ids), (time.time() + number,) * 2)
    assert [is_found(disk(), ids) for ids in texts] == [False, False, True, True]


def test_a_clock_that_went_backwards_breaks_nothing(disk):
    texts = [tuple(range(number * 1000, number * 1000 + 512)) for number in range(3)]
    for ids in texts[:2]:
        os.utime(kept(disk(), ids), (time.time() + 10**6,) * 2)
    room = int(2.5 * kept(disk(), texts[2]).stat().st_size)
    tier = disk(max_bytes=room)
    tier.keep((*texts[2], *range(5000, 5300)), latents(812))
    tier.close()
    assert sum(file.stat().st_size for file in disk()._root.rglob("*.latents")) <= room


def test_memory_is_bounded_and_gives_up_what_was_unused_longest():
    texts = [tuple(range(number * 1000, number * 1000 + 512)) for number in range(3)]
    tier = RamTier(int(2.5 * latents(512).bytes))
    tier.keep(texts[0], latents(512, 0))
    tier.keep(texts[1], latents(512, 1))
    assert is_found(tier, texts[0], 0)
    tier.keep(texts[2], latents(512, 2))
    assert [tier.longest(text)[1] for text in texts] == [512, 0, 512]


def test_only_what_brings_much_that_is_new_is_kept():
    tier = RamTier(10**9)
    assert is_news(tier, IDS) and not is_news(tier, IDS[:100])
    tier.keep(IDS, latents(512))
    assert not is_news(tier, (*IDS, 1, 2, 3)) and is_news(tier, (*IDS, *range(300)))


def test_the_key_tells_weights_and_precisions_apart(copied: Path):
    same = key_of(STARTER, "bfloat16", torch.bfloat16, "native")
    assert key_of(copied, "bfloat16", torch.bfloat16, "native") == same
    assert key_of(copied, "int8", torch.bfloat16, "native") != same
    file = sorted(copied.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert key_of(copied, "bfloat16", torch.bfloat16, "native") != same


def engine_on(folder: Path, **choice: int) -> LocalEngine:
    return load_engine(STARTER, device="cpu", dtype="float32", disk=Disk(folder, 10**9), **choice)


async def test_after_a_restart_a_file_is_warm_and_its_completion_the_same(tmp_path: Path):
    request = hole("    def st", prefix=LONG, tokens=16)
    first = engine_on(tmp_path)
    cold, _ = await ask(first, request)
    first.close()
    second = engine_on(tmp_path)
    warm, cost = await ask(second, request)
    second.close()
    assert warm == cold and cost.reuse is Reuse.EXACT and cost.computed_tokens < 40


async def test_after_a_restart_every_file_of_a_workspace_finds_what_is_known_of_the_others(tmp_path: Path):
    first = engine_on(tmp_path)
    await ask(first, told("one"))
    first.close()
    second = engine_on(tmp_path)
    _, cost = await ask(second, told("two"))
    second.close()
    assert cost.cached_tokens > 2 + len(first._tokenizer.encode_lines(BLOCK))


async def test_what_is_not_exact_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = engine_on(tmp_path)
    monkeypatch.setattr(LocalEngine, "_rest", lambda self: self._inexact.clear())
    await ask(engine, hole("    def st", prefix=LONG))
    edited = hole("    def st", prefix=LONG.replace("value * 7\n", "value * 7 + 1\n"))
    _, cost = await ask(engine, replace(edited, reuse=Reuse.SHIFTED))
    engine.close()
    again = engine_on(tmp_path)
    _, exact = await ask(again, edited)
    again.close()
    assert cost.shifted_tokens > 0
    assert exact.cached_tokens < LONG.index("value * 7\n")  # in characters, far more than tokens


async def test_when_nothing_can_be_kept_requests_are_answered_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr("model_host.engine.PAUSE_S", 0.01)
    engine = engine_on(tmp_path)
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()

    def full(pages: list[int]) -> Latents:
        loop.call_soon_threadsafe(tried.set)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._runner, "take_out", full)
    try:
        said, _ = await ask(engine, hole("    def st", prefix=LONG))
        await asyncio.wait_for(tried.wait(), 30)
        again, _ = await asyncio.wait_for(ask(engine, hole("    def st", prefix=LONG)), 30)
    finally:
        engine.close()
    assert again == said and "CUDA out of memory" in caplog.text


async def test_what_cannot_be_taken_back_is_computed_and_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    request = hole("    def st", prefix=LONG, tokens=16)
    first = engine_on(tmp_path)
    cold, _ = await ask(first, request)
    first.close()
    second = engine_on(tmp_path)

    def full(pages: list[int], *latents: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        with monkeypatch.context() as patched:
            patched.setattr(second._runner._latents, "put_in", full)
            said, cost = await ask(second, request)
        again, _ = await ask(second, request)
    finally:
        second.close()
    assert said == again == cold and not cost.cached_tokens and "CUDA out of memory" in caplog.text


added = st.sampled_from(["", "x", "self.", "\n", "é🙂"])
changes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 9), added, st.booleans()), max_size=4)


@settings(max_examples=6, deadline=None)
@given(changes=changes)
def test_any_sequence_of_edits_and_restarts_ends_in_what_a_cold_engine_says(changes: list, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")

    async def both() -> None:
        text, engine = LONG, engine_on(folder, cache_bytes=4_000_000)
        for chosen, removed, added, restarts in changes:
            place = chosen % (len(text) + 1)
            text = text[:place] + added + text[place + removed :]
            await ask(engine, replace(hole("    ", prefix=text), reuse=Reuse.SHIFTED))
            if restarts:
                engine.close()
                engine = engine_on(folder, cache_bytes=4_000_000)
        warm, _ = await ask(engine, hole("    ", prefix=text))
        cold, _ = await ask(engine, replace(hole("    ", prefix=text), reuse=Reuse.OFF))
        engine.close()
        assert warm == cold

    asyncio.run(both())
