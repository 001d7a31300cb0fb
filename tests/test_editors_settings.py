"""The settings that editors offer are those of the server's model; where they differ, their files were not written anew."""

import re

import pytest

from editors import settings


@pytest.mark.parametrize("file", settings.texts(), ids=lambda file: file.name)
def test_the_file_has_the_servers_settings(file):
    assert file.read_text("utf-8") == settings.texts()[file], "run: python -m editors.settings"


def test_what_only_the_user_may_set_is_out_of_a_workspaces_reach():
    declared = settings.configuration()["properties"]
    users = {name for name, setting in declared.items() if setting["scope"] == "machine"}
    assert {"deepseek-lsp.model", "deepseek-lsp.device", "deepseek-lsp.server.path"} <= users
    assert "deepseek-lsp.inline.max_lines" not in users
    assert set(settings.package()["capabilities"]["untrustedWorkspaces"]["restrictedConfigurations"]) == users
    assert not users & set(settings.schema()["properties"])


def test_every_file_that_the_extension_names_is_there():
    package = settings.package()
    steps = package["contributes"]["walkthroughs"][0]["steps"]
    named = [step["media"]["markdown"] for step in steps if "markdown" in step["media"]]
    named += [container["icon"] for containers in package["contributes"]["viewsContainers"].values() for container in containers]
    missing = [name for name in named if not (settings.PACKAGE.parent / name).is_file()]
    assert len(steps) >= 5 and not missing


def test_every_command_in_a_menu_a_key_or_the_walkthrough_is_declared():
    contributes = settings.package()["contributes"]
    declared = {command["command"] for command in contributes["commands"]}
    used = [entry["command"] for entries in contributes["menus"].values() for entry in entries]
    used += [binding["command"] for binding in contributes["keybindings"]]
    words = " ".join(step["description"] for step in contributes["walkthroughs"][0]["steps"])
    used += re.findall(r"\(command:([\w.-]+)", words)
    assert not {command for command in used if command.startswith("deepseek-lsp.")} - declared
