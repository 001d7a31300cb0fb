"""The extension's keys beside VS Code's own, on each system: those of its build for browsers, where the browser says which system it
is. What the desktop application binds beside them is not seen here."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.editors import install
from tests.editors.processes import LIMIT_S
from tests.editors.vscode import browser, load_into_host, served, wait_for

EXTENSION = Path(__file__).parents[2] / "editors/vscode"
SYSTEMS = {"linux": "X11; Linux x86_64", "mac": "Macintosh; Intel Mac OS X 10_15_7", "win": "Windows NT 10.0; Win64; x64"}
AGENT = "Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """VS Code's keybindings with the extension on each system."""
    install.extension()
    folder = tmp_path_factory.mktemp("keys")
    found = {}
    with served(folder, {"deepseek-lsp.server.path": "/nowhere"}, os.environ["PATH"], ()) as address, browser() as window:
        for name, system in SYSTEMS.items():
            project, results = folder / name, folder / f"{name}.json"
            (project / ".vscode").mkdir(parents=True)
            (project / ".vscode/settings.json").write_text(json.dumps({"tests.results": str(results)}))
            page = window.new_page(user_agent=AGENT.format(system=system))
            load_into_host(page, address, (EXTENSION,), Path(__file__).with_name("vscode_keys.js"))
            page.goto(f"{address}/?folder={project}", timeout=1000 * LIMIT_S)
            wait_for(results.exists, lambda: "VS Code showed no keybindings")
            page.close()
            lines = [line for line in results.read_text().splitlines() if not line.strip().startswith("//")]
            found[name] = json.loads("\n".join(lines))
    return found


def own(system: str) -> Iterator[tuple[str, str, str]]:
    """Our keys on a system, their commands, and when they hold."""
    package: Any = json.loads((EXTENSION / "package.json").read_text("utf-8"))
    for binding in package["contributes"]["keybindings"]:
        yield binding.get(system, binding["key"]), binding["command"], binding["when"]


def chords(key: str) -> list[frozenset[str]]:
    """`ctrl+k x` as what is pressed one after the other."""
    return [frozenset(chord.split("+")) for chord in key.split()]


def meet(one: str, other: str) -> bool:
    """Whether one is the other, or its beginning: then one of them cannot be had."""
    return all(a == b for a, b in zip(chords(one), chords(other), strict=False))


def exclude(one: str, other: str) -> bool:
    """Whether two conditions never hold together, going by their words: in each pair of alternatives one says what the other denies."""
    return all(contradict(a.split(" && "), b.split(" && ")) for a in one.split(" || ") for b in other.split(" || "))


def contradict(one: list[str], other: list[str]) -> bool:
    denials = {f"!{word}" for word in one} | {word.removeprefix("!") for word in one if word.startswith("!")}
    denials |= {word.replace(" == ", " != ") for word in one} | {word.replace(" != ", " == ") for word in one}
    return "false" in other or bool((denials - set(one)) & set(other))


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_key_takes_one_of_vs_codes_own_where_that_means_something(defaults: dict[str, list[dict[str, str]]], system: str):
    ours = {(key, command) for key, command, _ in own(system)}
    there = {(row["key"], row["command"]) for row in defaults[system]}
    assert ours <= there and len(there) > 500 and any("cmd" in key for key, _ in there) is (system == "mac")
    taken = [
        f"{key} when {when} takes {row}"
        for key, _, when in own(system)
        for row in defaults[system]
        if (row["key"], row["command"]) not in ours and meet(key, row["key"]) and not exclude(when, row.get("when", ""))
    ]
    assert not taken, "\n".join(taken)
