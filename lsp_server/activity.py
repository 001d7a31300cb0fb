"""Work that a user can watch and stop: a progress bar with a cancel button where the client has one, and words as they come.

Owns: tokens, cancelling, and the notification `deepseek/stream` for clients that say (`experimental.deepseekLsp.stream`) that they
show it, or that gave it an id with their request. Knows no feature.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server.connection import Connection
from lsp_server.errors import Refusal, Stale

STREAM = "deepseek/stream"
REPORT_EVERY_S = 0.25
CREATED_WITHIN_S = 1.0
MESSAGE_CHARS = 60
Result = TypeVar("Result")


class Activity:
    """One piece of work, from its beginning to its end. Used on the event loop. A client that names the `stream` shows the work itself and
    stops it by cancelling its request: it needs no progress bar."""

    def __init__(self, server: Connection, title: str, action: str, uri: str, stream: str | None = None) -> None:
        self._server, self._title = server, title
        self._about = {"id": stream or str(uuid.uuid4()), "action": action, "title": title, "uri": uri}
        self._token: str | None = None
        self._is_watched = stream is not None
        self._streams = self._is_watched or bool(own_capabilities(server).get("stream"))
        self._text, self._reported_at, self._percent = "", 0.0, -1

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Does `work`, which ends early when the user says so: then Refusal is raised."""
        await self._begin()
        running = asyncio.ensure_future(work())
        stopped = False

        def stop(future: Any) -> None:
            nonlocal stopped
            if future.cancelled():
                stopped = True
                running.cancel()

        progress = self._server.work_done_progress
        if self._token is not None:
            progress.tokens[self._token].add_done_callback(stop)
        message = "done"
        try:
            return await running
        except asyncio.CancelledError:
            message = "stopped"
            if stopped:
                raise Refusal("Stopped, and nothing was changed.") from None
            running.cancel()
            raise
        except Refusal as refusal:
            message = str(refusal)
            raise
        finally:
            self._send(done=True, message=message)
            if self._token is not None:
                progress.end(self._token, types.WorkDoneProgressEnd(message=message))
                progress.tokens.pop(self._token, None)

    async def heard(self, piece: str) -> None:
        """A piece of the answer came."""
        self._send(text=piece)
        self._text = (self._text + piece)[-4 * MESSAGE_CHARS :]
        now = time.monotonic()
        if self._token is not None and now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            last = " ".join(self._text.split())[-MESSAGE_CHARS:]
            self._server.work_done_progress.report(self._token, types.WorkDoneProgressReport(message=last, cancellable=True))

    def inform(self, what: str, share: float) -> None:
        """How far work of another kind than answering is."""
        percent = int(100 * share)
        if self._token is not None and percent != self._percent:
            self._percent = percent
            self._server.work_done_progress.report(self._token, types.WorkDoneProgressReport(message=what, percentage=percent))

    async def start_over(self, why: str) -> None:
        """What was heard so far is void: another attempt begins."""
        self._text = ""
        self._send(restart=True, message=why)

    def _send(self, **more: Any) -> None:
        if self._streams:
            self._server.protocol.notify(STREAM, {**self._about, **more})

    async def _begin(self) -> None:
        window = self._server.client_capabilities.window
        if window and window.work_done_progress and not self._is_watched:
            token = str(uuid.uuid4())
            created = asyncio.ensure_future(self._server.work_done_progress.create_async(token))
            created.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
            await asyncio.wait({created}, timeout=CREATED_WITHIN_S)
            if not created.done() or created.exception() is not None:
                return  # the client has no place for it now, or answers nothing before it is answered, as Helix; the work goes on
            self._token = token
            self._server.work_done_progress.begin(token, types.WorkDoneProgressBegin(title=self._title, cancellable=True))


def own_capabilities(server: Connection) -> Mapping[str, Any]:
    """What one of our own clients says it can do: `experimental.deepseekLsp`."""
    found = plain(server.client_capabilities.experimental)
    inner = found.get("deepseekLsp") if isinstance(found, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def plain(value: Any) -> Any:
    """pygls's objects of parameters that LSP does not name, as dicts and lists."""
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class Refused(JsonRpcException):
    """A refusal as the answer to a request."""


def refused(refusal: Refusal) -> Refused:
    code = types.LSPErrorCodes.ContentModified if isinstance(refusal, Stale) else types.LSPErrorCodes.RequestFailed
    return Refused(str(refusal), code.value)


def is_news(record: logging.LogRecord) -> bool:
    """For the log of pygls, which would tell every refusal with its traceback, as if something had broken."""
    return not (record.exc_info and isinstance(record.exc_info[1], Refused))


def stop_with_request(server: Connection) -> None:
    """A command's own task is not the request that the client can cancel: ties the one to the other."""
    id = server.protocol.msg_id
    request = server.protocol._request_futures.get(id) if id is not None else None
    task = asyncio.current_task()
    if request is not None and task is not None:
        request.add_done_callback(lambda future: task.cancel() if future.cancelled() else None)
