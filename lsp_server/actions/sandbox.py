"""Runs generated tests where they can do no harm: behind the walls of `walls.py`, for a limited time, with their output cut.

Owns: the run and what is told of it. Runs nothing where there are no walls.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 30.0
OUTPUT_BYTES = 3000
WALLS = Path(__file__).with_name("walls.py")
NOT_BUILT = 97
"""The status of `walls.py` when they could not be built: then nothing was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of a run: `is_done` says whether it took place at all, `output` what it or the sandbox said."""

    is_done: bool
    passed: bool = False
    output: str = ""


async def run(command: Sequence[str], root: Path, files: dict[str, str]) -> Run:
    """Runs `command` in `root`, which then also holds `files` (path below it: text). Nothing on disk changes."""
    if sys.platform != "linux":
        return Run(is_done=False, output="Tests are tried on Linux only, where they can be walled in.")
    with tempfile.TemporaryDirectory(prefix="deepseek-lsp-") as scratch:
        order = json.dumps({"command": list(command), "root": str(root), "scratch": scratch, "files": files})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(WALLS), stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
        )  # fmt: skip
        try:
            async with asyncio.timeout(LIMIT_S):
                output = await told(process, order.encode())
        except TimeoutError:
            return Run(is_done=True, output=f"The tests did not end within {LIMIT_S:g} s.")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    text = output.decode("utf-8", "replace")
    if process.returncode == NOT_BUILT:
        return Run(is_done=False, output=f"Tests are not tried: this system gives no sandbox ({text.strip()}).")
    return Run(is_done=True, passed=process.returncode == 0, output=text)


async def told(process: asyncio.subprocess.Process, order: bytes) -> bytes:
    """The end of what the process says, however much it says."""
    assert process.stdin and process.stdout
    with contextlib.suppress(ConnectionError):
        process.stdin.write(order)
        await process.stdin.drain()
        process.stdin.close()
    output = b""
    while piece := await process.stdout.read(65_536):
        output = (output + piece)[-OUTPUT_BYTES:]
    await process.wait()
    return output


def command_for(framework: str, python: str, file: str) -> list[str] | None:
    """How a test file of `framework` is run."""
    found = shutil.which(python)
    if found is None:
        return None
    if framework == "pytest":
        return [found, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", file]
    return [found, "-m", "unittest", "-q", file]
