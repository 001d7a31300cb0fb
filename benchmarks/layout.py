"""Whether the server's prompt costs quality: `python -m benchmarks.layout --data FOLDER`.

Bits per byte of what really stood in a hole, from the model's own probabilities, for the same holes in several layouts: the plain one
(cut at the cursor), the anchored one (cut at the start of a line, what was typed behind the middle's token) with the last word as it
stands or begun anew (healed), and with an anchor several lines above. Differences are paired, with intervals by the bootstrap. The
starter was trained on random cuts, never on anchored prompts.
"""

import argparse
import asyncio
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.infilling import SETS, cases, filled
from benchmarks.report import Goal, report
from model_host.batch import Span, Step
from model_host.checkpoints import STARTER, locate
from model_host.engine import CACHE_BYTES, LocalEngine, load_engine
from model_host.generation import Fim
from model_host.pages import pages_for
from model_host.runner import Runner, load
from model_host.tokenizer import Encoded, Tokenizer

HOLES, RESAMPLES = 2000, 10_000
LINES_ABOVE, LINES_BELOW, TYPED_LINES = 40, 20, 5
MAX_TOKENS = 4096

GOALS = (  # issue 4: the layout itself costs no quality; the interval of what it costs must reach 0
    Goal("anchored_minus_plain_bits_low", "<=", 0.0),
    Goal("healed_minus_unhealed_bits_low", "<=", 0.0),
    Goal("several_lines_minus_plain_bits_low", "<=", 0.0),
)


@dataclass(frozen=True, slots=True)
class Hole:
    """Lines above, the cursor's line before the cursor, what stood behind it to the line's end, lines below."""

    above: tuple[str, ...]
    before: str
    middle: str
    below: str


def plain(tokenizer: Tokenizer, hole: Hole) -> Encoded:
    return tokenizer.encode_fim(Fim(prefix="".join(hole.above) + hole.before, suffix=hole.below), MAX_TOKENS)


def plain_healed(tokenizer: Tokenizer, hole: Hole) -> Encoded:
    kept, must_begin = tokenizer.healed(hole.before)
    return replace(plain(tokenizer, replace(hole, before=kept)), must_begin=must_begin)


def anchored(tokenizer: Tokenizer, hole: Hole, lines: int = 0, *, heal: bool = False) -> Encoded:
    """The anchor `lines` lines above the cursor's."""
    cut = len(hole.above) - lines
    typed = "".join(hole.above[cut:]) + hole.before
    return tokenizer.encode_fim(Fim(prefix="".join(hole.above[:cut]), suffix=hole.below, middle=typed), MAX_TOKENS, heal=heal)


LAYOUTS: dict[str, Callable[[Tokenizer, Hole], Encoded]] = {
    "plain": plain,
    "plain_healed": plain_healed,
    "anchored": anchored,
    "anchored_healed": partial(anchored, heal=True),
    "several_lines_healed": partial(anchored, lines=TYPED_LINES, heal=True),
}
COMPARED = {
    "anchored_minus_plain": ("anchored_healed", "plain_healed"),
    "several_lines_minus_plain": ("several_lines_healed", "plain_healed"),
    "healed_minus_unhealed": ("anchored_healed", "anchored"),
}


def holes(count: int, seed: int) -> Iterator[Hole]:
    """Cursors at random characters of random lines of the standard library that have something behind them."""
    chance = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while count:
        lines = chance.choice(files).read_text("utf-8", "replace").splitlines(keepends=True)
        index = chance.randrange(len(lines))
        line = lines[index].rstrip("\n")
        if index <= TYPED_LINES or len(line.strip()) < 4:
            continue
        column = chance.randrange(len(line) - len(line.lstrip()), len(line))
        below = "\n" + "".join(lines[index + 1 : index + 1 + LINES_BELOW])
        yield Hole(tuple(lines[max(index - LINES_ABOVE, 0) : index]), line[:column], line[column:], below)
        count -= 1


def bits(runner: Runner, tokenizer: Tokenizer, prompt: Encoded, middle: str) -> float:
    """What the middle costs. Healed, its probability is that among texts that begin with the bytes that are known."""
    ids = tokenizer.encode(prompt.must_begin.decode() + middle)
    whole = (*prompt.ids, *ids)
    span = Span(tokens=len(whole), context=len(whole), pages=tuple(range(pages_for(len(whole)))))
    step = Step(ids=whole, spans=(span,), wanted=tuple(range(len(prompt.ids) - 1, len(whole) - 1)))
    surprise = torch.log_softmax(runner.run(step), dim=-1)  # [middle, V]
    known, total = prompt.must_begin, 0.0
    for row, id in zip(surprise, ids, strict=True):
        total -= float(row[id])
        if known:
            total += float(torch.logsumexp(row[torch.tensor(tokenizer.compatible(known))], 0))
            known = known[len(tokenizer.token_bytes(id)) :]
    return total / float(np.log(2))


def interval(bits_a: NDArray[np.float64], bits_b: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[float, float, float]:
    """The difference a - b in bits per byte, and the 95 % interval of it by a paired bootstrap over holes."""
    difference = bits_a - bits_b
    chosen = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    resampled = difference[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(difference.sum() / sizes.sum()), float(low), float(high)


async def exact_lines(engine: LocalEngine, file: Path, is_plain: bool, limit: int) -> float:
    """The share of cases whose first line comes out exactly, in percent."""
    right = total = 0
    for case in cases(file, limit):
        middle, _ = await filled(engine, case, one_line=True, prompt=Fim(prefix=case.prompt, suffix=case.suffix) if is_plain else None)
        right += middle.split("\n")[0].rstrip() == case.solution.split("\n")[0].rstrip()
        total += 1
    return 100 * right / total


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the HumanEval-Infilling files, for exact matches beside the bits")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--quick", action="store_true", help="50 holes; no goals")
    choice = parser.parse_args()
    folder = STARTER if choice.model == "starter" else locate(choice.model)
    tokenizer = Tokenizer(folder)
    model = load(folder, device="auto", dtype="auto", threads=0, kernels="auto", progress=lambda what, share: None)
    runner = Runner(model, CACHE_BYTES)
    chosen = list(holes(50 if choice.quick else HOLES, seed=0))
    sizes = np.array([len(hole.middle.encode()) for hole in chosen], dtype=np.float64)
    found: dict[str, NDArray[np.float64]] = {}
    metrics: dict[str, float] = {"holes": len(chosen)}
    for name, layout in LAYOUTS.items():
        found[name] = np.array([bits(runner, tokenizer, layout(tokenizer, hole), hole.middle) for hole in chosen])
        metrics[f"{name}_bits_per_byte"] = float(found[name].sum() / sizes.sum())
    for name, (a, b) in COMPARED.items():
        for what, value in zip(("", "_low", "_high"), interval(found[a], found[b], sizes), strict=True):
            metrics[f"{name}_bits{what}"] = value
    if choice.data:
        engine = load_engine(folder)
        for kind, file in SETS.items():
            for name, is_plain in (("plain", True), ("anchored_healed", False)):
                exact = await exact_lines(engine, choice.data / file, is_plain, 20 if choice.quick else 300)
                metrics[f"{name}_{kind}_exact_percent"] = exact
        engine.close()
    report("layout", metrics, () if choice.quick else GOALS)


if __name__ == "__main__":
    asyncio.run(main())
