"""What the tests of all editors share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: docs/pictures when `make pictures` asks for new ones."""
    wanted = os.environ.get("EDITORS_PICTURES")
    return Path(wanted).resolve() if wanted else tmp_path_factory.mktemp("pictures")
