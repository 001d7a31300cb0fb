"""How the plugin gets into Neovim 0.12 and 0.10, by hand and by plugin managers, and what it says when its server cannot run."""

import json
import os
import re
import shutil
import subprocess
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.editors import install
from tests.editors.neovim import ENTER, ESCAPE, HOLE, INVENTORY, PLUGIN, TAB, Neovim, server_saying, start_typing

SUITES = pytest.mark.parametrize("suite", ["forky", "trixie"], ids=["0.12", "0.10"])


@SUITES
def test_a_server_that_is_not_installed_is_explained(tmp_path: Path, suite: str):
    with closing(Neovim(tmp_path, suite, {"cmd": ["no-such-server"]})) as editor:
        editor.open("a.py", INVENTORY)
        editor.terminal.shows("deepseek error")
        editor.terminal.press(f":checkhealth deepseek_lsp{ENTER}")
        screen = editor.terminal.shows("no-such-server is not found")
        assert "pip install" in screen and "setup({ cmd" in screen


def test_a_server_that_keeps_dying_is_given_up_and_started_again_when_the_user_says_so(tmp_path: Path):
    program = tmp_path / "deepseek-lsp"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    waits: dict[str, list[str]] = {"forky": [], "trixie": []}
    with ExitStack() as both:
        editors = {}
        for suite in waits:
            (tmp_path / suite).mkdir()
            editor = Neovim(tmp_path / suite, suite, {"cmd": [str(program)]}, before="vim.o.cmdheight = 9\n")
            editors[suite] = both.enter_context(closing(editor))
            editor.open("a.py", INVENTORY)

        def are_given_up() -> bool:
            details = {suite: editor.lua("return require('deepseek_lsp.state').detail()") for suite, editor in editors.items()}
            for suite, detail in details.items():
                found = re.findall(r"started again in (\d+) s", detail)
                waits[suite] += [wait for wait in found if wait not in waits[suite]]
            return all("6 times" in detail for detail in details.values())

        editors["forky"].until(are_given_up)
        assert waits["forky"] == waits["trixie"] == ["1", "2", "4", "8", "16"]
        program.write_text(f'#!/bin/sh\nexec {install.SCRIPTS / "deepseek-lsp"} "$@"\n')
        for editor in editors.values():
            editor.terminal.shows("the server ended 6 times. :DeepseekLog, :DeepseekRestart")
            editor.terminal.press(f"{ESCAPE}:DeepseekRestart{ENTER}")
        for editor in editors.values():
            editor.until_ready()


def test_settings_reach_the_server_and_a_key_that_was_mapped_keeps_its_meaning(tmp_path: Path):
    options = {"settings": {"inline": {"max_lines": 3, "max_linez": 4}}}
    with closing(Neovim(tmp_path, options=options, before="vim.keymap.set('i', '<Tab>', 'mapped')\n")) as editor:
        editor.open("a.txt", "")
        editor.terminal.press("i" + TAB)
        editor.until(lambda: editor.buffer == ["mapped"])
        editor.open("a.py", INVENTORY)
        editor.terminal.shows("inline.max_linez in the editor's initializationOptions is left out")


def test_without_neovims_own_inline_completion_the_plugin_draws_it_also_where_neovim_starts_the_server(tmp_path: Path):
    """As in 0.11, which could not be had: it starts servers as 0.12 does, and knows no inline completion."""
    options = {"cmd": server_saying(pieces=["eturn self.items[name]"])}
    with closing(Neovim(tmp_path, options=options, before="vim.lsp.inline_completion = nil\n")) as editor:
        assert start_typing(editor, "a.py").startswith("eturn self.items[name]")
        editor.terminal.press(TAB)
        editor.until(lambda: editor.buffer[HOLE] == " " * 8 + "return self.items[name]")


def readme(manager: str) -> str:
    """What the README says is to be written for a plugin manager."""
    words = (PLUGIN / "README.md").read_text("utf-8")
    return words.split(f"```lua\n-- {manager}")[1].split("\n", 1)[1].split("```")[0]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository with the plugin where this one has it."""
    folder = tmp_path / "origin"
    shutil.copytree(PLUGIN, folder / "editors/neovim", ignore=shutil.ignore_patterns("tags"))
    for command in ("init --quiet", "add .", "-c user.name=me -c user.email=me@localhost commit --quiet --message=plugin"):
        subprocess.run(["git", "-C", str(folder), *command.split()], check=True)
    return folder


@pytest.fixture
def clone(tmp_path: Path, origin: Path) -> Path:
    """As lazy.nvim makes one."""
    folder = tmp_path / "data/lazy/deepseek-lsp"
    subprocess.run(["git", "clone", "--quiet", f"file://{origin}", str(folder)], check=True)
    return folder


def everything_is_there(folder: Path, suite: str, setup: str) -> None:
    with closing(Neovim(folder, suite, setup=setup)) as editor:
        editor.until(lambda: editor.lua("return vim.fn.exists(':DeepseekChat')") == 2)
        editor.open("warm.py", INVENTORY)
        editor.until_ready()
        start_typing(editor, "a.py")
        sources = editor.lua("return vim.api.nvim_get_runtime_file('lua/deepseek_lsp/init.lua', true)")
        assert len(sources) == 1 and str(PLUGIN) not in sources[0]
        editor.terminal.press(f"{ESCAPE}:help :DeepseekChat{ENTER}")
        editor.terminal.shows("deepseek-lsp.txt")


def test_vim_pack_installs_the_plugin_as_the_readme_says(tmp_path: Path, origin: Path):
    setup = (
        readme("vim.pack")
        .replace("https://HOST/OWNER/deepseek-lsp", f"file://{origin}")
        .replace('src = "', 'name = "deepseek-lsp", src = "')
    )
    everything_is_there(tmp_path, "forky", setup.replace("} })", "} }, { confirm = false })", 1))


LAZY = """
vim.go.loadplugins = false
local spec, dir = {spec}, "{clone}"
local function load() -- lazy.nvim's part: the clone into the runtimepath, then the spec's config with the options
  vim.opt.runtimepath:prepend(dir)
  spec.config({{ name = "deepseek-lsp", dir = dir }}, vim.tbl_deep_extend("force", spec.opts, vim.json.decode([==[{options}]==])))
end
{when}
"""
AT_START = 'vim.api.nvim_create_autocmd("VimEnter", { callback = vim.schedule_wrap(load) })'
ON_EVENT = """
vim.api.nvim_create_autocmd("{event}", {{
  pattern = "{pattern}",
  once = true,
  callback = function(event) -- what the plugin wants to hear of the event is told to it again
    local before = vim.tbl_map(function(one) return one.id end, vim.api.nvim_get_autocmds({{ event = "{event}" }}))
    load()
    for _, new in ipairs(vim.api.nvim_get_autocmds({{ event = "{event}" }})) do
      if not vim.list_contains(before, new.id) and new.group then
        vim.api.nvim_exec_autocmds("{event}", {{ buffer = event.buf, group = new.group, modeline = false }})
      end
    end
  end,
}})
"""
ON_COMMAND = """
vim.api.nvim_create_user_command("DeepseekChat", function(typed) -- stands in until the plugin defines its own
  vim.api.nvim_del_user_command("DeepseekChat")
  load()
  vim.cmd({ cmd = "DeepseekChat", bang = typed.bang, args = typed.fargs, range = { typed.line1, typed.line2 } })
end, { bang = true, range = true, nargs = "*" })
"""


def lazy(clone: Path, when: str, **options: Any) -> str:
    """An init.lua that does with the README's lines what lazy.nvim does, which itself could not be had."""
    return LAZY.format(spec=readme("lazy.nvim"), clone=clone, options=json.dumps(options), when=when)


@SUITES
def test_the_readmes_lines_for_lazy_nvim_work_as_it_runs_them(tmp_path: Path, clone: Path, suite: str):
    """After Neovim's start, with the loading of plugins left to it, the clone in the runtimepath."""
    everything_is_there(tmp_path, suite, lazy(clone, AT_START))


@SUITES
@pytest.mark.parametrize(("event", "pattern"), [("InsertEnter", "*"), ("FileType", "python")])
def test_loaded_by_an_event_it_completes_where_the_event_was(tmp_path: Path, clone: Path, suite: str, event: str, pattern: str):
    options = {"cmd": server_saying(pieces=["eturn self.items[name]"]), "keys": {"accept": "<C-g>"}}
    setup = lazy(clone, ON_EVENT.format(event=event, pattern=pattern), **options)
    with closing(Neovim(tmp_path, suite, setup=setup)) as editor:
        assert not editor.lua("return package.loaded.deepseek_lsp ~= nil")
        editor.open("a.py", INVENTORY)
        editor.terminal.press(f"{HOLE + 1}GA")
        editor.until_attached()
        editor.terminal.press("r")
        assert editor.until_ghost().startswith("eturn self.items[name]")
        editor.terminal.press("\x07")
        editor.until(lambda: editor.buffer[HOLE] == " " * 8 + "return self.items[name]")


@SUITES
def test_loaded_by_its_first_command_it_does_what_the_command_says(tmp_path: Path, clone: Path, suite: str):
    options = {"cmd": server_saying(answers={"Who are you": ["A ", "model."]})}
    with closing(Neovim(tmp_path, suite, setup=lazy(clone, ON_COMMAND, **options))) as editor:
        editor.open("a.py", INVENTORY)
        assert not editor.lua("return package.loaded.deepseek_lsp ~= nil")
        editor.terminal.press(f":20,21DeepseekChat Who are you?{ENTER}")
        editor.terminal.shows("A model.")
        assert "About a.py, lines 20 to 21" in editor.terminal.text


def test_help_has_every_command_and_option(tmp_path: Path):
    tags = subprocess.run(
        [
            str(install.neovim() / "usr/bin/nvim"), "--headless", "-u", "NONE", "-i", "NONE",
            "-c", f"helptags {PLUGIN / 'doc'} | set rtp+={PLUGIN} | help deepseek-lsp | echo expand('%:p') | quitall",
        ],
        capture_output=True, text=True, check=True,
        env=os.environ | {"VIMRUNTIME": str(install.neovim() / "usr/share/nvim/runtime")},
    )  # fmt: skip
    assert str(PLUGIN / "doc/deepseek-lsp.txt") in tags.stderr + tags.stdout
    words = (PLUGIN / "doc/deepseek-lsp.txt").read_text("utf-8")
    commands = re.findall(r'^  \{ "(Deepseek\w+)"', (PLUGIN / "lua/deepseek_lsp/commands.lua").read_text("utf-8"), re.MULTILINE)
    assert len(commands) >= 12
    for name in [*(f"*:{command}*" for command in commands), "accept_word", "root_markers", "settings", "filetypes", "cmd"]:
        assert name in words
