"""A project's own tests: which framework they use, how files are named, where the tests of a source file go, and one to learn from.

Owns: the reading of a project's files for that, within limits: names first, and the contents of a handful. Nothing is run and nothing is
written. Knows nothing of models or editors.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_server.context import is_secret
from lsp_server.workspace import NOT_OURS

MAX_FILES = 20_000
MAX_READ_CHARS = 200_000
MODEL_LINES = 60
TEST_FOLDERS = ("tests", "test", "__tests__", "spec")
JAVASCRIPT = frozenset({"javascript", "javascriptreact", "typescript", "typescriptreact"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Where the tests of one source file go, and in which words."""

    framework: str
    file: Path
    """Of the tests; may be there or not."""
    module: str
    """How the tests import the source."""
    example: str = ""
    """Tests that are there already, to learn the style from."""
    example_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where tests go, and what has to be known to check them."""

    root: Path
    source: Path
    suite: Suite
    existing: str
    """The test file's text as it is on disk or, better, in an editor; empty when there is none."""


def files_of(root: Path) -> list[Path]:
    """Names of the project's files, below `root`, without hidden folders and what was built or installed."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_OURS)
        found += [Path(folder, name).relative_to(root) for name in sorted(names)]
        if len(found) > MAX_FILES:
            break
    return found


def suite_of(root: Path, source: Path, language: str) -> Suite | None:
    """The suite for a source file of `root`; None for languages whose tests we do not know."""
    files = files_of(root)
    relative = source.relative_to(root)
    if language == "python":
        return python(root, files, relative)
    if language in JAVASCRIPT:
        return javascript(root, files, relative)
    if language == "go":
        return beside(root, files, relative, "go test", f"{relative.stem}_test.go", "_test.go", package_of(root / relative))
    if language in ("java", "kotlin"):
        return junit(root, files, relative)
    if language == "rust":
        return cargo(root, files, relative)
    return None


def read(file: Path) -> str:
    try:
        if is_secret(file.name) or file.is_symlink() or file.stat().st_size > 4 * MAX_READ_CHARS:
            return ""
        return file.read_text("utf-8", errors="replace")[:MAX_READ_CHARS]
    except OSError:
        return ""


def nearest(files: Sequence[Path], wanted: Path) -> Path | None:
    """The file with the most of `wanted`'s folders and the likest name."""

    def likeness(file: Path) -> tuple[int, int]:
        alike = sum(1 for one, other in zip(file.stem, wanted.stem, strict=False) if one == other)
        return len(set(file.parts[:-1]) & set(wanted.parts[:-1])), alike

    return max(files, key=likeness, default=None)


def with_example(root: Path, tests: Sequence[Path], suite: Suite) -> Suite:
    """The suite with the file itself as the example where it is there, else the nearest one."""
    own = suite.file.relative_to(root)
    model = own if own in tests else nearest(tests, own)
    if model is None:
        return suite
    text = "".join(read(root / model).splitlines(keepends=True)[:MODEL_LINES])
    return Suite(framework=suite.framework, file=suite.file, module=suite.module, example=text, example_path=model.as_posix())


def python(root: Path, files: Sequence[Path], source: Path) -> Suite:
    """pytest or unittest; test_x.py or x_test.py; in tests/ (flat or mirrored) or beside."""
    tests = [file for file in files if file.suffix == ".py" and (file.stem.startswith("test_") or file.stem.endswith("_test"))]
    behind = sum(file.stem.endswith("_test") and not file.stem.startswith("test_") for file in tests)
    name = f"{source.stem}_test.py" if behind > len(tests) / 2 else f"test_{source.stem}.py"
    there = [file for file in tests if file.name == name]
    inner = source.relative_to("src") if source.parts[0] == "src" and len(source.parts) > 1 else source
    target = nearest(there, source) or folder_for(files, tests, source, inner) / name
    framework = "pytest" if uses_pytest(root, files, tests) else "unittest"
    parts = inner.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    return with_example(root, tests, Suite(framework=framework, file=root / target, module=module))


def folder_for(files: Sequence[Path], tests: Sequence[Path], source: Path, inner: Path) -> Path:
    """The folder that new tests of `source` belong in, as those of its neighbours do."""
    top = next((Path(name) for name in TEST_FOLDERS if any(file.parts[0] == name for file in files if len(file.parts) > 1)), None)
    if top is None:
        return source.parent if any(file.parent == source.parent for file in tests) else Path("tests")
    for skip in (1, 0):  # tests/cart/ for shop/cart/x.py is more usual than tests/shop/cart/
        mirrored = top.joinpath(*inner.parts[skip:-1])
        if mirrored != top and any(file.is_relative_to(mirrored) for file in files):
            return mirrored
    return top


def uses_pytest(root: Path, files: Sequence[Path], tests: Sequence[Path]) -> bool:
    names = {file.name for file in files}
    if names & {"pytest.ini", "conftest.py"}:
        return True
    declared = "".join(read(root / name) for name in ("pyproject.toml", "setup.cfg", "tox.ini", "requirements.txt", "requirements-dev.txt"))
    if re.search(r"\bpytest\b", declared):
        return True
    contents = [read(root / file) for file in tests[:20]]
    if any(re.search(r"^\s*(?:import|from) pytest\b|^def test_", text, re.M) for text in contents):
        return True
    return not any("unittest" in text for text in contents)


def javascript(root: Path, files: Sequence[Path], source: Path) -> Suite:
    """vitest or jest, by the nearest package.json; x.test.ts or x.spec.ts, beside or in __tests__."""
    declared: dict[str, object] = {}
    for folder in (root / source).parents:
        if (folder / "package.json").is_file() or folder == root:
            declared = package_json(folder / "package.json")
            break
    framework = "vitest" if "vitest" in declared else "jest" if "jest" in declared else "node:test"
    tests = [file for file in files if re.search(r"\.(test|spec)\.[cm]?[jt]sx?$", file.name)]
    kind = "spec" if sum(".spec." in file.name for file in tests) > len(tests) / 2 else "test"
    name = f"{source.stem}.{kind}{source.suffix}"
    there = [file for file in tests if file.name == name]
    folder = source.parent
    if tests and all(file.parent.name == "__tests__" for file in tests):
        folder = source.parent / "__tests__"
    elif tests and all(file.parts[0] in TEST_FOLDERS for file in tests):
        folder = Path(tests[0].parts[0])
    target = nearest(there, source) or folder / name
    way = Path(os.path.relpath(source.with_suffix(""), target.parent)).as_posix()
    suite = Suite(framework=framework, file=root / target, module=way if way.startswith(".") else f"./{way}")
    return with_example(root, tests, suite)


def package_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(read(file) or "{}")
        return {**found.get("dependencies", {}), **found.get("devDependencies", {})}
    except (ValueError, AttributeError, TypeError):
        return {}


def beside(root: Path, files: Sequence[Path], source: Path, framework: str, name: str, ending: str, module: str) -> Suite:
    tests = [file for file in files if file.name.endswith(ending)]
    return with_example(root, tests, Suite(framework=framework, file=root / source.with_name(name), module=module))


def package_of(source: Path) -> str:
    found = re.search(r"^package\s+([\w.]+)", read(source), re.M)
    return found[1] if found else source.parent.name


def junit(root: Path, files: Sequence[Path], source: Path) -> Suite:
    """src/main/... becomes src/test/...; JUnit 4 where the build says so."""
    build = "".join(read(root / file) for file in files if file.name in ("pom.xml", "build.gradle", "build.gradle.kts"))
    framework = "JUnit 4" if re.search(r"junit:junit|<artifactId>junit</artifactId>", build) and "jupiter" not in build else "JUnit 5"
    parts = list(source.parts)
    if "main" in parts:
        parts[parts.index("main")] = "test"
    tests = [file for file in files if file.stem.endswith("Test")]
    target = Path(*parts).with_name(f"{source.stem}Test{source.suffix}")
    package = package_of(root / source)
    return with_example(root, tests, Suite(framework=framework, file=root / target, module=f"{package}.{source.stem}"))


def cargo(root: Path, files: Sequence[Path], source: Path) -> Suite:
    """Integration tests in the crate's tests/."""
    crate = next((folder for folder in source.parents if folder / "Cargo.toml" in files), Path())
    found = re.search(r'^name\s*=\s*"([^"]+)"', read(root / crate / "Cargo.toml"), re.M)
    name = (found[1] if found else source.stem).replace("-", "_")
    inner = source.relative_to(crate / "src").with_suffix("") if source.is_relative_to(crate / "src") else Path(source.stem)
    path = [part for part in inner.parts if part not in ("lib", "mod", "main")]
    tests = [file for file in files if file.suffix == ".rs" and "tests" in file.parts]
    target = crate / "tests" / f"{source.stem}.rs"
    return with_example(root, tests, Suite(framework="cargo test", file=root / target, module="::".join([name, *path])))
