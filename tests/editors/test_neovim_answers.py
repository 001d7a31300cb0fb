"""What the plugin shows of the model's answers, in Neovim 0.12 and 0.10: explain, changes by command, chat. With the real server and the
starter, and where the words must be known with a server whose model says what stands here."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.editors.neovim import ENTER, ESCAPE, INVENTORY, Neovim, server_saying

ADD = 20
"""The line of the inventory, counted from 1, in which `add` begins."""
SEND = "\x13"
LONG = [f"line {number}\n" for number in range(60)]
TESTS = """```python
from inventory import Inventory, Item


def test_add():
    stock = Inventory()
    stock.add(Item("pear", 0.7))
    assert "pear" in stock.items
```"""
FIXED = "```python\ndef add(self, item: Item) -> None:\n    self.items[item.name.lower()] = item\n```"
ANSWERS = {
    "Explain what this function does": ["It ", "keeps ", "an **item**", None],
    "Explain what this code does": ["So:\n\n", "```python\nx = 1\ny = 2\n```\n", "That is all."],
    "Review the code": LONG,
    "Write a test": [TESTS],
    "Fix the code below": [FIXED],
    "Change the code below: lower the name": [FIXED],
    "Who are you": ["A ", "model."],
    "Think": ["I ", "think", None],
}
SCRIPTED = server_saying(answers=ANSWERS, step_s=0.01)
SUITES = pytest.mark.parametrize("suite", ["forky", "trixie"], ids=["0.12", "0.10"])


@pytest.fixture(scope="module", params=["forky", "trixie"], ids=["0.12", "0.10"])
def starter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neovim]:
    with Neovim(tmp_path_factory.mktemp("neovim"), request.param).warm() as editor:
        yield editor


@pytest.fixture(scope="module", params=["forky", "trixie"], ids=["0.12", "0.10"])
def scripted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neovim]:
    with Neovim(tmp_path_factory.mktemp("neovim"), request.param, {"cmd": SCRIPTED}).warm() as editor:
        yield editor


def at_add(neovim: Neovim, command: str, name: str = "inventory.py") -> None:
    """Opens the inventory, alone on the screen, and runs the command with the cursor in `add`."""
    neovim.lua("vim.cmd('silent! only!')")
    neovim.open(name, INVENTORY)
    neovim.until_attached()
    neovim.terminal.press(f"{ESCAPE}:{ADD}{ENTER}:{command}{ENTER}")


def lines(neovim: Neovim, name: str) -> list[str]:
    """What stands in an open file."""
    found: list[str] = neovim.lua("return vim.fn.getbufline(...)", name, 1, "$")
    return found


def floating(neovim: Neovim) -> str:
    """What stands in the floating window; empty when there is none."""
    text: str = neovim.lua("""
        for _, window in ipairs(vim.api.nvim_list_wins()) do
            if vim.api.nvim_win_get_config(window).relative ~= "" then
                return table.concat(vim.api.nvim_buf_get_lines(vim.api.nvim_win_get_buf(window), 0, -1, false), "\\n")
            end
        end
        return ""
    """)
    return text


def until_floating(neovim: Neovim, words: str) -> str:
    return str(neovim.until(lambda: (text := floating(neovim)) and words in text and text))


def until_closed(neovim: Neovim) -> None:
    neovim.until(lambda: not floating(neovim))


def chat(neovim: Neovim) -> str:
    """What stands in the chat; empty before there is one."""
    text: str = neovim.lua("return table.concat(vim.fn.getbufline('deepseek://chat', 1, '$'), '\\n')")
    return text


def until_chat(neovim: Neovim, words: str, count: int = 1) -> str:
    return str(neovim.until(lambda: (text := chat(neovim)).count(words) >= count and text))


def test_explain_streams_into_a_window_on_the_screen(starter: Neovim, pictures: Path):
    before = len(starter.states)
    at_add(starter, "DeepseekExplain")
    screen = starter.terminal.shows("c asks on in the chat")
    assert "Explain add" in screen and "q closes" in screen
    assert len(floating(starter)) > 20
    starter.terminal.shows("deepseek ready")
    assert "deepseek busy" in starter.states[before:]
    starter.terminal.draw(pictures / "neovim-explain.svg", "Neovim")
    starter.terminal.press("q")
    until_closed(starter)


def test_the_chat_asks_and_answers_and_the_server_remembers_the_turn_before(starter: Neovim, pictures: Path):
    starter.lua("vim.g.mapleader = ' '")
    at_add(starter, f"{ADD},{ADD + 1}DeepseekChat!")
    starter.terminal.shows("About inventory.py, lines 20 to 21")
    starter.terminal.press("What does this do?" + SEND)
    until_chat(starter, "> About inventory.py, lines 20 to 21\n\n### DeepSeek\n\n")
    starter.until_ready()
    first = starter.status["action"]["cost"]
    starter.terminal.draw(pictures / "neovim-chat.svg", "Neovim")
    starter.terminal.press(f"And why?{ESCAPE}{ENTER}")
    until_chat(starter, "And why?\n\n### DeepSeek\n\n")
    starter.terminal.press(":DeepseekStop" + ENTER)
    starter.until_ready()
    starter.terminal.press("aWho?" + SEND)
    until_chat(starter, "Who?\n\n### DeepSeek\n\n")
    starter.until_ready()
    assert starter.status["action"]["cost"]["cached_tokens"] >= first["cached_tokens"] + first["computed_tokens"] - 1


def test_document_puts_a_docstring_below_the_header_and_u_takes_it_back(starter: Neovim):
    at_add(starter, "DeepseekDocument", "document.py")
    starter.until(lambda: '"""' in lines(starter, "document.py")[ADD])
    until_closed(starter)
    starter.terminal.press("u")
    starter.until(lambda: lines(starter, "document.py") == INVENTORY.splitlines())


def test_q_stops_the_answer_and_closes_the_window(scripted: Neovim):
    at_add(scripted, "DeepseekExplain")
    until_floating(scripted, "It keeps an **item**")
    scripted.terminal.shows("deepseek busy")
    scripted.terminal.press("q")
    until_closed(scripted)
    scripted.until_ready()


def test_stop_leaves_what_was_written(scripted: Neovim):
    at_add(scripted, "DeepseekExplain")
    until_floating(scripted, "It keeps an **item**")
    scripted.terminal.press(f":DeepseekStop{ENTER}")
    assert until_floating(scripted, "> Stopped.").startswith("It keeps an **item**")
    scripted.until_ready()
    scripted.terminal.press(ESCAPE)
    until_closed(scripted)


def test_the_window_follows_the_text_until_the_reader_goes_elsewhere(scripted: Neovim):
    at_add(scripted, f"1,{ADD}DeepseekAction review")
    scripted.terminal.shows("line 59")
    scripted.terminal.press("q")
    until_closed(scripted)
    at_add(scripted, f"1,{ADD}DeepseekAction review")
    until_floating(scripted, "line 1\n")
    scripted.terminal.press("gg")
    scripted.until(lambda: scripted.lua("return vim.fn.line('.')") == 1)
    until_floating(scripted, "line 59")
    scripted.terminal.shows("line 0")
    assert scripted.lua("return vim.fn.line('.')") == 1
    scripted.terminal.press("q")


def test_a_code_block_is_yanked_and_inserted(scripted: Neovim):
    at_add(scripted, f"{ADD},{ADD + 1}DeepseekExplain", "blocks.py")
    until_floating(scripted, "That is all.")
    scripted.terminal.press("gy")
    scripted.until(lambda: scripted.lua("return vim.fn.getreg('\"')") == "x = 1\ny = 2\n")
    scripted.terminal.press("gp")
    scripted.terminal.shows("2 lines inserted below line")
    scripted.terminal.press("q")
    until_closed(scripted)
    assert lines(scripted, "blocks.py")[ADD : ADD + 2] == ["x = 1", "y = 2"]


def test_generated_tests_are_shown_before_the_file_is_made(scripted: Neovim):
    file = scripted.folder / "tests/test_inventory.py"
    at_add(scripted, "DeepseekTests")
    shown = until_floating(scripted, "+++ tests/test_inventory.py (new)")
    assert "+    stock = Inventory()" in shown and not file.exists()
    scripted.terminal.press("q")
    until_closed(scripted)
    assert not file.exists()
    at_add(scripted, "DeepseekTests")
    until_floating(scripted, "+++ tests/test_inventory.py (new)")
    scripted.terminal.press(ENTER)
    scripted.until(file.exists)
    scripted.until(lambda: file.read_text("utf-8") == TESTS.removeprefix("```python\n").removesuffix("```"))
    scripted.terminal.shows("def test_add():")
    file.unlink()
    scripted.lua("vim.cmd('bwipeout!')")


def report(neovim: Neovim) -> None:
    neovim.lua(
        """local place = { lnum = ..., col = 8, message = "the name may be in capitals", source = "lint" }
        vim.diagnostic.set(vim.api.nvim_create_namespace("lint"), 0, { place })""",
        ADD,
    )


def test_fix_mends_what_is_reported(scripted: Neovim):
    at_add(scripted, f"{ADD + 1}", "fix.py")
    report(scripted)
    scripted.terminal.press(f":DeepseekFix{ENTER}")
    scripted.until(lambda: lines(scripted, "fix.py")[ADD] == "        self.items[item.name.lower()] = item")
    assert lines(scripted, "fix.py")[ADD - 1] == "    def add(self, item: Item) -> None:"
    scripted.terminal.press(f"1G:DeepseekFix{ENTER}")
    scripted.terminal.shows("nothing is reported here")


def test_the_menu_of_code_actions_runs_the_same_actions(scripted: Neovim):
    at_add(scripted, f"{ADD + 1}", "menu.py")
    report(scripted)
    scripted.terminal.press(f":DeepseekAction{ENTER}")
    screen = scripted.terminal.shows("Fix this with the model")
    (number,) = [line.split(":")[0].strip() for line in screen.splitlines() if "Fix this with the model" in line]
    scripted.terminal.press(f"{number}{ENTER}")
    scripted.until(lambda: lines(scripted, "menu.py")[ADD] == "        self.items[item.name.lower()] = item")


def test_tab_completes_the_actions_that_fit_here(scripted: Neovim):
    at_add(scripted, "echo", "names.py")

    def completed(typed: str) -> list[str]:
        """Nothing where the server takes longer than Neovim waits, on a busy machine."""
        names: list[str] = scripted.until(lambda: scripted.lua("return vim.fn.getcompletion(..., 'cmdline')", typed))
        return names

    names = completed("DeepseekAction ")
    assert {"docstring", "explain_symbol", "tests"} <= set(names) and "refactor" not in names
    assert completed("20,21DeepseekAction re") == ["refactor", "review"]


def test_an_action_that_needs_words_asks_for_them_and_shows_its_change_first(scripted: Neovim):
    at_add(scripted, f"{ADD},{ADD + 1}DeepseekAction refactor", "refactor.py")
    scripted.terminal.shows("What should change?")
    scripted.terminal.press(f"lower the name{ENTER}")
    shown = until_floating(scripted, "+++ refactor.py")
    assert "-        self.items[item.name] = item\n+        self.items[item.name.lower()] = item" in shown
    scripted.terminal.press(ENTER)
    scripted.until(lambda: lines(scripted, "refactor.py")[ADD] == "        self.items[item.name.lower()] = item")


def test_a_change_for_text_that_is_gone_is_not_made(scripted: Neovim):
    at_add(scripted, f"{ADD},{ADD + 1}DeepseekAction refactor lower the name", "late.py")
    until_floating(scripted, "+++ late.py")
    scripted.lua("vim.api.nvim_buf_set_lines(vim.fn.bufnr('late.py'), 0, 1, false, { '# typed meanwhile' })")
    scripted.terminal.press(ENTER)
    scripted.terminal.shows("late.py changed meanwhile, so nothing is changed")
    assert lines(scripted, "late.py")[ADD] == "        self.items[item.name] = item"


def test_what_cannot_be_done_is_said_in_a_sentence(scripted: Neovim):
    at_add(scripted, "1DeepseekTests")
    scripted.terminal.shows("There is no function or class here")
    until_closed(scripted)
    scripted.open("plain.txt", "words\n")
    for command in ("Explain", "Action review", "Fill"):
        scripted.lua("vim.cmd('messages clear')")
        scripted.terminal.press(f":Deepseek{command}{ENTER}")
        scripted.until(lambda: "No server is attached to this buffer" in scripted.lua("return vim.fn.execute('messages')"))


def test_a_question_can_follow_an_explanation(scripted: Neovim):
    at_add(scripted, f"{ADD},{ADD + 1}DeepseekExplain")
    until_floating(scripted, "That is all.")
    scripted.terminal.shows("c asks on in the chat")
    scripted.terminal.press("c")
    until_chat(scripted, "> Explain the selection\n\nSo:\n\n```python")
    scripted.terminal.press("Who are you?" + SEND)
    text = until_chat(scripted, "### You\n\nWho are you?\n\n### DeepSeek\n\nA model.\n")
    assert text.startswith("### DeepSeek\n\n> Explain the selection")


def test_a_stopped_answer_leaves_the_chat_ready_and_what_is_typed_meanwhile_stays(scripted: Neovim):
    at_add(scripted, "DeepseekChat! Think")
    until_chat(scripted, "I think")
    scripted.terminal.press("Who are you?" + SEND)
    scripted.terminal.shows("an answer is being written")
    scripted.terminal.press(ESCAPE)
    scripted.until(lambda: scripted.lua("return vim.fn.mode()") == "n")
    scripted.terminal.press(ESCAPE)
    until_chat(scripted, "I think\n\n> Stopped")
    scripted.terminal.press(SEND)
    until_chat(scripted, "A model.")
    scripted.until_ready()
    scripted.terminal.press(f"{ESCAPE}:DeepseekChat!{ENTER}")
    scripted.until(lambda: chat(scripted) == "")


def test_an_action_by_its_name_in_the_chat_shows_its_change(scripted: Neovim):
    at_add(scripted, f"{ADD},{ADD + 1}DeepseekChat! /refactor lower the name", "slash.py")
    until_floating(scripted, "+++ slash.py")
    scripted.terminal.press(ENTER)
    scripted.until(lambda: "item.name.lower()" in lines(scripted, "slash.py")[ADD])
    assert "a change, shown beside" in chat(scripted)


@SUITES
def test_a_server_that_dies_while_it_answers_is_said_and_the_chat_goes_on_with_the_new_one(tmp_path: Path, suite: str):
    with Neovim(tmp_path, suite, {"cmd": SCRIPTED}).warm() as neovim:
        at_add(neovim, "DeepseekChat Who are you?")
        until_chat(neovim, "A model.")
        neovim.terminal.press(f"Think{SEND}")
        until_chat(neovim, "I think")
        (server,) = [
            child for child in psutil.Process(neovim.lua("return vim.uv.os_getpid()")).children() if "tests.scripted" in child.cmdline()
        ]
        server.kill()
        until_chat(neovim, "The server ended before it had answered")
        neovim.until_ready()
        neovim.terminal.press(f"{ESCAPE}:%bdelete!{ENTER}")
        at_add(neovim, "DeepseekChat Who are you?")
        until_chat(neovim, "does not know what was said above.\n\n### You\n\nWho are you?\n\n### DeepSeek\n\nA model.")


@SUITES
def test_fill_writes_where_the_cursors_line_ends(tmp_path: Path, suite: str):
    with Neovim(tmp_path, suite, {"cmd": server_saying(pieces=["return self.items[name]"])}).warm() as neovim:
        neovim.open("hole.py", INVENTORY)
        neovim.until_attached()
        neovim.terminal.press(f"{ESCAPE}:24{ENTER}:DeepseekFill{ENTER}")
        neovim.until(lambda: neovim.buffer[23] == "        return self.items[name]")
