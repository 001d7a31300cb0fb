"""Configurations in editors/README.md for editors that are not run here: held against what those editors read, and what they name is
started and spoken to. Zed: "Configuring Languages" in its manual. Sublime Text: "Client Configuration" in that of its package LSP."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.editors import install
from tests.wire import wire

README = (Path(__file__).parents[2] / "editors/README.md").read_text("utf-8")


def configuration(editor: str) -> Any:
    return json.loads(README.split(f"## {editor}\n")[1].split("```json\n")[1].split("```")[0])


def zed() -> list[str]:
    """The command that Zed starts for Python."""
    found = configuration("Zed")
    assert set(found) == {"lsp", "languages"}
    ((server, settings),) = found["lsp"].items()
    assert server in found["languages"]["Python"]["language_servers"] and "..." in found["languages"]["Python"]["language_servers"]
    assert set(settings) == {"binary"} and set(settings["binary"]) == {"path", "arguments"}, "Zed takes a path together with its arguments"
    return [settings["binary"]["path"], *settings["binary"]["arguments"]]


def sublime() -> list[str]:
    """The command that the package LSP starts for Python."""
    ((_, client),) = configuration("Sublime Text")["clients"].items()
    assert set(client) == {"enabled", "command", "selector", "initializationOptions"}
    assert client["enabled"] is True and client["selector"] == "source.python"
    command: list[str] = client["command"]
    return command


@pytest.mark.parametrize("command", [zed, sublime], ids=["Zed", "Sublime Text"])
async def test_the_configuration_starts_a_server_that_offers_items_and_actions(command):
    program, *arguments = command()
    async with wire(str(install.SCRIPTS / program), *arguments) as server:
        await server.send(id=1, method="initialize", params={"processId": None, "rootUri": None, "capabilities": {}})
        offered = (await server.answer(1))["result"]["capabilities"]
        assert "completionProvider" in offered and "codeActionProvider" in offered
