"""Gathers the starter model's corpus: permissively licensed Python source, with the licence of every part written down.

Owns: which distributions and which files count. Knows nothing of tokens. Sources are the standard library of the running
interpreter and the wheels of `packages.txt` (fetched with pip); a distribution takes part only if its own metadata names a
licence of `PERMITTED`. The result is `corpus.jsonl.xz` (one document a line) and `corpus.json` (what went in, by distribution).
"""

import gzip
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PERMITTED = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation)\b", re.IGNORECASE)
FORBIDDEN = re.compile(r"GPL|MPL|Mozilla|Affero|EUPL|CC-BY|Proprietary|Commercial", re.IGNORECASE)
GENERATED = re.compile(r"do not edit|auto-?generated|generated (by|from)|automatically generated", re.IGNORECASE)
SKIPPED_FOLDERS = {"locale", "locales", "_vendor", "vendored", "vendor", "third_party", "externals", "migrations", "idle_test", "lib2to3"}
MIN_CHARS, MAX_CHARS, MAX_LINE_CHARS = 200, 150_000, 300
MAX_DISTRIBUTION_CHARS = 4_500_000
MAX_LIBRARY_CHARS = 30_000_000
"""Of any one distribution, and of the standard library: so that no house style outweighs the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    distribution: str
    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One source of documents: its name, version and licence as its metadata gives them, and its Python files."""

    name: str
    version: str
    licence: str
    files: Iterable[tuple[str, bytes]]


def fetch_wheels(packages: Iterable[str], folder: Path) -> None:
    """Downloads one wheel per package into `folder` with pip; a package that cannot be had is named on stderr and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    present = {wheel.name.split("-")[0].lower().replace("_", "-") for wheel in folder.glob("*.whl")}
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.13", "--implementation=cp", "--platform=any"]
    options += [f"--abi={abi}" for abi in ("cp313", "abi3", "none")]
    options += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17, 12)] + ["--platform=manylinux2014_x86_64"]

    def fetch(package: str) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), package]
        if subprocess.run(command, capture_output=True, timeout=600, check=False).returncode:
            sys.stderr.write(f"no wheel of {package}: left out\n")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, (p for p in packages if p.lower().replace("_", "-") not in present)))


def licence_in(metadata: str) -> str:
    """The licence a METADATA file states: its expression, else its classifiers, else the first line of its License field."""
    headers = HeaderParser().parsestr(metadata)
    if expression := headers.get("License-Expression"):
        return str(expression)
    classifiers = [c.split(" :: ")[-1] for c in headers.get_all("Classifier", []) if c.startswith("License :: ")]
    named = [c for c in classifiers if c != "OSI Approved"]
    return "; ".join(named) or str(headers.get("License", "")).strip().split("\n")[0][:60]


def wheel_distribution(wheel: Path) -> Distribution:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode("utf-8", "replace")
    headers = HeaderParser().parsestr(text)
    files = ((n, archive.read(n)) for n in sorted(names) if n.endswith(".py"))
    return Distribution(name=headers["Name"], version=headers["Version"], licence=licence_in(text), files=files)


def standard_library() -> Distribution:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts)
    files = ((str(p.relative_to(root)), p.read_bytes()) for p in paths)
    return Distribution(name="python", version=sys.version.split()[0], licence="PSF-2.0", files=files)


def wanted_text(path: str, content: bytes) -> str | None:
    """The file's text when it is source a person wrote and would want completed, else None."""
    if SKIPPED_FOLDERS & set(path.split("/")[:-1]):
        return None
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\t", "    ")
    except UnicodeDecodeError:
        return None
    if not MIN_CHARS <= len(text) <= MAX_CHARS or "\0" in text or GENERATED.search(text[:1500]):
        return None
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
        return None
    letters = sum(c.isalpha() or c in " \n" for c in text[:20_000])
    return text if letters > 0.6 * len(text[:20_000]) else None


def held_out_lines(files: Iterable[Path]) -> frozenset[str]:
    """Long lines of evaluation prompts: a document with one of them is left out of the corpus."""
    lines: set[str] = set()
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as rows:
            for case in map(json.loads, rows):
                lines.update(line.strip() for line in (case["prompt"] + case["suffix"]).split("\n"))
    return frozenset(line for line in lines if len(line) >= 50)


def documents(distribution: Distribution, seen: set[str], held_out: frozenset[str]) -> Iterator[Document]:
    total, limit = 0, MAX_LIBRARY_CHARS if distribution.name == "python" else MAX_DISTRIBUTION_CHARS
    for path, content in distribution.files:
        text = wanted_text(path, content)
        if text is None or total + len(text) > limit:
            continue
        digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()
        if digest in seen or any(line.strip() in held_out for line in text.split("\n")):
            continue
        seen.add(digest)
        total += len(text)
        yield Document(distribution=distribution.name, path=path, text=text)


def gather(folder: Path, held_out_files: Iterable[Path]) -> Path:
    """Writes `folder/corpus.jsonl.xz` and `folder/corpus.json`, unless they are there; returns the first."""
    target = folder / "corpus.jsonl.xz"
    if target.exists():
        return target
    names = [line.strip() for line in (HERE / "packages.txt").read_text().splitlines()]
    packages = [name for name in names if name and not name.startswith("#")]
    fetch_wheels(packages, folder / "wheels")
    held_out = held_out_lines(held_out_files)
    seen: set[str] = set()
    parts: list[dict[str, object]] = []
    partial = target.with_suffix(".partial")
    with io.TextIOWrapper(lzma.open(partial, "wb", preset=6), encoding="utf-8") as out:
        sources = (wheel_distribution(w) for w in sorted((folder / "wheels").glob("*.whl")))
        for source in [standard_library(), *sources]:
            if not PERMITTED.search(source.licence) or FORBIDDEN.search(source.licence):
                sys.stderr.write(f"{source.name}: licence {source.licence!r} is not on the list: left out\n")
                continue
            files = chars = 0
            for document in documents(source, seen, held_out):
                out.write(json.dumps({"d": document.distribution, "p": document.path, "t": document.text}, ensure_ascii=False) + "\n")
                files, chars = files + 1, chars + len(document.text)
            parts.append({"name": source.name, "version": source.version, "licence": source.licence, "files": files, "chars": chars})
    (folder / "corpus.json").write_text(json.dumps(parts, indent=1) + "\n")
    partial.rename(target)
    return target


def contents(folder: Path) -> list[dict[str, Any]]:
    """What `gather` put in: name, version, licence, files and chars of every distribution."""
    parts: list[dict[str, Any]] = json.loads((folder / "corpus.json").read_text())
    return parts


def read(corpus: Path) -> Iterator[Document]:
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Document(distribution=row["d"], path=row["p"], text=row["t"])
