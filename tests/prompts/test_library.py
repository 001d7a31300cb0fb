"""Actions as files: what loads, and what is refused with which words."""

from pathlib import Path

import pytest

from prompts import library

GOOD = """+++
title = "Count $name"
kind = "explain"
applies_to = "symbol"
answer = "show"
+++
Count the lines of $code
"""
SHIPPED = "explain explain_symbol explain_error tests docstring fix refactor optimise simplify convert todo review"


def test_every_shipped_action_loads_and_its_words_need_only_the_variables_there_are():
    actions, problems = library.load()
    assert {action.name for action in actions} == set(SHIPPED.split()) and problems == []
    for action in actions:
        words = action.words({variable: f"<{variable}>" for variable in library.VARIABLES})
        assert "<code>" in words and "$" not in words


def test_code_with_dollars_and_braces_is_put_in_as_it_is():
    code = "echo $HOME ${x} $$ {y}"
    assert library.parsed("count", GOOD, "count.md").words({"code": code}) == f"Count the lines of {code}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('answer = "show"', 'answer = "show"\nmax_tokns = 3', "max_tokns: Extra inputs"),
        ('answer = "show"', 'answer = "speak"', "answer: Input should be"),
        ('answer = "show"\n', "", "answer: Field required"),
        ("$code", "$cod", "$cod is no variable"),
        ("$code", "$", "write $$ for a plain one"),
        ("$code", "it", "never says $code"),
        ("Count the lines of $code", "", "no prompt below the head"),
        ("of $code", "of $code as $instruction", "asks and $instruction go together"),
        ("of $code", "of $code with $framework", 'only where answer = "new_file"'),
        ('"symbol"', '"diagnostic"', "has to say $diagnostics"),
        ('answer = "show"', 'answer = "show"\nonly_where = "("', "no regular expression"),
        ('answer = "show"', 'answer = "show"\noffers = ["Python"]', "offers are answers to asks"),
        ("+++\ntitle", "title", "has to begin with a line +++"),
        ("title = ", "title ", "no TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name_with_what_is_wrong(old: str, new: str, said: str):
    with pytest.raises(library.PromptError) as error:
        library.parsed("count", GOOD.replace(old, new, 1), "count.md")
    assert str(error.value).startswith("count.md: ") and said in str(error.value)


def test_a_users_own_file_adds_an_action_or_replaces_one_and_a_wrong_one_is_left_out_with_a_sentence(tmp_path: Path):
    (tmp_path / "count.md").write_text(GOOD)
    (tmp_path / "review.md").write_text(GOOD)
    (tmp_path / "Odd name.md").write_text(GOOD)
    (tmp_path / "empty.md").write_text("")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.txt").write_text("not an action")
    actions, problems = library.load(tmp_path)
    found = {action.name: action for action in actions}
    assert set(found) == {*SHIPPED.split(), "count"} and found["review"].title("f") == "Count f"
    assert len(problems) == 3 and all("is left out" in problem for problem in problems)
    assert library.load(tmp_path / "nowhere")[1] == []
