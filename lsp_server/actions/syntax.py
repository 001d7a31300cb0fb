"""Whether code parses, in the languages that can be asked: Python by its own parser, others by tree-sitter's grammars.

Owns: which grammars there are. They run apart (`grammars.py`), for a limited time: text over which a grammar crashes or takes too long does
not parse. Blocks while it asks, about 0.1 s for a short text: to be called on any thread but the event loop's.
"""

import ast
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRAMMARS = {
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "csharp": ("tree_sitter_c_sharp", "language"),
    "css": ("tree_sitter_css", "language"),
    "go": ("tree_sitter_go", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "javascriptreact": ("tree_sitter_javascript", "language"),
    "json": ("tree_sitter_json", "language"),
    "jsonc": ("tree_sitter_json", "language"),
    "kotlin": ("tree_sitter_kotlin", "language"),
    "php": ("tree_sitter_php", "language_php"),
    "python": ("tree_sitter_python", "language"),
    "ruby": ("tree_sitter_ruby", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "shellscript": ("tree_sitter_bash", "language"),
    "toml": ("tree_sitter_toml", "language"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "typescriptreact": ("tree_sitter_typescript", "language_tsx"),
}
PROGRAM = Path(__file__).with_name("grammars.py")
LIMIT_S = 10.0
DEPTH = 8
"""So deep are trees drawn: as far as the names within a list of imports."""


def is_known(language: str) -> bool:
    """Whether there is a parser for a language."""
    return language in GRAMMARS


def tree(code: str) -> ast.Module | None:
    """Python code, indented or not, as its syntax tree; None when it is none."""
    found = python(code)
    return found if isinstance(found, ast.Module) else None


def python(code: str) -> ast.Module | Exception:
    """Python code as its syntax tree, or what is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the user's own code, and nobody's business here
        try:
            return ast.parse(textwrap.dedent(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return error


def faults(language: str, texts: Sequence[str]) -> list[int | None]:
    """For each text the line, from 1, of the first thing that is wrong; None where it parses."""
    if language == "python":
        found = map(python, texts)
        return [None if isinstance(one, ast.Module) else getattr(one, "lineno", None) or 1 for one in found]
    seen = asked(language, texts, depth=0)
    return [one["fault"] for one in seen] + [1] * (len(texts) - len(seen))


def parses(language: str, code: str) -> bool:
    """Whether code of a known language is whole."""
    return faults(language, [code]) == [None]


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a text as its grammar reads it. Rows are counted from 0."""

    kind: str
    role: str | None
    """What it is to the node above it."""
    start: int
    end: int
    """Bytes of `source`."""
    row: int
    column: int
    last_row: int
    children: tuple["Node", ...]
    source: bytes = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        return self.source[self.start : self.end].decode("utf-8", "replace")

    def part(self, role: str) -> "Node | None":
        return next((child for child in self.children if child.role == role), None)

    def of_kind(self, *kinds: str) -> Iterator["Node"]:
        """The nodes of a kind below this one, outermost first."""
        for child in self.children:
            if child.kind in kinds:
                yield child
            else:
                yield from child.of_kind(*kinds)


def trees(language: str, *texts: str) -> list[Node | None]:
    """Each text as a tree; None where it does not parse. Texts have \\n for line endings."""
    seen: list[Node | None] = [
        None if one["fault"] else node(one["tree"], text.encode("utf-8", "replace"))
        for one, text in zip(asked(language, texts, depth=DEPTH), texts, strict=False)
    ]
    return seen + [None] * (len(texts) - len(seen))


def node(drawn: list[Any], source: bytes) -> Node:
    kind, role, (row, column, start), (last_row, last_column, end), children = drawn
    last_row = max(last_row - 1, row) if last_column == 0 else last_row  # some grammars count a line's end to what stands before it
    return Node(kind, role, start, end, row, column, last_row, tuple(node(child, source) for child in children), source)


def asked(language: str, texts: Sequence[str], *, depth: int) -> list[dict[str, Any]]:
    """What the grammar saw, up to the first text that it did not come through."""
    order = json.dumps({"grammar": GRAMMARS[language], "texts": list(texts), "depth": depth})
    window = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows, none is to flash up
    command = [sys.executable, "-I", str(PROGRAM)]
    try:
        output = subprocess.run(
            command, input=order.encode(), capture_output=True, timeout=LIMIT_S, check=False, creationflags=window
        ).stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
    return [json.loads(line) for line in output.split(b"\n")[:-1]]
