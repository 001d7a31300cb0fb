"""The settings that editors offer are those of the server's model; where they differ, their files were not written anew."""

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
