"""Which files of its project a file imports: where each of its imports may lie.

Owns: how imports are written, and how they name files, in the languages where a name says where to look. Works on the text as it is,
since code that is being edited seldom parses. Does not look at the file system.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MAX_CHARS = 40_000
"""Imports are looked for so far down."""
MAX_IMPORTS = 64
PYTHON = re.compile(r"^[ \t]*(?:from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]+)|import[ \t]+([\w., \t]+))", re.M)
JAVASCRIPT = re.compile(r"\b(?:from|import|require)\s*\(?\s*['\"](\.{1,2}/[^'\"\n]+)['\"]")
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*\"([^\"\n]+)\"", re.M)
JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)", re.M)
RUST = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:mod[ \t]+(\w+)[ \t]*;|use[ \t]+crate::([\w:]+))", re.M)
RUBY = re.compile(r"^[ \t]*require_relative[ \t]*\(?['\"]([^'\"\n]+)['\"]", re.M)
COMMENT = re.compile(r"#[^\n]*")
SCRIPTS = (".ts", ".tsx", ".js", ".jsx", ".mjs", ".d.ts", "/index.ts", "/index.tsx", "/index.js")

Places = tuple[Path, ...]
"""Where one import may lie; the first that is there is meant."""


def imported(text: str, language: str, file: Path, root: Path) -> list[Places]:
    """The places of each import of a `file` below `root`, in the order of the text."""
    head = text[:MAX_CHARS]
    if language == "python":
        found = in_python(head, file, root)
    elif language.startswith(("javascript", "typescript")):
        found = (scripts(file.parent / name) for name in JAVASCRIPT.findall(head))
    elif language in ("c", "cpp", "objective-c"):
        folders = (file.parent, root, root / "include", root / "src")
        found = (tuple(folder / name for folder in folders) for name in INCLUDE.findall(head))
    elif language in ("java", "kotlin"):
        names = (name.replace(".", "/") for name in JAVA.findall(head))
        found = (tuple(folder / f"{name}{file.suffix}" for folder in above(file, root)) for name in names)
    elif language == "rust":
        found = in_rust(head, file, root)
    elif language == "ruby":
        found = ((file.parent / f"{name.removesuffix('.rb')}.rb",) for name in RUBY.findall(head))
    else:
        found = iter(())
    return list(dict.fromkeys(islice(found, MAX_IMPORTS)))


def above(file: Path, root: Path) -> list[Path]:
    """The folders around a file, `root` first."""
    return [folder for folder in reversed(file.parents) if folder.is_relative_to(root)]


def in_python(text: str, file: Path, root: Path) -> Iterator[Places]:
    for dots, module, names, modules in PYTHON.findall(text):
        if modules:
            yield from (modules_at(above_or_src(file, root), name.split()[0]) for name in modules.split(",") if name.strip())
            continue
        bases = [file.parents[len(dots) - 1]] if 0 < len(dots) <= len(file.parents) else above_or_src(file, root)
        for name in COMMENT.sub("", names).strip("()").split(","):
            if word := name.split()[:1]:
                inner = modules_at(bases, f"{module}.{word[0]}".strip(".")) if word[0] != "*" else ()
                yield *inner, *(modules_at(bases, module) if module else ())


def above_or_src(file: Path, root: Path) -> list[Path]:
    return [root, root / "src", *above(file, root)[1:]]


def modules_at(bases: list[Path], module: str) -> Places:
    name = module.replace(".", "/")
    return tuple(base / f"{name}{ending}" for base in bases for ending in (".py", "/__init__.py"))


def scripts(named: Path) -> Places:
    """TypeScript is imported under the names that it will be compiled to."""
    stem = str(named).removesuffix(".js").removesuffix(".jsx")
    return (*([named] if named.suffix else []), *(Path(stem + ending) for ending in SCRIPTS))


def in_rust(text: str, file: Path, root: Path) -> Iterator[Places]:
    crate = next((folder for folder in file.parents if folder.name == "src" and folder.is_relative_to(root)), file.parent)
    for module, path in RUST.findall(text):
        if module:
            folders = (file.parent, file.parent / file.stem)
            yield tuple(folder / ending for folder in folders for ending in (f"{module}.rs", f"{module}/mod.rs"))
        else:
            parts = path.strip(":").split("::")
            names = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
            yield tuple(crate / ending for name in names for ending in (f"{name}.rs", f"{name}/mod.rs"))
