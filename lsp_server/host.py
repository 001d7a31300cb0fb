"""The engine of one server, from "not started" to "ready" or "failed", found or loaded in the background.

Owns: which kind of engine it is, its life, and the sentence that says where it stands.
"""

import asyncio
import importlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from lsp_server.settings import Settings
from model_host import meeting, shared
from model_host.errors import EngineError
from model_host.generation import Engine, Progress
from model_host.remote.endpoint import Endpoint, endpoint
from model_host.wanted import Wanted, load

log = logging.getLogger(__name__)
Load = Callable[[Settings, Progress], Engine]


def load_chosen(settings: Settings, progress: Progress) -> Engine:
    """The engine that `settings` names. Runs on any thread but the event loop's. Raises EngineError."""
    return load_remote(settings, progress) if settings.engine == "openai" else load_local(settings, progress)


def load_remote(settings: Settings, progress: Progress) -> Engine:
    progress("asking what it serves", 0.0)
    engine = importlib.import_module("model_host.remote.engine")
    connected: Engine = engine.connect(remote_endpoint(settings))
    return connected


def remote_endpoint(settings: Settings) -> Endpoint:
    """Raises EngineError, naming the setting that is wrong."""
    return endpoint(**settings.remote.model_dump(), environment=os.environ)


def goal(settings: Settings) -> str:
    """What is being started, in words."""
    return f"Connecting to {settings.remote.url}" if settings.engine == "openai" else f"Loading {settings.model}"


def load_local(settings: Settings, progress: Progress) -> Engine:
    """The checkpoint that `settings` names on this machine, in the process that all editors share, where the user does not forbid it."""
    reason = meeting.why_alone() if settings.share_model else ""
    if reason is None:
        return shared.connect(wanted(settings), keep_s=settings.keep_model_s, progress=progress)
    if reason:
        log.warning("The model is loaded for this editor alone: %s.", reason)
    return load(wanted(settings), progress)


def wanted(settings: Settings) -> Wanted:
    folder = Path(settings.model).expanduser()
    return Wanted(
        model=str(folder.resolve()) if folder.is_dir() and settings.model != "starter" else settings.model,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        kernels=settings.kernels,
        cache_bytes=settings.cache_mb * 1_000_000,
        ram_bytes=settings.ram_cache_mb * 1_000_000,
        disk_folder=str(latents_folder()) if settings.disk_cache_mb else "",
        disk_bytes=settings.disk_cache_mb * 1_000_000,
    )


def latents_folder() -> Path:
    """Where what was computed of documents is kept, if the user asks for it."""
    return platformdirs.user_cache_path("deepseek-lsp", appauthor=False) / "latents"


def closed(loading: "Future[Engine]") -> None:
    """Closes an engine that nobody waits for any more."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()


@dataclass
class Host:
    """Holds the engine once there is one. Used on the event loop."""

    load: Load = load_chosen
    engine: Engine | None = None
    state: str = "waiting"
    """waiting, loading, ready or failed"""
    message: str = "Loading starts when the editor says that it is initialized."

    async def start(self, settings: Settings, report: Progress) -> None:
        """Loads the model; `report` is called on the event loop. Cancelled, it leaves no engine behind, whenever the loading ends."""
        loop = asyncio.get_running_loop()
        self.state, self.message = "loading", f"{goal(settings)}."

        def heard(what: str, share: float) -> None:
            self.message = f"{goal(settings)}: {what}, {share:.0%}."
            report(what, share)

        def progress(what: str, share: float) -> None:
            loop.call_soon_threadsafe(heard, what, share)

        thread = ThreadPoolExecutor(1, "load")
        loading = thread.submit(self.load, settings, progress)
        thread.shutdown(wait=False)
        try:
            self.engine = await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(closed)
            self.state, self.message = "waiting", f"{goal(settings)} was stopped."
            raise
        except EngineError as error:
            self.state, self.message = "failed", str(error)
        except Exception as error:
            self.state, self.message = "failed", f"{goal(settings)} failed: {error!r}. Run: deepseek-lsp doctor"
        else:
            facts = self.engine.facts
            self.state = "ready"
            if facts.parameters:
                self.message = f"{settings.model} on {facts.device} in {facts.dtype}, loaded in {facts.load_s:.1f} s."
            else:
                self.message = f"{facts.checkpoint} on {facts.device}, elsewhere."

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
