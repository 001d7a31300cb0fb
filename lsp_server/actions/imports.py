"""What a file of tests imports, name by name, and where one more import would stand, in the languages whose tests are written here.

Owns: how imports look as each grammar names them. Pure functions of trees.
"""

import itertools
from collections.abc import Iterator

from lsp_server.actions.syntax import Node

IMPORTS = {
    *("import_statement", "import_from_statement", "future_import_statement"),  # Python; the first in JavaScript too
    *("import_declaration", "import", "use_declaration"),  # Java and Go, Kotlin, Rust
}
HEADS = {"package_clause", "package_declaration", "package_header", "hash_bang_line", "inner_attribute_item", "file_annotation"}
"""What stands before imports."""
COMMENTS = {"comment", "line_comment", "block_comment"}


def is_import(node: Node) -> bool:
    return node.kind in IMPORTS or is_require(node)


def is_string(node: Node) -> bool:
    """Whether it is a docstring, or JavaScript's 'use strict'."""
    return node.kind == "expression_statement" and [child.kind for child in node.children] == ["string"]


def place(old: Node) -> int:
    """The line that new imports go before."""
    line, opens = 0, True
    for node, after in itertools.zip_longest(old.children, old.children[1:]):
        alone = node.kind in COMMENTS and (after is None or after.row > node.last_row + 1 or node.text.startswith("#!"))
        if is_import(node) or node.kind in HEADS or (opens and (alone or is_string(node))):
            line = node.last_row + 1
        elif node.kind not in COMMENTS:
            opens = False
    while (over := next((node for node in old.children if node.row < line <= node.last_row), None)) is not None:
        line = over.last_row + 1
    return line


def missing(old: Node, new: Node, language: str) -> list[str]:
    """The statements that import what the new code imports and the old does not."""
    there = {key for node in old.children for key, _ in imported(node, language)}
    found = []
    for node in new.children:
        if node.kind == "future_import_statement":  # its place is before all others, or nowhere
            continue
        wanted = list(imported(node, language))
        lacking = [statement for key, statement in wanted if key not in there]
        found += [node.text.strip()] if len(lacking) == len(wanted) and wanted and language != "go" else lacking
        there |= {key for key, _ in wanted}
    return found


def imported(node: Node, language: str) -> Iterator[tuple[str, str]]:
    """What a statement imports, each with a statement that imports nothing else. Two of the same key cannot stand beside each other."""
    whole = " ".join(node.text.split())
    if language.startswith(("javascript", "typescript")):
        yield from imported_in_javascript(node, whole)
    elif node.kind not in IMPORTS:
        return
    elif language == "python":
        module = node.part("module_name")
        opening = f"from {module.text} " if module else ""
        names = [child.text for child in node.children if child.role == "name"] or ["*"]
        yield from ((f"{opening}import {name}",) * 2 for name in names)
    elif language == "go":
        specs = (" ".join(spec.text.split()) for spec in node.of_kind("import_spec"))
        yield from ((f"import {spec}",) * 2 for spec in specs)
    elif language == "rust":
        path = node.part("argument")
        yield from ((f"use {one};",) * 2 for one in (paths(path) if path else ()))
    else:
        yield whole, whole


def imported_in_javascript(node: Node, whole: str) -> Iterator[tuple[str, str]]:
    end = ";" if whole.endswith(";") else ""
    if is_require(node):
        for declarator in node.of_kind("variable_declarator"):
            name, call = declarator.part("name"), declarator.part("value")
            if name and call and name.kind == "object_pattern":
                for one in name.children:
                    bound = (one.part("value") or one).text
                    yield bound, f"const {{ {one.text} }} = {call.text}{end}"
            elif name and call:
                yield name.text, f"const {name.text} = {call.text}{end}"
    elif node.kind == "import_statement":
        source, clause = node.part("source"), next(node.of_kind("import_clause"), None)
        if source is None or clause is None:
            yield whole, whole
            return
        word = "import type" if whole.startswith("import type ") else "import"
        for child in clause.children:
            if child.kind == "named_imports":
                for one in child.of_kind("import_specifier"):
                    bound = (one.part("alias") or one.part("name") or one).text
                    yield bound, f"{word} {{ {one.text} }} from {source.text}{end}"
            else:
                yield child.text.split()[-1], f"{word} {child.text} from {source.text}{end}"


def is_require(node: Node) -> bool:
    """Whether it is JavaScript's older way of importing."""
    declarators = [child for child in node.children if child.kind == "variable_declarator"]
    return bool(declarators) and all((value := one.part("value")) and value.text.startswith("require(") for one in declarators)


def paths(node: Node) -> Iterator[str]:
    """The paths that a use of Rust's names, one by one."""
    if node.kind == "use_list":
        for child in node.children:
            yield from paths(child)
    elif node.kind == "scoped_use_list":
        start, inner = node.part("path"), node.part("list")
        for path in paths(inner) if inner else ():
            yield f"{start.text}::{path}" if start else path
    else:
        yield " ".join(node.text.split())
