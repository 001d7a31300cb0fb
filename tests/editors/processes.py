"""The servers that an editor started."""

import psutil


def servers(editor: psutil.Process) -> list[psutil.Process]:
    """Those that live, however deep below the editor's process."""
    return [child for child in editor.children(recursive=True) if any(part.endswith("/deepseek-lsp") for part in cmdline(child))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []
