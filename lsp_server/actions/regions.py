"""Lines of a document that an action is about, how the model is shown them, and how its answer takes their place.

Owns: indentation, the check that what parsed still does, the smallest set of changed lines, and where a docstring goes. Pure functions of
text: a change is lines of the document and what replaces them. Knows nothing of LSP.
"""

import ast
import difflib
import io
import re
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass

from lsp_server.actions import extraction, syntax
from lsp_server.errors import Unusable
from lsp_server.session import split_lines
from lsp_server.symbols import Symbol
from prompts.comments import MARKERS

QUOTED = re.compile(r"[rRuU]?(\"{3}|'{3})(?P<text>.*?)\1", re.S)
BLOCK_COMMENT = r"/\*(?:(?!\*/).)*\*/[ \t]*$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Lines `first` to `last` of a document, both in it."""

    lines: tuple[str, ...]
    """Of the whole document, with their endings."""
    language: str
    newline: str
    first: int
    last: int
    symbol: Symbol | None = None

    @property
    def text(self) -> str:
        """The region's lines, with \\n and without a last one."""
        return "\n".join(line.rstrip("\r\n") for line in self.lines[self.first : self.last + 1])

    @property
    def margin(self) -> str:
        """What all of the region's lines begin with; empty when one of them stands farther left than the first."""
        filled = [line for line in self.text.split("\n") if line.strip()]
        own = leading(filled[0]) if filled else ""
        return own if all(line.startswith(own) for line in filled) else ""

    @property
    def shown(self) -> str:
        """As the model sees it: moved to the left."""
        return "\n".join(line.removeprefix(self.margin) for line in self.text.split("\n"))


@dataclass(frozen=True, slots=True)
class Change:
    """Lines `first` up to `end`, which is not in it, become `text`, which ends as a line of the document does."""

    first: int
    end: int
    text: str


def leading(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def unit_of(lines: Sequence[str]) -> str:
    """One step of indentation: the smallest in the document."""
    indents = {leading(line) for line in lines[:1000] if line.strip()}
    if any(indent.startswith("\t") for indent in indents):
        return "\t"
    return min((indent for indent in indents if len(indent) > 1), key=len, default="    ")


def trimmed(lines: Sequence[str], first: int, last: int) -> tuple[int, int]:
    """Without blank lines at the ends."""
    while first < last and not lines[first].strip():
        first += 1
    while last > first and not lines[last].strip():
        last -= 1
    return first, last


def string_lines(code: str) -> set[int]:
    """Lines, from 0, that begin within a string over several lines: moving them would change what the code says."""
    found: set[int] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.STRING or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
                found |= set(range(token.start[0], token.end[0]))
    except (tokenize.TokenError, SyntaxError):
        return found
    return found


def moved(code: str, to: str, region: Region) -> str:
    """`code` with its first line indented by `to`, in the document's tabs or blanks; strings over several lines keep theirs where the model
    saw them as they stand."""
    lines = code.split("\n")
    own = leading(next((line for line in lines if line.strip()), ""))
    kept = string_lines(textwrap.dedent(code)) if region.language == "python" and not region.margin else set()
    unit = unit_of(region.lines)
    result = []
    for number, line in enumerate(lines):
        if number in kept or (own == to and not line.startswith(own)):
            result.append(line if number in kept else line.rstrip())
            continue
        if not line.strip():
            result.append("")
            continue
        inner = leading(line.removeprefix(own)) if line.startswith(own) else ""
        if ("\t" in inner) != (unit == "\t"):
            steps, rest = divmod(len(inner.expandtabs(4)), 4)
            inner = unit * steps + " " * rest
        result.append(to + inner + line.lstrip(" \t"))
    return "\n".join(result)


def replaced(region: Region, code: str) -> list[Change]:
    """The changes that put `code` in the place of the region: only the lines that differ. Raises Unusable where the code no longer
    parses, or where nothing would change."""
    own_margin = leading(region.lines[region.first])
    new = own(region, moved(code, own_margin, region).strip("\n").split("\n"), region.last)
    old = list(region.lines[region.first : region.last + 1])
    changes = [
        Change(region.first + i, region.first + j, "".join(new[k:m]))
        for what, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if what != "equal"
    ]
    if not changes:
        raise Unusable("The model proposes no change.")
    checked(region, changes)
    return changes


def own(region: Region, lines: list[str], last: int) -> list[str]:
    """Lines with the document's ending; the document's last line keeps having none."""
    whole = [line + region.newline for line in lines]
    if not region.lines[last].endswith(("\n", "\r")):
        whole[-1] = whole[-1].removesuffix(region.newline)
    return whole


def applied(lines: Sequence[str], changes: Sequence[Change]) -> str:
    """The document's text with the changes made."""
    text, at = [], 0
    for change in changes:
        text += [*lines[at : change.first], change.text]
        at = change.end
    return "".join([*text, *lines[at:]])


def checked(region: Region, changes: Sequence[Change]) -> None:
    """Raises Unusable when what parsed before does not parse behind the changes, in languages that have a parser."""
    if not syntax.is_known(region.language):
        return
    after, above = applied(region.lines, changes), 0
    was, now = syntax.faults(region.language, ["".join(region.lines), after])
    if was is not None:  # while somebody works elsewhere in the file, the region alone has to stay whole
        grown = sum(change.text.count("\n") - (change.end - change.first) for change in changes)
        part = "".join(split_lines(after)[region.first : region.last + 1 + grown])
        was, now = syntax.faults(region.language, [region.text, part])
        above = region.first
    if was is None and now is not None:
        where = f"line {above + now}"
        raise Unusable(f"With the model's answer the file would no longer parse ({where}), so it is not used. Ask again, or select less.")


def documented(region: Region, answer: str) -> list[Change]:
    """The changes that put an answer's docstring below the header (Python), or its comment above it. Raises Unusable."""
    symbol = region.symbol
    if symbol is None:
        raise Unusable("There is no function or class here to document.")
    code = next((text for block in extraction.blocks(answer) for text in block.texts()), answer)
    if region.language == "python":
        changes = [docstring(region, symbol, text_of_docstring(code))]
    else:
        text = moved(comment_in(code, region.language), leading(region.lines[symbol.header]), region)
        changes = [Change(symbol.first, symbol.first, "".join(line + region.newline for line in text.split("\n")))]
    checked(region, changes)
    return changes


def comment_in(code: str, language: str) -> str:
    """The first comment that stands on lines of its own. Raises Unusable when there is none."""
    marker = re.escape(MARKERS.get(language, "//"))
    found = re.search(rf"^[ \t]*(?:{BLOCK_COMMENT}|{marker}[^\n]*(?:\n[ \t]*{marker}[^\n]*)*)", code, re.S | re.M)
    if found is None:
        raise Unusable("The model's answer holds no comment, so nothing is changed. Ask again.")
    return re.sub(r"\\+$", "", found[0].strip("\n"), flags=re.M)  # a backslash there would take the next line along


def text_of_docstring(code: str) -> str:
    """The words of the docstring in `code`, be it alone or within its function; empty when there is none."""
    if (tree := syntax.tree(code)) is None:
        found = QUOTED.search(code)
        return textwrap.dedent(found["text"]).strip() if found else ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            return text
    return ""


def docstring(region: Region, symbol: Symbol, words: str) -> Change:
    """The change that gives a Python function `words` as its docstring, in the place of one it has."""
    if not words:
        raise Unusable("The model's answer holds no docstring, so nothing is changed. Ask again.")
    if symbol.body > symbol.last:
        raise Unusable(f"The body of {symbol.name} stands on its header's line, where a docstring has no place.")
    body = next(line for line in region.lines[symbol.body : symbol.last + 1] if line.strip())
    margin = leading(body)
    safe = words.replace('"""', "'''")
    prefix = "r" if "\\" in safe else ""
    if safe.endswith('"') or (prefix and safe.endswith("\\")):
        safe += " "
    first, *rest = safe.split("\n")
    lines = [f'{margin}{prefix}"""{first}', *(f"{margin}{line}".rstrip() for line in rest)]
    if rest:
        lines.append(f'{margin}"""')
    else:
        lines[0] += '"""'
    start, end = old_docstring(region, symbol)
    return Change(start, end, "".join(line + region.newline for line in lines))


def old_docstring(region: Region, symbol: Symbol) -> tuple[int, int]:
    """Where the docstring goes: the lines of the one there is, up to the one behind it; or none, right below the header."""
    tree = syntax.tree("".join(region.lines[symbol.header : symbol.last + 1]))
    node = tree.body[0] if tree and tree.body else None
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        old = node.body[0]
        return symbol.header + old.lineno - 1, symbol.header + (old.end_lineno or old.lineno)
    return symbol.body, symbol.body


def inserted_above(region: Region, code: str) -> list[Change]:
    """The change that puts `code` on lines of its own above the region."""
    text = moved(code.strip("\n"), leading(region.lines[region.first]), region)
    changes = [Change(region.first, region.first, "".join(line + region.newline for line in text.split("\n")))]
    checked(region, changes)
    return changes
