"""Emacs with lsp-mode and the client in editors/emacs, and Helix as the README configures it; with the real server and the starter."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.editors import install
from tests.editors.terminal import Terminal

REPOSITORY = Path(__file__).parents[2]
PATH = f"{install.SCRIPTS}:{os.environ['PATH']}"
ACCEPTED = re.compile(r"^ *(24 )? *return self\.items\[name\]$", re.MULTILINE)
DOCUMENTED = re.compile(r"def add\(self, item: Item\) -> None:\n[ \d●┃│~]*\"\"\"")
FIRST = "Make the selection faster"
"""What stands at the top of the menu of actions."""
INIT = """
(dolist (folder (file-expand-wildcards "{packages}/*")) (add-to-list 'load-path folder))
(dolist (file (file-expand-wildcards "{packages}/*/*-autoloads.el")) (load file nil t)) ; as the package manager does
(add-to-list 'load-path "{client}")
(setq make-backup-files nil auto-save-default nil inhibit-startup-screen t create-lockfiles nil native-comp-deferred-compilation nil
      lsp-session-file "{folder}/session" lsp-auto-guess-root t lsp-enable-suggest-server-download nil lsp-client-packages nil
      lsp-warn-no-matched-clients nil lsp-headerline-breadcrumb-enable nil lsp-inline-completion-idle-delay 0.2)
(require 'deepseek-lsp)
(setq deepseek-lsp-command '("env" "-u" "LD_LIBRARY_PATH" "deepseek-lsp"))
(add-hook 'prog-mode-hook #'deepseek-lsp-start)
(global-set-key (kbd "C-c s") #'deepseek-lsp-status)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    (folder / ".git").mkdir(parents=True)
    shutil.copy(REPOSITORY / "examples/inventory.py", folder)
    return folder


@pytest.fixture
def emacs(project: Path, tmp_path: Path) -> Iterator[Terminal]:
    root = install.emacs()
    init = tmp_path / "init.el"
    packages, client = root / "usr/share/emacs/site-lisp/elpa-src", REPOSITORY / "editors/emacs"
    init.write_text(INIT.format(packages=packages, client=client, folder=tmp_path))
    env = {"PATH": PATH, "HOME": str(tmp_path)}
    editor = Terminal(str(root / "emacs"), "-nw", "-Q", "-l", str(init), "inventory.py", cwd=project, env=env)
    try:
        yield editor
    finally:
        editor.close()


def test_emacs_shows_ghost_text_that_tab_takes_and_makes_the_change_of_a_code_action(emacs: Terminal, pictures: Path):
    emacs.shows("LSP[deepseek-lsp:")
    emacs.press_until("\x03s", "deepseek-lsp is ready")
    emacs.press("\x1bgg24\r\x05r")
    emacs.shows("return self.items[name]")
    emacs.draw(pictures / "emacs.svg", "Emacs")
    emacs.press("\t")
    emacs.press("\x18\x13")
    emacs.shows("Wrote")
    assert ACCEPTED.search(emacs.text)
    emacs.press("\x1bgg20\r\x1bxlsp-execute-code-action\r")
    emacs.shows("Select code action")
    emacs.press("Document add\r")
    emacs.until(lambda screen: bool(DOCUMENTED.search(screen)))


@pytest.fixture
def helix(project: Path, tmp_path: Path) -> Iterator[Terminal]:
    config = tmp_path / "home/.config/helix"
    config.mkdir(parents=True)
    (config / "languages.toml").write_text(configuration())
    (config / "config.toml").write_text("[editor.lsp]\ndisplay-progress-messages = true\n")
    root = install.helix()
    env = {"PATH": PATH, "HOME": str(tmp_path / "home"), "HELIX_RUNTIME": str(root / "usr/lib/hx/runtime")}
    editor = Terminal(str(root / "usr/lib/hx/hx"), "inventory.py:24", cwd=project, env=env)
    try:
        editor.shows("loaded in")
        yield editor
    finally:
        editor.close()


def test_helix_has_the_suggestion_in_its_menu(helix: Terminal):
    helix.press("Ar\x18")
    helix.until(lambda screen: screen.count("return self.items[name]") > 0)
    helix.press("\x0e\r")
    helix.until(lambda screen: bool(ACCEPTED.search(screen)))


def test_helix_makes_the_change_of_a_code_action(helix: Terminal):
    helix.press("20G a")
    rows = helix.until(lambda screen: FIRST in screen and "Document add" in screen).splitlines()
    first, wanted = (next(number for number, row in enumerate(rows) if title in row) for title in (FIRST, "Document add"))
    helix.press("\x0e" * (wanted - first) + "\r")  # the first one is chosen already
    helix.until(lambda screen: bool(DOCUMENTED.search(screen)))


def configuration() -> str:
    """What the README says belongs into languages.toml."""
    return (REPOSITORY / "editors/README.md").read_text("utf-8").split("```toml\n")[1].split("```")[0]
