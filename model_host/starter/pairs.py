"""Real question-and-answer pairs for the chat share of the corpus: function -> docstring, function -> its test, function -> what it does.

Owns: finding them in source with `ast`. Knows nothing of templates or tokens. Nothing is invented: every answer was written by
the author of the function.
"""

import ast
import json
import lzma
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from model_host.starter.corpus import Document

MAX_SOURCE_CHARS, MAX_ANSWER_CHARS = 2_500, 1_500
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    ask: str
    answer: str


def fenced(code: str) -> str:
    return f"```python\n{code.strip(chr(10))}\n```"


def functions(document: Document) -> Iterator[tuple[Function, str]]:
    """Every function of the document with its dedented source; none when it does not parse."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = document.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, Function):
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(source) <= MAX_SOURCE_CHARS:
                yield node, source


def without_docstring(node: Function, source: str) -> str:
    """The function's source with the lines of its docstring taken out."""
    first = node.body[0]
    lines = source.splitlines(keepends=True)
    return "".join(lines[: first.lineno - node.lineno] + lines[(first.end_lineno or first.lineno) - node.lineno + 1 :])


def pairs_in(documents: Iterable[Document]) -> Iterator[Pair]:
    """Pairs of one distribution's documents: a docstring or an explanation for every second documented function (more would
    only make the corpus larger), and every test, which belongs to a function of the same distribution by its name, test_NAME."""
    sources: dict[str, str] = {}
    tests: dict[str, str] = {}
    for document in documents:
        for node, source in functions(document):
            if node.name.startswith("test_"):
                tests.setdefault(node.name.removeprefix("test_"), source)
                continue
            docstring = ast.get_docstring(node)
            first = node.body[0]
            on_own_lines = first.lineno > node.lineno and len(node.body) > 1 and node.body[1].lineno > (first.end_lineno or 0)
            if docstring and on_own_lines and 30 <= len(docstring) <= MAX_ANSWER_CHARS:
                bare = without_docstring(node, source)
                sources.setdefault(node.name, bare)
                quoted = textwrap.indent(f'"""{docstring}\n"""' if "\n" in docstring else f'"""{docstring}"""', "    ")
                summary = docstring.split("\n\n")[0].replace("\n", " ")
                if zlib.crc32(bare.encode()) % 2:
                    pair = Pair(ask=f"Write a docstring for this function.\n\n{fenced(bare)}", answer=fenced(quoted))
                else:
                    pair = Pair(ask=f"Explain what this function does.\n\n{fenced(bare)}", answer=summary)
                if zlib.crc32(pair.ask.encode()) % 2 and (summary.endswith(".") or pair.answer != summary):
                    yield pair
            elif len(node.body) > 1:
                sources.setdefault(node.name, source)
    for name, test in tests.items():
        if name in sources and len(test) <= MAX_ANSWER_CHARS:
            yield Pair(ask=f"Write a test for this function.\n\n{fenced(sources[name])}", answer=fenced(test))


def write(documents: Iterable[Document], target: Path) -> Path:
    """Writes the pairs of all distributions, one JSON a line, unless they are there. Documents come grouped by distribution."""
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    group: list[Document] = []
    with lzma.open(partial, "wt", preset=6, encoding="utf-8") as out:

        def flush() -> None:
            for pair in pairs_in(group):
                out.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
            group.clear()

        for document in documents:
            if group and document.distribution != group[0].distribution:
                flush()
            group.append(document)
        flush()
    partial.rename(target)
    return target


def read(file: Path) -> list[Pair]:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [Pair(**json.loads(line)) for line in lines]
