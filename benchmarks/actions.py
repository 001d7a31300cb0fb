"""python -m benchmarks.actions [--model MODEL] [--limit N] [--quick]: what becomes of a checkpoint's answers when they are asked for as an
editor asks.

The functions are real ones, of the standard library, each in a project of its own with its module's source. Counted are answers that
become an edit (they parse, change something and pass every check), docstrings that agree with the signature, tests that can be written,
that run and pass, and how many of a few mutants of the function such tests notice. The ceiling of every share is 1. Tests run in the
server's sandbox; without one their metrics are left out. Time to the first token is compared between a cold file and a warm one.
"""

import argparse
import ast
import asyncio
import importlib
import inspect
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lsprotocol import types

from benchmarks.report import Goal, report
from lsp_server.actions import prompting, reading, regions, tasks, writing_tests
from lsp_server.actions.tasks import Asked, Place, Span, Task
from lsp_server.errors import Refusal
from lsp_server.session import Document, Encoding
from lsp_server.settings import ActionSettings
from model_host.checkpoints import locate
from model_host.engine import load_engine
from model_host.generation import Engine
from prompts import library

FUNCTIONS = (
    "calendar.isleap", "calendar.leapdays", "colorsys.rgb_to_hsv", "colorsys.hsv_to_rgb", "textwrap.dedent", "textwrap.indent",
    "html.escape", "string.capwords", "shlex.quote", "posixpath.join", "posixpath.split", "posixpath.commonpath", "ntpath.splitdrive",
    "bisect.insort_right", "heapq.heappushpop", "fnmatch.filter", "statistics.mean", "statistics.median", "statistics.mode",
    "random.sample",    "difflib.get_close_matches", "base64.b16decode", "urllib.parse.quote_plus", "copy.copy",
    "mimetypes.guess_extension",
)  # fmt: skip
EDITS = ("docstring", "simplify", "optimise", "fix")
GOALS = (Goal("warm_to_cold_first_token", "<=", 0.2),)
MUTANTS = 6
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A real function in a file of a project of its own."""

    name: str
    file: Path
    text: str
    line: int

    @property
    def root(self) -> Path:
        return self.file.parent


def subjects(folder: Path, limit: int) -> Iterator[Subject]:
    """The functions, without their docstrings, so that none is copied."""
    for number, path in enumerate(FUNCTIONS[:limit] if limit else FUNCTIONS):
        module, _, name = path.rpartition(".")
        tree = ast.parse(inspect.getsource(importlib.import_module(module)))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        if not found:
            continue
        if ast.get_docstring(found[0]) is not None and len(found[0].body) > 1:
            found[0].body.pop(0)
        text = ast.unparse(tree) + "\n"
        file = folder / f"p{number}" / f"my_{module.replace('.', '_')}.py"
        file.parent.mkdir()
        file.write_text(text, "utf-8")
        line = next(index for index, row in enumerate(text.split("\n")) if row.startswith(f"def {name}("))
        yield Subject(name=name, file=file, text=text, line=line)


def task_of(subject: Subject, action: str) -> Task:
    document = Document(types.TextDocumentItem(subject.file.as_uri(), "python", 0, subject.text), Encoding.Utf32)
    head = ACTIONS[action].head.applies_to
    node = function(subject.text, subject.name)
    last = subject.line if head in ("symbol", "diagnostic") else (node.end_lineno or node.lineno) - 1
    span = Span(start=Place(line=subject.line, character=0), end=Place(line=last, character=10**6))
    asked = Asked(
        action=action,
        uri=subject.file.as_uri(),
        range=span,
        diagnostics=("a reader found this hard to understand",),
        instruction="simplify",
    )
    return tasks.prepare(ACTIONS[action], asked, document, subject.file.name, [subject.root.as_uri()], 2_000_000)


def function(text: str, name: str) -> ast.FunctionDef:
    return next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)


ACTIONS = {action.name: action for action in library.load()[0]}


async def edited(engine: Engine, settings: ActionSettings, subject: Subject, action: str) -> str | None:
    """The file behind an action; None where its answer was refused."""
    try:
        task = task_of(subject, action)
        chat, _ = prompting.prompt(task, engine, settings, [], {})
        words = await reading.answer(engine, chat, task.action.head.max_new_tokens, settings, reading.unheard, None)
        return regions.applied(task.region.lines, reading.changes(task, words))
    except Refusal:
        return None


def agrees(node: ast.FunctionDef) -> bool:
    """Whether a docstring names no argument that the function lacks, and speaks of a result only where there is one."""
    words = ast.get_docstring(node) or ""
    given = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    given |= {argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument}
    block = re.search(r"^(?:Args|Arguments|Parameters):?\s*\n((?:[ \t-]+.*\n?)+)", words, re.M)
    named = set(re.findall(r":param\s+(?:[\w\[\]., |]+\s)?(\w+):", words))
    named |= set(re.findall(r"^\s+\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:", block[1], re.M)) if block else set()
    gives = any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))
    says = bool(re.search(r"^(?:Returns?|Yields?):", words, re.M)) or ":return" in words
    return named <= given and (gives or not says)


def mutants(subject: Subject) -> Iterator[str]:
    """The file with one thing wrong in the function, each time another."""
    tree = ast.parse(subject.text)
    target = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == subject.name)
    count = 0
    for node in ast.walk(target):
        for field, value in ast.iter_fields(node):
            changed: object = None
            if isinstance(value, ast.AST) and type(value) in SWAPS:
                changed = SWAPS[type(value)]()
            elif isinstance(node, ast.Compare) and field == "ops" and type(value[0]) in SWAPS:
                changed = [SWAPS[type(value[0])](), *value[1:]]
            elif isinstance(node, ast.Constant) and field == "value" and isinstance(value, int):
                changed = value + 1 if not isinstance(value, bool) else not value
            elif isinstance(node, ast.Return) and value is not None:
                changed = ast.Constant(None)
            if changed is None or count == MUTANTS:
                continue
            count += 1
            setattr(node, field, changed)
            yield ast.unparse(ast.fix_missing_locations(tree)) + "\n"
            setattr(node, field, value)


async def tested(engine: Engine, settings: ActionSettings, subject: Subject) -> dict[str, float]:
    """What generated tests are worth: 1 or 0 for written and passing, and the share of mutants they notice."""
    task = task_of(subject, "tests")
    plan = writing_tests.plan(task, [subject.root.as_uri()])
    watched = writing_tests.Watched(heard=reading.unheard, start_over=reading.unheard)
    try:
        code, _ = await writing_tests.write(engine, task, plan, settings, "", watched)
    except Refusal:
        return {"tests_written": 0.0, "tests_pass": 0.0}
    run = await writing_tests.tried(task, plan, code, sys.executable)
    if run is None or not run.is_done:
        return {"tests_written": 1.0}
    found = {"tests_written": 1.0, "tests_pass": float(run.passed)}
    if run.passed:
        noticed = []
        for text in mutants(subject):
            wrong = replace(task, region=replace(task.region, lines=tuple(text.splitlines(keepends=True))))
            result = await writing_tests.tried(wrong, plan, code, sys.executable)
            noticed.append(float(result is not None and not result.passed))
        if noticed:
            found["mutation_score"] = sum(noticed) / len(noticed)
    return found


async def warmth(engine: Engine, settings: ActionSettings, subject: Subject) -> dict[str, float]:
    """Time to the first token of an action, in a file the engine has not seen and eight lines further down."""
    short = settings.model_copy(update={"max_new_tokens": 16})
    lines = subject.text.count("\n")
    times = []
    for line in (lines // 3, lines // 3 + 8):
        span = Span(start=Place(line=line, character=0), end=Place(line=line + 3, character=0))
        document = Document(types.TextDocumentItem(subject.file.as_uri(), "python", 0, subject.text), Encoding.Utf32)
        asked = Asked(action="explain", uri=subject.file.as_uri(), range=span)
        task = tasks.prepare(
            ACTIONS["explain"], asked, document, f"{subject.root.name}/{subject.file.name}", [subject.root.as_uri()], 2_000_000
        )
        chat, _ = prompting.prompt(task, engine, short, [], {})
        words = await reading.answer(engine, chat, 16, short, reading.unheard, None)
        times.append(words.cost.first_token_s if words.cost else 0.0)
    return {"cold_first_token_s": times[0], "warm_first_token_s": times[1]} if all(times) else {}


async def measure(engine: Engine, limit: int) -> dict[str, float]:
    settings, found = ActionSettings(first_words_s=3600, deadline_s=3600), defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(Path(folder), limit):
            print(f"{subject.name} …", file=sys.stderr)
            for name, seconds in (await warmth(engine, settings, subject)).items():
                found[name].append(seconds)
            for action in EDITS:
                text = await edited(engine, settings, subject, action)
                found[f"{action}_accepted"].append(float(text is not None))
                if action == "docstring" and text is not None:
                    found["docstring_agrees"].append(float(agrees(function(text, subject.name))))
            for name, value in (await tested(engine, settings, subject)).items():
                found[name].append(value)
    metrics = {"functions": float(len(found["docstring_accepted"])), **{name: sum(of) / len(of) for name, of in found.items()}}
    if "cold_first_token_s" in metrics:
        metrics["warm_to_cold_first_token"] = metrics["warm_first_token_s"] / metrics["cold_first_token_s"]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter", help="'starter', a folder or a hub name that was downloaded")
    parser.add_argument("--limit", type=int, default=0, help="so many functions; 0: all")
    parser.add_argument("--quick", action="store_true", help="two functions")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    engine = load_engine(locate(options.model), device=options.device)
    try:
        metrics = asyncio.run(measure(engine, 2 if options.quick else options.limit))
    finally:
        engine.close()
    report("actions", metrics, GOALS)


if __name__ == "__main__":
    main()
