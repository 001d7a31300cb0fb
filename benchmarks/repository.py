"""What it is worth to tell the model of a project's other files, and what it costs: `python -m benchmarks.repository`.

Packages of the standard library stand for projects: files that import each other. The block is built by the server's own code, from
documents that were opened and left, and from what they import. Three parts. `random` and `named` compare bits per byte of what really
stood in a hole, at random places and where a name stood that the file does not show and the block does: with the block and without it, with
a shorter one, one in front of the prefix's token, one with the hole's own file in it (outlined without the hole), and another project's,
which is as long and says nothing. `trunk` goes round five files and counts the tokens that are computed, in float32 on the CPU.
"""

import argparse
import asyncio
import random
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
from lsprotocol import types
from numpy.typing import NDArray

from benchmarks.edit_replay import Said, say, starter
from benchmarks.layout import MAX_TOKENS, bits, interval
from benchmarks.report import Goal, report
from lsp_server.anchors import Anchors
from lsp_server.neighbours import imported
from lsp_server.repository import Repository, text_of
from lsp_server.session import Document, Encoding, Session, Snapshot
from lsp_server.settings import InlineSettings
from model_host.checkpoints import STARTER, locate
from model_host.engine import CACHE_BYTES, LocalEngine
from model_host.generation import Fim, Reuse
from model_host.runner import Runner, load
from model_host.tokenizer import Encoded, Tokenizer

PACKAGES = [
    *("asyncio", "concurrent", "ctypes", "curses", "email", "html", "http", "idlelib", "importlib", "json", "lib2to3", "logging"),
    *("multiprocessing", "sqlite3", "tkinter", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo"),
]
HOLES = {"random": 450, "named": 150}
LEFT_FILES = 3
"""So many other files were open before."""
CONTEXT_TOKENS = InlineSettings().context_tokens
NAMES = re.compile(r"\b[A-Za-z_]\w{3,}\b")
BLOCK_TOKENS, SHORT_TOKENS = 1024, 512
ROUND = ("base_events", "events", "streams", "tasks", "locks")
"""Modules of asyncio that one goes round."""

GOALS = (  # issue 4: a second file computes nothing of the trunk again, and typing stays what it was
    Goal("trunk_next_visits_extra_tokens_max", "<=", 0),
    Goal("trunk_typing_extra_tokens_max", "<=", 8),
    Goal("trunk_changed_computed_share", "<=", 0.25),
    Goal("trunk_changed_rested_identical_share", ">=", 1.0),
)


def project(folder: Path) -> Path:
    """The packages as a workspace, without their tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in PACKAGES:
        if (library / name).is_dir():
            shutil.copytree(library / name, folder / name, ignore=shutil.ignore_patterns("test*", "idle_test", "__pycache__", "turtledemo"))
    return folder.resolve()


@dataclass(slots=True)
class Editing:
    """A workspace with documents open in it."""

    root: Path
    session: Session
    repository: Repository

    @classmethod
    def at(cls, root: Path) -> "Editing":
        session = Session()
        return cls(root, session, Repository(session, lambda: [root.as_uri()]))

    def open(self, file: Path, text: str | None = None) -> Document:
        """Opens a file, with another text than it has, and completes there once."""
        text = file.read_text("utf-8", "replace") if text is None else text
        self.session.open(types.TextDocumentItem(file.as_uri(), "python", 0, text))
        self.repository.use(file.as_uri())
        document = self.session.find(file.as_uri())
        assert document
        return document

    async def rest(self, max_tokens: int) -> str:
        """The block after a pause."""
        self.repository.keep(await self.repository.grown(max_tokens))
        return text_of(self.repository.pieces)


@dataclass(frozen=True, slots=True)
class Hole:
    """A cursor in a file of which the rest of the line is gone, and the files that were open before."""

    file: Path
    snapshot: Snapshot
    middle: str
    left: tuple[Path, ...]
    package: Path
    names: frozenset[str] = frozenset()
    """Of which one is to be in the block."""

    def prompt(self, root: Path, block: str) -> Fim:
        return Anchors().moved(self.snapshot, CONTEXT_TOKENS).hole(self.snapshot, self.file.relative_to(root).as_posix(), block)

    async def block(self, root: Path, max_tokens: int, *, own: bool = False) -> str:
        """As the server has it when the user comes to the file from others; `own`: and had left it before."""
        editing = Editing.at(root)
        text = "".join(self.snapshot.lines)
        if own:
            editing.open(self.file, text)
        for file in self.left:
            editing.open(file)
        if own:
            await editing.rest(max_tokens)
        editing.open(self.file, text)
        return await editing.rest(max_tokens)


def holes(root: Path, seed: int) -> Iterator[Hole]:
    """Random places of files that import others of the project, without end."""
    chance = random.Random(seed)
    files = sorted(file for file in root.rglob("*.py") if 1000 < file.stat().st_size < 200_000)
    texts = {file: file.read_text("utf-8", "replace") for file in files}
    importing = [
        file for file in files if any(place.is_file() for places in imported(texts[file], "python", file, root) for place in places)
    ]
    while True:
        file = chance.choice(importing)
        lines = texts[file].splitlines(keepends=True)
        index = chance.randrange(len(lines))
        line = lines[index].rstrip("\n")
        if index <= 5 or len(line.strip()) < 4:
            continue
        column = chance.randrange(len(line) - len(line.lstrip()), len(line))
        without = "".join([*lines[:index], line[:column], "\n", *lines[index + 1 :]])
        document = Document(types.TextDocumentItem(file.as_uri(), "python", 0, without), Encoding.Utf32)
        package = root / file.relative_to(root).parts[0]
        near = [other for other in files if other.is_relative_to(package) and other != file]
        left = tuple(chance.sample(near, min(LEFT_FILES, len(near))))
        yield Hole(file, document.snapshot(types.Position(index, column)), line[column:], left, package)


def naming(root: Path) -> Iterator[Hole]:
    """Those holes in which a name stood that is nowhere else in the file."""
    for hole in holes(root, seed=1):
        if names := set(NAMES.findall(hole.middle)) - set(NAMES.findall("".join(hole.snapshot.lines))):
            yield replace(hole, names=frozenset(names))


async def quality(model_name: str, counts: dict[str, int]) -> dict[str, float]:
    """Bits per byte in every layout, and what the block changes, for so many holes of each kind."""
    folder = STARTER if model_name == "starter" else locate(model_name)
    tokenizer = Tokenizer(folder)
    model = load(folder, device="auto", dtype="auto", threads=0, kernels="auto", progress=lambda what, share: None)
    runner = Runner(model, CACHE_BYTES)
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = project(Path(temporary))
        for where, count in counts.items():
            chosen = naming(root) if where == "named" else holes(root, seed=0)
            cases = [case async for case in with_blocks(root, chosen, count)]
            found: dict[str, list[float]] = {}
            for number, (hole, _) in enumerate(cases):
                for name, prompt in (await prompts_of(root, tokenizer, cases, number)).items():
                    found.setdefault(name, []).append(bits(runner, tokenizer, prompt, hole.middle))
                if number % 50 == 49:
                    print(f"{where}: {number + 1} of {len(cases)} holes", file=sys.stderr)
            sizes = np.array([len(hole.middle.encode()) for hole, _ in cases], dtype=np.float64)
            metrics[f"{where}_holes"] = len(cases)
            metrics[f"{where}_block_tokens_median"] = median(len(tokenizer.encode_lines(block)) for _, block in cases)
            metrics |= {f"{where}_{name}": value for name, value in compared(found, sizes).items()}
    return metrics


async def with_blocks(root: Path, chosen: Iterator[Hole], count: int) -> AsyncIterator[tuple[Hole, str]]:
    """The first of the holes, with their blocks; of those that are to name something, the ones whose block does."""
    while count:
        hole = next(chosen)
        block = await hole.block(root, BLOCK_TOKENS)
        if not hole.names or hole.names & set(NAMES.findall(block)):
            yield hole, block
            count -= 1


async def prompts_of(root: Path, tokenizer: Tokenizer, cases: list[tuple[Hole, str]], number: int) -> dict[str, Encoded]:
    hole, block = cases[number]
    none = hole.prompt(root, "")
    others = (other for elsewhere, other in (*cases[number + 1 :], *cases[:number]) if elsewhere.package != hole.package)
    prompts = {
        "none": none,
        "block": replace(none, repository=block),
        "short": replace(none, repository=await hole.block(root, SHORT_TOKENS)),
        "with_own": replace(none, repository=await hole.block(root, BLOCK_TOKENS, own=True)),
        "unrelated": replace(none, repository=next(others, "")),
    }
    found = {name: tokenizer.encode_fim(prompt, 4 * MAX_TOKENS) for name, prompt in prompts.items()}
    ids = found["none"].ids  # <bos> <fim_begin> ...
    return found | {"in_front": replace(found["none"], ids=(ids[0], *tokenizer.encode_lines(block), *ids[1:]))}


def compared(found: dict[str, list[float]], sizes: NDArray[np.float64]) -> dict[str, float]:
    """Bits per byte, and paired differences."""
    values = {name: np.array(one) for name, one in found.items()}
    metrics: dict[str, float] = {f"{name}_bits_per_byte": float(one.sum() / sizes.sum()) for name, one in values.items()}
    pairs = [*((name, "none") for name in values if name != "none"), *(("block", other) for other in ("in_front", "with_own", "unrelated"))]
    for a, b in pairs:
        for what, value in zip(("", "_low", "_high"), interval(values[a], values[b], sizes), strict=True):
            metrics[f"{a}_minus_{b}_bits{what}"] = value
    return metrics


async def asked(engine: LocalEngine, prompt: Fim, reuse: Reuse = Reuse.SHIFTED, tokens: int = 16) -> Said:
    said = await say(engine, prompt, reuse, tokens)
    await asyncio.to_thread(engine.rested.wait)
    return said


def visited(editing: Editing, name: str, block: str, typed: str = "") -> Fim:
    """The prompt in the middle of a module, at the end of a line with something on it."""
    file = editing.root / "asyncio" / f"{name}.py"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    index = next(number for number in range(len(lines) // 2, len(lines)) if len(lines[number].strip()) > 10)
    text = "".join([*lines[:index], lines[index].rstrip("\n") + typed + "\n", *lines[index + 1 :]])
    document = editing.open(file, text)
    snapshot = document.snapshot(types.Position(index, 10**6))
    return Anchors().moved(snapshot, CONTEXT_TOKENS).hole(snapshot, f"asyncio/{name}.py", block)


async def trunk(budget: int) -> dict[str, float]:
    """Tokens computed going round five files: for the first time, typing, and after the block has changed."""
    tokenizer = Tokenizer(STARTER)
    with tempfile.TemporaryDirectory() as temporary:
        editing = Editing.at(project(Path(temporary)))
        for name in ROUND:  # the block once all of them were visited
            visited(editing, name, "")
            block = await editing.rest(budget)
        trunk_tokens = len(tokenizer.encode_lines(block))
        ours, cold = starter(), starter()
        extra, without, first_ratios, typing = [], [], [], []
        for name in ROUND:
            prompt = visited(editing, name, block)
            own = len(tokenizer.encode_fim(replace(prompt, repository=""), 4 * MAX_TOKENS).ids) - 1
            said, whole = await asked(ours, prompt), await asked(cold, prompt, Reuse.OFF)
            extra.append(said.cost.computed_tokens - own)
            without.append(whole.cost.computed_tokens)
            first_ratios.append(said.seconds / whole.seconds)
            for typed in ("x", "x =", "x = s", "x = self."):
                typing.append((await asked(ours, visited(editing, name, block, typed))).cost.computed_tokens)
        before = [piece.name for piece in editing.repository.pieces]
        visited(editing, "queues", block)
        visited(editing, ROUND[0], block)
        changed = await editing.rest(budget)
        shares, changed_ratios, same = [], [], []
        for name in ROUND:
            prompt = visited(editing, name, changed)
            said, whole = await asked(ours, prompt), await asked(cold, prompt, Reuse.OFF)
            shares.append(said.cost.computed_tokens / whole.cost.computed_tokens)
            changed_ratios.append(said.seconds / whole.seconds)
            same.append((await asked(ours, prompt)).text == whole.text)
        ours.close()
        cold.close()
    return {
        "trunk_tokens": trunk_tokens,
        "trunk_files": len(before),
        "trunk_first_visit_extra_tokens": extra[0],
        "trunk_next_visits_extra_tokens_max": max(extra[1:]),
        "trunk_next_visits_time_to_cold": median(first_ratios[1:]),
        "trunk_without_tokens_mean": mean(without),
        "trunk_without_share_of_block": trunk_tokens / mean(without),
        "trunk_typing_extra_tokens_max": max(typing),
        "trunk_changed_is_appended": float(changed.startswith(block) and changed != block),
        "trunk_changed_computed_share": median(shares),
        "trunk_changed_time_to_cold": median(changed_ratios),
        "trunk_changed_rested_identical_share": mean(same),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repository", description=__doc__)
    parser.add_argument("--part", choices=[*HOLES, "trunk"], help="one part of it")
    parser.add_argument("--model", default="starter", help="for random and named")
    parser.add_argument("--tokens", type=int, default=BLOCK_TOKENS, help="of the block, for trunk")
    parser.add_argument("--quick", action="store_true", help="few holes; no goals")
    choice = parser.parse_args()
    metrics: dict[str, float] = {}
    if choice.part in (None, "trunk"):
        metrics |= await trunk(choice.tokens)
    counts = {where: 5 if choice.quick else count for where, count in HOLES.items() if choice.part in (None, where)}
    if counts:
        metrics |= await quality(choice.model, counts)
    report("repository", metrics, () if choice.quick else GOALS)


if __name__ == "__main__":
    asyncio.run(main())
