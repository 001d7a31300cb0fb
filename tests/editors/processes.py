"""The servers that an editor started."""

import psutil


def servers(editor: psutil.Process, name: str = "/deepseek-lsp") -> list[psutil.Process]:
    """Those that live, however deep below the editor's process; one of their words ends with `name`."""
    return [child for child in editor.children(recursive=True) if any(part.endswith(name) for part in cmdline(child))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []
