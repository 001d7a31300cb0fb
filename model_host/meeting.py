"""Where the process is met that holds a model for all editors of a user, and who starts it where it is not there.

Owns: the place, a socket in a folder that only the user can open. Whoever wants the same model in the same way, with the same code, meets
the same process; one that nobody uses any more is asked to go before another is started. Knows nothing of torch.
"""

import contextlib
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model_host.errors import EngineError
from model_host.generation import Facts, Progress
from model_host.line import read, read_error, written
from model_host.wanted import Wanted

MEETING_S = 60.0
"""How long a process may take until it listens: Python has to start, no more."""
LOOK_EVERY_S = 0.02
LEAVING_S = 20.0
"""How long a process that goes may take to free its memory."""
MAX_FOLDER_BYTES = 80
"""A socket's name may have a hundred or so."""
LOG_CHARS = 300


def why_alone() -> str | None:
    """Why there can be no shared process here; None where there can."""
    if not hasattr(socket, "AF_UNIX") or sys.platform == "win32":
        return "this system has no sockets in the file system"
    try:
        folder()
    except OSError as error:
        return str(error)
    return None


def folder() -> Path:
    """Where this user's processes are met. Raises OSError where nobody can make such a folder, or others can open it."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    place = Path(given) / "deepseek-lsp"
    if not given or len(os.fsencode(place)) > MAX_FOLDER_BYTES:
        place = Path(tempfile.gettempdir()) / f"deepseek-lsp-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{place} can be opened by others: remove it, or chmod 700 {place}")
    return place


def name_of(wanted: Wanted) -> str:
    """The same for whoever wants the same, has the same code, and sees the same GPUs and files."""
    here, model = Path(__file__).parent, Path(wanted.model).expanduser()
    files = [*here.rglob("*.py"), *(model.iterdir() if model.is_dir() else ())]
    newest = max(file.stat().st_mtime_ns for file in files)
    seen = [asdict(wanted), version("deepseek-lsp"), sys.executable, str(here), os.environ.get("CUDA_VISIBLE_DEVICES"), newest]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the process for one model is met."""

    socket: Path
    lock: Path
    """Held by that process as long as it lives."""
    log: Path
    """What it has said beside its answers."""

    @classmethod
    def of(cls, wanted: Wanted) -> "Place":
        """Raises OSError."""
        name = folder() / name_of(wanted)
        return cls(name, name.with_suffix(".lock"), name.with_suffix(".log"))

    def last_words(self) -> str:
        """What the log says of an end: the name of a crash, else its last line; nothing where that came without a word."""
        try:
            lines = self.log.read_text("utf-8", "replace").split("\n")
        except OSError:
            return ""
        said = [line.strip()[:LOG_CHARS] for line in lines if line.strip()]
        return next((line for line in reversed(said) if line.startswith("Fatal ")), said[-1] if said else "")


class Line:
    """This end of the connection to a process."""

    def __init__(self, place: Path, patience_s: float | None = None) -> None:
        """Raises OSError where nobody listens."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience_s)
        try:
            self._socket.connect(str(place))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Waits until there is room for all of it. Raises OSError when nobody is there any more."""
        self._socket.sendall(data)

    def send_now(self, data: bytes) -> int:
        """How much of it there was room for."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # nobody is there any more, which whoever reads notices
            return len(data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """What the process says until the connection ends."""
        try:
            for line in self._lines:
                said: dict[str, Any] = json.loads(line)
                yield said
        except (OSError, ValueError):  # broken off, maybe within a line
            return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the wait of whoever reads
        self._socket.close()


def started(wanted: Wanted, place: Place) -> subprocess.Popen[str]:
    """A process of its own that outlives this one. It ends at once where another has the place already."""
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "model_host.keeper"],  # -P: never code from the folder that the editor was started in
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            text=True,
        )
    finally:
        os.close(log)
    assert process.stdin is not None
    with process.stdin as orders:
        orders.write(json.dumps([asdict(wanted), *map(str, (place.socket, place.lock, place.log))]))
    threading.Thread(target=process.wait, daemon=True).start()  # it is our child as long as we live
    return process


def make_room(place: Place) -> None:
    """Ends those processes whose model nobody uses any more: their memory may be needed by the one that is about to start."""
    for lock in place.lock.parent.glob("*.lock"):
        if lock == place.lock:
            continue
        try:
            line = Line(lock.with_suffix(""), LEAVING_S)
            line.send(written(leave=True))
        except OSError:
            continue
        for said in line:  # to the end of the process, if it goes
            if said.get("leaving") is False:
                break
        line.close()


def joined(wanted: Wanted, place: Place, keep_s: float, progress: Progress) -> tuple[Line, Facts]:
    """A line to the process that has the model, once it is loaded. Raises EngineError."""
    process: subprocess.Popen[str] | None = None
    deadline = time.monotonic() + MEETING_S
    while time.monotonic() < deadline:
        try:
            line = Line(place.socket)
        except OSError:
            if process is not None and process.poll():
                raise EngineError(f"The model's process could not start: {place.last_words()}") from None
            if process is None or process.poll() == 0:  # another one has the place, and does not listen yet or any more
                make_room(place)
                process = started(wanted, place)
            time.sleep(LOOK_EVERY_S)
            continue
        met = False
        try:
            line.send(written(keep_s=keep_s))
            for said in line:
                met = True
                if "facts" in said:
                    return line, read(Facts, said["facts"])
                if "failed" in said:
                    raise read_error(said["failed"])
                progress(said["doing"], said["share"])
        except OSError:
            pass
        line.close()
        if met:
            raise EngineError(f"The model's process ended while it loaded{in_words(place)}: see what fits with deepseek-lsp doctor.")
    raise EngineError(f"The model's process did not listen within {MEETING_S:g} s: see {place.log}.")


def in_words(place: Place) -> str:
    words = place.last_words()
    return f" ({words}; see {place.log})" if words else ", without a word, as it does when memory runs out"
