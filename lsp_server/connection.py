"""One connection to an editor: what its features share, and how a message in an unusual shape is still understood.

Owns: the session, the settings, the host, who may answer (`take_turn`), and what the user is told. Knows no feature.
"""

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from cattrs import Converter
from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer
from pygls.protocol import JsonRPCRequestMessage, LanguageServerProtocol, default_converter
from pygls.workspace import Workspace

from lsp_server.actions.conversations import Conversations
from lsp_server.actions.explained import Explained
from lsp_server.ask import Answer, Memory
from lsp_server.host import Host
from lsp_server.repository import Repository
from lsp_server.second import Second
from lsp_server.session import UNNUMBERED, Session
from lsp_server.settings import SECTION, Layer, Settings, merge, user_file, workspace_layer
from model_host.generation import Cost
from prompts import library

log = logging.getLogger(__name__)
"""Never above DEBUG with anything of the user's text in it."""

VERSION = version("deepseek-lsp")
RUN = "deepseek-lsp.run"
"""The command that does an action."""
ACCEPTED = "deepseek-lsp.accepted"
"""The command that reports an accepted suggestion."""


def converter() -> Converter:
    """pygls's converter, lenient where clients differ: the first drafts of LSP 3.18 numbered trigger kinds from 0, documents had no version
    or null before LSP 3.16, and a request of our own may come without parameters, which JSON-RPC allows."""
    lenient: Converter = default_converter()
    strict = lenient.get_structure_hook(JsonRPCRequestMessage)
    lenient.register_structure_hook(JsonRPCRequestMessage, lambda value, kind: strict({"params": None} | value, kind))
    for versioned in (types.TextDocumentItem, types.VersionedTextDocumentIdentifier):
        lenient.register_structure_hook(versioned, numbered(lenient.get_structure_hook(versioned)))
    kind = types.InlineCompletionTriggerKind
    lenient.register_structure_hook(kind, lambda value, _: kind(value) if value in (1, 2) else kind.Invoked)
    return lenient


def numbered(strict: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Reads what has a version also where the client gives none."""
    return lambda value, kind: strict(value if value.get("version") is not None else {**value, "version": UNNUMBERED}, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastAction:
    """What became of the action or question asked for last."""

    title: str
    reason: str = ""
    """Why it was not done."""
    cost: Cost | None = None


LEVELS = {types.MessageType.Log: logging.DEBUG, types.MessageType.Info: logging.INFO}


class NoDocuments(Workspace):
    """pygls's workspace without its documents: ours are in `Session`, and two copies would be one too many (and pygls's one
    breaks lines at form feeds, which LSP does not)."""

    def put_text_document(self, text_document: types.TextDocumentItem, notebook_uri: str | None = None) -> None: ...

    def update_text_document(
        self, text_doc: types.VersionedTextDocumentIdentifier, change: types.TextDocumentContentChangeEvent
    ) -> None: ...

    def remove_text_document(self, doc_uri: str) -> None: ...


class Protocol(LanguageServerProtocol):
    @property
    def workspace(self) -> NoDocuments:
        given = super().workspace
        if not isinstance(given, NoDocuments):
            given = NoDocuments(
                given.root_uri, types.TextDocumentSyncKind.Incremental, list(given.folders.values()), given.position_encoding
            )
            self._workspace = given
        return given

    def structure_message(self, data: dict[str, Any]) -> Any:
        """As pygls does it; but nobody waits for ever for the answer to a message, or to one of ours, that cannot be understood."""
        try:
            return super().structure_message(data)
        except JsonRpcException as error:
            what = data.get("method", "the answer to a request")
            unclear = JsonRpcException(f"The editor sent {what} in a form that LSP does not have.", error.code)
            if "id" in data and "method" in data:
                self._send_response(data["id"], error=unclear.to_response_error())
            elif "id" in data:
                self._handle_response(data["id"], error=unclear.to_response_error())
            raise unclear from error


class Connection(LanguageServer):
    """The pygls server of one connection."""

    protocol: Protocol

    def __init__(self, layers: list[Layer], problems: list[str], host: Host) -> None:
        super().__init__("deepseek-lsp", VERSION, protocol_cls=Protocol, converter_factory=converter)
        self.session = Session()
        self.host = host
        self.second = Second()
        self.user_layers = layers
        self.client_layers: dict[str, Layer] = {}
        self.client_problems: dict[str, list[str]] = {}
        self.has_one_root = False
        self.settings = Settings()
        self.last: Answer = Answer(reason="Nothing was asked for yet.")
        self.last_action: LastAction | None = None
        self.asked = self.shown = self.accepted = 0
        self.written = 0
        """Suggestions that were found written: what is known of clients that never run an item's command, such as LSP4IJ."""
        self.found_written: Answer | None = None
        """The last of them; one that is taken back and written again does not count twice."""
        self.memory = Memory(repository=Repository(self.session, self.folders))
        self.actions, wrong = library.load(user_file().parent / "actions")
        self.user_problems = [*problems, *wrong]
        self.problems: list[str] = []
        """What is wrong in the settings as they are now."""
        self.conversations = Conversations()
        self.explained = Explained()
        self.shown_files: tempfile.TemporaryDirectory[str] | None = None
        self._turns: dict[str, asyncio.Task[Answer]] = {}
        self._ahead: asyncio.Task[None] | None = None
        self.apply_settings()

    def take_layer(self, name: str, layer: Layer, problems: list[str]) -> None:
        """Takes what the client set, in the place of what it set before under this name."""
        self.client_layers[name], self.client_problems[name] = layer, problems
        self.apply_settings()

    def apply_settings(self) -> None:
        """Merges all layers anew."""
        before = self.settings
        self.settings, wrong = merge([*self.user_layers, *self.client_layers.values()])
        if self.settings != before:
            self.memory.remembered.forget()
        self.problems = list(dict.fromkeys([*self.user_problems, *chain(*self.client_problems.values()), *wrong]))

    def folders(self) -> list[str]:
        """The workspace's, as URIs; the one root of a client that has no list of them."""
        listed = [folder.uri for folder in self.workspace.folders.values()]
        return listed or [root for root in [self.workspace.root_uri] if root and self.has_one_root]

    def shown_path(self, uri: str) -> str:
        """The document's path below its workspace folder, or its name."""
        path = PurePosixPath(unquote(urlsplit(uri).path))
        for folder in self.folders():
            root = PurePosixPath(unquote(urlsplit(folder).path))
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return path.name

    def tell(self, message: str, kind: types.MessageType = types.MessageType.Log) -> None:
        """Into the client's log, and for warnings and errors on the user's screen too."""
        log.log(LEVELS.get(kind, logging.WARNING), message)
        if kind in (types.MessageType.Warning, types.MessageType.Error):
            self.window_show_message(types.ShowMessageParams(type=kind, message=message))
        else:
            self.window_log_message(types.LogMessageParams(type=kind, message=message))

    async def take_turn(self, name: str, work: Awaitable[Answer]) -> Answer | None:
        """Runs `work` as the only one of its name: an older one still running is cancelled, and its caller gets None."""
        self.stop_ahead()
        older = self._turns.get(name)
        if older is not None:
            older.cancel()
        turn = asyncio.ensure_future(work)
        assert isinstance(turn, asyncio.Task)
        self._turns[name] = turn
        try:
            return await asyncio.shield(turn)
        except asyncio.CancelledError:
            if turn.cancelled() or turn.cancelling():
                return None
            turn.cancel()
            raise
        finally:
            if self._turns.get(name) is turn:
                del self._turns[name]

    def run_ahead(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` until it is done or anything is asked for."""
        self.stop_ahead()
        self._ahead = asyncio.create_task(work)

    @property
    def is_ahead(self) -> bool:
        """Whether such work runs."""
        return self._ahead is not None and not self._ahead.done()

    def stop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()

    def explain(self, answer: Answer) -> None:
        """Keeps why nothing is shown, for the status request and the log."""
        self.asked += 1
        self.shown += bool(answer.text)
        if answer.reason and answer.reason != self.last.reason:
            self.tell(f"Nothing shown: {answer.reason}")
        self.last = answer

    async def read_configuration(self, pushed: Any) -> None:
        """Takes the client's settings: asked for where it can be asked, else those it `pushed`."""
        workspace = self.client_capabilities.workspace
        values = pushed
        if workspace and workspace.configuration:
            asked = types.ConfigurationParams(items=[types.ConfigurationItem(section=SECTION)])
            try:
                values = next(iter(await self.workspace_configuration_async(asked)), None)
            except JsonRpcException as error:
                log.warning("workspace/configuration was refused: %s", error)
        known = self.problems
        self.take_layer("workspace", *workspace_layer(values))
        for problem in self.problems:
            if problem not in known:
                self.tell(problem, types.MessageType.Warning)
