"""The embedded model, loaded once; and folders with damaged copies of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_host.checkpoints import STARTER
from model_host.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(STARTER)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the starter that a test may damage."""
    return Path(shutil.copytree(STARTER, tmp_path / "checkpoint"))


@pytest.fixture
def edited_config(copied: Path) -> Callable[..., Path]:
    def edit(**changes: Any) -> Path:
        file = copied / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return copied

    return edit
