"""Which function or class stands at a line, how far it goes, what it calls, and a file's outline: by headers' words and by indentation.

Owns: headers of the usual languages. Works on lines as they are, parsed or not, since code that is being edited seldom parses; costs a look
at the lines around, so that a menu can ask at every cursor. Knows nothing of LSP or prompts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LINES = 4000
"""So far up is a header looked for, and so far down an end."""
PYTHON = re.compile(r"\s*(?:async\s+)?(?:def|class)\s+(?P<name>\w+)")
WORDS = re.compile(
    r"\s*(?:(?:export|default|public|private|protected|internal|static|async|final|abstract|override|open|sealed|unsafe|const|data|inline"
    r"|virtual|pub(?:\([^)]*\))?)\s+)*(?:function\*?|func|fn|fun|def|class|struct|interface|trait|impl|enum|record|module|object)"
    r"\s+(?:\([^)]*\)\s*)?(?P<name>[\w.]+)"
)
ARROW = re.compile(r"\s*(?:export\s+)?(?:const|let|var)\s+(?P<name>\w+)\s*(?::[^=]+)?=\s*(?:async\s*)?(?:\([^)]*\)|\w+)\s*(?::[^=]+)?=>")
BRACED = re.compile(
    r"\s*(?!(?:if|for|while|switch|catch|return|else|do|try|with|using|lock|foreach|match|loop|new|throw)\b)"
    r"(?:[\w<>\[\],*&:~?.]+\s+)*[*&]*(?P<name>~?[\w:]+)\s*\([^;]*(?:\{\s*$|\)\s*(?:const|override|noexcept|throws\s+[\w., ]+)?\s*$)"
)
TYPE = re.compile(r"\s*(?:[\w()]+\s+)*?(?:class|struct|interface|trait|impl|enum|record|module|object)\b")
"""A header whose body holds members."""
NAMES = (
    re.compile(r"\s*(?:\w+\s+)*?\w+\s*(?::[^=]+)?=(?![=>])"),  # x = 1, x: int = 1, export const x = 1
    re.compile(r"\s*(?:(?:pub|public|private|protected|readonly|static|val|var)\s+)*\w+\??\s*:\s*\w"),  # x: int
    re.compile(
        r"\s*(?!(?:return|import|package|use|using|throw|goto|else|delete|export)\b)(?:[\w<>\[\],.*&:]+\s+)+[*&]*\w+[^={}]*;\s*$"
    ),  # int x;
    re.compile(r"(?:#\s*define|type|typedef|using)\s+\w"),
)
NOT_CODE = {
    "css", "html", "ini", "json", "jsonc", "latex", "less", "markdown", "plaintext", "scss", "tex", "toml", "xml", "yaml",
}  # fmt: skip
NOT_MEMBERS = re.compile(r"\s*(?:\*|/[*/]|--|;|[{}\])]|(?:public|private|protected)\s*:)|\s*$")
"""Comments, brackets, and what parts a class in C++."""
MAX_NAME_CHARS, MAX_LINE_CHARS = 100, 500
DECORATION = re.compile(r"\s*(?:@[\w.]+|#\[)")
CLOSER = re.compile(r"\s*(?:[}\])]|end\b)")
TRIPLE = re.compile(r"\"{3}|'{3}")
CALL = re.compile(r"(?<![\w.])(?:(?:self|this)\s*(?:\.|->)\s*)?(\w+)\s*\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """A function or class: lines `first` to `last`, both counted from 0 and both in it."""

    name: str
    first: int
    """With what decorates it."""
    header: int
    body: int
    """The first line behind the header, which may go over several."""
    last: int


def header(line: str, language: str) -> str | None:
    """The name of the function or class that begins on this line."""
    patterns = (PYTHON,) if language == "python" else (WORDS, ARROW, BRACED)
    for pattern in patterns:
        if found := pattern.match(line):
            return found["name"]
    return None


def indentation(line: str) -> int:
    return len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip())


def symbol_at(lines: Sequence[str], language: str, line: int) -> Symbol | None:
    """The innermost function or class that `line` is in, or that it decorates."""
    while line < len(lines) - 1 and DECORATION.match(lines[line]):
        line += 1
    for index in range(line, max(line - MAX_LINES, -1), -1):
        name = header(lines[index], language)
        if name is None:
            continue
        body = end_of_header(lines, index)
        last = end_of_body(lines, index, body)
        if last >= line:
            first = index
            while first > 0 and DECORATION.match(lines[first - 1]) and indentation(lines[first - 1]) == indentation(lines[index]):
                first -= 1
            return Symbol(name=name, first=first, header=index, body=body, last=last)
    return None


def end_of_header(lines: Sequence[str], index: int) -> int:
    """The line behind a header, whose brackets may close lines below."""
    depth = 0
    for number in range(index, min(index + 100, len(lines))):
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", lines[number])
        depth += sum(map(bare.count, "([")) - sum(map(bare.count, ")]"))
        if depth <= 0:
            # bounds of types may follow, before the brace on a line of its own
            where = number + 1 < len(lines) and lines[number + 1].lstrip().startswith("where")
            braces = (below for below in range(number + 1, min(number + 12, len(lines))) if where and lines[below].strip() == "{")
            return next(braces, number + 1)
    return index + 1


def end_of_body(lines: Sequence[str], index: int, body: int) -> int:
    """The last line of the block whose header is at `index`."""
    depth, last = indentation(lines[index]), body - 1
    within = ""  # the quotes of a string over several lines, whose text may stand anywhere
    for number in range(body, min(body + MAX_LINES, len(lines))):
        text = lines[number]
        was_within, within = within, quotes_behind(text, within)
        if was_within:
            last = number
        if was_within or not text.strip():
            continue
        if indentation(text) <= depth:
            opens = number == body and text.strip() == "{"
            if opens or (CLOSER.match(text) and indentation(text) == depth):
                last = number
                if opens:
                    continue
            break
        last = number
    return last


def quotes_behind(line: str, within: str) -> str:
    """The triple quotes that are open at a line's end, when `within` were open at its beginning."""
    for marks in TRIPLE.findall(line):
        within = "" if within == marks else within or marks
    return within


def signatures(lines: Sequence[str], language: str, symbol: Symbol) -> list[str]:
    """The headers, in this file, of what `symbol` calls, with the first line of their docstrings."""
    wanted = {name for line in lines[symbol.body : symbol.last + 1] for name in CALL.findall(line)} - {symbol.name}
    found = []
    for index, line in enumerate(lines[: 2 * MAX_LINES]):
        if not symbol.first <= index <= symbol.last and (name := header(line, language)) in wanted and name is not None:
            end = end_of_header(lines, index)
            documented = lines[end : end + 1] if end < len(lines) and lines[end].lstrip().startswith(('"""', "'''")) else []
            found.append("".join([*lines[index:end], *documented]).rstrip())
    return found


def outline(lines: Sequence[str], language: str) -> list[str]:
    """Headers of a file's functions, classes and methods, and the names beside them, in source order, as they are written; without what
    is in functions. Lines without their endings."""
    found: list[str] = []
    types: list[tuple[int, int]] = []  # the types around, each with its indentation and its members'
    index, within = 0, ""
    while index < len(lines) and language not in NOT_CODE:
        line = lines[index]
        was_within, within = within, quotes_behind(line, within)
        index += 1
        if was_within or NOT_MEMBERS.match(line) or len(line) > MAX_LINE_CHARS:
            continue
        depth = indentation(line)
        while types and depth <= types[-1][0]:
            types.pop()
        if header(line, language) is not None:
            end, within = index if line.rstrip().endswith("{") else end_of_header(lines, index - 1), ""
            found += lines[index - 1 : end]
            if TYPE.match(line):
                types.append((depth, next((indentation(below) for below in lines[end : end + 50] if not NOT_MEMBERS.match(below)), 0)))
                index = end
            else:
                index = end_of_body(lines, index - 1, end) + 1
        elif DECORATION.match(line):
            found.append(line)
        elif depth == (types[-1][1] if types else 0) and any(pattern.match(line) for pattern in NAMES):
            found.append(line.rstrip()[:MAX_NAME_CHARS])
    return [line.rstrip() for line in found]
