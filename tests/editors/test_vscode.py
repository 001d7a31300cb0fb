"""The packaged extension in VS Code (code-server in Chromium), with the real server and the starter."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, Page

from tests.editors import install
from tests.editors.processes import LIMIT_S, servers
from tests.editors.vscode import Code, browser, load_into_host, served, spaced, wait_for

REPOSITORY = Path(__file__).parents[2]
EXTENSION = REPOSITORY / "editors/vscode"
INVENTORY = (REPOSITORY / "examples/inventory.py").read_text("utf-8")
HOLE = 24
"""The line of the inventory that is empty, counted from 1."""
PATH = f"{install.SCRIPTS}:{os.environ['PATH']}"
FILES = ("warm.py", "inventory.py", "word.py", "line.py", "off.py", "on.py", "again.py", "explained.py", "menu.py", "id_rsa")
WINDOW = {"width": 1000, "height": 640}


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def code(window: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Code]:
    folder = tmp_path_factory.mktemp("vscode")
    project = folder / "shop"
    project.mkdir()
    for name in FILES:
        (project / name).write_text(INVENTORY)
    with served(folder, {}, PATH, (install.extension(),)) as address:
        running = Code(window.new_page(viewport=WINDOW), address, project)
        running.press("Control+b")  # no list of files, for the pictures
        running.open("warm.py")
        running.until_ready()
        yield running


def start_typing(code: Code, name: str) -> str:
    code.open(name)
    code.go_to(HOLE)
    code.type("r")
    return code.until_ghost()


def test_what_is_typed_brings_ghost_text_and_tab_takes_it(code: Code, pictures: Path):
    assert start_typing(code, "inventory.py").startswith("eturn self.items[name]")
    assert code.line(HOLE) == " " * 8 + "r"
    code.picture(pictures / "vscode.png")
    code.press("Tab")
    code.until(lambda: code.line(HOLE) == " " * 8 + "return self.items[name]")


def test_control_right_takes_a_word_and_the_rest_stays(code: Code):
    start_typing(code, "word.py")
    code.press("Control+ArrowRight")
    code.until(lambda: code.line(HOLE) == " " * 8 + "return")
    code.until(lambda: code.ghost.startswith(" self.items[name]"))


def test_control_alt_j_takes_a_line(code: Code):
    start_typing(code, "line.py")
    code.press("Control+Alt+j")
    code.until(lambda: code.line(HOLE) == " " * 8 + "return self.items[name]")


def test_the_status_bar_says_why_nothing_is_shown(code: Code):
    code.open("id_rsa")
    code.go_to(1)
    code.type("x")
    code.until(lambda: "file of secrets" in code.status)
    assert code.status.startswith("DeepSeek is ready.")


def test_the_menu_switches_a_language_off_and_on_again(code: Code, pictures: Path):
    code.open("off.py")
    code.page.locator('.statusbar-item[id^="deepseek-lsp"] a').click()
    row = code.page.locator('.quick-input-list .monaco-list-row:has-text("off for python")')
    row.wait_for()
    code.picture(pictures / "vscode-menu.png")
    row.click()
    code.until(lambda: "off for this language" in code.status)
    code.go_to(HOLE)
    code.type("r")
    code.page.wait_for_timeout(1000)  # the absence of something has no event
    assert not code.ghost
    code.command("DeepSeek: Switch Ghost Text On or Off for This Language")
    code.until_ready()
    start_typing(code, "on.py")


def test_switched_off_it_shows_nothing_and_says_so(code: Code):
    code.command("DeepSeek: Switch Ghost Text On or Off")
    code.until(lambda: "DeepSeek is off" in code.status)
    code.command("DeepSeek: Switch Ghost Text On or Off")
    code.until_ready()


def test_status_shows_what_runs(code: Code):
    code.command("DeepSeek: Show Status")
    dialog = code.page.locator(".monaco-dialog-box")
    dialog.wait_for()
    assert "23.8 M parameters" in dialog.inner_text()
    code.press("Escape")
    dialog.wait_for(state="detached")


def test_restart_goes_through_loading_with_a_percentage_to_ready(code: Code):
    before = len(code.states)
    code.command("DeepSeek: Restart the Server")
    code.until(lambda: any(re.match(r"DeepSeek \d+%: DeepSeek is loading", state) for state in code.states[before:]))
    code.until_ready()


def test_an_explanation_by_the_starter_comes_into_the_panel(code: Code):
    code.open("explained.py")
    code.go_to(20)
    before = len(code.states)
    code.press("Control+k")
    code.press("x")
    answer = code.view.until("done", "Explain add")
    assert answer.locator(".answer").inner_text().strip()
    assert any("DeepSeek is busy" in state for state in code.states[before:])
    code.view.input.fill("Why?")
    code.view.input.press("Enter")
    code.until(lambda: code.view.turns.count() == 2)
    code.view.until("done", "Why?")
    code.command("DeepSeek: New Conversation")
    code.view.frame.locator(".welcome").wait_for()
    code.until(lambda: code.view.has_focus)
    code.press("Control+b")


def test_completion_items_are_in_the_menu_of_suggestions_and_ghost_text_stays_beside_it(code: Code):
    code.open("menu.py")
    code.go_to(HOLE)
    code.type("return self.")
    code.press("Control+Space")
    code.page.locator('.suggest-widget .monaco-list-row:has-text("items[name]")').first.wait_for()
    code.until(lambda: code.ghost.startswith("items[name]"))
    code.press("Escape")


def test_the_logs_are_in_an_output_channel(code: Code):
    code.command("DeepSeek: Show Logs")
    code.until(lambda: "Starting " in spaced(code.page.locator(".output-view .view-lines, .output-view-content .view-lines").inner_text()))
    code.press("Control+j")


def test_a_killed_server_is_started_again_and_knows_what_was_not_saved(code: Code):
    start_typing(code, "again.py")
    code.type("e")
    code.press("Escape")
    (server,) = servers(psutil.Process())
    before = len(code.states)
    os.kill(server.pid, signal.SIGKILL)
    code.until(lambda: any("ended by itself" in state and "in 1 s" in state for state in code.states[before:]))
    code.until_ready()
    assert server.pid not in [new.pid for new in servers(psutil.Process())]
    code.type("t")
    code.until(lambda: code.ghost.startswith("urn self.items[name]"))
    code.press("Escape")


def test_a_server_that_keeps_dying_is_given_up_and_a_button_starts_it_again(code: Code):
    program = code.folder.parent / "dying"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    before = len(code.states)
    (code.folder.parent / "user/Machine/settings.json").write_text(json.dumps({"deepseek-lsp.server.path": str(program)}))
    toast = code.page.locator('.notification-toast:has-text("(6 times) and is not started again")')
    toast.wait_for()
    waits = [wait for state in code.states[before:] for wait in re.findall(r"started again in (\d+) s", state)]
    assert list(dict.fromkeys(waits)) == ["1", "2", "4", "8", "16"]
    toasts = code.page.locator(".notification-toast").all_inner_texts()
    assert len(toasts) == 1, toasts
    program.write_text(f'#!/bin/sh\nexec {install.SCRIPTS / "deepseek-lsp"} "$@"\n')
    toast.locator('text="Restart the Server"').click()
    code.until_ready()


def test_a_server_that_is_not_there_is_said_with_an_offer_to_install_it(code: Code, pictures: Path):
    settings = code.folder.parent / "user/Machine/settings.json"
    settings.write_text(json.dumps({"deepseek-lsp.server.path": "/nowhere/deepseek-lsp"}))
    code.until(lambda: "DeepSeek is error" in code.status)
    code.page.locator('.notification-toast:has-text("/nowhere/deepseek-lsp") >> text="Install..."').wait_for()
    toasts = code.page.locator(".notification-toast").all_inner_texts()
    assert len(toasts) == 1, toasts
    code.picture(pictures / "vscode-install.png")
    code.command("DeepSeek: Open the Chat")
    code.until(lambda: code.view.has_focus)
    code.view.input.fill("Are you there?")
    code.view.input.press("Enter")
    code.view.until("failed", "No server is running. deepseek-lsp.server.path names /nowhere/deepseek-lsp")
    code.press("Control+b")
    settings.write_text(json.dumps({"deepseek-lsp.server.path": str(install.SCRIPTS / "deepseek-lsp")}))
    code.until_ready()
    settings.write_text("{}")
    code.until_ready()


def test_the_window_asks_nobody_but_this_machine(code: Code):
    asked = set(code.asked) - code.answered_within
    assert {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}


def test_everything_works_without_any_network(tmp_path: Path):
    """In a network namespace with nothing but a loopback."""
    alone = ["unshare", "--map-root-user", "--net"]
    tried = subprocess.run(["sh", "-c", f"{shlex.join(alone)} true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no user may make network namespaces here, so this could not be shown: {tried.stderr.strip()}")
    command = [*alone, sys.executable, "-m", "tests.editors.offline", str(tmp_path)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=3 * LIMIT_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "return self.items[name]" in ran.stdout and "Explain get" in ran.stdout


STAND_IN = """
const vscode = require("vscode");
const changed = new vscode.EventEmitter();
let path = "";
exports.activate = () => ({
  environments: { getActiveEnvironmentPath: () => ({ path }), onDidChangeActiveEnvironmentPath: changed.event },
  select(now) { path = now; changed.fire({ path }); },
});
"""
"""As much of Microsoft's Python extension as is asked here: it cannot be had without its marketplace."""


def python_extension(folder: Path) -> Path:
    folder.mkdir()
    about: dict[str, Any] = {"name": "python", "publisher": "ms-python", "version": "1.0.0", "main": "./main.js"}
    about |= {"engines": {"vscode": "^1.91.0"}, "activationEvents": [], "extensionKind": ["workspace"]}
    (folder / "package.json").write_text(json.dumps(about))
    (folder / "main.js").write_text(STAND_IN)
    return folder


def environment(folder: Path, deadline_s: int) -> Path:
    """A Python environment with a server that is known by one of its settings; gives its interpreter."""
    folder.mkdir()
    program = folder / "deepseek-lsp"
    program.write_text(f'#!/bin/sh\nDEEPSEEK_LSP_INLINE__DEADLINE_S={deadline_s} exec {install.SCRIPTS / "deepseek-lsp"} "$@"\n')
    program.chmod(0o755)
    return folder / "python"


def wheel(folder: Path, deadline_s: int) -> Path:
    """A package named deepseek-lsp that pip installs without a network, with a server that is known by one of its settings."""
    file, about = folder / "deepseek_lsp-9.0-py3-none-any.whl", "deepseek_lsp-9.0.dist-info"
    server = str(install.SCRIPTS / "deepseek-lsp")
    settings = {"DEEPSEEK_LSP_INLINE__DEADLINE_S": str(deadline_s)}
    module = f"import os\ndef main():\n    os.execve({server!r}, [{server!r}], os.environ | {settings!r})\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("started.py", module)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: deepseek-lsp\nVersion: 9.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", "[console_scripts]\ndeepseek-lsp = started:main\n")
        archive.writestr(f"{about}/RECORD", "")
    return file


@contextmanager
def host(window: Browser, folder: Path, given: dict[str, object], trusts: bool = True) -> Iterator[Page]:
    """VS Code with the extension and the stand-in for Python's, loaded from their folders; it runs vscode_host.js in its extension host."""
    install.extension()
    project = folder / "shop"
    (project / ".vscode").mkdir(parents=True)
    (project / "inventory.py").write_text(INVENTORY)
    (project / ".vscode/settings.json").write_text(json.dumps({f"tests.{name}": str(value) for name, value in given.items()}))
    settings = {} if trusts else {"security.workspace.trust.enabled": True, "security.workspace.trust.startupPrompt": "never"}
    config = folder / "home/.config/deepseek-lsp/config.toml"
    with served(folder, settings, PATH, (), trusts) as address:
        config.parent.mkdir(parents=True)
        config.write_text("[inline]\nmax_new_tokens = 77\n")
        page = window.new_page(viewport=WINDOW)
        page.set_default_timeout(1000 * LIMIT_S)

        extensions = (EXTENSION, python_extension(folder / "python"))
        load_into_host(page, address, extensions, Path(__file__).with_name("vscode_host.js"))
        page.goto(f"{address}/?folder={project}")
        yield page
        page.close()


def found_in(results: Path) -> dict[str, str]:
    """What the tests inside the extension host found wrong, by their names."""
    wait_for(results.exists, lambda: "the tests inside the extension host did not end", 2 * LIMIT_S)
    found: dict[str, str] = json.loads(results.read_text())
    if errors := [f"{name}: {error}" for name, error in found.items() if error]:
        pytest.fail("\n".join(errors))
    return found


def test_inside_the_extension_host(window: Browser, tmp_path: Path):
    results = tmp_path / "results.json"
    given = {"results": results, "environment": environment(tmp_path / "environment", 7), "wheel": wheel(tmp_path, 8)}
    with host(window, tmp_path, {"set": "trusted", **given}):
        assert len(found_in(results)) >= 7


def test_a_workspace_that_is_not_trusted_does_not_choose_the_server_until_it_is(window: Browser, tmp_path: Path):
    results, ready = tmp_path / "results.json", tmp_path / "ready"
    given = {"results": results, "ready": ready, "environment": environment(tmp_path / "environment", 7)}
    with host(window, tmp_path, {"set": "restricted", **given}, trusts=False) as page:
        wait_for(ready.exists, lambda: results.read_text() if results.exists() else "no server is ready in a workspace that is not trusted")
        page.locator('.statusbar-item:has-text("Restricted Mode") a').click()
        page.locator('.workspace-trust-editor .monaco-button:text-is("Trust")').first.click()
        found_in(results)
