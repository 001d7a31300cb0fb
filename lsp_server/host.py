"""The engine of one server, from "not started" to "ready" or "failed", loaded in the background.

Owns: the engine's life and the sentence that says where it stands. torch is imported on the loading thread only, so that
`initialize` is answered before the 1 to 2 seconds that import takes.
"""

import asyncio
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from lsp_server.settings import Settings
from model_host.errors import EngineError
from model_host.generation import Engine, Progress

Load = Callable[[Settings, Progress], Engine]


def load_local(settings: Settings, progress: Progress) -> Engine:
    """Loads the checkpoint that `settings` names on this machine. Runs on any thread but the event loop's."""
    progress("starting torch", 0.0)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, by torch: threads that wait actively starve each other and the editor
    checkpoints = importlib.import_module("model_host.checkpoints")
    engine = importlib.import_module("model_host.engine")
    folder = checkpoints.locate(settings.model)
    loaded: Engine = engine.load_engine(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        kernels=settings.kernels,
        cache_bytes=settings.cache_mb * 1_000_000,
        progress=progress,
    )
    return loaded


@dataclass
class Host:
    """Holds the engine once there is one. Used on the event loop."""

    load: Load = load_local
    engine: Engine | None = None
    state: str = "waiting"
    """waiting, loading, ready or failed"""
    message: str = "Loading starts when the editor says that it is initialized."

    async def start(self, settings: Settings, report: Progress) -> None:
        """Loads the model; `report` is called on the event loop."""
        loop = asyncio.get_running_loop()
        self.state, self.message = "loading", f"Loading {settings.model}."

        def heard(what: str, share: float) -> None:
            self.message = f"Loading {settings.model}: {what}, {share:.0%}."
            report(what, share)

        def progress(what: str, share: float) -> None:
            loop.call_soon_threadsafe(heard, what, share)

        try:
            self.engine = await asyncio.to_thread(self.load, settings, progress)
        except EngineError as error:
            self.state, self.message = "failed", str(error)
        except Exception as error:
            self.state, self.message = "failed", f"The model {settings.model} could not be loaded: {error!r}. Run: deepseek-lsp doctor"
        else:
            facts = self.engine.facts
            self.state = "ready"
            self.message = f"{facts.checkpoint} on {facts.device} in {facts.dtype}, loaded in {facts.load_s:.1f} s."

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
