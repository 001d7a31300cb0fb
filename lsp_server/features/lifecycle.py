"""The beginning of a connection: answers at once, then reads the configuration and loads the model in the background."""

import asyncio
import uuid

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server.activity import CREATED_WITHIN_S
from lsp_server.connection import Connection
from lsp_server.host import goal
from lsp_server.session import Encoding
from lsp_server.settings import table_layer


def register(server: Connection) -> None:
    @server.feature(types.INITIALIZE)
    async def initialize(params: types.InitializeParams) -> None:
        server.has_one_root = not params.workspace_folders
        server.session.encoding = Encoding(server.workspace.position_encoding)
        server.take_layer("initialize", *table_layer("the editor's initializationOptions", params.initialization_options))

    @server.feature(types.INITIALIZED)
    async def initialized(params: types.InitializedParams) -> None:
        for problem in server.problems:
            server.tell(problem, types.MessageType.Warning)
        await asyncio.gather(load(server), configure(server))  # a client that leaves a question unanswered has its model all the same


async def configure(server: Connection) -> None:
    await watch_configuration(server)
    await server.read_configuration(None)


async def watch_configuration(server: Connection) -> None:
    """Asks a client that wants to be asked to say when its configuration changes."""
    workspace = server.client_capabilities.workspace
    watched = workspace.did_change_configuration if workspace else None
    if watched and watched.dynamic_registration:
        registration = types.Registration(id=str(uuid.uuid4()), method=types.WORKSPACE_DID_CHANGE_CONFIGURATION)
        try:
            await server.client_register_capability_async(types.RegistrationParams([registration]))
        except JsonRpcException as error:
            server.tell(f"Changes of the configuration will not be noticed: the client refused to register ({error}).")


async def load(server: Connection) -> None:
    """Loads the model where there is none yet, with a progress bar in clients that show one, and says how it went."""
    if server.host.engine is not None:
        return
    progress = server.work_done_progress
    token, last_percent = str(uuid.uuid4()), -1

    async def begin() -> bool:
        window = server.client_capabilities.window
        if not (window and window.work_done_progress):
            return False
        try:
            await progress.create_async(token)
        except JsonRpcException:
            return False
        progress.begin(token, types.WorkDoneProgressBegin(title=goal(server.settings), percentage=0))
        return True

    def report(what: str, share: float) -> None:
        nonlocal last_percent
        percent = int(100 * share)
        if is_shown() and percent != last_percent:
            last_percent = percent
            progress.report(token, types.WorkDoneProgressReport(message=what, percentage=percent))

    def is_shown() -> bool:
        return beginning.done() and beginning.result()

    beginning = asyncio.create_task(begin())
    try:
        await server.host.start(server.settings, report)
        await asyncio.wait({beginning}, timeout=CREATED_WITHIN_S)
        if is_shown():
            progress.end(token, types.WorkDoneProgressEnd(message=server.host.message))
    finally:
        beginning.cancel()
    failed = server.host.state == "failed"
    server.tell(server.host.message, types.MessageType.Error if failed else types.MessageType.Info)
