"""The panel and the code actions in VS Code, with the real server around an engine whose words are known (`tests.scripted`)."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser

from tests.editors import install
from tests.editors.processes import servers
from tests.editors.vscode import Code, browser, served

REPOSITORY = Path(__file__).parents[2]
INVENTORY = (REPOSITORY / "examples/inventory.py").read_text("utf-8")
HOLE, ADD = 24, 20
"""Lines of the inventory, counted from 1: the empty one, and the header of `add`."""
WINDOW = {"width": 1100, "height": 720}
EXPLAIN = "DeepSeek: Explain the Selection or the Function"
CODE = "if item.name in self.items:\n    raise ValueError(item.name)"
ANSWER = f"""`Inventory.add` keeps an item under its **name**, so a later one of the same name takes its place.

1. `self.items` is a dictionary, made anew for each inventory.
2. Nothing is given back.

To refuse a second item of one name, begin with:

```python
{CODE}
```
"""
HOSTILE = """<img src="https://evil.example/x.png" onerror="document.title = 'broken'"> <script>document.title = "broken"</script>

<iframe src="https://evil.example"></iframe> ![picture](https://evil.example/p.png)
[one](javascript:alert(1)) [two](command:workbench.action.quit)
[three](https://example.org/ok "') onclick=alert(1)")

```"><img src=x onerror=alert(1)>
</code></pre><img src=x onerror="document.title = 'broken'">
```
"""
TESTS = """```python
from inventory import Inventory, Item


def test_add_keeps_the_item():
    inventory = Inventory()
    inventory.add(Item("pear", 0.7, 3))
    assert inventory.items["pear"].quantity == 3
```
"""
WRONG = 'function total(price: number): number {\n  return "price";\n}\n'
FIXED = "function total(price: number): number {\n  return price;\n}"


class Script:
    """What the engine says to the next question, and what it was asked."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.says("")

    def says(self, text: str, *, forever: bool = False) -> None:
        pieces: list[str | None] = [text[start : start + 16] for start in range(0, len(text), 16)]
        self._file.write_text(json.dumps({"pieces": [*pieces, *([None] if forever else [])]}))

    @property
    def log(self) -> list[dict[str, Any]]:
        file = self._file.with_suffix(".log")
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    @property
    def asked(self) -> str:
        """The last question, with all that went before it."""
        found: str = [one["asked"] for one in self.log if "asked" in one][-1]
        return found


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script") / "script.json")


@pytest.fixture(scope="module")
def opened(window: Browser, script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Code]:
    folder = tmp_path_factory.mktemp("panel")
    project, programs = folder / "shop", folder / "programs"
    for place in (project, programs):
        place.mkdir()
    (project / "inventory.py").write_text(INVENTORY)
    (project / "total.ts").write_text(WRONG)
    server = shlex.join([sys.executable, "-m", "tests.scripted", json.dumps({"file": str(script._file)})])
    (programs / "deepseek-lsp").write_text(f"#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {server}\n")
    (programs / "deepseek-lsp").chmod(0o755)
    with served(folder, {}, f"{programs}:{install.SCRIPTS}:{os.environ['PATH']}", (install.extension(),)) as address:
        page = window.new_page(viewport=WINDOW)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        running = Code(page, address, project)
        running.open("inventory.py")
        running.until_ready()
        yield running


@pytest.fixture
def code(opened: Code) -> Code:
    """The window with the cursor behind the header of `add`, and an empty conversation."""
    opened.command("DeepSeek: New Conversation")
    opened.view.frame.locator(".welcome").wait_for()
    opened.until(lambda: opened.view.has_focus)
    opened.open("inventory.py")
    opened.go_to(ADD)
    return opened


def undo(code: Code) -> None:
    """Once the editor has the focus again."""
    code.until_editor_has_focus()
    code.press("Control+z")


def ask(code: Code, text: str) -> None:
    code.view.input.fill(text)
    code.view.input.press("Enter")


def until_as_before(code: Code) -> None:
    """Takes back what was done to the inventory, and saves it; keys are lost now and then, and one too many changes nothing."""
    file = code.folder / "inventory.py"

    def is_as_before() -> bool:
        undo(code)
        code.press("Control+s")
        return code.soon(lambda: not code.page.locator(".tab.active.dirty").count() and file.read_text("utf-8") == INVENTORY)

    code.until(is_as_before)


def test_an_explanation_is_on_the_screen_while_it_comes_and_ends_when_it_is_stopped(code: Code, script: Script):
    script.says("`Inventory.add` keeps **items**", forever=True)
    code.command(EXPLAIN)
    code.view.until("answering", "Inventory.add keeps items")
    code.until(lambda: "DeepSeek is busy" in code.status)
    code.view.frame.get_by_role("button", name="Stop").click()
    stopped = code.view.until("stopped", "Stopped.")
    assert "Inventory.add keeps items" in stopped.inner_text()
    code.until(lambda: script.log[-1] == {"cancelled": True})
    code.until_ready()
    assert "def add(self, item: Item)" in script.asked


def test_code_of_an_answer_goes_to_the_cursor_as_one_edit(code: Code, script: Script, pictures: Path):
    script.says(ANSWER)
    code.command(EXPLAIN)
    answer = code.view.until("done", "To refuse a second item")
    assert answer.locator(".question").inner_text().startswith("Explain add")
    assert answer.locator("strong").inner_text() == "name" and answer.locator("ol > li").count() == 2
    assert answer.locator("pre").inner_text() == CODE
    code.picture(pictures / "vscode-panel.png")
    code.go_to(ADD)
    code.press("Enter")
    answer.get_by_role("button", name="Insert").click()
    code.until(lambda: code.line(ADD + 2) == " " * 12 + "raise ValueError(item.name)")
    assert code.line(ADD + 1) == " " * 8 + "if item.name in self.items:"
    undo(code)
    code.until(lambda: code.line(ADD + 1).strip() == "" and "self.items[item.name]" in code.line(ADD + 2))
    until_as_before(code)


def test_code_of_an_answer_is_copied(code: Code, script: Script):
    script.says(ANSWER)
    code.command(EXPLAIN)
    code.view.until("done").get_by_role("button", name="Copy").click()
    code.until(lambda: code.page.evaluate("navigator.clipboard.readText()") == CODE)


def test_markup_in_an_answer_is_text_and_the_policy_would_stop_it_if_it_were_not(code: Code, script: Script):
    script.says(HOSTILE)
    ask(code, "What is this?")
    answer = code.view.until("done", "<iframe")
    assert "onerror=\"document.title = 'broken'\"" in answer.inner_text()
    body = code.view.frame.locator("body")
    assert body.locator("img, iframe, object, style, [onerror], [onclick], [style*=url]").count() == 0
    assert [link.get_attribute("href") for link in answer.locator("a").all()] == ["https://evil.example/p.png", "https://example.org/ok"]
    ran = body.evaluate("""async body => {
        body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.ran = 1"><p onclick="window.ran = 2" id="p">');
        document.getElementById('p').click();
        const script = document.createElement('script');
        script.textContent = 'window.ran = 3';
        body.append(script);
        const refused = await fetch('https://evil.example').then(() => '', error => String(error));
        body.querySelectorAll('img, #p').forEach(element => element.remove());
        script.remove();
        return [window.ran ?? 0, Boolean(refused), document.title];
    }""")
    assert ran == [0, True, "DeepSeek"]
    assert not [url for url in code.asked if "evil.example" in url]
    policy = code.view.frame.locator('meta[http-equiv="Content-Security-Policy"]').get_attribute("content") or ""
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "'nonce-" in policy


def test_a_question_follows_what_was_said_and_a_new_conversation_knows_nothing_of_it(code: Code, script: Script):
    script.says("It keeps items.")
    code.command(EXPLAIN)
    code.view.until("done", "It keeps items.")
    script.says("Because of their names.")
    ask(code, "Why does it?")
    code.view.until("done", "Because of their names.")
    assert "It keeps items." in script.asked and script.asked.endswith("Why does it?")
    assert code.view.turns.count() == 2
    code.command("DeepSeek: New Conversation")
    code.view.frame.locator(".welcome").wait_for()
    ask(code, "What now?")
    code.view.until("done")
    assert "It keeps items." not in script.asked


def test_the_selection_goes_along_once_and_can_be_left_out(code: Code, script: Script):
    script.says("Yes.")
    code.select_lines(ADD, ADD + 1)
    chip = code.view.frame.get_by_role("button", name="inventory.py:20-21")
    chip.wait_for()
    ask(code, "Is this right?")
    code.view.until("done", "inventory.py:20-21")
    assert script.asked.count("def add(self, item: Item)") == 1
    ask(code, "Really?")
    code.until(lambda: script.asked.endswith("Really?"))
    assert script.asked.count("def add(self, item: Item)") == 1
    chip.click()
    code.view.frame.locator('.chip[aria-pressed="false"]').wait_for()
    code.view.until("done")
    code.command("DeepSeek: New Conversation")
    chip.wait_for()
    chip.click()
    code.view.frame.locator('.chip[aria-pressed="false"]').wait_for()
    ask(code, "And without?")
    code.view.until("done")
    assert "def add" not in script.asked


def test_an_answer_goes_on_while_the_panel_is_hidden(code: Code, script: Script):
    script.says("Half of it,", forever=True)
    ask(code, "Tell me")
    code.view.until("answering", "Half of it,")
    code.view.input.fill("half a question")
    code.press("Control+Shift+e")
    code.page.locator(".explorer-folders-view").wait_for()
    code.page.locator("iframe.webview.ready").wait_for(state="hidden")
    code.command("DeepSeek: Open the Chat")
    assert "Half of it," in code.view.until("answering").inner_text()
    assert code.view.input.input_value() == "half a question"
    code.view.input.press("Escape")
    code.view.until("stopped")
    code.view.input.fill("")


def test_a_server_that_ends_within_an_answer_is_said_and_can_be_asked_again(code: Code, script: Script):
    script.says("It keeps items.")
    ask(code, "What does it do?")
    code.view.until("done")
    script.says("It begins", forever=True)
    ask(code, "And why?")
    code.view.until("answering", "It begins")
    (server,) = servers(psutil.Process(), "tests.scripted")
    os.kill(server.pid, signal.SIGKILL)
    failed = code.view.until("failed", "The server ended before the answer did.")
    script.says("Because of names.")
    code.until_ready()
    failed.get_by_role("button", name="Ask again").click()
    again = code.view.until("done", "Because of names.")
    assert "no longer knows what was said above" in again.inner_text()
    assert code.view.turns.count() == 2


def test_everything_in_the_panel_is_reached_with_keys(code: Code, script: Script):
    script.says(ANSWER)
    code.page.locator(".editor-instance").click()
    code.press("Control+k")
    code.press("a")
    code.until(lambda: code.view.has_focus)
    code.type("/expl")
    code.view.frame.get_by_role("option", name="/explain_symbol").wait_for()
    code.press("ArrowDown")
    code.press("ArrowDown")
    code.press("Enter")
    assert code.view.input.input_value() == "/explain_symbol "
    code.press("Enter")
    code.view.until("done")

    def focused() -> str:
        found: str = code.view.frame.locator("body").evaluate("() => document.activeElement.className || document.activeElement.id")
        return found

    reached = []
    while focused() != "talk" and len(reached) < 10:
        code.press("Shift+Tab")
        reached.append(focused())
    assert [name for name in reached if name in ("chip", "copy", "insert", "talk")] == ["chip", "copy", "insert", "talk"]
    code.press("Tab")
    assert focused() == "insert"
    code.press("Enter")
    code.until(lambda: "if item.name in self.items:" in code.line(ADD))
    until_as_before(code)


def test_the_panel_has_the_colours_of_the_theme(code: Code):
    def colours() -> list[str]:
        found: list[str] = code.view.input.evaluate("i => [getComputedStyle(i).color, getComputedStyle(i.parentElement).backgroundColor]")
        return found

    dark = colours()
    code.command("Preferences: Toggle between Light/Dark Themes")
    code.until(lambda: colours()[0] != dark[0] and colours()[1] != dark[1])
    code.command("Preferences: Toggle between Light/Dark Themes")
    code.until(lambda: colours() == dark)


def test_tests_are_shown_before_the_new_file_is_made(code: Code, script: Script):
    file = code.folder / "tests/test_inventory.py"
    script.says(TESTS)
    code.command("DeepSeek: Write Tests for the Function")
    code.page.locator('.tab.active:has-text("new, proposed")').wait_for()
    code.page.locator('.notification-toast >> text="Discard"').click()
    code.page.locator('.tab:has-text("new, proposed")').wait_for(state="detached")
    assert not file.exists()
    code.command("DeepSeek: Write Tests for the Function")
    code.page.locator('.tab.active:has-text("new, proposed")').wait_for()
    code.page.locator('.editor-actions [aria-label^="Apply the Proposed Change"]').click()
    code.page.wait_for_selector('.tab.active[data-resource-name="test_inventory.py"]')
    code.until(lambda: file.exists() and "test_add_keeps_the_item" in file.read_text("utf-8"))
    file.unlink()
    code.page.locator(".notification-toast").wait_for(state="detached")
    code.press("Control+F4")


def test_a_change_in_ones_own_words_is_shown_as_a_diff_before_it_is_made(code: Code, script: Script):
    script.says("```python\n    def add(self, item: Item) -> None:\n        self.items.setdefault(item.name, item)\n```")
    code.select_lines(ADD, ADD + 1)
    code.choose("Change the selection as I say")
    code.box.fill("keep the first item")
    code.box.press("Enter")
    code.page.locator('.tab.active:has-text("inventory.py (proposed)")').wait_for()
    code.until(lambda: "setdefault" in code.page.locator(".modified .view-lines, .diff-editor .view-lines").all_inner_texts().__str__())
    assert "keep the first item" in script.asked
    code.page.locator('.notification-toast >> text="Apply"').click()
    code.until(lambda: code.line(ADD + 1) == " " * 8 + "self.items.setdefault(item.name, item)")
    until_as_before(code)


def test_a_diagnostic_is_fixed_and_explained(code: Code, script: Script):
    code.open("total.ts")
    code.page.locator(".squiggly-error").first.wait_for()
    code.go_to(2)
    code.press("Home")
    script.says("The **word** is no number.")
    code.choose("Explain this error")
    code.view.until("done", "The word is no number.")
    assert "is not assignable to type 'number'" in script.asked
    code.open("total.ts")
    code.go_to(2)
    script.says(f"```typescript\n{FIXED}\n```")
    code.choose("Fix this with the model")
    code.until(lambda: code.line(2) == "  return price;")
    code.page.locator(".squiggly-error").first.wait_for(state="detached")
    assert "is not assignable to type 'number'" in script.asked


def test_an_answer_that_cannot_be_used_says_why(code: Code, script: Script):
    script.says("I would rather not.")
    code.command("DeepSeek: Document the Function")
    code.page.locator('.notification-toast:has-text("holds no docstring")').wait_for()
    until_as_before(code)


def test_the_walkthrough_has_its_steps_and_pictures(code: Code):
    code.page.set_viewport_size({"width": 1600, "height": 900})
    code.command("Welcome: Open Walkthrough...")
    code.page.locator('.quick-input-list .monaco-list-row:has-text("DeepSeek on your own machine")').click()
    code.page.locator('.getting-started-step:has-text("Have code explained")').click()
    picture = code.page.locator('.getting-started-media img[alt^="The panel"]')
    picture.wait_for()
    code.until(lambda: picture.evaluate("image => image.naturalWidth") > 0)
    assert code.page.locator(".getting-started-step").count() == 6
    code.press("Control+F4")
    code.page.set_viewport_size(WINDOW)
