"""How suggestions get into buffers that are not as usual, in Neovim 0.12 and 0.10, with a server whose model says what stands here."""

from collections.abc import Iterator

import pytest

from tests.editors.neovim import ENTER, ESCAPE, TAB, Neovim, server_saying

SAID = ["total = 1\n", "size = 2\n", "name = 3"]
LINE = f"{ESCAPE}l"


@pytest.fixture(scope="module", params=["forky", "trixie"], ids=["0.12", "0.10"])
def neovim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neovim]:
    options = {"cmd": server_saying(pieces=SAID)}
    with Neovim(tmp_path_factory.mktemp("neovim"), request.param, options).warm() as editor:
        yield editor


@pytest.mark.parametrize(("keys", "taken"), [([TAB], 3), ([LINE, LINE], 2)], ids=["all", "lines"])
def test_in_a_file_with_the_lines_of_dos_a_suggestion_has_its_line_endings_and_no_more(neovim: Neovim, keys: list[str], taken: int):
    name = f"dos{taken}.py"
    neovim.open(name, "import os\r\n\r\n")
    neovim.until_attached()
    neovim.terminal.press("Go")
    assert neovim.until_ghost() == "".join(SAID)
    assert "^M" not in neovim.terminal.shows("name = 3")
    for key in keys:
        ghost = neovim.until_ghost()
        neovim.terminal.press(key)
        neovim.until(lambda ghost=ghost: neovim.ghost != ghost)
    neovim.until(lambda: len(neovim.buffer) == taken + 2)
    neovim.terminal.press(f"{ESCAPE}:write{ENTER}")
    neovim.until(lambda: not neovim.lua("return vim.bo.modified"))
    lines = "".join(SAID).split("\n")[:taken]
    assert (neovim.folder / name).read_bytes().decode() == "".join(f"{line}\r\n" for line in ["import os", "", *lines])


def test_a_file_of_a_second_project_has_ghost_text_and_what_is_taken_is_counted_by_its_own_server(neovim: Neovim):
    (neovim.folder / "other/.git").mkdir(parents=True)
    neovim.open("other/second.py", "import os\n\n")
    neovim.until_attached()
    clients = neovim.lua("return vim.tbl_map(function(one) return one.id end, vim.lsp.get_clients({ name = 'deepseek_lsp' }))")
    assert len(clients) == 2
    neovim.terminal.press("Go")
    assert neovim.until_ghost() == "".join(SAID)
    neovim.terminal.press(TAB)
    neovim.until(lambda: neovim.buffer[2:] == "".join(SAID).split("\n"))
    neovim.until(lambda: neovim.status["requests"]["accepted"] == 1)
