"""python -m tests.editors.offline FOLDER: in VS Code a suggestion shown and accepted, and code explained in the panel; run in a namespace
without a network."""

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from tests.editors import install
from tests.editors.vscode import Code, browser, served

HOLE = 24
SIOCSIFFLAGS, UP = 0x8914, 0x1


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP))


def main() -> None:
    loopback_up()
    folder = Path(sys.argv[1])
    project = folder / "shop"
    project.mkdir()
    path = f"{install.SCRIPTS}:{os.environ['PATH']}"
    package = Path(__file__).parents[2] / "editors/vscode/deepseek-lsp.vsix"
    (project / "inventory.py").write_text(Path("examples/inventory.py").read_text("utf-8"))
    with served(folder, {}, path, (package,)) as address, browser() as window:
        code = Code(window.new_page(), address, project)
        code.open("inventory.py")
        code.until_ready()
        code.go_to(HOLE)
        code.type("r")
        code.until_ghost()
        code.press("Tab")
        code.until(lambda: "items[name]" in code.line(HOLE))
        code.command("DeepSeek: Explain the Selection or the Function")
        explained = code.view.until("done")
        sys.stdout.write(f"{code.line(HOLE)}\n{explained.inner_text()}")


if __name__ == "__main__":
    main()
