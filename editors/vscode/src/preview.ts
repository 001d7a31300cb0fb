/** Changes that ask to be confirmed: shown beside what is there, made when the user says so. */
import { randomUUID } from "node:crypto";
import * as vscode from "vscode";
import { TextDocumentEdit, WorkspaceEdit } from "vscode-languageclient/node";

export const SCHEME = "deepseek-lsp";
const EMPTY = vscode.Uri.from({ scheme: SCHEME, path: "/nothing" });
const APPLY = "Apply";
const DISCARD = "Discard";

interface Open {
  proposed: vscode.Uri;
  decide: (isWanted: boolean) => void;
}

export class Preview implements vscode.TextDocumentContentProvider, vscode.Disposable {
  private readonly texts = new Map<string, string>();
  private readonly watching: vscode.Disposable;
  private open: Open | undefined;

  constructor() {
    this.watching = vscode.Disposable.from(
      vscode.workspace.registerTextDocumentContentProvider(SCHEME, this),
      vscode.window.tabGroups.onDidChangeTabs(({ closed }) => {
        const isClosed = closed.some(({ input }) => input instanceof vscode.TabInputTextDiff && String(input.modified) === String(this.open?.proposed));
        if (isClosed) {
          this.decide(false);
        }
      }),
    );
  }

  provideTextDocumentContent(uri: vscode.Uri): string {
    return this.texts.get(String(uri)) ?? "";
  }

  /** Shows the edit of one document and waits until the user decides; another one that waits is discarded. */
  async isWanted(edit: WorkspaceEdit): Promise<boolean> {
    this.decide(false);
    const change = edit.documentChanges?.find((one) => TextDocumentEdit.is(one));
    if (!change) {
      return true;
    }
    const file = vscode.Uri.parse(change.textDocument.uri);
    const isNew = edit.documentChanges?.some((one) => "kind" in one && one.kind === "create") ?? false;
    const document = isNew ? undefined : await vscode.workspace.openTextDocument(file);
    const proposed = vscode.Uri.from({ scheme: SCHEME, path: file.path, query: randomUUID() });
    this.texts.set(String(proposed), withEdits(document, change));
    const name = vscode.workspace.asRelativePath(file);
    const decided = new Promise<boolean>((decide) => (this.open = { proposed, decide }));
    const title = `${name} (${isNew ? "new, proposed" : "proposed"})`;
    await vscode.commands.executeCommand("vscode.diff", document?.uri ?? EMPTY, proposed, title, { preview: true });
    let isAnswered = false;
    const what = Object.values(edit.changeAnnotations ?? {})[0]?.label ?? "The model proposes a change";
    void vscode.window.showInformationMessage(`${what}: ${isNew ? `make ${name}` : `change ${name}`} as shown?`, APPLY, DISCARD).then((said) => {
      isAnswered = true;
      if (said && this.open?.proposed === proposed) {
        this.decide(said === APPLY);
      }
    });
    const isWanted = await decided;
    if (!isAnswered) {
      await vscode.commands.executeCommand("notifications.hideToasts"); // ours would ask on
    }
    this.texts.delete(String(proposed));
    const tabs = vscode.window.tabGroups.all.flatMap((group) => group.tabs);
    const shown = tabs.filter(({ input }) => input instanceof vscode.TabInputTextDiff && String(input.modified) === String(proposed));
    await vscode.window.tabGroups.close(shown);
    return isWanted;
  }

  /** What the user says to the change that is shown. */
  decide(isWanted: boolean): void {
    const { open } = this;
    this.open = undefined;
    open?.decide(isWanted);
  }

  dispose(): void {
    this.decide(false);
    this.watching.dispose();
  }
}

/** The document's text with the edits made; they do not overlap. */
function withEdits(document: vscode.TextDocument | undefined, change: TextDocumentEdit): string {
  let text = document?.getText() ?? "";
  const at = ({ line, character }: { line: number; character: number }) => document?.offsetAt(new vscode.Position(line, character)) ?? 0;
  const edits = change.edits.flatMap((edit) => ("newText" in edit ? [{ first: at(edit.range.start), end: at(edit.range.end), text: edit.newText }] : []));
  for (const edit of edits.sort((one, other) => other.first - one.first)) {
    text = text.slice(0, edit.first) + edit.text + text.slice(edit.end);
  }
  return text;
}
