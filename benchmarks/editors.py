"""python -m benchmarks.editors [--quick]: from a key pressed to ghost text on the screen, in VS Code and in Neovim.

Both run the real server with the starter model. Each time a blank is added two lines above the hole of examples/inventory.py, so that no
suggestion from before holds; then one letter is typed into the hole, and the screen is watched until the suggestion is drawn. The
server's part is the same on the wire, with no editor: from the request written to the answer read. What is left is the editor's: its
pause after a key (200 ms in Neovim), its requests, its drawing. There is no ceiling but the server's part. That is measured with the model
in the process that editors share and, taking turns, within the server (`alone`), without the first key, for which the file is computed.
"""

import argparse
import asyncio
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.apart import apart
from benchmarks.report import report
from tests.editors import install
from tests.editors.neovim import ESCAPE, Neovim
from tests.editors.vscode import GHOST, Code, browser, served
from tests.wire import wire

INVENTORY = Path("examples/inventory.py").read_text("utf-8")
HOLE = 24
ABOVE = 22
KEY = "r"
SHOWN = re.compile(r"def get\(.*\n +r\S")
TURNS = 3
SERVER = (sys.executable, "-m", "lsp_server")
DRAWN = f"""() => new Promise(resolve => {{
    let pressed;
    const look = () => {{
        if (pressed && document.querySelector('{GHOST}')?.textContent) {{
            watcher.disconnect();
            requestAnimationFrame(() => resolve(performance.now() - pressed));
        }}
    }};
    const watcher = new MutationObserver(look);
    watcher.observe(document, {{ subtree: true, childList: true, characterData: true }});
    document.addEventListener('keydown', () => {{ pressed = performance.now(); }}, {{ capture: true, once: true }});
}})"""


def spread(name: str, times: list[float]) -> dict[str, float]:
    return {f"{name}_p50_ms": statistics.median(times), f"{name}_p95_ms": statistics.quantiles(times, n=20)[18]}


def in_neovim(rounds: int, folder: Path) -> list[float]:
    editor = Neovim(folder)
    try:
        editor.open("inventory.py", INVENTORY)
        editor.until_ready()
        times = []
        for round in range(rounds):
            editor.lua("vim.fn.setline(...)", ABOVE, " " * round)
            editor.terminal.press(f"{ESCAPE}{HOLE}GA")
            editor.terminal.shows("INSERT")
            started = time.perf_counter()
            editor.terminal.press(KEY)
            editor.terminal.until(lambda screen: bool(SHOWN.search(screen)))
            times.append(1000 * (time.perf_counter() - started))
            editor.terminal.press(f"{ESCAPE}x")
            editor.terminal.until(lambda screen: not SHOWN.search(screen))
        return times
    finally:
        editor.close()


def in_vscode(rounds: int, folder: Path) -> list[float]:
    project = folder / "shop"
    project.mkdir()
    (project / "inventory.py").write_text(INVENTORY)
    path = f"{install.SCRIPTS}:{os.environ['PATH']}"
    with served(folder, {}, path, (install.extension(),)) as address, browser() as window:
        code = Code(window.new_page(), address, project)
        code.open("inventory.py")
        code.until_ready()
        times = []
        for _ in range(rounds):
            code.go_to(ABOVE)
            code.type(" ")
            code.go_to(HOLE)
            code.page.evaluate(f"void (window.drawn = ({DRAWN})())")
            code.type(KEY)
            times.append(float(code.page.evaluate("window.drawn")))
            code.press("Escape")
            code.press("Backspace")
            code.until(lambda: code.press("Escape") or not code.ghost)  # an answer may still be on its way
        return times


async def on_the_wire(rounds: int) -> list[float]:
    """The server's part: from the request written to the answer read, with the same keys in the same place."""
    uri = "file:///project/shop.py"
    async with wire(*SERVER) as server:
        await server.start()
        await server.open(INVENTORY)
        id, version, times = 10, 1, []
        state = ""
        while state != "ready":
            id += 1
            await server.send(id=id, method="deepseek/status", params=None)
            state = (await server.answer(id))["result"]["state"]
            await asyncio.sleep(0.05)
        for round in range(rounds):
            for line, text, column in ((ABOVE, " ", 0), (HOLE, KEY, 8)):
                version += 1
                here = {"line": line - 1, "character": column}
                place = {"start": here, "end": here if line == ABOVE or not round else here | {"character": column + 1}}
                document = {"uri": uri, "version": version}
                params = {"textDocument": document, "contentChanges": [{"range": place, "text": text}]}
                await server.send(method="textDocument/didChange", params=params)
            id += 1
            started = time.perf_counter()
            await server.ghost(id, HOLE - 1, 9)
            await server.answer(id)
            times.append(1000 * (time.perf_counter() - started))
        return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editors", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer keys")
    rounds = 10 if parser.parse_args().quick else 60
    times: dict[str, list[float]] = {"server": [], "alone": []}
    for _ in range(TURNS):
        for name, took in times.items():
            with apart(share_model=name == "server"):
                took.extend(asyncio.run(on_the_wire(rounds // TURNS + 1))[1:])
    metrics = {key: value for name, took in times.items() for key, value in spread(name, took).items()}
    for name, measured in (("neovim", in_neovim), ("vscode", in_vscode)):
        with apart(), tempfile.TemporaryDirectory() as folder:
            metrics |= spread(name, measured(rounds, Path(folder)))
    report("editors", metrics)


if __name__ == "__main__":
    main()
