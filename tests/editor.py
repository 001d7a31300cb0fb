"""What an editor does, in a few words: opens, types, asks. Around pytest-lsp's client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cattrs import Converter
from lsprotocol import types
from pygls.protocol import default_converter
from pytest_lsp import LanguageClient, client_capabilities
from pytest_lsp.client import register_lsp_features

URI = "file:///project/app/shop.py"


def client_converter() -> Converter:
    """lsprotocol takes a code action that has a command for a command."""
    found: Converter = default_converter()
    as_command = found.get_structure_hook(types.Command)
    found.register_structure_hook(
        types.Command,
        lambda value, kind: found.structure(value, types.CodeAction) if isinstance(value.get("command"), dict) else as_command(value, kind),
    )
    return found


def make_client() -> LanguageClient:
    client = LanguageClient(converter_factory=client_converter)
    register_lsp_features(client)
    return client


def capabilities(encodings: list[str] | None = None, progress: bool = True) -> types.ClientCapabilities:
    found = client_capabilities("visual_studio_code")
    assert found.text_document and found.window
    found.text_document.inline_completion = types.InlineCompletionClientCapabilities()
    found.general = types.GeneralClientCapabilities(position_encodings=encodings)
    found.window.work_done_progress = progress
    return found


@asynccontextmanager
async def editor(*command: str, env: dict[str, str] | None = None) -> AsyncIterator["Editor"]:
    """A client on a fresh server process, which is shut down as an editor does it, or killed when it does not go."""
    client = make_client()
    await client.start_io(*command, env=env)
    try:
        yield Editor(client)
        if client._server is not None and client._server.returncode is None:
            async with asyncio.timeout(20):
                await client.shutdown_session()
    finally:
        process = client._server
        if process is not None and process.returncode is None:
            process.kill()


def plain(value: Any) -> Any:
    """pygls's objects of unknown results as dicts and lists."""
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class Editor:
    def __init__(self, client: LanguageClient) -> None:
        self.client = client
        self.version = 0

    async def start(
        self, options: Any = None, encodings: list[str] | None = None, folder: str = "file:///project"
    ) -> types.InitializeResult:
        folders = [types.WorkspaceFolder(uri=folder, name="project")]
        params = types.InitializeParams(capabilities=capabilities(encodings), workspace_folders=folders, initialization_options=options)
        return await self.client.initialize_session(params)

    def open(self, text: str, uri: str = URI, language: str = "python") -> None:
        self.client.text_document_did_open(
            types.DidOpenTextDocumentParams(types.TextDocumentItem(uri=uri, language_id=language, version=0, text=text))
        )

    def type(self, line: int, character: int, text: str, uri: str = URI) -> None:
        self.version += 1
        here = types.Position(line, character)
        change = types.TextDocumentContentChangePartial(range=types.Range(here, here), text=text)
        identifier = types.VersionedTextDocumentIdentifier(version=self.version, uri=uri)
        self.client.text_document_did_change(types.DidChangeTextDocumentParams(text_document=identifier, content_changes=[change]))

    async def ghost(self, line: int, character: int, uri: str = URI) -> types.InlineCompletionItem | None:
        found = await self.client.text_document_inline_completion_async(
            types.InlineCompletionParams(
                text_document=types.TextDocumentIdentifier(uri),
                position=types.Position(line, character),
                context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Automatic),
            )
        )
        if found is None:
            return None
        items = found.items if isinstance(found, types.InlineCompletionList) else found
        return items[0] if items else None

    async def menu(self, line: int, character: int, uri: str = URI) -> list[types.CompletionItem]:
        found = await self.client.text_document_completion_async(
            types.CompletionParams(types.TextDocumentIdentifier(uri), types.Position(line, character))
        )
        return list(found.items) if isinstance(found, types.CompletionList) else list(found or [])

    async def status(self) -> Any:
        return plain(await self.client.protocol.send_request_async("deepseek/status", None))

    async def until_ready(self, limit_s: float = 60.0) -> Any:
        """Waits for the model: its progress has an end, whatever the state is then."""
        async with asyncio.timeout(limit_s):
            while not any(isinstance(r, types.WorkDoneProgressEnd) for reports in self.client.progress_reports.values() for r in reports):
                await self.client.wait_for_notification("$/progress")
        return await self.status()
