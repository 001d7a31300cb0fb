"""Where an edit may go, on a real file system."""

from pathlib import Path

import pytest

from lsp_server.actions import guard


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "a.py").write_text("x = 1\n")
    return folder


def refusal(file: Path | str, folder: Path, *, is_open: bool = True) -> str | None:
    uri = file if isinstance(file, str) else file.as_uri()
    return guard.refusal(uri, [folder.as_uri()], is_open=is_open)


def test_files_of_the_workspace_may_be_edited_there_or_not_yet(shop: Path):
    assert refusal(shop / "app" / "a.py", shop) is None
    assert refusal(shop / "tests" / "test_a.py", shop, is_open=False) is None
    assert refusal(shop / ".eslintrc.js", shop) is None


@pytest.mark.parametrize(
    "path",
    [
        ".git/hooks/pre-commit", ".GIT/config", ".git /config", ".git./config", "git~1/config", ".g\u200cit/config", "sub/.git/config",
        ".vscode/settings.json", ".VSCode/tasks.json", ".idea/workspace.xml", "x.code-workspace", ".github/workflows/ci.yml",
        ".gitlab-ci.yml", "Jenkinsfile", "azure-pipelines.yml", ".circleci/config.yml", ".bashrc", ".zshrc", ".profile", ".envrc",
        ".git::$INDEX_ALLOCATION/config", ".vscode/settings.json::$DATA", "sitecustomize.py", "lib/evil.pth", ".husky/pre-commit",
    ],
)  # fmt: skip
def test_what_other_programs_act_on_is_never_edited(shop: Path, path: str):
    assert "configuration that other programs act on" in (refusal(shop / path, shop) or "")


def test_what_lies_outside_is_not_edited_however_it_is_named(shop: Path, tmp_path: Path):
    outside = tmp_path / "outside.py"
    outside.write_text("")
    (shop / "link.py").symlink_to(outside)
    (shop / "folder").symlink_to(tmp_path)
    (shop / "hooks").symlink_to(shop / ".git")
    for place in (outside, shop / "link.py", shop / "folder" / "outside.py", tmp_path / "shop-two" / "a.py"):
        assert "outside the workspace" in (refusal(place, shop) or "")
    assert "with .." in (refusal(f"{shop.as_uri()}/../outside.py", shop) or "")
    assert "with .." in (refusal(f"{shop.as_uri()}/%2e%2e/outside.py", shop) or "")
    assert "configuration" in (refusal(shop / "hooks" / "pre-commit", shop) or "")


@pytest.mark.parametrize(
    "uri", ["git:/shop/app/a.py", "https://example.com/a.py", "file://server/share/a.py", "file:///a%00b.py", "file:", ""]
)
def test_only_files_of_this_machine_are_edited(shop: Path, uri: str):
    assert "Only files of this machine" in (refusal(uri, shop) or "")


def test_our_own_configuration_is_not_edited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert refusal(tmp_path / "deepseek-lsp" / "config.toml", tmp_path) is not None


def test_without_a_workspace_only_an_open_document_is_edited(shop: Path):
    file = shop / "app" / "a.py"
    assert guard.refusal(file.as_uri(), [], is_open=True) is None
    assert guard.refusal((shop / "app" / "b.py").as_uri(), [], is_open=False) is not None


def test_a_document_in_no_file_yet_is_edited_while_it_is_open_unless_it_is_to_become_what_others_act_on(shop: Path):
    assert refusal("untitled:Untitled-1", shop) is None
    assert refusal("untitled:/tmp/new.py", shop) is None
    assert "Only files of this machine" in (refusal("untitled:Untitled-1", shop, is_open=False) or "")
    for place in ("untitled:/home/me/.bashrc", f"untitled:{shop}/%2evscode/tasks.json"):
        assert "configuration" in (refusal(place, shop) or "")
