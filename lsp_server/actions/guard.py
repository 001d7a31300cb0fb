"""Which files an edit may touch: those of the workspace, and there none that something else reads as orders.

Owns: the refusal. An answer may have been written by whoever wrote the code the model was shown, so an edit never reaches what runs by
itself or loosens a guard: version control, editors' settings, CI, what a shell reads at its start, our own configuration (CVE-2025-53773,
CVE-2025-59944 are such cases). Looks at the file system, changes nothing.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import platformdirs

from lsp_server.workspace import path_of, root_of

FOLDERS = (
    ".git .hg .svn .vscode .idea .fleet .zed .cursor .devcontainer .github .gitlab .gitea .forgejo .circleci .buildkite .woodpecker .ci"
    " .husky .githooks .ssh .gnupg .aws .azure .kube .docker .deepseek-lsp"
)
FILES = (
    ".gitattributes .gitmodules .gitconfig .gitlab-ci.yml .travis.yml .drone.yml .woodpecker.yml appveyor.yml .appveyor.yml jenkinsfile"
    " azure-pipelines.yml azure-pipelines.yaml bitbucket-pipelines.yml .pre-commit-config.yaml lefthook.yml .bashrc .bash_profile"
    " .bash_login .bash_logout .profile .zshrc .zshenv .zprofile .zlogin .zlogout .cshrc .tcshrc .kshrc .login config.fish .envrc .exrc"
    " .nvimrc .nvim.lua .vimrc .emacs .dir-locals.el .netrc .npmrc .pypirc .mcp.json sitecustomize.py usercustomize.py deepseek-lsp.toml"
)
NAMES = frozenset((FOLDERS + " " + FILES).split())
ENDINGS = (".code-workspace", ".sublime-project", ".pth")
UNSAVED = "untitled:"
"""What VS Code names a document by that is in no file yet; it may have the path of the file it will be."""
SHORT_NAME = re.compile(r"(\.?\w{1,6})~\d")
"""What Windows calls a longer name: GIT~1."""


def folded(part: str) -> str:
    """A path's part as the most forgiving file system reads it."""
    shown = "".join(letter for letter in unicodedata.normalize("NFKC", part) if unicodedata.category(letter) != "Cf")
    return shown.split(":", 1)[0].rstrip(". ").casefold()


def is_protected(path: Path) -> bool:
    for part in map(folded, path.parts):
        if part in NAMES or part.endswith(ENDINGS):
            return True
        if (short := SHORT_NAME.fullmatch(part)) and any(name.lstrip(".").startswith(short[1].lstrip(".")) for name in FOLDERS.split()):
            return True
    return path.is_relative_to(platformdirs.user_config_path("deepseek-lsp", appauthor=False))


def protection(path: Path) -> str:
    return f"{path.name} is configuration that other programs act on, so the model's answers are never written there: change it by hand."


def refusal(uri: str, folders: Sequence[str], *, is_open: bool) -> str | None:
    """Why the file at `uri` is not edited, as a sentence; None when it may be. `folders` are the workspace's, as URIs. Without any, a
    document that the user has open may be edited; one that is in no file yet, always: it is the user's to save."""
    path = path_of(uri)
    if path is None and is_open and uri.startswith(UNSAVED):
        name = Path(unquote(uri.removeprefix(UNSAVED)))
        return protection(name) if is_protected(name) else None
    if path is None:
        return f"Only files of this machine are edited, and {uri.split(':', 1)[0]}: is another kind of place."
    if ".." in path.parts:
        return f"{path.name} is named by a path with .. in it, and such a file is not edited."
    real = path.resolve()
    if is_protected(path) or is_protected(real):
        return protection(path)
    if not any(map(path_of, folders)) and is_open and not path.is_symlink():
        return None
    if root_of(path, folders) is None:
        return f"{path.name} lies outside the workspace, and nothing is written there. Open its folder to edit it."
    return None
