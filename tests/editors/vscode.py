"""VS Code as a user has it, in a browser window: the extension installed from its package, keys pressed, the screen read."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from playwright.sync_api import Browser, Error, Locator, Page, sync_playwright

from tests.editors import install
from tests.editors.processes import LIMIT_S, SOON_S, end

SETTINGS = {
    "chat.disableAIFeatures": True,
    "telemetry.telemetryLevel": "off",
    "workbench.startupEditor": "none",
    "workbench.colorTheme": "Default Dark Modern",
    "workbench.preferredDarkColorTheme": "Default Dark Modern",
    "workbench.enableExperiments": False,
    "extensions.autoCheckUpdates": False,
    "extensions.ignoreRecommendations": True,
    "editor.fontFamily": "DejaVu Sans Mono",
    "editor.minimap.enabled": False,
    "files.autoSave": "off",
    "workbench.reduceMotion": "on",
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "security.workspace.trust.enabled": False,
}
GHOST = ".ghost-text, .ghost-text-decoration, .ghost-text-decoration-preview"
ITEM = '.statusbar-item[id^="deepseek-lsp"] a'
STATES = f"""
    window.states = [];
    new MutationObserver(() => {{
        const item = document.querySelector('{ITEM}');
        const state = item && `${{item.textContent.trim()}}: ${{item.getAttribute('aria-label')}}`;
        if (state && state !== window.states.at(-1)) window.states.push(state);
    }}).observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
"""
"""Keeps what our item in the status bar showed and said, one after the other."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(folder: Path, settings: dict[str, Any], path: str, packages: tuple[Path, ...], trusts: bool = True) -> Iterator[str]:
    """code-server on data of its own in `folder`; gives its address. `path` is the server's PATH; `trusts` says whether every workspace is
    trusted."""
    user, extensions = folder / "user", folder / "extensions"
    (user / "User").mkdir(parents=True)
    (user / "User/settings.json").write_text(json.dumps(SETTINGS | settings))
    (folder / "config.yaml").write_text("")
    home = folder / "home"
    home.mkdir()
    (home / ".profile").write_text(f"export PATH={path}\n")  # VS Code asks a login shell
    env = os.environ | {"HOME": str(home), "SHELL": "/bin/sh"}
    program = install.code_server() / "node_modules/code-server/out/node/entry.js"
    command = [
        str(install.SCRIPTS / "node"), str(program), "--user-data-dir", str(user), "--extensions-dir", str(extensions),
        "--config", str(folder / "config.yaml"),
    ]  # fmt: skip
    for package in packages:
        install.run(*command, "--install-extension", package, env=env)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "code-server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--auth", "none", "--bind-addr", address, "--disable-telemetry", "--disable-update-check",
             "--disable-getting-started-override", *(["--disable-workspace-trust"] if trusts else [])],
            env=env, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            wait_for(lambda: answers(f"http://{address}/healthz"), (folder / "code-server.log").read_text)
            yield f"http://{address}"
        finally:
            end(psutil.Process(process.pid))
            process.wait(20)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], otherwise: Callable[[], str], limit_s: float = LIMIT_S) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise())
        time.sleep(0.05)
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=str(install.chromium()),
            args=["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"],
        )
        try:
            yield running
        finally:
            running.close()


def load_into_host(page: Page, address: str, extensions: Iterable[Path], tests: Path) -> None:
    """Has VS Code, once it is in the page, load extensions from their folders, and call what `tests` exports as `run` in the extension
    host."""

    def place(path: Path) -> dict[str, str]:
        return {"scheme": "vscode-remote", "authority": urlsplit(address).netloc, "path": str(path)}

    development = {"extensions": [place(path) for path in extensions], "extensionTestsPath": place(tests)}
    page.add_init_script(f"""
        document.addEventListener('readystatechange', () => {{
            const meta = document.getElementById('vscode-workbench-web-configuration');
            if (!meta || meta.dataset.tested) return;
            const settings = JSON.parse(meta.dataset.settings);
            settings.developmentOptions = {{ ...settings.developmentOptions, ...{json.dumps(development)} }};
            meta.dataset.settings = JSON.stringify(settings);
            meta.dataset.tested = 'yes';
        }});
    """)


class View:
    """The panel's webview: a page within a page within VS Code's."""

    def __init__(self, page: Page) -> None:
        self.frame = page.frame_locator("iframe.webview.ready").frame_locator("iframe#active-frame")

    @property
    def turns(self) -> Locator:
        return self.frame.locator(".turn")

    @property
    def input(self) -> Locator:
        return self.frame.locator("#text")

    @property
    def has_focus(self) -> bool:
        """Whether what is typed goes into the panel's input."""
        return bool(self.input.evaluate("input => document.activeElement === input && document.hasFocus()"))

    def until(self, state: str, text: str = "") -> Locator:
        """Waits for the last turn to be waiting, answering, done, stopped or failed, with `text` in it."""
        found = self.frame.locator(f'.turn[data-state="{state}"]:last-child', has_text=text or None)
        found.wait_for()
        return found


class Code:
    """One window of VS Code."""

    def __init__(self, page: Page, address: str, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.asked: list[str] = []
        self.view = View(page)
        self.answered_within: set[str] = set()
        """Addresses that never left the browser: VS Code's service worker reads the webviews' files for them."""
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", lambda response: response.from_service_worker and self.answered_within.add(response.url))
        page.set_default_timeout(1000 * LIMIT_S)
        page.add_init_script(STATES)
        page.goto(f"{address}/?folder={folder}")
        page.wait_for_selector(".monaco-workbench .explorer-folders-view")

    def open(self, name: str) -> None:
        """Opens a file that was in the folder before the window was: VS Code finds new ones late."""
        self.quick_open(name, f'.monaco-list-row:has-text("{name}")')
        self.page.wait_for_selector(f'.tab.active[data-resource-name="{name}"]')
        self.page.wait_for_selector(".editor-instance .monaco-editor .view-lines")

    def quick_open(self, text: str, row: str) -> None:
        self.ask_in_box("Control+P", text)
        self.page.locator(f".quick-input-list {row}").first.click()

    def command(self, title: str) -> None:
        self.ask_in_box("F1", f">{title}")
        self.page.locator(f'.quick-input-list .monaco-list-row:is([aria-label="{title}"], [aria-label^="{title}, "])').first.click()

    @property
    def box(self) -> Locator:
        """Where VS Code asks for words: the one at the top of the window."""
        return self.page.locator(".quick-input-widget:visible input[type=text]")

    def ask_in_box(self, key: str, text: str) -> None:
        def is_open() -> bool:
            self.press(key)  # lost where nothing has the focus for a moment
            try:
                self.box.wait_for(timeout=5000)
            except Error:
                return False
            return True

        self.until(is_open)
        self.box.fill(text)

    def choose(self, title: str) -> None:
        """From the menu of code actions at the cursor, which VS Code closes when diagnostics come meanwhile."""
        row = self.page.locator(f'.action-widget .monaco-list-row:has-text("{title}")').first

        def is_chosen() -> bool:
            self.press("Control+.")
            try:
                row.wait_for(timeout=5000)
                row.click(timeout=5000)
            except Error:
                self.press("Escape")
                return False
            return True

        self.until(is_chosen)

    def go_to(self, line: int) -> None:
        """Puts the cursor at the end of a line, counted from 1."""
        self.ask_in_box("Control+G", f":{line}")
        self.box.press("Enter")
        self.page.wait_for_selector(".quick-input-widget", state="hidden")
        self.until_editor_has_focus()
        self.page.keyboard.press("End")

    def select_lines(self, first: int, last: int) -> None:
        """Selects whole lines, counted from 1."""
        place = self.page.locator('[id="status.editor.selection"]', has_text=f"Ln {last + 1}, Col 1 (")

        def are_selected() -> bool:
            self.go_to(first)
            self.press("Home")
            for _ in range(first, last + 1):
                self.press("Shift+ArrowDown")
            return self.soon(place.count)

        self.until(are_selected)

    def until_editor_has_focus(self) -> None:
        """Keys before that are lost."""
        self.until(lambda: self.page.evaluate("Boolean(document.activeElement.closest('.editor-instance'))"))

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    @property
    def ghost(self) -> str:
        """The ghost text on the screen; one that begins a suggestion is often drawn in pieces."""
        return spaced("".join(self.page.locator(GHOST).all_text_contents()))

    def until_ghost(self) -> str:
        found: str = self.until(lambda: self.ghost)
        return found

    @property
    def status(self) -> str:
        """Our item in the status bar, as a screen reader reads it."""
        try:
            return self.page.locator(ITEM).first.get_attribute("aria-label", timeout=1000) or ""
        except Error:
            return ""

    @property
    def states(self) -> list[str]:
        found: list[str] = self.page.evaluate("window.states")
        return found

    def until_ready(self) -> None:
        self.until(lambda: "DeepSeek is ready" in self.status)

    def line(self, number: int) -> str:
        """A line of the document on the screen, without ghost text, counted from 1."""
        script = """number => {
            const rows = [...document.querySelectorAll('.editor-instance .monaco-editor .view-line')];
            const at = row => parseFloat(row.style.top);
            const margins = [...document.querySelectorAll('.editor-instance .margin-view-overlays > div')];
            const margin = margins.find(row => row.textContent.trim() === String(number));
            const row = margin && rows.find(row => at(row) === at(margin));
            if (!row) return '';
            const copy = row.cloneNode(true);
            copy.querySelectorAll('.ghost-text, .ghost-text-decoration, .ghost-text-decoration-preview').forEach(e => e.remove());
            return copy.textContent;
        }"""
        return spaced(str(self.page.evaluate(script, number)))

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
        def screen() -> str:
            self.page.screenshot(path=self.folder.parent / "late.png")
            return f"status: {self.status!r}, ghost: {self.ghost!r}; the screen is in {self.folder.parent / 'late.png'}"

        return wait_for(condition, screen, limit_s)

    def soon(self, condition: Callable[[], Any]) -> bool:
        """Whether it comes true within a few seconds; if not, a key was lost."""
        try:
            return bool(wait_for(condition, str, SOON_S))
        except TimeoutError:
            return False

    def picture(self, file: Path) -> None:
        self.page.mouse.move(150, 18)  # over nothing that explains itself
        self.page.screenshot(path=file, animations="disabled")


def spaced(text: str) -> str:
    """Monaco draws blanks as no-break spaces."""
    return re.sub("[\u00a0\u00b7\u200b]", lambda found: "" if found[0] == "\u200b" else " ", text)
