"""textDocument/codeAction and codeAction/resolve: the actions that fit a place are listed without asking the model, which answers when
one is chosen. Clients that cannot resolve get commands."""

from collections.abc import Sequence

from lsprotocol import types

from lsp_server import answering
from lsp_server.actions import tasks
from lsp_server.actions.tasks import Asked, Span
from lsp_server.activity import own_capabilities, plain, refused
from lsp_server.connection import RUN, Connection
from lsp_server.errors import Refusal

INPUT = "deepseek-lsp.input"
"""A command of our own clients': asks the user for an instruction, then runs the action with it."""


def register(server: Connection) -> None:
    kinds = sorted({action.head.kind.split(".")[0] for action in server.actions})
    options = types.CodeActionOptions(code_action_kinds=list(kinds), resolve_provider=True)

    @server.feature(types.TEXT_DOCUMENT_CODE_ACTION, options)
    async def listed(params: types.CodeActionParams) -> list[types.Command | types.CodeAction] | None:
        document = server.session.find(params.text_document.uri)
        if document is None or not server.settings.actions.enabled or not document.contains(params.range.start):
            return None
        snapshot = document.snapshot(params.range.start)
        span_asked = span_of(params.range)
        diagnostics = tuple(said(diagnostic) for diagnostic in params.context.diagnostics)
        found: list[types.Command | types.CodeAction] = []
        for action in server.actions:
            head = action.head
            if params.context.only and not any(is_of(head.kind, only) for only in params.context.only):
                continue
            if (title := tasks.fits(action, snapshot, span_asked, len(diagnostics))) is None:
                continue
            written = tasks.marked(action, snapshot.lines[span_asked.start.line : span_asked.end.line + 1])
            if head.asks and not (written or head.offers or own_capabilities(server).get("input")):
                continue
            about_diagnostic = head.applies_to == "diagnostic"
            asked = Asked(
                action=action.name,
                uri=params.text_document.uri,
                range=span_of(params.context.diagnostics[0].range) if about_diagnostic else span_asked,
                version=document.version,
                diagnostics=diagnostics if about_diagnostic else (),
                instruction=written,
            )
            found.append(offered(server, title, asked, params.context.diagnostics))
        return found

    @server.feature(types.CODE_ACTION_RESOLVE)
    async def resolved(action: types.CodeAction) -> types.CodeAction:
        if action.edit is not None or action.data is None:
            return action
        try:
            done = await answering.perform(server, Asked.read(plain(action.data)))
        except Refusal as refusal:
            server.tell(f"{action.title}: {refusal}")
            raise refused(refusal) from refusal
        for note in done.notes:
            server.tell(f"{action.title}: {note}")
        action.edit = done.edit
        return action


def is_of(kind: str, asked: str) -> bool:
    """Whether a kind of action is the one that is asked for, or one of it; the empty one is all of them."""
    return not asked or kind == asked or kind.startswith(f"{asked}.")


def span_of(range: types.Range) -> Span:
    start, end = (tasks.Place(line=place.line, character=place.character) for place in (range.start, range.end))
    return Span(start=start, end=end)


def said(diagnostic: types.Diagnostic) -> str:
    """A diagnostic as one paragraph: who says what about which line."""
    source = f"{diagnostic.source}: " if diagnostic.source else ""
    code = f" ({diagnostic.code})" if diagnostic.code is not None else ""
    return f"line {diagnostic.range.start.line + 1}: {source}{diagnostic.message}{code}"


def offered(server: Connection, title: str, asked: Asked, diagnostics: Sequence[types.Diagnostic]) -> types.Command | types.CodeAction:
    """The action in the form that the client understands."""
    head = answering.find(server, asked.action).head
    data = asked.model_dump(mode="json")
    client = server.client_capabilities.text_document
    client_actions = (client and client.code_action) or types.CodeActionClientCapabilities()
    command = types.Command(title=title, command=RUN, arguments=[data])
    if head.asks and not asked.instruction and own_capabilities(server).get("input"):
        command = types.Command(title=title, command=INPUT, arguments=[data, head.asks])
    if client_actions.code_action_literal_support is None:
        return command
    found = types.CodeAction(title=title, kind=head.kind)
    if head.applies_to == "diagnostic":
        found.diagnostics = list(diagnostics)
    resolves = client_actions.resolve_support and "edit" in client_actions.resolve_support.properties and client_actions.data_support
    needs_words = head.asks and not asked.instruction
    if head.answer == "show" or needs_words or not resolves:
        found.command = command
    else:
        found.data = data
    return found
