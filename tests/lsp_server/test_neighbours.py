"""Where a file's imports may lie, language by language."""

import os
from pathlib import Path

import pytest

from lsp_server.neighbours import imported

ROOT = Path("/p")


@pytest.mark.parametrize(
    ("text", "language", "file", "there"),
    [
        ("import a.b as c, d\n", "python", "x.py", ["a/b.py", "d/__init__.py"]),
        ("from .a import b\n", "python", "pkg/x.py", ["pkg/a.py"]),
        ("from . import (\n    b,  # why\n    c as d,\n)\n", "python", "pkg/x.py", ["pkg/b.py", "pkg/c.py"]),
        ("from ..other import *\n", "python", "pkg/sub/x.py", ["pkg/other/__init__.py"]),
        ("from pkg.a import b\n", "python", "src/pkg/x.py", ["src/pkg/a/b.py"]),
        ("if TYPE_CHECKING:\n    from pkg import a\n", "python", "src/pkg/x.py", ["src/pkg/a.py"]),
        ("import x from './a';\nexport * from '../b.js'\n", "typescript", "s/x.ts", ["s/a.tsx", "b.ts"]),
        ("const c = require('./c')\nimport('./d.mjs')\n", "javascript", "x.js", ["c/index.js", "d.mjs"]),
        ('#include "a.h"\n#  include "lib/b.h"\n#include <c.h>\n', "c", "src/x.c", ["src/a.h", "include/lib/b.h"]),
        ("import shop.Item;\nimport static shop.Tax.rate;\n", "java", "src/main/java/shop/Cart.java", ["src/main/java/shop/Item.java"]),
        ("mod a;\nuse crate::b::C;\n", "rust", "src/lib.rs", ["src/a/mod.rs", "src/b.rs"]),
        ("require_relative 'a/b'\n", "ruby", "x.rb", ["a/b.rb"]),
    ],
)
def test_each_import_may_lie_where_its_language_says(text: str, language: str, file: str, there: list[str]):
    places = [[Path(os.path.normpath(place)) for place in one] for one in imported(text, language, ROOT / file, ROOT)]
    for wanted in there:
        assert any(ROOT / wanted in one for one in places), wanted


def test_nothing_is_looked_for_outside_of_the_folder_by_absolute_imports_nor_in_other_languages():
    found = imported("import a\nfrom b import c\n", "python", ROOT / "src/x.py", ROOT)
    assert all(place.is_relative_to(ROOT) for places in found for place in places)
    assert imported("import a\n", "markdown", ROOT / "x.md", ROOT) == []


def test_the_first_imports_are_enough():
    assert len(imported("".join(f"import m{number}\n" for number in range(1000)), "python", ROOT / "x.py", ROOT)) == 64
