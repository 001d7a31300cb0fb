"""The folders that an editor has open: which of their files may be read.

Owns: the way from a URI to a file, and the refusal: nothing outside the folders (by real path), no secrets, nothing too large, nothing that
is no text. What is read without being asked for is the project's own besides: not hidden, not built or installed, not ignored by git.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from re import match
from urllib.parse import unquote, urlsplit

from pathspec import GitIgnoreSpec

from lsp_server.context import is_secret
from lsp_server.errors import Refusal

MAX_BYTES = 2_000_000
NOT_OURS = {
    "node_modules", "target", "build", "dist", "vendor", "__pycache__", "venv", "env", "site-packages", "out", "bin", "obj",
}  # fmt: skip
"""Folders of what was built or installed."""


def path_of(uri: str) -> Path | None:
    """The local file a URI names, or None."""
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not path or "\0" in path:
        return None
    if match(r"/[A-Za-z]:", path):  # file:///c:/x
        path = path[1:]
    return Path(path)


def root_of(path: Path, folders: Sequence[str]) -> Path | None:
    """The real path of the innermost of the `folders` (URIs) that the file really lies in."""
    real = path.resolve()
    roots = [root.resolve() for folder in folders if (root := path_of(folder)) is not None]
    return max((root for root in roots if real.is_relative_to(root)), key=lambda root: len(root.parts), default=None)


def read(path: Path, folders: Sequence[str], max_bytes: int = MAX_BYTES) -> str:
    """The text of a file of the workspace. Raises Refusal."""
    if root_of(path, folders) is None:
        raise Refusal(f"{path.name} is neither open nor in the workspace, so it is not read.")
    if is_secret(path.name) or is_secret(path.resolve().name):
        raise Refusal(f"{path.name} looks like a file of secrets, and those are not read.")
    try:
        if path.exists() and not path.is_file():
            raise Refusal(f"{path.name} is no file, so it is not read.")
        if path.stat().st_size > max_bytes:
            raise Refusal(f"{path.name} is larger than {max_bytes / 1e6:g} MB, so it is not read.")
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path.name} cannot be read: {error}") from error


def is_own(path: Path, root: Path) -> bool:
    """Whether a file below `root` (both real paths) is one that people of the project write: not hidden, not of secrets, not built or
    installed, not ignored by git."""
    parts = path.relative_to(root).parts
    if is_secret(path.name) or any(part.startswith(".") or part in NOT_OURS for part in parts):
        return False
    return not is_ignored(path, root)


def why_ignored(uri: str) -> str | None:
    """Why a document is not completed because git ignores it, as a sentence; None where it does not, or where nobody can tell. Reads files:
    not for the event loop."""
    path = path_of(uri)
    try:
        if path is None or not is_ignored(path.resolve()):
            return None
    except (OSError, ValueError):
        return None
    return f"git ignores {path.name}, and such files are not completed unless inline.ignored_files is true."


def is_ignored(path: Path, top: Path | None = None) -> bool:
    """Whether the .gitignore files of the repository that a real path is in, or else those up to `top`, ignore it. Raises OSError or
    ValueError where one of them cannot be read or understood."""
    top = next((folder for folder in path.parents if (folder / ".git").exists()), top)
    for folder in path.parents if top else ():  # the nearest .gitignore that speaks of the file decides
        file = folder / ".gitignore"
        ignores = patterns(file, file.stat().st_mtime_ns).check_file(path.relative_to(folder)).include if file.is_file() else None
        if ignores is not None:
            return ignores
        if folder == top:
            break
    return False


@lru_cache(64)
def patterns(file: Path, written_ns: int) -> GitIgnoreSpec:
    """What a .gitignore that was written then says."""
    return GitIgnoreSpec.from_lines(file.read_text("utf-8", "replace").splitlines())
