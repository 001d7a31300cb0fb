"""How test code joins a file that has tests already, drawn: the file before, the model's code, the file after."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_server.actions import joining_tests, regions
from lsp_server.errors import Unusable
from lsp_server.session import split_lines


def added(language: str, existing: str, code: str, newline: str = "\n") -> str:
    lines = tuple(split_lines(existing))
    found = joining_tests.changes(lines, newline, language, code)
    assert all(change.first == change.end for change in found), "a line that is there was touched"
    return regions.applied(lines, found)


PYTHON = """import pytest


def test_old():
    assert True
"""
NEW_PYTHON = """import pytest
from shop import add


@pytest.mark.slow
def test_add():
    # one and two
    assert add(1, 2) == 3


def test_old():
    test_old.x = 1


# the end
if __name__ == "__main__":
    pytest.main()
"""
PYTHON_AFTER = """import pytest
from shop import add


def test_old():
    assert True


@pytest.mark.slow
def test_add():
    # one and two
    assert add(1, 2) == 3


def test_old_2():
    test_old_2.x = 1
"""
UNITTEST = '''#!/usr/bin/env python3
"""Tests of the shop."""

def test_a(): pass

if __name__ == "__main__":
    unittest.main()
'''
UNITTEST_AFTER = '''#!/usr/bin/env python3
"""Tests of the shop."""

from shop import add

def test_a(): pass

def test_add():
    assert add(1, 2) == 3


if __name__ == "__main__":
    unittest.main()
'''
JAVA = """package shop;

import org.junit.jupiter.api.Test;

class CartTest {
    private Cart cart = new Cart();

    @Test
    void total() {
        check(cart);
    }
}
"""
NEW_JAVA = """package shop;

import org.junit.jupiter.api.Test;
import static org.junit.jupiter.api.Assertions.assertEquals;

/** Tests of Cart. */
public class CartTest {
  private Cart cart = new Cart();

  CartTest() {}

  // nothing is nothing
  @Test
  void total() {
    if (true) {
      assertEquals(0, cart.total());
    }
  }
}
"""
JAVA_AFTER = """package shop;

import org.junit.jupiter.api.Test;
import static org.junit.jupiter.api.Assertions.assertEquals;

class CartTest {
    private Cart cart = new Cart();

    @Test
    void total() {
        check(cart);
    }

    // nothing is nothing
    @Test
    void total_2() {
      if (true) {
        assertEquals(0, cart.total());
      }
    }
}
"""
KOTLIN = "package shop\n\nclass CartTest {\n\t@Test\n\tfun `adds up`() = check(1)\n}\n"
NEW_KOTLIN = "import kotlin.test.Test\n\n@Test\nfun `adds up`() {\n    check(2)\n}\n\nclass Other\n"
KOTLIN_AFTER = (
    "package shop\n\nimport kotlin.test.Test\n\nclass CartTest {\n\t@Test\n\tfun `adds up`() = check(1)\n\n"
    "\t@Test\n\tfun `adds up 2`() {\n\t    check(2)\n\t}\n}\n\nclass Other\n"
)
VITEST = "import { expect, test } from 'vitest';\nimport { add } from './cart';\n\ntest('old', () => {});\n"
NEW_VITEST = """import { describe, expect, test } from 'vitest';
import { add, total as sum } from './cart';
import * as fs from 'fs';

describe('sum', () => {
  test('nothing', () => expect(sum([])).toBe(0));
});
"""
VITEST_AFTER = """import { expect, test } from 'vitest';
import { add } from './cart';
import { describe } from 'vitest';
import { total as sum } from './cart';
import * as fs from 'fs';

test('old', () => {});

describe('sum', () => {
  test('nothing', () => expect(sum([])).toBe(0));
});
"""
JEST = "'use strict'\nconst { add } = require('./cart')\n\ntest('old', () => {})\n"
NEW_JEST = "const { add, total } = require('./cart')\nconst path = require('path')\n\ntest('total', () => total([]))\n"
JEST_AFTER = (
    "'use strict'\nconst { add } = require('./cart')\nconst { total } = require('./cart')\nconst path = require('path')\n\n"
    "test('old', () => {})\n\ntest('total', () => total([]))\n"
)
GO = 'package shop\n\nimport "testing"\n\nfunc TestAdd(t *testing.T) {\n\tif Add(1, 2) != 3 {\n\t\tt.Fail()\n\t}\n}\n'
NEW_GO = (
    'package shop\n\nimport (\n\t"testing"\n\tr "reflect"\n)\n\nfunc (c *Cart) Sum() int { return 0 }\n\n'
    "func TestAdd(t *testing.T) {\n\tt.Log(r.TypeOf(Add))\n}\n"
)
GO_AFTER = (
    'package shop\n\nimport "testing"\nimport r "reflect"\n\nfunc TestAdd(t *testing.T) {\n\tif Add(1, 2) != 3 {\n\t\tt.Fail()\n\t}\n}\n\n'
    "func (c *Cart) Sum() int { return 0 }\n\nfunc TestAdd2(t *testing.T) {\n\tt.Log(r.TypeOf(Add))\n}\n"
)
RUST = "#![allow(unused)]\nuse shop::cart::add;\n\n#[test]\nfn adds() {}\n"
NEW_RUST = "use shop::cart::{add, total as sum, deep::*};\n\n// nothing\n#[test]\n#[ignore]\nfn adds() {\n    sum();\n}\n"
RUST_AFTER = (
    "#![allow(unused)]\nuse shop::cart::add;\nuse shop::cart::total as sum;\nuse shop::cart::deep::*;\n\n#[test]\nfn adds() {}\n\n"
    "// nothing\n#[test]\n#[ignore]\nfn adds_2() {\n    sum();\n}\n"
)


@pytest.mark.parametrize(
    ("language", "before", "code", "after"),
    [
        ("python", PYTHON, NEW_PYTHON, PYTHON_AFTER),
        (
            "python",
            UNITTEST,
            "from __future__ import annotations\nfrom shop import add\n\ndef test_add():\n    assert add(1, 2) == 3\n",
            UNITTEST_AFTER,
        ),
        ("java", JAVA, NEW_JAVA, JAVA_AFTER),
        ("java", JAVA, "@Test\nvoid none() {}\n", JAVA.removesuffix("}\n") + "\n    @Test\n    void none() {}\n}\n"),
        ("java", "class ATest {\n}\n", "@Test\nvoid none() {}\n", "class ATest {\n    @Test\n    void none() {}\n}\n"),
        ("kotlin", KOTLIN, NEW_KOTLIN, KOTLIN_AFTER),
        ("typescript", VITEST, NEW_VITEST, VITEST_AFTER),
        ("javascript", JEST, NEW_JEST, JEST_AFTER),
        ("go", GO, NEW_GO, GO_AFTER),
        ("rust", RUST, NEW_RUST, RUST_AFTER),
    ],
)
def test_imports_join_imports_and_tests_go_where_tests_are(language: str, before: str, code: str, after: str):
    assert added(language, before, code) == after


def test_the_documents_line_endings_and_a_missing_last_one_are_kept():
    assert added("python", "import a\r\nx = 1", "import b\n\ndef test_b():\n    b()\n", "\r\n") == (
        "import a\r\nimport b\r\nx = 1\r\n\r\n\r\ndef test_b():\r\n    b()\r\n"
    )


@pytest.mark.parametrize(
    ("language", "before", "code", "said"),
    [
        ("python", "def broken(:\n", "def test_a(): pass\n", "mend it first"),
        ("java", "class A {\n", "@Test void a() {}\n", "mend it first"),
        ("java", "class A { }\n", "@Test void a() {}\n", "on a line of its own"),
        ("java", JAVA, "class CartTest { @Test void a() {", "do not parse"),
        ("kotlin", KOTLIN, "@Test\nfun `adds up`() = check(1)", "there already"),
        ("python", PYTHON, "def test_old():\n    assert True\n", "there already"),
    ],
)
def test_what_does_not_fit_changes_nothing_and_says_why(language: str, before: str, code: str, said: str):
    with pytest.raises(Unusable, match=said):
        added(language, before, code)


LINES = ["import os", "import pytest; x = '''\n'''", "x = 1", "def test_add(): pass", "# é 🙂", "", '"""\ntext\n"""']


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=8))
def test_an_addition_keeps_every_line_that_is_there_in_order(lines: list[str]):
    existing = "\n".join(lines)
    result = added("python", existing, "from shop import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n").split("\n")
    place = 0
    for line in existing.split("\n"):
        place = result.index(line, place) + 1
