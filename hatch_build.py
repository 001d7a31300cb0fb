"""Compiles model_host/native while the project is built or installed; an install without a compiler works, without those kernels."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "model_host/native"


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        native = Path(self.root) / NATIVE
        # An editable install runs from the source tree; what lies there is never taken into a wheel, which has its own build.
        folder = native if version == "editable" else Path(self.directory) / "native"
        folder.mkdir(parents=True, exist_ok=True)
        made = runpy.run_path(str(native / "build.py"))["build"](folder)
        if version == "editable":
            return
        build_data["force_include"] |= {str(file): f"{NATIVE}/{file.name}" for file in made}
        if any(file.suffix == ".so" for file in made):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
