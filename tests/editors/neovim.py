"""Neovim as a user has it: in a terminal, with the plugin set up in its init.lua. Keys go in; the screen and the state are read."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvim

from tests.editors import install
from tests.editors.processes import LIMIT_S
from tests.editors.terminal import Terminal

REPOSITORY = Path(__file__).parents[2]
PLUGIN = REPOSITORY / "editors/neovim"
INVENTORY = (REPOSITORY / "examples/inventory.py").read_text("utf-8")
HOLE = 23
"""The line of the inventory that is empty, counted from 0."""
INIT = """
vim.o.swapfile, vim.o.shada, vim.o.laststatus, vim.o.more, vim.o.cmdheight = false, "", 2, false, 3
vim.o.statusline = "%t %m %= %{%v:lua.state()%} "
function _G.state() -- plugin managers may load the plugin later
  local is_there, plugin = pcall(require, "deepseek_lsp")
  return is_there and plugin.statusline() or ""
end
_G.states = {}
vim.api.nvim_create_autocmd({ "LspProgress", "LspRequest" }, {
  callback = vim.schedule_wrap(function() table.insert(_G.states, _G.state()) end),
})
"""
SETUP = """
vim.opt.runtimepath:prepend({plugin})
require("deepseek_lsp").setup(vim.json.decode({options}))
"""
TMUX = """
set -g default-terminal tmux-256color
set -ga terminal-features ",*:RGB"
set -g status off
set -g destroy-unattached on
set -g exit-empty on
"""
"""Ends with its terminal."""
TAB, ESCAPE, ENTER = "\t", "\x1b", "\r"


def server_saying(**script: Any) -> list[str]:
    """A server whose model says what `tests.scripted` is told."""
    return [sys.executable, "-m", "tests.scripted", json.dumps(script)]


def attached(socket: Path) -> pynvim.Nvim:
    """The editor that listens there; its file is there before anybody listens."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return pynvim.attach("socket", path=str(socket))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class Neovim:
    def __init__(
        self,
        folder: Path,
        suite: str = "forky",
        options: dict[str, Any] | None = None,
        before: str = "",
        setup: str = SETUP,
        in_tmux: bool = False,
    ) -> None:
        """An editor in `folder`, which gets an init.lua (with `before`, then `setup`), a socket and a home."""
        root = install.neovim(suite)
        self.folder = folder
        (folder / ".git").mkdir()
        init, socket = folder / "init.lua", folder / "socket"
        options_lua = f"[==[{json.dumps(options or {})}]==]"
        if setup is SETUP:
            setup = SETUP.format(plugin=json.dumps(str(PLUGIN)), options=options_lua)
        parsers = f"vim.opt.runtimepath:append({json.dumps(str(root / 'usr/lib/nvim'))})\n"  # which the editor looks for in /usr/lib/nvim
        init.write_text(INIT + parsers + before + setup)
        env = {
            "VIMRUNTIME": str(root / "usr/share/nvim/runtime"),
            "PATH": f"{install.SCRIPTS}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "XDG_STATE_HOME": str(folder / "home/state"),
        }
        nvim = [str(root / "usr/bin/nvim"), "-u", str(init), "-i", "NONE", "--listen", str(socket)]
        if in_tmux:
            tmux, configuration = install.tmux(), folder / "tmux.conf"
            configuration.write_text(TMUX)
            nvim = [str(tmux / "usr/bin/tmux"), "-u", "-S", str(folder / "tmux"), "-f", str(configuration), "new-session", *nvim]
            env["TERMINFO"] = str(tmux / "usr/share/terminfo")
        self.terminal = Terminal(*nvim, cwd=folder, env=env)
        self._nvim = attached(socket)
        self.until(lambda: self.lua("return vim.v.vim_did_enter") == 1)

    def lua(self, code: str, *arguments: Any) -> Any:
        return self._nvim.exec_lua(code, *arguments)

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
        """What the condition gives once that is something."""
        deadline = time.monotonic() + limit_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"This was on the screen in the end:\n{self.terminal.text}")
            self.lua("vim.wait(20)")
        return found

    def open(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(text)
        self.terminal.press(f"{ESCAPE}:edit! {file}{ENTER}")
        self.until(lambda: self.lua("return vim.api.nvim_buf_get_name(0)") == str(file))
        self.lua("vim.cmd('echo')")

    def until_ready(self) -> None:
        self.until(lambda: self.lua("return require('deepseek_lsp').statusline()") == "deepseek ready")
        self.terminal.shows("deepseek ready")

    def until_attached(self) -> None:
        """Neovim asks nothing for keys that come before the server knows the buffer."""
        self.until(lambda: self.lua("return #vim.lsp.get_clients({ name = 'deepseek_lsp', bufnr = 0 })"))

    @property
    def status(self) -> dict[str, Any]:
        """What the buffer's server says of itself."""
        found: dict[str, Any] = self.lua(
            """
            local limit_ms, status = ...
            require("deepseek_lsp.server").request("deepseek/status", nil, function(_, answer) status = answer end, 0)
            vim.wait(limit_ms, function() return status end, 10)
            return status
            """,
            int(1000 * LIMIT_S),
        )
        return found

    @property
    def states(self) -> list[str]:
        """What the statusline said, one after the other, whenever the server was asked or told how far it is."""
        found: list[str] = self.lua("return _G.states")
        return found

    @property
    def buffer(self) -> list[str]:
        return list(self._nvim.current.buffer[:])

    @property
    def ghost(self) -> str:
        """The ghost text, read from the marks that draw it."""
        marks = self.lua("""
            local found = {}
            for name, namespace in pairs(vim.api.nvim_get_namespaces()) do
                if name == "nvim.lsp.inline_completion" or name == "deepseek_lsp.ghost" then
                    vim.list_extend(found, vim.api.nvim_buf_get_extmarks(0, namespace, 0, -1, { details = true }))
                end
            end
            return found
        """)
        if not marks:
            return ""
        details = marks[0][3]
        lines = [details["virt_text"], *details.get("virt_lines", [])]
        return "\n".join("".join(piece for piece, _ in line) for line in lines)

    def until_ghost(self) -> str:
        found: str = self.until(lambda: self.ghost)
        return found

    @contextmanager
    def warm(self) -> Iterator["Neovim"]:
        """Itself, once the model is loaded; closed in the end."""
        try:
            self.open("warm.py", INVENTORY)
            self.until_ready()
            yield self
        finally:
            self.close()

    def close(self) -> None:
        self._nvim.close()
        self.terminal.close()


def start_typing(neovim: Neovim, name: str, typed: str = "r") -> str:
    """Opens the inventory, types into its hole, gives the ghost text."""
    neovim.open(name, INVENTORY)
    neovim.until_attached()
    neovim.terminal.press(f"{HOLE + 1}GA{typed}")
    return neovim.until_ghost()
