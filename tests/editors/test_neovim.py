"""The plugin with the real server and the starter: in Neovim 0.12, whose ghost text is its own, on a screen within tmux, and in 0.10, where
the plugin draws it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.editors import processes
from tests.editors.neovim import ENTER, ESCAPE, HOLE, INVENTORY, TAB, Neovim, start_typing

WORD, LINE = f"{ESCAPE}w", f"{ESCAPE}l"


@pytest.fixture(scope="module", params=["forky", "trixie"], ids=["0.12 in tmux", "0.10"])
def neovim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neovim]:
    with Neovim(tmp_path_factory.mktemp("neovim"), request.param, in_tmux=request.param == "forky").warm() as editor:
        yield editor


def test_what_is_typed_brings_ghost_text_on_the_screen_and_tab_takes_it(neovim: Neovim, pictures: Path):
    ghost = start_typing(neovim, "tab.py")
    assert ghost.startswith("eturn self.items[name]")
    assert bool(neovim.lua("return vim.env.TMUX")) is (neovim.lua("return vim.fn.has('nvim-0.12')") == 1)
    screen = neovim.terminal.shows("return self.items[name]")
    assert neovim.buffer[HOLE] == " " * 8 + "r", screen
    neovim.terminal.draw(pictures / "neovim.svg", "Neovim")
    neovim.terminal.press(TAB)
    neovim.until(lambda: neovim.buffer[HOLE] == " " * 8 + "r" + ghost.split("\n")[0])


def test_the_statusline_says_how_much_is_loaded(neovim: Neovim):
    states = neovim.states
    shares = [int(state.removeprefix("deepseek ").removesuffix("%%")) for state in states if state.endswith("%%")]
    assert max(shares) > 0 and shares == sorted(shares), states


def test_an_accepted_suggestion_is_counted_by_the_server(neovim: Neovim):
    def accepted() -> int:
        return int(neovim.status["requests"]["accepted"])

    before = accepted()
    start_typing(neovim, "counted.py")
    neovim.terminal.press(TAB)
    neovim.until(lambda: accepted() == before + 1)


def test_alt_w_takes_a_word_and_the_rest_stays_to_be_taken(neovim: Neovim):
    start_typing(neovim, "word.py")
    neovim.terminal.press(WORD)
    neovim.until(lambda: neovim.buffer[HOLE] == " " * 8 + "return")
    neovim.until(lambda: neovim.ghost.startswith(" self.items[name]"))
    neovim.terminal.press(WORD)
    neovim.until(lambda: neovim.buffer[HOLE] == " " * 8 + "return self")


def test_alt_l_takes_a_line(neovim: Neovim):
    ghost = start_typing(neovim, "line.py")
    neovim.terminal.press(LINE)
    neovim.until(lambda: neovim.buffer[HOLE] == " " * 8 + "r" + ghost.split("\n")[0])


def test_what_was_typed_of_a_suggestion_is_not_written_twice(neovim: Neovim):
    """Tab at once after more keys, before the server was asked again."""
    ghost = start_typing(neovim, "twice.py")
    neovim.terminal.press(ghost[:3] + TAB)
    neovim.until(lambda: neovim.buffer[HOLE] == " " * 8 + "r" + ghost.split("\n")[0])


def test_a_suggestion_with_nothing_to_follow_it_goes_from_the_screen(neovim: Neovim):
    neovim.open(".env", "")
    start_typing(neovim, "gone.py")
    neovim.terminal.press(f"{ESCAPE}:edit! {neovim.folder}/.env{ENTER}ir")
    neovim.until(lambda: neovim.buffer == ["r"])
    neovim.until(lambda: not neovim.ghost)


def test_tab_without_a_suggestion_is_a_tab(neovim: Neovim):
    neovim.open("plain.txt", "")
    neovim.terminal.press("ia" + TAB + "b")
    neovim.until(lambda: neovim.buffer == ["a\tb"])


def test_leaving_insert_mode_takes_the_ghost_text_away(neovim: Neovim):
    start_typing(neovim, "left.py")
    neovim.terminal.press(ESCAPE)
    neovim.until(lambda: not neovim.ghost)


def test_status_says_what_runs_and_why_nothing_was_shown(neovim: Neovim):
    neovim.open("id_rsa", "secret\n")
    neovim.lua("vim.bo.filetype = 'python'")
    neovim.until_attached()
    neovim.terminal.press("A!")
    neovim.until(lambda: "file of secrets" in neovim.status["last"]["reason"])
    neovim.terminal.press(f"{ESCAPE}:DeepseekStatus{ENTER}")
    screen = neovim.terminal.shows("file of secrets")
    assert "23.8 M parameters" in screen
    neovim.terminal.press("q")


def test_toggle_switches_ghost_text_off_and_on_again(neovim: Neovim):
    neovim.open("toggle.py", INVENTORY)
    neovim.terminal.press(f"{ESCAPE}:DeepseekToggle{ENTER}")
    neovim.terminal.shows("deepseek off")
    neovim.terminal.press(f"{HOLE + 1}GAr{TAB}")
    neovim.until(lambda: neovim.buffer[HOLE].startswith(" " * 8 + "r") and len(neovim.buffer[HOLE]) > 9)
    assert not neovim.ghost and "return" not in neovim.buffer[HOLE]
    neovim.terminal.press(f"{ESCAPE}:DeepseekToggle{ENTER}")
    neovim.terminal.shows("deepseek ready")
    start_typing(neovim, "toggle2.py")


def test_checkhealth_finds_everything_in_order(neovim: Neovim):
    neovim.open("health.py", INVENTORY)
    neovim.terminal.press(f"{ESCAPE}:checkhealth deepseek_lsp{ENTER}")
    screen = neovim.terminal.shows("The server is ready")
    assert "ERROR" not in screen and "WARNING" not in screen
    neovim.terminal.press(f":bwipeout!{ENTER}")


def test_the_suggestion_is_in_the_completion_menu_too(neovim: Neovim):
    neovim.open("menu.py", INVENTORY)
    neovim.terminal.press(f"{HOLE + 1}GAr\x18\x0f")
    neovim.until(lambda: neovim.lua("return vim.fn.pumvisible()") == 1 or "return" in neovim.buffer[HOLE])
    neovim.terminal.shows("return self.items[name]")
    neovim.terminal.press(ESCAPE)


def test_a_killed_server_is_started_again_and_knows_what_was_not_saved(neovim: Neovim):
    start_typing(neovim, "again.py", "re")
    neovim.terminal.press(ESCAPE)
    (server,) = servers(neovim)
    os.kill(server.pid, signal.SIGKILL)
    neovim.terminal.shows("deepseek error")
    neovim.terminal.shows("deepseek ready")
    assert server.pid not in [new.pid for new in servers(neovim)]
    neovim.terminal.press("At")
    neovim.until(lambda: neovim.ghost.startswith("urn self.items[name]"))


def servers(neovim: Neovim) -> list[psutil.Process]:
    return processes.servers(psutil.Process(neovim.lua("return vim.uv.os_getpid()")))


def test_restart_gives_a_new_server(neovim: Neovim):
    neovim.open("restart.py", INVENTORY)
    (old,) = servers(neovim)
    neovim.terminal.press(f"{ESCAPE}:DeepseekRestart{ENTER}")
    neovim.until(lambda: [new for new in servers(neovim) if new.pid != old.pid])
    neovim.until_ready()
    start_typing(neovim, "restarted.py")
