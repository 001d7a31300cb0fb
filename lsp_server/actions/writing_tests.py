"""Tests for a function, from the prompt's share to the text that goes into a file: checked, tried where the user allows it, mended once.

Owns: what is wrong with an answer (`problem`), and how it joins tests that are there already without touching them. Which file it is,
`suites` says; what an editor makes of it is another's matter.
"""

import ast
import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_server.actions import extraction, guard, prompting, reading, sandbox, suites
from lsp_server.actions.extraction import fence_language
from lsp_server.actions.guard import path_of
from lsp_server.actions.reading import Heard, Words
from lsp_server.actions.regions import Change
from lsp_server.actions.suites import Suite
from lsp_server.actions.surroundings import Part
from lsp_server.actions.tasks import Task
from lsp_server.errors import Refusal, Unusable
from lsp_server.settings import ActionSettings
from model_host.generation import Engine

FRAMEWORKS = frozenset({"pytest", "unittest", "mock", "hypothesis"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where tests go, and what has to be known to check them."""

    root: Path
    source: Path
    suite: Suite
    existing: str
    """The test file's text as it is on disk or, better, in an editor; empty when there is none."""


def plan(task: Task, folders: Sequence[str]) -> Plan:
    """Where the tests of a task go. Raises Refusal."""
    source = path_of(task.snapshot.uri)
    roots = [root for folder in folders if (root := path_of(folder)) is not None and source is not None and source.is_relative_to(root)]
    if source is None or not roots:
        raise Refusal("Tests are written into the project's folder, and this document is in none: open the folder.")
    root = max(roots, key=lambda folder: len(folder.parts))
    suite = suites.suite_of(root, source, task.snapshot.language)
    if suite is None:
        raise Refusal(f"How tests are written in {task.snapshot.language} is not known here: ask for them in the chat.")
    if reason := guard.refusal(suite.file.as_uri(), folders, is_open=False):
        raise Refusal(reason)
    try:
        existing = suite.file.read_bytes().decode("utf-8") if suite.file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{suite.file.name} is there already and cannot be read: {error}") from error
    return Plan(root=root, source=source, suite=suite, existing=existing)


def part(plan: Plan, language: str, importance: int) -> Part:
    """The tests that are there already, as an example for the model."""
    return Part(
        what=f"the tests in {plan.suite.example_path}",
        heading=f"Tests of this project look like this ({plan.suite.example_path}):",
        language=fence_language(language),
        text=plan.suite.example,
        importance=importance,
        order=1,
    )


def code_of(task: Task, plan: Plan, answer: str, *, is_cut_off: bool) -> str:
    """The test code of an answer; in Python with what it forgot to import of the source. Raises Unusable."""
    code = extraction.new_code(answer, task.snapshot.language, is_cut_off=is_cut_off)
    if task.snapshot.language != "python":
        return code
    return with_import(code, plan.suite.module, top_level_name(task))


def top_level_name(task: Task) -> str:
    """The name by which tests reach the symbol: its own, or that of the class it is in."""
    tree = extraction.tree("".join(task.region.lines))
    line = task.region.first + 1
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= line <= (node.end_lineno or node.lineno):
                return node.name
    return task.name


def imported(tree: ast.Module) -> set[str]:
    """The names that a module's imports bind, and the modules themselves."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names} | {node.module or "."}
    return names


def with_import(code: str, module: str, name: str) -> str:
    """`code`, beginning with an import of `name` from `module` where it uses the name and binds it nowhere."""
    tree = extraction.tree(code)
    if tree is None or not name:
        return code
    used = any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
    defined = {getattr(node, "name", None) for node in tree.body}
    if not used or name in defined or name in imported(tree):
        return code
    return f"from {module} import {name}\n\n\n{code}"


def problem(task: Task, plan: Plan, code: str) -> str | None:
    """What is wrong with test code, as a sentence for the model and the user; None when nothing is, as far as reading tells."""
    if task.snapshot.language != "python":
        return None
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return f"The test code is no Python: {error.msg} in line {error.lineno}."
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")]
    if not tests:
        return "There is no function whose name begins with test."
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    if task.name not in names and top_level_name(task) not in names:
        return f"The tests never use {task.name}."
    return wrong_import(task, plan, tree)


def wrong_import(task: Task, plan: Plan, tree: ast.Module) -> str | None:
    """The first import that cannot work: of a project's module or name that is not there, or of a package that the project does not use."""
    known = packages_used(plan, "".join(task.region.lines))
    for node in ast.walk(tree):
        wanted: list[tuple[str, tuple[str, ...]]]
        if isinstance(node, ast.Import):
            wanted = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = [(node.module or "", tuple(alias.name for alias in node.names))]
        else:
            continue
        for module, names in wanted:
            top = module.split(".")[0]
            if (file := module_file(plan.root, module)) is not None:
                found = module_names(plan, file, task)
                missing = next((name for name in names if found is not None and name not in found and name != "*"), None)
                if missing is not None:
                    return f"{module} has no {missing} to import."
            elif top not in known and not plan.root.joinpath(*module.split(".")).is_dir():
                return f"The import of {module} cannot work: the project has no such module and does not use such a package."
    return None


def packages_used(plan: Plan, source: str) -> frozenset[str]:
    """The packages that a test of this project may import beside the project's own: the standard library's, and those that are in use."""
    found = set(sys.stdlib_module_names) | FRAMEWORKS
    for text in (source, plan.existing, plan.suite.example):
        found |= {match.split(".")[0] for match in re.findall(r"^\s*(?:from|import)\s+([\w.]+)", text, re.M)}
    return frozenset(found - own_packages(plan.root))


def own_packages(root: Path) -> set[str]:
    return {file.stem for top in (root, root / "src") if top.is_dir() for file in top.iterdir() if file.suffix == ".py" or file.is_dir()}


def module_file(root: Path, module: str) -> Path | None:
    """The project's file that a module's name means."""
    for top in (root, root / "src"):
        base = top.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def module_names(plan: Plan, file: Path, task: Task) -> set[str] | None:
    """The names at a module's top level; None when that cannot be told."""
    text = "".join(task.region.lines) if file == plan.source else suites.read(file)
    tree = extraction.tree(text)
    if tree is None or "__getattr__" in text or "import *" in text:
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    if file.name == "__init__.py":
        names |= {child.stem for child in file.parent.iterdir()}
    return names | imported(tree)


async def tried(task: Task, plan: Plan, code: str, python: str) -> sandbox.Run | None:
    """What became of the tests in a sandbox; None for tests that are not tried here. The source is as the editor has it, saved or not."""
    if task.snapshot.language != "python" or not python:
        return None
    name = plan.suite.file.with_name(f"test_deepseek_lsp_{plan.suite.file.stem}.py").relative_to(plan.root)
    command = sandbox.command_for(plan.suite.framework, python, name.as_posix())
    if command is None:
        return sandbox.Run(is_done=False, output=f"tests_python = {python!r} is no program: name the project's Python.")
    source = plan.source.relative_to(plan.root).as_posix()
    return await sandbox.run(command, plan.root, {name.as_posix(): code, source: "".join(task.region.lines)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Who hears the answer while it comes, and that it begins anew."""

    heard: Heard
    start_over: Heard


async def write(
    engine: Engine, task: Task, plan: Plan, settings: ActionSettings, python: str, watched: Watched
) -> tuple[str, tuple[str, ...]]:
    """Test code for the task, and notes for the user; what does not work is mended once. Raises Refusal."""
    head = task.action.head
    parts = [part(plan, task.snapshot.language, head.context.index("tests"))] if "tests" in head.context else []
    chat, found = prompting.prompt(task, engine, settings, parts, {"framework": plan.suite.framework, "module": plan.suite.module})
    words = await reading.answer(engine, chat, head.max_new_tokens, settings, watched.heard, None)
    wrong, code, notes = await judged(task, plan, words, python)
    if wrong is not None:
        await watched.start_over(wrong)
        chat = prompting.continued(chat, words.text, repair(wrong))
        words = await reading.answer(engine, chat, head.max_new_tokens, settings, watched.heard, None)
        wrong, code, notes = await judged(task, plan, words, python)
    if not code:
        raise Unusable(f"{wrong} Nothing was written: ask again.")
    if wrong is not None:
        notes = (*notes, f"The tests are written as they came, and do not work yet. {wrong}")
    return code, (*reading.notes_of(engine, words, found.dropped), *notes)


async def judged(task: Task, plan: Plan, words: Words, python: str) -> tuple[str | None, str, tuple[str, ...]]:
    """What is wrong with an answer, the code that may be written all the same (none where it cannot even be read), and notes."""
    try:
        code = code_of(task, plan, words.text, is_cut_off=words.is_cut_off)
    except Unusable as unusable:
        return str(unusable), "", ()
    if wrong := await asyncio.to_thread(problem, task, plan, code):
        return wrong, "", ()
    run = await tried(task, plan, code, python)
    if run is None or not run.is_done:
        return None, code, (run.output,) if run else ()
    return (None, code, ("The tests were run, and pass.",)) if run.passed else (f"They fail:\n\n{run.output}", code, ())


def repair(what: str) -> str:
    """The second question of a conversation about tests that do not work."""
    return f"This does not work:\n\n{what}\n\nAnswer with the whole corrected test code in one fenced block."


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What is added to a test file: lines at a place that exists, and at its end."""

    imports: str = ""
    imports_line: int = 0
    """Before this line, counted from 0."""
    tests: str = ""


def addition(plan: Plan, language: str, code: str) -> Addition:
    """How test code joins a file that has tests already: new imports behind those that are there, the rest at its end. Raises Unusable."""
    if language == "python":
        return python_addition(plan.existing, code)
    if language in ("java", "kotlin"):
        raise Unusable(f"{plan.suite.file.name} is there already, and tests are not added to a class: ask in the chat and paste what fits.")
    if language == "go":
        code = re.sub(r"\A\s*package\s+\w+\s*\n", "", code)
        missing = [
            path for path in re.findall(r'"([\w./-]+)"', "".join(re.findall(GO_IMPORTS, code, re.S))) if f'"{path}"' not in plan.existing
        ]
        if missing:
            raise Unusable(f"The tests import {missing[0]}, which {plan.suite.file.name} does not yet: add the import and ask again.")
        code = re.sub(GO_IMPORTS, "", code, flags=re.S)
    lines = plan.existing.split("\n")
    kept = [line for line in code.split("\n") if not (line.startswith(("import ", "use ", "const {")) and line in lines)]
    return Addition(tests="\n".join(kept).strip("\n"))


GO_IMPORTS = r"^import\s+(?:\([^)]*\)|\"[^\"]*\")\s*\n"


def python_addition(existing: str, code: str) -> Addition:
    old, new = extraction.tree(existing), extraction.tree(code)
    if old is None or new is None:
        raise Unusable("The test file that is there does not parse, so nothing is added to it: mend it first.")
    there = {bound for node in imports_of(old) for bound in bindings(node)}
    wanted = [node for node in imports_of(new) if not set(bindings(node)) <= there]
    names = {node.name for node in old.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    lines = code.split("\n")
    pieces = []
    for node in new.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if (name := getattr(node, "name", None)) in names:
            text = re.sub(rf"\b{re.escape(str(name))}\b", free_name(str(name), names), text, count=1)
        pieces.append(text)
    last = max((node.end_lineno or 0 for node in imports_of(old)), default=0)
    return Addition(imports="\n".join(map(ast.unparse, wanted)), imports_line=last, tests="\n\n\n".join(pieces))


def imports_of(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def bindings(node: ast.Import | ast.ImportFrom) -> list[tuple[str, str, str | None]]:
    """What an import takes from where under which name."""
    return [(getattr(node, "module", None) or "", alias.name, alias.asname) for alias in node.names]


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or it with the first number that makes it new."""
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def changes(lines: Sequence[str], newline: str, added: Addition) -> list[Change]:
    """The changes that make an addition: not a line that is there is touched."""
    found = []
    if added.imports:
        text = added.imports.replace("\n", newline) + newline
        found.append(Change(added.imports_line, added.imports_line, text if added.imports_line else text + newline))
    if added.tests:
        end = len(lines) - 1 if lines[-1] == "" else len(lines)
        blank = newline * 2 if end and lines[end - 1].strip() else ""
        found.append(Change(end, end, blank + added.tests.replace("\n", newline) + newline))
    if found and found[0].first == len(lines):  # the last line has no ending yet
        text = "".join(change.text for change in found)
        found = [Change(len(lines), len(lines), newline + text)]
    elif found and found[-1].first == len(lines):
        found[-1] = Change(len(lines), len(lines), newline + found[-1].text)
    return found
