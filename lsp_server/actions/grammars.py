"""Where other people's grammars run: parses texts with tree-sitter and says what it saw.

Owns: that, in a process of its own, since grammars are C and what they are given may be anything: some take minutes over it, or crash.
Run as a program with an order on stdin; one line of JSON for each text, as soon as it is known. Nothing of this package imports it.
"""

import importlib
import json
import sys
from typing import Any

from tree_sitter import Language, Node, Parser


def main() -> None:
    """Reads its order (`grammar`: module and function, `texts`, `depth`: how deep the trees are drawn) and carries it out."""
    order = json.load(sys.stdin.buffer)
    module, function = order["grammar"]
    parser = Parser(Language(getattr(importlib.import_module(module), function)()))
    for text in order["texts"]:
        root = parser.parse(text.encode("utf-8", "replace")).root_node
        seen = {"fault": fault(root), "tree": drawn(root, order["depth"]) if order["depth"] else None}
        sys.stdout.write(json.dumps(seen) + "\n")
        sys.stdout.flush()


def fault(root: Node) -> int | None:
    """The line, from 1, of the first thing that is wrong."""
    if not root.has_error:
        return None
    node: Node | None = root
    line = 1
    while node is not None:
        line = node.start_point.row + 1
        wrong = not node.is_error and not node.is_missing
        node = next((child for child in node.children if child.has_error or child.is_missing), None) if wrong else None
    return line


def drawn(node: Node, depth: int, field: str | None = None) -> list[Any]:
    """A node as plain values: its kind and field, where it starts and ends (row, byte in the row, byte), the named ones below it."""
    ends = (*node.start_point, node.start_byte), (*node.end_point, node.end_byte)
    children = [
        drawn(child, depth - 1, node.field_name_for_child(index))
        for index, child in enumerate(node.children)
        if depth > 1 and child.is_named
    ]
    return [node.type, field, *ends, children]


if __name__ == "__main__":
    main()
