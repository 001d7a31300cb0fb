"""The benchmark of actions, with an engine whose answers are known to be good or bad."""

import ast
from pathlib import Path

import pytest

from benchmarks import actions as benchmark
from lsp_server.settings import ActionSettings
from tests.scripted import ScriptedEngine

GOOD_TESTS = """```python
import pytest
from my_calendar import isleap


@pytest.mark.parametrize(("year", "leap"), [(2000, True), (1900, False), (2024, True), (2023, False)])
def test_isleap(year, leap):
    assert isleap(year) is leap
```"""
WEAK_TESTS = "```python\nfrom my_calendar import isleap\n\n\ndef test_isleap():\n    isleap(2000)\n```"


@pytest.fixture
def subject(tmp_path: Path) -> benchmark.Subject:
    return next(benchmark.subjects(tmp_path, 1))


async def test_good_tests_notice_mutants_that_weak_ones_do_not(subject: benchmark.Subject):
    good = await benchmark.tested(ScriptedEngine([GOOD_TESTS]), ActionSettings(), subject)
    if "tests_pass" not in good:
        pytest.skip("no sandbox here")
    weak = await benchmark.tested(ScriptedEngine([WEAK_TESTS]), ActionSettings(), subject)
    assert good["tests_pass"] == weak["tests_pass"] == 1
    assert weak["mutation_score"] < 0.2
    assert good["mutation_score"] > 0.8
    assert await benchmark.tested(ScriptedEngine(["no"]), ActionSettings(), subject) == {"tests_written": 0, "tests_pass": 0}


async def test_edits_are_counted_when_they_are_accepted(subject: benchmark.Subject):
    answer = (
        '```python\n    """Whether a year is a leap year.\n\n    Args:\n        year: The year.\n\n    Returns:\n        bool\n    """\n```'
    )
    text = await benchmark.edited(ScriptedEngine([answer]), ActionSettings(), subject, "docstring")
    assert benchmark.agrees(benchmark.function(text, "isleap"))
    assert await benchmark.edited(ScriptedEngine(["words"]), ActionSettings(), subject, "simplify") is None


def test_a_docstring_that_names_what_is_not_there_does_not_agree():
    def agrees(words: str) -> bool:
        return benchmark.agrees(ast.parse(f'def f(a, *rest):\n    """{words}"""\n    print(a)\n').body[0])

    assert agrees("Prints.") and agrees("Prints.\n\n    Args:\n        a: It.\n        *rest (int): Others.")
    assert not agrees("Prints.\n\n    Args:\n        b: It.") and not agrees("Prints.\n\n    :param b: It.")
    assert not agrees("Prints.\n\n    Returns:\n        None")


def test_every_mutant_is_another_program_and_the_function_stays_what_it_was(subject: benchmark.Subject):
    found = list(benchmark.mutants(subject))
    assert len(found) == len(set(found)) == benchmark.MUTANTS and subject.text not in found
    for text in found:
        compile(text, "mutant", "exec")
