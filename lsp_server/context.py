"""Which documents are never read nor completed: files of secrets, and what is no text to complete."""

from pathlib import PurePosixPath

from lsp_server.session import Snapshot

MAX_LINE_CHARS = 20_000
SECRET_NAMES = (".env", "id_rsa", "id_ed25519", ".netrc", ".pgpass", ".npmrc", ".pypirc", "credentials")
SECRET_ENDINGS = (".pem", ".key", ".p12", ".pfx", ".kdbx", ".keystore")


def refusal(snapshot: Snapshot, chars: int, max_chars: int) -> str | None:
    """Why this document is not completed, as a sentence; None when it is."""
    name = PurePosixPath(snapshot.path).name.lower()
    if is_secret(name):
        return f"{name} looks like a file of secrets, and those are neither read nor completed."
    if chars > max_chars:
        return f"The document has {chars:,} characters, more than inline.max_document_chars = {max_chars:,}."
    if (length := len(snapshot.lines[snapshot.line])) > MAX_LINE_CHARS:
        return f"The cursor's line has {length:,} characters; lines of more than {MAX_LINE_CHARS:,} are not completed."
    if "\0" in "".join(snapshot.lines[max(snapshot.line - 50, 0) : snapshot.line + 50]):
        return "The text around the cursor holds NUL bytes: it looks like binary data."
    return None


def is_secret(name: str) -> bool:
    """Whether a file of this name is neither read nor completed."""
    name = name.lower()
    return name in SECRET_NAMES or name.startswith(".env.") or name.endswith(SECRET_ENDINGS)
