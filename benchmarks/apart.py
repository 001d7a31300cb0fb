"""Servers that are measured share their model with none of the user's editors, and leave none behind."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def apart(*, share_model: bool = True) -> Iterator[None]:
    """For the processes that are started within."""
    with tempfile.TemporaryDirectory(prefix="deepseek-lsp-") as room:
        before = dict(os.environ)
        os.environ |= {"XDG_RUNTIME_DIR": room, "DEEPSEEK_LSP_KEEP_MODEL_S": "0", "DEEPSEEK_LSP_SHARE_MODEL": str(share_model)}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before
