"""What is wrong with test code, as far as reading it tells: whether it parses, tests what it should, and can import what it does.

Owns: that, and what can be put right without asking: a forgotten import of what is tested, a forgotten package. Runs nothing.
"""

import ast
import re
import sys
from pathlib import Path

from lsp_server.actions import extraction, suites, syntax
from lsp_server.actions.suites import Plan
from lsp_server.actions.tasks import Task

FRAMEWORKS = frozenset({"pytest", "unittest", "mock", "hypothesis"})
PACKAGED = ("go", "java", "kotlin")
PACKAGE = r"^package\s+[\w.]+;?"
JAVASCRIPT_TEST = r"\b(?:test|it)\s*(?:\.\w+\s*)*\("
TESTS = {
    "go": r"\bfunc\s+(?:Test|Fuzz|Benchmark|Example)\w*\(",
    "java": r"@\w*Test\b",
    "kotlin": r"@\w*Test\b",
    "rust": r"#\[(?:\w+::)*test\b",
    **dict.fromkeys(suites.JAVASCRIPT, JAVASCRIPT_TEST),
}
"""What a test begins with."""


def code_of(task: Task, plan: Plan, answer: str, *, is_cut_off: bool) -> str:
    """The test code of an answer; with what it forgot to import of the source, or its package. Raises Unusable."""
    code = extraction.new_code(answer, task.snapshot.language, is_cut_off=is_cut_off)
    if task.snapshot.language == "python":
        return with_import(code, plan.suite.module, top_level_name(task))
    package = re.search(PACKAGE, "".join(task.region.lines), re.M) if task.snapshot.language in PACKAGED else None
    return f"{package[0]}\n\n{code}" if package and not re.search(PACKAGE, code, re.M) else code


def top_level_name(task: Task) -> str:
    """The name by which tests reach the symbol: its own, or that of the class it is in."""
    tree = syntax.tree("".join(task.region.lines))
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
    tree = syntax.tree(code)
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
        return problem_elsewhere(task, plan, code)
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


def problem_elsewhere(task: Task, plan: Plan, code: str) -> str | None:
    """What is wrong with test code in another language than Python."""
    language = task.snapshot.language
    (line,) = syntax.faults(language, [code])
    if line is not None:
        return f"The test code does not parse, from line {line} on."
    if not re.search(TESTS[language], code):
        return "There is no test in the test code."
    if not re.search(rf"(?<!\w){re.escape(re.split('[.:]', task.name)[-1])}(?!\w)", code):
        return f"The tests never use {task.name}."
    public = re.search(r"^public\s+(?:final\s+)?class\s+(\w+)", code, re.M) if language == "java" and not plan.existing else None
    if public and public[1] != plan.suite.file.stem:
        return f"The class has to be called {plan.suite.file.stem}, as its file is."
    return None


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
    tree = syntax.tree(text)
    if tree is None or "__getattr__" in text or "import *" in text:
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    if file.name == "__init__.py":
        names |= {child.stem for child in file.parent.iterdir()}
    return names | imported(tree)
