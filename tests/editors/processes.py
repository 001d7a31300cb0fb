"""The processes of an editor: the servers it started, and its end."""

import contextlib

import psutil

LIMIT_S = 90.0
"""How long anything may take: on a free machine seconds, on a busy one a multiple of that."""
SOON_S = 8.0
"""How long what a key does may take before it is pressed once more."""
END_LIMIT_S = 10.0


def servers(editor: psutil.Process, name: str = "/deepseek-lsp") -> list[psutil.Process]:
    """Those that live, however deep below the editor's process; one of their words ends with `name`."""
    return [child for child in editor.children(recursive=True) if any(part.endswith(name) for part in cmdline(child))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def end(editor: psutil.Process) -> None:
    """Ends it and all below it: node, as pip installs it, does not take its children along."""
    family = [editor, *editor.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(family, END_LIMIT_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
