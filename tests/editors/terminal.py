"""A program in a terminal of its own: keys go in, and what stands on its screen can be waited for, read and drawn."""

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pyte
from ptyprocess import PtyProcess
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.editors.processes import LIMIT_S

REMOTE_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


class Screen(pyte.Screen):
    """A screen that lets questions about itself pass that pyte does not know."""

    def report_device_status(self, mode: int, **_: bool) -> None: ...


class Terminal:
    def __init__(self, *command: str, cwd: Path, env: Mapping[str, str], columns: int = 100, rows: int = 30) -> None:
        self._screen = Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        surroundings = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | dict(env)
        self._process = PtyProcess.spawn(list(command), cwd=str(cwd), env=surroundings, dimensions=(rows, columns))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                read = self._process.read(65536)
            except (EOFError, OSError):
                return
            with self._changed:
                self._stream.feed(read)
                self._changed.notify_all()

    def press(self, keys: str) -> None:
        self._process.write(keys.encode())

    @property
    def lines(self) -> list[str]:
        with self._changed:
            return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, condition: Callable[[str], bool], limit_s: float = LIMIT_S) -> str:
        """Waits for a screen that the condition holds for."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while not condition(text := self.text):
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() > deadline:
                    raise TimeoutError(f"This was on the screen in the end:\n{text}")
        return text

    def shows(self, text: str, limit_s: float = LIMIT_S) -> str:
        return self.until(lambda screen: text in screen, limit_s)

    def press_until(self, keys: str, text: str, pause_s: float = 2.0) -> str:
        """Presses the keys again and again, with time to work in between, until a text is on the screen."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            self.press(keys)
            try:
                return self.shows(text, pause_s)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def draw(self, picture: Path, title: str) -> None:
        """Writes the screen as an SVG."""
        with self._changed:
            rows = [[self._screen.buffer[row][column] for column in range(self._screen.columns)] for row in range(self._screen.lines)]
            lines = [Text.assemble(*((cell.data, style(cell)) for cell in row)) for row in rows]
        save(lines, self._screen.columns, picture, title)

    def close(self) -> None:
        self._process.terminate(force=True)
        self._reader.join(5)


def save(lines: Iterable[Text], columns: int, picture: Path, title: str) -> None:
    """Writes lines as an SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=columns, file=io.StringIO())
    for line in lines:
        console.print(line, soft_wrap=True)
    drawn = console.export_svg(title=title, unique_id=picture.stem)
    picture.write_text(REMOTE_FONTS.sub("", drawn), "utf-8")


def style(cell: pyte.screens.Char) -> Style:
    foreground, background = (colour(name) for name in (cell.fg, cell.bg))
    return Style(color=foreground, bgcolor=background, bold=cell.bold, italic=cell.italics, underline=cell.underscore, reverse=cell.reverse)


def colour(name: str) -> str | None:
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name.lower()):
        return f"#{name}"
    return {"brown": "yellow"}.get(name, name.replace("bright", "bright_"))
