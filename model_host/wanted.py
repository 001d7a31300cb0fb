"""A model as its user wants it held, and how it comes to be held in this very process. Imports torch only then."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from model_host.generation import Engine, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    model: str
    """As `checkpoints.locate` takes it; a folder's whole path."""
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    kernels: str = "auto"
    cache_bytes: int = 1 << 30
    ram_bytes: int = 0
    disk_folder: str = ""
    """Where latents are kept on disk; empty: nowhere."""
    disk_bytes: int = 0


def load(wanted: Wanted, progress: Progress) -> Engine:
    """Raises EngineError."""
    progress("starting torch", 0.0)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, by torch: threads that wait actively starve each other and the editor
    checkpoints = importlib.import_module("model_host.checkpoints")
    engine = importlib.import_module("model_host.engine")
    loaded: Engine = engine.load_engine(
        checkpoints.locate(wanted.model),
        device=wanted.device,
        dtype=wanted.dtype,
        threads=wanted.threads,
        kernels=wanted.kernels,
        cache_bytes=wanted.cache_bytes,
        ram_bytes=wanted.ram_bytes,
        disk=engine.Disk(Path(wanted.disk_folder), wanted.disk_bytes) if wanted.disk_folder else None,
        progress=progress,
    )
    return loaded
