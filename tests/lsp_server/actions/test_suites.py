"""Where tests of a file go, told by a project's own files."""

import json
from pathlib import Path

import pytest

from lsp_server.actions import suites


def project(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


PYTEST = {"pyproject.toml": "[tool.pytest.ini_options]\n"}
VITEST = {"package.json": json.dumps({"devDependencies": {"vitest": "1"}})}
JEST = {"package.json": json.dumps({"devDependencies": {"jest": "29"}})}
JAVA, JAVA_TEST = "src/main/java/a/Cart.java", "src/test/java/a/CartTest.java"
SOURCE = "def f(): ...\n"


@pytest.mark.parametrize(
    ("files", "source", "language", "framework", "file", "module"),
    [
        (PYTEST, "shop/cart.py", "python", "pytest", "tests/test_cart.py", "shop.cart"),
        ({}, "cart.py", "python", "pytest", "tests/test_cart.py", "cart"),
        ({"test/test_a.py": "import unittest\n"}, "cart.py", "python", "unittest", "test/test_cart.py", "cart"),
        ({"tests/test_a.py": "def test_a(): ...\n"}, "src/shop/cart.py", "python", "pytest", "tests/test_cart.py", "shop.cart"),
        ({"tests/cart/test_a.py": "import pytest\n"}, "shop/cart/pay.py", "python", "pytest", "tests/cart/test_pay.py", "shop.cart.pay"),
        ({"tests/shop/__init__.py": ""}, "shop/pay.py", "python", "pytest", "tests/shop/test_pay.py", "shop.pay"),
        ({"shop/a_test.py": "import pytest\n"}, "shop/pay.py", "python", "pytest", "shop/pay_test.py", "shop.pay"),
        ({"tests/deep/test_pay.py": "import pytest\n"}, "shop/pay.py", "python", "pytest", "tests/deep/test_pay.py", "shop.pay"),
        (PYTEST | {".venv/lib/tests/test_pay.py": ""}, "shop/__init__.py", "python", "pytest", "tests/test___init__.py", "shop"),
        (VITEST, "src/cart.ts", "typescript", "vitest", "src/cart.test.ts", "./cart"),
        (JEST | {"src/a.spec.js": ""}, "src/cart.js", "javascript", "jest", "src/cart.spec.js", "./cart"),
        (JEST | {"src/__tests__/a.test.js": ""}, "src/cart.js", "javascript", "jest", "src/__tests__/cart.test.js", "../cart"),
        (JEST | {"test/a.test.js": ""}, "src/cart.js", "javascript", "jest", "test/cart.test.js", "../src/cart"),
        ({"package.json": "{broken"}, "cart.js", "javascript", "node:test", "cart.test.js", "./cart"),
        ({"go.mod": "module x\n"}, "shop/cart.go", "go", "go test", "shop/cart_test.go", "shop"),
        ({"pom.xml": "<artifactId>junit</artifactId>"}, JAVA, "java", "JUnit 4", JAVA_TEST, "a.Cart"),
        ({"build.gradle": "junit-jupiter"}, JAVA, "java", "JUnit 5", JAVA_TEST, "a.Cart"),
        ({"Cargo.toml": '[package]\nname = "my-shop"\n'}, "src/cart.rs", "rust", "cargo test", "tests/cart.rs", "my_shop::cart"),
    ],
)  # fmt: skip
def test_framework_place_name_and_import(tmp_path, files, source, language, framework, file, module):
    text = "package a;\n" if language == "java" else "package shop\n" if language == "go" else SOURCE
    root = project(tmp_path, {**files, source: text})
    found = suites.suite_of(root, root / source, language)
    assert (found.framework, found.file.relative_to(root).as_posix(), found.module) == (framework, file, module)


def test_tests_that_are_there_are_the_example_and_secrets_and_links_are_not(tmp_path: Path):
    files = {"shop/cart.py": SOURCE, "tests/test_pay.py": "def test_pay(): ...\n", "tests/test_other.py": "def test_other(): ...\n"}
    root = project(tmp_path, files)
    assert suites.suite_of(root, root / "shop" / "cart.py", "python").example.startswith("def test_")
    (root / "tests" / "test_cart.py").symlink_to(root / "tests" / "test_pay.py")
    assert suites.suite_of(root, root / "shop" / "cart.py", "python").example == ""


def test_languages_without_known_tests_have_no_suite(tmp_path: Path):
    assert suites.suite_of(tmp_path, tmp_path / "a.hs", "haskell") is None
