"""Which files of a workspace may be read."""

from pathlib import Path

import pytest

from lsp_server.actions import suites
from lsp_server.errors import Refusal
from lsp_server.workspace import is_own, read, root_of


def written(root: Path, **files: str) -> None:
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_innermost_folder_is_a_files_own(tmp_path: Path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    folders = [tmp_path.as_uri(), inner.as_uri(), "untitled:x"]
    assert root_of(inner / "x.py", folders) == inner
    assert root_of(tmp_path / "a" / "x.py", folders) == tmp_path
    assert root_of(tmp_path.parent / "x.py", folders) is None


def test_what_git_ignores_is_not_the_projects_own(tmp_path: Path):
    root = tmp_path / "repository" / "app"
    written(root.parent, **{".gitignore": "*.gen.py\n/app/local/\n", "app__.gitignore": "!kept.gen.py\n"})
    (root.parent / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*\n")  # outside of the repository
    assert is_own(root / "a.py", root) and is_own(root / "kept.gen.py", root)
    assert not is_own(root / "a.gen.py", root) and not is_own(root / "local" / "a.py", root)


def test_folders_of_installed_code_are_skipped_by_their_whole_names(tmp_path: Path):
    written(tmp_path, packages__a="1", site__b="2", node_modules__c="3")
    assert suites.files_of(tmp_path) == [Path("packages/a"), Path("site/b")]
    assert is_own(tmp_path / "packages" / "a", tmp_path) and not is_own(tmp_path / "node_modules" / "c", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("nothing.py", "cannot be read"), (".env", "secrets"), ("folder", "no file"), ("large.py", "larger")]
)
def test_what_is_not_read_is_said_in_a_sentence(tmp_path: Path, name: str, said: str):
    written(tmp_path, **{".env": "A=1", "large.py": "x" * 200, "folder__x": ""})
    with pytest.raises(Refusal, match=said):
        read(tmp_path / name, [tmp_path.as_uri()], max_bytes=100)
