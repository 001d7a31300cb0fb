"""Which text goes into a completion's prompt: the path, a window of the file, the line being typed.

Owns: the window and the anchor. The prompt is cut at the start of the cursor's line, the anchor: everything before it stays the
same from one keystroke to the next, and what was typed on the line is the middle's beginning (docs/architecture.md, "The
prompt"). The window moves in steps, never with the cursor, for the same reason.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from lsp_server.session import Snapshot
from model_host.generation import Fim
from prompts.comments import path_comment

CHARS_PER_TOKEN = 3
SUFFIX_SHARE = 0.25
STEPS = 4
"""A window's end moves by a quarter of its size at a time."""
MAX_LINE_CHARS = 20_000
SECRET_NAMES = (".env", "id_rsa", "id_ed25519", ".netrc", ".pgpass", ".npmrc", ".pypirc", "credentials")
SECRET_ENDINGS = (".pem", ".key", ".p12", ".pfx", ".kdbx", ".keystore")


def refusal(snapshot: Snapshot, chars: int, max_chars: int) -> str | None:
    """Why this document is not completed, as a sentence; None when it is."""
    name = PurePosixPath(snapshot.path).name.lower()
    if name in SECRET_NAMES or name.startswith(".env.") or name.endswith(SECRET_ENDINGS):
        return f"{name} looks like a file of secrets, and those are neither read nor completed."
    if chars > max_chars:
        return f"The document has {chars:,} characters, more than inline.max_document_chars = {max_chars:,}."
    if (length := len(snapshot.lines[snapshot.line])) > MAX_LINE_CHARS:
        return f"The cursor's line has {length:,} characters; lines of more than {MAX_LINE_CHARS:,} are not completed."
    if "\0" in "".join(snapshot.lines[max(snapshot.line - 50, 0) : snapshot.line + 50]):
        return "The text around the cursor holds NUL bytes: it looks like binary data."
    return None


def fim_prompt(snapshot: Snapshot, shown_path: str, context_tokens: int) -> Fim:
    """The hole at the cursor, with line endings as \\n, within about `context_tokens`."""
    budget = context_tokens * CHARS_PER_TOKEN
    suffix_chars = int(budget * SUFFIX_SHARE)
    first = window_start(snapshot.lines, snapshot.line, budget - suffix_chars)
    last = window_end(snapshot.lines, snapshot.line, suffix_chars)
    rest = snapshot.lines[snapshot.line][snapshot.column :]
    return Fim(
        prefix=path_comment(shown_path, snapshot.language) + with_newlines(snapshot.lines[first : snapshot.line]),
        suffix=with_newlines([rest, *snapshot.lines[snapshot.line + 1 : last]]),
        middle=snapshot.before,
    )


def window_start(lines: Sequence[str], line: int, max_chars: int) -> int:
    """The first line shown: 0 while all fits, then the top-level line behind the last whole step."""
    step = max(max_chars // STEPS, 1)
    excess = sum(map(len, lines[:line])) - max_chars
    if excess <= 0:
        return 0
    cut = -(-excess // step) * step
    offset = 0
    for index in range(line):
        if offset >= cut and not lines[index][:1].isspace():
            return index
        if offset >= cut + step:  # no top-level line far and wide
            return index
        offset += len(lines[index])
    return line


def window_end(lines: Sequence[str], line: int, max_chars: int) -> int:
    """The line behind the last one shown; what is hidden is whole steps counted from the file's end, which typing does not move."""
    step = max(max_chars // STEPS, 1)
    excess = sum(map(len, lines[line + 1 :])) - max_chars
    hidden = -(-excess // step) * step if excess > 0 else 0
    for index in range(len(lines), line + 1, -1):
        if hidden <= 0:
            return index
        hidden -= len(lines[index - 1])
    return line + 1


def with_newlines(lines: Sequence[str]) -> str:
    return "".join(lines).replace("\r\n", "\n").replace("\r", "\n")
