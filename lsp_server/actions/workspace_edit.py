"""Changes of lines as LSP's WorkspaceEdit, in the words that the client understands.

Owns: versions, change annotations, and the older form for clients without `documentChanges`. Knows nothing of models.
"""

from collections.abc import Sequence

from lsprotocol import types

from lsp_server.actions.regions import Change
from lsp_server.errors import Refusal
from lsp_server.session import Snapshot, units


def known(capabilities: types.ClientCapabilities) -> types.WorkspaceEditClientCapabilities:
    workspace = capabilities.workspace
    return (workspace and workspace.workspace_edit) or types.WorkspaceEditClientCapabilities()


def text_edits(snapshot: Snapshot, changes: Sequence[Change]) -> list[types.TextEdit]:
    """The changes as edits of the document as it is in `snapshot`."""
    return [
        types.TextEdit(range=types.Range(position(snapshot, change.first), position(snapshot, change.end)), new_text=change.text)
        for change in changes
    ]


def position(snapshot: Snapshot, line: int) -> types.Position:
    """A line's start; the document's end for a line behind it."""
    if line < len(snapshot.lines):
        return types.Position(line, 0)
    return types.Position(len(snapshot.lines) - 1, units(snapshot.lines[-1], snapshot.encoding))


def edit_of(
    capabilities: types.ClientCapabilities, snapshot: Snapshot, edits: Sequence[types.TextEdit], label: str, *, confirm: bool
) -> types.WorkspaceEdit:
    """An edit that holds for the snapshot's version only, where the client can be told so."""
    client = known(capabilities)
    if not client.document_changes:
        return types.WorkspaceEdit(changes={snapshot.uri: list(edits)})
    annotated, annotations = with_annotation(client, edits, label, confirm=confirm)
    document = types.OptionalVersionedTextDocumentIdentifier(uri=snapshot.uri, version=snapshot.version)
    return types.WorkspaceEdit(
        document_changes=[types.TextDocumentEdit(text_document=document, edits=annotated)], change_annotations=annotations
    )


def new_file(capabilities: types.ClientCapabilities, uri: str, text: str, label: str) -> types.WorkspaceEdit:
    """An edit that makes a file, and fails where there is one. Raises Refusal where the client cannot make files."""
    client = known(capabilities)
    if not client.document_changes or types.ResourceOperationKind.Create not in (client.resource_operations or ()):
        raise Refusal(f"This editor cannot create files on request: create {uri.rsplit('/', 1)[-1]} by hand and ask again.")
    start = types.Position(0, 0)
    annotated, annotations = with_annotation(client, [types.TextEdit(types.Range(start, start), text)], label, confirm=True)
    document = types.OptionalVersionedTextDocumentIdentifier(uri=uri, version=None)
    return types.WorkspaceEdit(
        document_changes=[
            types.CreateFile(
                uri=uri,
                options=types.CreateFileOptions(overwrite=False, ignore_if_exists=False),
                annotation_id=next(iter(annotations), None) if annotations else None,
            ),
            types.TextDocumentEdit(text_document=document, edits=annotated),
        ],
        change_annotations=annotations,
    )


Edits = list[types.TextEdit | types.AnnotatedTextEdit | types.SnippetTextEdit]


def with_annotation(
    client: types.WorkspaceEditClientCapabilities, edits: Sequence[types.TextEdit], label: str, *, confirm: bool
) -> tuple[Edits, dict[types.ChangeAnnotationIdentifier, types.ChangeAnnotation] | None]:
    """The edits under a label, which lets a client show them before they are made."""
    if client.change_annotation_support is None:
        return list(edits), None
    annotation = types.ChangeAnnotation(label=label, needs_confirmation=confirm, description="Written by the model")
    annotated: Edits = [types.AnnotatedTextEdit(annotation_id="deepseek-lsp", range=edit.range, new_text=edit.new_text) for edit in edits]
    return annotated, {"deepseek-lsp": annotation}
