"""Compiles forward.cpp, once for each instruction set, with the C++ compiler of the system. Standard library only: hatch_build.py
runs this file by its path, before the project is installed.

Each instruction set is a library of its own: the linker would otherwise merge the inline functions of all of them, and an older
processor could meet instructions it does not have.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("forward.cpp")
REASON = "unbuilt.txt"
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 300
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno",
          "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi")  # fmt: skip
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512")
LEVELS = {"plain": (), "avx2": AVX2, "avx512": AVX512}
"""Instruction sets, the least first; forward.cpp's native_level gives an index into them."""


def library(folder: Path, level: str) -> Path:
    return folder / f"forward-{level}.so"


def build(folder: Path) -> list[Path]:
    """Compiles into `folder` and returns the files made: libraries, or the reason why there are none. Never raises."""
    for level in LEVELS:
        library(folder, level).unlink(missing_ok=True)
    (folder / REASON).unlink(missing_ok=True)
    try:
        return _libraries(folder)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = folder / REASON
        reason.write_text(str(error), "utf-8")
        return [reason]


def _libraries(folder: Path) -> list[Path]:
    if sys.platform == "win32":
        raise RuntimeError("they are not built on Windows yet")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise RuntimeError("there was no C++ compiler (c++, g++ or clang++)")
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"plain": ()}

    def compile(level: str) -> Path:
        made = library(folder, level)
        command = [*compiler.split(), *COMMON, *LEVELS[level], str(SOURCE), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines() or ["no message"]
            raise RuntimeError(f"{compiler} could not compile them for {level} ({lines[0].strip()})")
        return made

    made = [compile("plain")]  # the one that must be there; a compiler too old for the others' flags goes without them
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(compile, level) for level in levels if level != "plain"]:
            try:
                made.append(future.result())
            except RuntimeError as error:
                print(f"model_host/native: {error}", file=sys.stderr)  # noqa: T201
    return made
