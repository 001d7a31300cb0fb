"""How test code joins a file that has tests already: new imports beside those that are there, tests behind the others, in the class where
tests are members of one. Not a line that is there is touched.

Owns: which parts code has, and where they go, in each language as its grammar names it. What does not fit is an `Unusable`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lsp_server.actions import imports, syntax
from lsp_server.actions.imports import COMMENTS, HEADS, is_import, is_string
from lsp_server.actions.regions import Change, applied, leading, unit_of
from lsp_server.actions.syntax import Node
from lsp_server.errors import Unusable

LOOSE = COMMENTS | {"attribute_item"}
"""What belongs to that which follows it."""
CLASSES = {"java": {"class_declaration"}, "kotlin": {"class_declaration", "object_declaration"}}
"""Languages whose tests are members of a class."""
DECLARING = {"type_spec", "const_spec", "var_spec", "variable_declarator", "variable_declaration", "assignment"}
NAMES = {"identifier", "type_identifier", "property_identifier", "shorthand_property_identifier_pattern"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A declaration or statement of the new code, with the comments above it."""

    text: str
    margin: int
    """How far in its first line begins."""
    names: tuple[str, ...] = ()
    """What it declares."""


def changes(lines: Sequence[str], newline: str, language: str, code: str) -> list[Change]:
    """The changes that add test code to a document with these lines. Raises Unusable. Asks a grammar: not for the event loop."""
    existing = "".join(line.rstrip("\r\n") + "\n" * line.endswith(("\n", "\r")) for line in lines)
    old, new = syntax.trees(language, existing, code)
    if old is None:
        raise Unusable("The test file that is there does not parse, so nothing is added to it: mend it first.")
    if new is None:
        raise Unusable("The model's tests do not parse, so nothing is added. Ask again.")
    statements = imports.missing(old, new, language)
    found = [Change(line := imports.place(old), line, spaced(lines, line, statements, old))] if statements else []
    if language in CLASSES and (home := class_of(old, new, language)) is not None:
        members, others = members_of(new, home, language)
        if kept := fresh(members, home.children):
            found.append(in_class(lines, home, kept))
    else:
        others = list(pieces(new.children))
    gap = 2 if language == "python" else 1
    if kept := fresh(others, old.children):
        text = ("\n" * (gap + 1)).join(piece.text for piece in kept) + "\n"
        found.append(at_end(lines, old, text, gap))
    if not found:
        raise Unusable("The tests that the model wrote are there already.")
    found = [replace_newlines(change, lines, newline) for change in found]
    if not syntax.parses(language, applied(lines, found)):
        raise Unusable("The model's tests do not fit into the file that is there, so nothing is added. Ask again.")
    return found


def pieces(nodes: Sequence[Node]) -> Iterator[Piece]:
    """The parts of some code in order, without imports, what stands before them, and what runs it."""
    loose: list[Node] = []
    last: Node | None = None
    for node in nodes:
        if loose and node.row > loose[-1].last_row + 1:  # a comment that stands alone
            yield piece(loose, loose[-1])
            loose = []
        if node.kind in LOOSE and last is not None and node.row == last.last_row:
            continue
        if node.kind in LOOSE:
            loose.append(node)
            continue
        if not (is_import(node) or node.kind in HEADS or is_string(node) or runs(node)):
            yield piece(loose, node)
        loose, last = [], node
    if loose:
        yield piece(loose, loose[-1])


def piece(loose: Sequence[Node], node: Node) -> Piece:
    first = loose[0] if loose else node
    text = node.source[first.start : node.end].decode("utf-8", "replace").rstrip()
    return Piece(text=text, margin=first.column, names=tuple(declared(node)))


def runs(node: Node) -> bool:
    """Whether it is what runs a module of Python."""
    return node.kind == "if_statement" and node.text.startswith("if __name__")


def declared(node: Node) -> Iterator[str]:
    """The names that a declaration gives to what it declares."""
    if node.part("receiver") is not None:  # a method of Go's, which belongs to its type
        return
    for child in node.children:
        if child.role in ("name", "left") and child.kind in NAMES:
            yield child.text
        elif child.role in ("name", "left") and child.kind.endswith("_pattern"):
            yield from (name.text for name in child.of_kind(*NAMES))
        elif child.role in ("definition", "declaration", "declarator") or child.kind in DECLARING:
            yield from declared(child)
        elif node.kind == "variable_declaration" and child.kind in NAMES:  # Kotlin's
            yield child.text


def fresh(found: Sequence[Piece], there: Sequence[Node]) -> list[Piece]:
    """The pieces that are not there yet, their names changed where something else has them."""
    old = list(pieces(there))
    texts, taken = {dedented(one) for one in old}, {name for one in old for name in one.names}
    kept = [one for one in found if dedented(one) not in texts]
    for name in dict.fromkeys(name for one in kept for name in one.names if name in taken):
        free = free_name(name, taken | {name for one in kept for name in one.names})
        pattern = re.compile(rf"(?:(?<![\w.`])|(?<=this\.)|(?<=self\.)){re.escape(name)}(?!\w)")
        kept = [replace(one, text=pattern.sub(free, one.text)) for one in kept]
        taken.add(free)
    return kept


def free_name(name: str, taken: set[str]) -> str:
    """`name` with the first number that makes it new."""
    quote = "`" if name.endswith("`") else ""
    bare = name.removesuffix(quote)
    between = " " if quote else "_" if "_" in bare or bare.islower() else ""
    number = 2
    while f"{bare}{between}{number}{quote}" in taken:
        number += 1
    return f"{bare}{between}{number}{quote}"


def dedented(found: Piece) -> str:
    """Its text as it would stand at the left margin."""
    first, *rest = found.text.split("\n")
    return "\n".join([first, *(line[min(found.margin, len(leading(line))) :] for line in rest)])


def class_of(old: Node, new: Node, language: str) -> Node | None:
    """The body of the class that new members go into: the one of the new code's name, else the last one."""
    there = [node for node in old.children if node.kind in CLASSES[language]]
    names = {name for node in new.children if node.kind in CLASSES[language] for name in declared(node)}
    chosen = next((node for node in there if names & set(declared(node))), there[-1] if there else None)
    return next((child for child in chosen.children if child.kind == "class_body"), None) if chosen else None


def members_of(new: Node, home: Node, language: str) -> tuple[list[Piece], list[Piece]]:
    """The new code as members of a class: those of its own (first) class, and functions that stand alone; and what is neither."""
    classes = [node for node in new.children if node.kind in CLASSES[language]]
    own = next((node for node in classes if any(node.of_kind("class_body"))), None)
    members = list(pieces(next(own.of_kind("class_body")).children)) if own else []
    constructors = tuple(f"{name}(" for name in declared(own)) if own else ()
    members = [one for one in members if not (constructors and one.text.startswith(constructors))]
    alone = [one for one in pieces([node for node in new.children if node not in classes]) if one.names]
    return [*members, *alone], list(pieces([node for node in classes if node is not own]))


def in_class(lines: Sequence[str], home: Node, members: Sequence[Piece]) -> Change:
    """The members before the brace that closes a class."""
    line = home.last_row
    if home.source[: home.end - 1].rpartition(b"\n")[2].strip() or home.row == line:
        raise Unusable("The class there ends on a line with other code: put its closing brace on a line of its own and ask again.")
    first = next((child for child in home.children if child.row > home.row), None)
    margin = leading(lines[first.row]) if first else leading(lines[line]) + unit_of(lines)
    shown = ["\n".join(margin + row if row.strip() else "" for row in dedented(member).split("\n")) for member in members]
    above = "" if not lines[line - 1].strip() or line - 1 == home.row else "\n"
    return Change(line, line, above + "\n\n".join(shown) + "\n")


def at_end(lines: Sequence[str], old: Node, text: str, gap: int) -> Change:
    """The text behind everything, but before what runs a module of Python."""
    last = old.children[-1] if old.children else None
    if last is not None and runs(last):
        return Change(last.row, last.row, text + "\n" * gap)
    end = len(lines) - 1 if lines[-1] == "" else len(lines)
    return Change(end, end, ("\n" * gap if end and lines[end - 1].strip() else "") + text)


def replace_newlines(change: Change, lines: Sequence[str], newline: str) -> Change:
    """The change in the document's line endings; behind a last line that has none, it brings one."""
    text = change.text.replace("\n", newline)
    return Change(change.first, change.end, newline + text if change.first == len(lines) else text)


def spaced(lines: Sequence[str], line: int, statements: Sequence[str], old: Node) -> str:
    """New imports as lines of their own, apart from what is no import."""
    text = "".join(f"{one}\n" for one in statements)
    if any(map(is_import, old.children)):
        return text
    above = "\n" if line and lines[line - 1].strip() else ""
    return above + text + ("\n" if line < len(lines) and lines[line].strip() else "")
