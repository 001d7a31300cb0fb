"""What a keystroke costs in an edited file: `python -m benchmarks.edit_replay`.

Files of the standard library are edited as people edit: typing at a hole, a line changed far above the cursor, blocks deleted and pasted, a
name changed in many places, undo, switching between files, closing and reopening. After each edit the completion at the cursor is asked
for, with the prompts that the server makes. Three engines run in turn: ours, one that computes everything (cold), and one that reuses
exact prefixes of the plain prompt, cut at the cursor, as others do. Float32, where equal latents give equal words.
"""

import argparse
import asyncio
import random
import re
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, median

from benchmarks.engine import MID
from benchmarks.report import Goal, report
from lsp_server.anchors import Anchors
from lsp_server.session import Encoding, Snapshot, split_lines
from model_host.checkpoints import STARTER
from model_host.engine import CACHE_BYTES, Disk, LocalEngine, load_engine
from model_host.generation import Cost, Facts, Fim, Request, Reuse
from model_host.native.model import NativeModel
from model_host.runner import Runner
from model_host.tokenizer import Tokenizer

SIZES = (2000, 6000, 12_000)
SUFFIX_TOKENS, ABOVE_TOKENS = 1500, 3000
APART_TOKENS = 100
"""So much further up is the next hole of a file: agreement in one hole says little about another."""
CASES = {2000: (12, 5), 6000: (6, 5), 12_000: (2, 3)}
"""Files of each size, and holes in each."""
NEW_TOKENS = 32
CONTEXT_TOKENS = 24_000
"""So many that no file is cut."""
KEYS = ["x", "s", "self.", "(", ")", "\n", "    ", " = ", "return ", "é"]
NAMES = re.compile(r"\b[A-Za-z_]{3,}\b")

GOALS = (  # issue 4, "Measured"
    Goal("typing_extra_tokens_max", "<=", 8),
    Goal("typing_6000_time_to_cold", "<=", 0.02),
    Goal("typing_identical_share", ">=", 1.0),
    *(Goal(f"edit_above_{size}_computed_share", "<=", 0.10) for size in SIZES),
    *(Goal(f"edit_above_{size}_time_to_cold", "<=", 0.15) for size in SIZES),
    Goal("edit_above_first_line_share", ">=", 0.97),
    Goal("rested_identical_share", ">=", 1.0),
    Goal("switching_extra_tokens_max", "<=", 8),
    Goal("reopening_time_to_cold", "<=", 0.25),
)


@dataclass(frozen=True, slots=True)
class Said:
    text: str
    cost: Cost

    @property
    def first_line(self) -> str:
        return self.text.split("\n")[0]

    @property
    def seconds(self) -> float:
        """To the first token, from the moment of asking."""
        return self.cost.queued_s + self.cost.first_token_s

    @property
    def whole_seconds(self) -> float:
        """To the last token, waiting for exact latents included."""
        return self.seconds + self.cost.decode_s


async def say(engine: LocalEngine, prompt: Fim, reuse: Reuse, tokens: int = NEW_TOKENS) -> Said:
    async with engine.submit(Request(prompt=prompt, max_new_tokens=tokens, reuse=reuse)) as generation:
        text = "".join([piece async for piece in generation])
    assert generation.cost
    return Said(text, generation.cost)


@dataclass(frozen=True, slots=True)
class Place:
    """A file with a cursor in it."""

    uri: str
    text: str
    cursor: int

    @property
    def snapshot(self) -> Snapshot:
        before = self.text[: self.cursor]
        line = before.count("\n")
        column = len(before) - before.rfind("\n") - 1
        lines = tuple(split_lines(self.text))
        return Snapshot(uri=self.uri, version=0, language="python", lines=lines, line=line, column=column, encoding=Encoding.Utf32)

    @property
    def plain(self) -> Fim:
        return Fim(prefix=f"# {self.uri}\n{self.text[: self.cursor]}", suffix=self.text[self.cursor :])

    def typed(self, text: str) -> "Place":
        return Place(self.uri, self.text[: self.cursor] + text + self.text[self.cursor :], self.cursor + len(text))

    def edited(self, head: str) -> "Place":
        """With another text before the cursor."""
        return Place(self.uri, head + self.text[self.cursor :], len(head))


@dataclass(slots=True)
class Engines:
    """Ours, and the two it is held against; and the anchors of our documents."""

    ours: LocalEngine
    cold: LocalEngine
    prefix: LocalEngine
    anchors: Anchors = field(default_factory=Anchors)

    def close(self) -> None:
        for engine in (self.ours, self.cold, self.prefix):
            engine.close()

    def prompt(self, place: Place) -> Fim:
        """The server's prompt, its anchor kept."""
        snapshot = place.snapshot
        anchor = self.anchors.at(snapshot, CONTEXT_TOKENS)
        self.anchors.keep(place.uri, anchor)
        return anchor.hole(snapshot, place.uri)

    async def ask(self, place: Place) -> Said:
        return await say(self.ours, self.prompt(place), Reuse.SHIFTED)

    async def ask_all(self, place: Place) -> tuple[Said, Said, Said]:
        """Ours, cold with the same prompt, and the exact prefix of the plain prompt."""
        prompt = self.prompt(place)
        return (
            await say(self.ours, prompt, Reuse.SHIFTED),
            await say(self.cold, prompt, Reuse.OFF),
            await say(self.prefix, place.plain, Reuse.EXACT, tokens=1),
        )

    async def rested(self) -> None:
        await asyncio.to_thread(self.ours.rested.wait)


def library_files(tokenizer: Tokenizer, size: int, count: int, seed: int) -> list[str]:
    """Files of the standard library of about `size` tokens, longer ones cut."""
    files = sorted(file for file in Path(sysconfig.get_path("stdlib")).glob("*.py") if file.stat().st_size > 3 * size)
    texts = (file.read_text("utf-8", "replace") for file in random.Random(seed).sample(files, len(files)))
    return list(islice((cut for text in texts if (cut := cut_to(tokenizer, text, size))), count))


def cut_to(tokenizer: Tokenizer, text: str, size: int) -> str:
    """The first lines of a text, about `size` tokens; nothing if it has not so many."""
    kept, tokens = [], 0
    for line in text.splitlines(keepends=True):
        kept.append(line)
        tokens += len(tokenizer.encode_lines(line))
        if tokens >= size:
            return "".join(kept)
    return ""


def hole_in(tokenizer: Tokenizer, number: int, text: str, case: int = 0) -> tuple[Place, str]:
    """A hole of one line with SUFFIX_TOKENS or a little more behind it, the cursor where the line's text begins; and what stood there."""
    lines = text.splitlines(keepends=True)
    tokens, index = 0, len(lines) - 1
    while index > 0 and (tokens < SUFFIX_TOKENS + case * APART_TOKENS or len(lines[index].strip()) < 20):
        tokens += len(tokenizer.encode_lines(lines[index]))
        index -= 1
    line = lines[index].rstrip("\n")
    indent = line[: len(line) - len(line.lstrip())]
    head = "".join(lines[:index]) + indent
    return Place(f"file{number}.py", head + "\n" + "".join(lines[index + 1 :]), len(head)), line.strip()


def line_above(tokenizer: Tokenizer, place: Place) -> int:
    """Where a line begins that stands ABOVE_TOKENS above the cursor, or in the middle of what is above if that is less."""
    head = place.text[: place.cursor].splitlines(keepends=True)
    counts = [len(tokenizer.encode_lines(line)) for line in head]
    wanted, index = min(ABOVE_TOKENS, sum(counts) // 2), len(head)
    while wanted > 0:
        index -= 1
        wanted -= counts[index]
    return len("".join(head[:index]))


def changed_lines(tokenizer: Tokenizer, place: Place, chance: random.Random) -> Place:
    """A line far above changed as people change lines: a value, a name, a comment, a new statement, a line gone."""
    head = place.text[: place.cursor]
    start = line_above(tokenizer, place)
    stop = head.index("\n", start) + 1
    line = head[start:stop]
    indent = line[: len(line) - len(line.lstrip())]
    names = NAMES.findall(line) or ["x"]
    new = chance.choice(
        [
            line.replace(chance.choice(names), "renamed", 1),
            line.rstrip("\n") + "  # noqa\n",
            f"{line}{indent}count = {chance.randint(2, 99)}\n",
            f"{indent}check(value)\n{line}",
            "",
        ]
    )
    return place.edited(head[:start] + new + head[stop:])


def blocks_moved(place: Place) -> tuple[Place, Place]:
    """Up to 20 lines in the middle of what is above deleted; then pasted a quarter further down."""
    lines = place.text[: place.cursor].splitlines(keepends=True)
    middle = len(lines) // 2
    behind = middle + min(20, len(lines) // 8)
    block, rest = lines[middle:behind], [*lines[:middle], *lines[behind:]]
    there = middle + (len(rest) - middle) // 2
    pasted = [*rest[:there], *block, *rest[there:]]
    return place.edited("".join(rest)), place.edited("".join(pasted))


def name_changed(place: Place) -> Place:
    """The first 20 occurrences of a frequent name renamed."""
    head = place.text[: place.cursor]
    [(name, _)] = Counter(found for found in NAMES.findall(head) if found not in ("self", "def", "the")).most_common(1)
    return place.edited(re.sub(rf"\b{name}\b", name + "_x", head, count=20))


@dataclass(slots=True)
class Tally:
    """What one kind of edit cost, over its cases."""

    computed_shares: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    prefix_ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    whole_ratios: list[float] = field(default_factory=list)
    settled: list[bool] = field(default_factory=list)
    cold_seconds: list[float] = field(default_factory=list)
    same_line: list[bool] = field(default_factory=list)
    same_text: list[bool] = field(default_factory=list)

    def add(self, ours: Said, cold: Said, prefix: Said, place: Place) -> None:
        cost = ours.cost
        self.computed_shares.append(cost.computed_tokens / (cost.cached_tokens + cost.shifted_tokens + cost.computed_tokens))
        self.ratios.append(ours.seconds / cold.seconds)
        self.prefix_ratios.append(prefix.seconds / cold.seconds)
        self.seconds.append(ours.seconds)
        self.whole_ratios.append(ours.whole_seconds / cold.whole_seconds)
        self.settled.append(cost.settled_tokens > 0)
        self.cold_seconds.append(cold.seconds)
        if counts(cold.first_line, place):
            self.same_line.append(ours.first_line == cold.first_line)
            self.same_text.append(ours.text == cold.text)

    def metrics(self, name: str) -> dict[str, float]:
        found = {
            f"{name}_computed_share": median(self.computed_shares),
            f"{name}_time_to_cold": median(self.ratios),
            f"{name}_prefix_only_time_to_cold": median(self.prefix_ratios),
            f"{name}_settled_share": mean(self.settled),
            f"{name}_whole_time_to_cold_mean": mean(self.whole_ratios),
            f"{name}_ms": 1000 * median(self.seconds),
            f"{name}_cold_ms": 1000 * median(self.cold_seconds),
        }
        if self.same_line:
            found |= {
                f"{name}_counted": len(self.same_line),
                f"{name}_first_line_share": sum(self.same_line) / len(self.same_line),
                f"{name}_text_share": sum(self.same_text) / len(self.same_text),
            }
        return found


def counts(first_line: str, place: Place) -> bool:
    """Whether agreement on this line says anything: it is not blank, and not the line above once more."""
    above = place.text[: place.cursor].rstrip().splitlines()[-1:]
    return bool(first_line.strip()) and first_line.strip() not in (line.strip() for line in above)


async def typing(engines: Engines, tokenizer: Tokenizer, place: Place, line: str, tally: Tally) -> list[int]:
    """Types a line key by key; returns how many tokens were computed beyond those typed since the last request."""
    await engines.ask(place)
    await say(engines.prefix, place.plain, Reuse.EXACT, 1)
    extra = []
    for index, key in enumerate(line[:24]):
        place = place.typed(key)
        if index % 6 == 5:
            ours, cold, prefix = await engines.ask_all(place)
            tally.add(ours, cold, prefix, place)
        else:
            ours = await engines.ask(place)
            await say(engines.prefix, place.plain, Reuse.EXACT, 1)
        extra.append(ours.cost.computed_tokens - len(tokenizer.encode(key)))
    return extra


async def same_in_random_edits(engines: Engines, place: Place, edits: int, chance: random.Random) -> float:
    """Typing, deleting, new lines and jumps at random; the share of requests whose text is that of a cold run."""
    same = 0
    for _ in range(edits):
        if chance.random() < 0.1:
            place = Place(place.uri, place.text, chance.randrange(len(place.text)))
        removed = chance.choice([0, 0, 0, 0, 1, 3])
        head = place.text[: max(place.cursor - removed, 0)] + chance.choice(KEYS)
        place = place.edited(head)
        prompt = engines.prompt(place)
        ours, cold = await say(engines.ours, prompt, Reuse.EXACT, 8), await say(engines.cold, prompt, Reuse.OFF, 8)
        same += ours.text == cold.text
    return same / edits


async def switching(engines: Engines, places: list[Place]) -> int:
    """Between five files, a key in each turn; the most that was computed beyond the key."""
    for place in places:
        await engines.ask(place)
    await engines.rested()
    extra = []
    for _ in range(2):
        for index, place in enumerate(places):
            places[index] = place.typed("x")
            extra.append((await engines.ask(places[index])).cost.computed_tokens - 1)
    return max(extra)


async def reopening(place: Place, cold: LocalEngine) -> float:
    """The first completion of a new process, whose files another one kept, to that of a cold one."""
    prompt = Engines(cold, cold, cold).prompt(place)
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder), 10**9)
        first = load_engine(STARTER, device="cpu", dtype="float32", disk=disk)
        await say(first, prompt, Reuse.EXACT)
        first.close()
        second = load_engine(STARTER, device="cpu", dtype="float32", disk=disk)
        again = await say(second, prompt, Reuse.EXACT)
        second.close()
    return again.seconds / (await say(cold, prompt, Reuse.OFF)).seconds


async def replay(engines: Engines, tokenizer: Tokenizer, size: int, files: int, cases: int) -> dict[str, float]:
    """All edits on files of one size."""
    chance = random.Random(size)
    tallies = {name: Tally() for name in ("typing", "edit_above", "delete", "paste", "rename", "undo")}
    rested: list[bool] = []
    extra: list[int] = []
    for number, text in enumerate(library_files(tokenizer, size, files, seed=size)):
        start, line = hole_in(tokenizer, number + size, text)
        extra += await typing(engines, tokenizer, start, line, tallies["typing"])
        for case in range(cases):
            there, line = hole_in(tokenizer, number + size, text, case)
            place = there.typed(line[: len(line) // 2])
            await engines.ask(place)
            await engines.rested()
            edited = changed_lines(tokenizer, place, chance)
            ours, cold, prefix = await engines.ask_all(edited)
            tallies["edit_above"].add(ours, cold, prefix, edited)
            await engines.rested()
            again = await engines.ask(edited)
            rested.append(again.text == cold.text and not again.cost.shifted_tokens)
        tallies["undo"].add(*await engines.ask_all(place), place)
        await engines.rested()
        deleted, pasted = blocks_moved(place)
        for name, edited in (("delete", deleted), ("paste", pasted), ("rename", name_changed(place))):
            tallies[name].add(*await engines.ask_all(edited), edited)
            await engines.rested()
    metrics: dict[str, float] = {f"typing_{size}_extra_tokens_max": max(extra)}
    for name, tally in tallies.items():
        metrics |= tally.metrics(f"{name}_{size}")
    return metrics | {f"rested_{size}_identical_share": sum(rested) / len(rested)}


def starter() -> LocalEngine:
    return load_engine(STARTER, device="cpu", dtype="float32")


def mid() -> LocalEngine:
    """Random weights of a larger shape: what it costs, not what it says."""
    runner = Runner(NativeModel.random(MID, "bfloat16", seed=0), CACHE_BYTES)
    facts = Facts(
        checkpoint="mid", device="cpu", dtype="bfloat16", parameters=MID.parameters, weight_bytes=0, context_tokens=16_384, load_s=0.0
    )
    return LocalEngine(runner, Tokenizer(STARTER), facts)


def engines_of(make: Callable[[], LocalEngine]) -> Engines:
    return Engines(make(), make(), make())


def pooled(metrics: dict[str, float], sizes: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """Over all sizes: shares weighted by their cases."""
    counted = [metrics.get(f"edit_above_{size}_counted", 0) for size in sizes]
    if sum(counted):
        shares = [metrics.get(f"edit_above_{size}_first_line_share", 0) for size in sizes]
        yield "edit_above_first_line_share", sum(n * share for n, share in zip(counted, shares, strict=True)) / sum(counted)
    yield "rested_identical_share", min(metrics[f"rested_{size}_identical_share"] for size in sizes)
    yield "typing_extra_tokens_max", max(metrics[f"typing_{size}_extra_tokens_max"] for size in sizes)


async def plotted(engines: Engines, tokenizer: Tokenizer, file: Path) -> None:
    """Draws the time to the first token of every keystroke: typing, a line changed far above, typing on."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  only here, and only in development

    text = library_files(tokenizer, 6000, 1, seed=1)[0]
    place, line = hole_in(tokenizer, 1, text)
    chance = random.Random(1)
    steps: list[Place] = []
    for index, key in enumerate((line * 3)[:45]):
        place = place.typed("\n" + key if index in (15, 30) else key)
        if index in (20, 35):
            place = changed_lines(tokenizer, place, chance)
        steps.append(place)
    lines: dict[str, list[float]] = {"cold": [], "exact prefix": [], "shifted": [], "anchored (ours)": []}
    shifted = starter()
    for step in steps:
        lines["anchored (ours)"].append((await engines.ask(step)).seconds)
        lines["cold"].append((await say(engines.cold, step.plain, Reuse.OFF, 1)).seconds)
        lines["exact prefix"].append((await say(engines.prefix, step.plain, Reuse.EXACT, 1)).seconds)
        lines["shifted"].append((await say(shifted, step.plain, Reuse.SHIFTED, 1)).seconds)
    shifted.close()
    figure, axes = plt.subplots(figsize=(9, 4))
    for name, seconds in lines.items():
        axes.plot([1000 * second for second in seconds[1:]], label=name, linewidth=1.4)
    axes.set(yscale="log", xlabel="keystroke", ylabel="time to first token, ms", title="A file of 6,000 tokens, the starter on a CPU")
    for index, what in ((14, "new line"), (19, "edit above"), (29, "new line"), (34, "edit above")):
        axes.axvline(index, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(what, (index, axes.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=7, color="0.4")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


async def everywhere_else(engines: Engines, tokenizer: Tokenizer, edits: int) -> dict[str, float]:
    """What does not depend on a file's size: random edits, several files, a new process."""
    print("random edits, switching, reopening", file=sys.stderr)
    text = library_files(tokenizer, SIZES[0], 1, seed=3)[0]
    same = await same_in_random_edits(engines, hole_in(tokenizer, 3, text)[0], edits, random.Random(4))
    print(f"the same text as cold: {same:.1%} of {edits} edits", file=sys.stderr)
    files = library_files(tokenizer, SIZES[0], 5, seed=5)
    extra = await switching(engines, [hole_in(tokenizer, number, text)[0] for number, text in enumerate(files)])
    large = library_files(tokenizer, SIZES[1], 1, seed=6)[0]
    reopened = await reopening(hole_in(tokenizer, 6, large)[0], engines.cold)
    return {
        "typing_edits": edits,
        "typing_identical_share": same,
        "switching_extra_tokens_max": extra,
        "reopening_time_to_cold": reopened,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit_replay", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small file, few edits; no goals")
    parser.add_argument("--part", choices=[*map(str, SIZES), "elsewhere", "mid"], help="one part of it: files of so many tokens, ...")
    parser.add_argument("--plot", type=Path, help="draw the time of every keystroke into this file, and nothing else")
    choice = parser.parse_args()
    tokenizer = Tokenizer(STARTER)
    engines = engines_of(starter)
    if choice.plot:
        await plotted(engines, tokenizer, choice.plot)
        engines.close()
        return
    sizes = SIZES[:1] if choice.quick else tuple(size for size in SIZES if choice.part in (None, str(size)))
    metrics: dict[str, float] = {}
    for size in sizes:
        print(f"files of {size:,} tokens", file=sys.stderr)
        files, cases = (2, 2) if choice.quick else CASES[size]
        metrics |= await replay(engines, tokenizer, size, files, cases)
    if sizes:
        metrics |= dict(pooled(metrics, sizes))
    if choice.part in (None, "elsewhere"):
        metrics |= await everywhere_else(engines, tokenizer, edits=10 if choice.quick else 500)
    engines.close()
    if choice.part in (None, "mid") and not choice.quick:
        engines = engines_of(mid)
        found = await replay(engines, tokenizer, 6000, files=2, cases=2)
        metrics |= {f"mid_{name}": value for name, value in found.items() if name.endswith(("share", "cold", "ms", "max"))}
        engines.close()
    report("edit_replay", metrics, () if choice.quick else GOALS)


if __name__ == "__main__":
    asyncio.run(main())
