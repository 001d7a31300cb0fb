"""Whether code parses, in every language that has a parser."""

import sys
from pathlib import Path

import pytest

from lsp_server.actions import syntax

WHOLE = {
    "c": "int f(int a) { return a; }\n",
    "cpp": "template <class T> T f(T a) { return a; }\n",
    "csharp": "class A { int F() => 1; }\n",
    "css": "a { color: red; }\n",
    "go": "package p\n\nfunc f() int { return 1 }\n",
    "java": "class A { int f() { return 1; } }\n",
    "javascript": "const f = async (a) => { await a; };\n",
    "javascriptreact": "const f = () => { return <a b={1}>x</a>; };\n",
    "json": '{"a": [1]}\n',
    "jsonc": '// c\n{"a": [1]}\n',
    "kotlin": "fun f(): Int { return 1 }\n",
    "php": "<?php\nfunction f() { return 1; }\n",
    "python": "def f(a): return (a)\n",
    "ruby": "def f(a)\n  (a)\nend\n",
    "rust": "fn f() -> u8 { 1 }\n",
    "shellscript": "f() { echo 1; }\n",
    "toml": "a = [1]\n",
    "typescript": "function f<T>(a: T): T { return a; }\n",
    "typescriptreact": "const f = (a: number) => { return <a>{a}</a>; };\n",
}


@pytest.mark.parametrize("language", sorted(syntax.GRAMMARS))
def test_whole_code_parses_and_code_that_lacks_its_last_bracket_does_not(language: str):
    whole = WHOLE[language]
    broken = "".join(letter for index, letter in enumerate(whole) if index != max(whole.rfind(mark) for mark in "})]"))
    broken = broken if language != "ruby" else whole.removesuffix("end\n")
    found = syntax.faults(language, [whole, "\n\n" + broken, whole])
    assert found[0] is None and found[2] is None
    assert found[1] is not None and 1 <= found[1] <= broken.count("\n") + 3


def test_the_line_of_the_first_fault_is_told():
    assert syntax.faults("java", ["class A {\n  int f() { return 1; }\n  int g( { }\n  int h( { }\n}\n"]) == [3]
    assert syntax.faults("python", ["x = 1\n\ny = (\n"]) == [3]


def test_text_over_which_a_grammar_fails_does_not_parse_and_what_came_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "grammars.py"
    program = syntax.PROGRAM.read_text("utf-8")
    at = "        root = parser.parse("
    assert at in program
    broken.write_text(program.replace(at, "        if 'crash' in text:\n            import os; os.abort()\n" + at), "utf-8")
    monkeypatch.setattr(syntax, "PROGRAM", broken)
    assert syntax.faults("go", ["package a\n", "package crash\n", "package a\n"]) == [None, 1, 1]
    assert syntax.trees("go", "package crash\n") == [None]


def test_text_that_takes_too_long_does_not_parse_and_what_came_before_it_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(syntax, "LIMIT_S", 3.0)
    assert syntax.faults("csharp", [WHOLE["csharp"], "a<" * 60_000, WHOLE["csharp"]]) == [None, 1, 1]


def test_nothing_of_a_workspace_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tree_sitter.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert syntax.parses("go", WHOLE["go"])


def test_no_grammar_is_loaded_into_the_server():
    assert syntax.parses("go", WHOLE["go"]) and "tree_sitter" not in sys.modules
