"""What the model sees of a file, and that it sees the same while one types."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server.context import CHARS_PER_TOKEN, fim_prompt, refusal
from lsp_server.session import Document, Encoding, Snapshot
from model_host.generation import Fim


def at(text: str, line: int, column: int, uri: str = "file:///p/a.py") -> Snapshot:
    return Document(types.TextDocumentItem(uri, "python", 0, text), Encoding.Utf32).snapshot(types.Position(line, column))


def test_a_small_file_is_shown_whole_with_its_path_and_cut_at_the_start_of_the_line():
    assert fim_prompt(at("a = 1\nb = a + c\nd\n", 1, 8), "p/a.py", 1000) == Fim(
        prefix="# p/a.py\na = 1\n", middle="b = a + ", suffix="c\nd\n"
    )


def test_line_endings_of_windows_do_not_reach_the_model():
    prompt = fim_prompt(at("a\r\nb\rc\r\n", 1, 1), "a.py", 1000)
    assert "\r" not in prompt.prefix + prompt.middle + prompt.suffix


LONG = "".join(f"def f{n}(a):\n    x = a + {n}\n    return x\n\n" for n in range(400))


@given(line=st.integers(0, 1599))
def test_a_long_file_is_shown_within_the_budget_and_around_the_cursor(line: int):
    prompt = fim_prompt(at(LONG, line, 0), "a.py", 500)
    assert len(prompt.prefix) + len(prompt.suffix) <= 1.3 * 500 * CHARS_PER_TOKEN
    assert (prompt.prefix.removeprefix("# a.py\n") + prompt.suffix) in LONG


def test_the_window_moves_in_steps_so_that_the_next_line_reuses_the_last_ones_prefix():
    prefixes = [fim_prompt(at(LONG, line, 0), "a.py", 500).prefix for line in range(800, 900)]
    kept = sum(later.startswith(earlier) for earlier, later in itertools.pairwise(prefixes))
    assert kept >= 90


def test_typing_in_a_line_changes_neither_prefix_nor_suffix():
    prompts = []
    for typed in ("", "x", "x = ", "x = some_thing"):
        text = LONG.replace("def f200(a):\n", f"def f200(a):\n{typed}\n")
        prompts.append(fim_prompt(at(text, 801, len(typed)), "a.py", 500))
    assert len({prompt.prefix for prompt in prompts}) == 1
    assert len({prompt.suffix for prompt in prompts}) == 1


def test_files_of_secrets_are_not_completed():
    for name in (".env", ".env.local", "server.pem", "id_rsa", "id_ed25519"):
        assert "secrets" in (refusal(at("a", 0, 0, f"file:///p/{name}"), 1, 1000) or "")
    assert refusal(at("a", 0, 0), 1, 1000) is None
