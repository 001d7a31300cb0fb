"""A second checkpoint for actions and chat beside the one that completes: loaded when it is first needed, let go when it is not.

Owns: its life. It goes when nobody asked it for a while, or at once when the machine's memory runs short, but never within an answer. One
that cannot be loaded is tried again when the settings change, or after a while.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from lsp_server.errors import Refusal
from lsp_server.host import Host
from lsp_server.settings import Settings
from model_host.generation import Engine, Progress

LOOK_EVERY_S = 15.0
RETRY_S = 120.0
SHORT_SHARE = 0.05
"""Less than this share of the machine's memory left is short."""


def memory_is_short() -> bool:
    """Whether hardly any memory is left, as Linux tells it; elsewhere nothing is known, and nothing is short."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return kilobytes["MemAvailable"] < SHORT_SHARE * kilobytes["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return False


@dataclass
class Second:
    """Holds the second engine while it is wanted. Used on the event loop."""

    host: Host = field(default_factory=lambda: Host(message="It is loaded when an action or the chat first needs it."))
    is_short: Callable[[], bool] = memory_is_short
    _users: int = 0
    _used_at: float = 0.0
    _failed_at: float = 0.0
    _failed_with: Settings | None = None
    _loading: asyncio.Task[None] | None = None
    _watch: asyncio.Task[None] | None = None

    def has_failed(self, settings: Settings) -> bool:
        """Whether it could not be loaded lately, with these settings; `host.message` says why."""
        return self._failed_with == settings and time.monotonic() - self._failed_at < RETRY_S

    @contextlib.asynccontextmanager
    async def engine(self, settings: Settings, report: Progress) -> AsyncIterator[Engine]:
        """The engine, loaded where it is not, and not let go before the block ends. Raises Refusal when it cannot be loaded."""
        self._users += 1
        try:
            if self.host.engine is None:
                if self._loading is None or self._loading.done():
                    self._loading = asyncio.create_task(self._load(settings, report))
                await asyncio.shield(self._loading)  # who no longer wants to wait stops waiting; the thread that loads goes on
            if self.host.engine is None:
                raise Refusal(self.host.message)
            yield self.host.engine
        finally:
            self._users -= 1
            self._used_at = time.monotonic()

    async def _load(self, settings: Settings, report: Progress) -> None:
        await self.host.start(settings.model_copy(update={"model": settings.chat_model, "keep_model_s": 0.0}), report)
        if self.host.engine is None:
            self._failed_at, self._failed_with = time.monotonic(), settings
            return
        self._used_at, self._failed_with = time.monotonic(), None
        self._watch = asyncio.create_task(self._let_go_in_time(settings))

    async def _let_go_in_time(self, settings: Settings) -> None:
        while self.host.engine is not None:
            await asyncio.sleep(min(LOOK_EVERY_S, settings.chat_idle_s))
            if self._users:
                continue
            if time.monotonic() - self._used_at >= settings.chat_idle_s:
                await self._let_go(f"Nobody asked {settings.chat_model} for {settings.chat_idle_s:g} s")
            elif self.is_short():
                await self._let_go("Memory ran short")

    async def _let_go(self, why: str) -> None:
        engine, self.host.engine = self.host.engine, None
        self.host.state, self.host.message = "waiting", f"{why}, so it was let go; it is loaded again when it is needed."
        if engine is not None:
            await asyncio.to_thread(engine.close)  # freeing gigabytes takes its time
