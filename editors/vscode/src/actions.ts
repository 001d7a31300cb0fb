/** Code actions and commands: those that explain are answered in the panel, those that change code show what they change. */
import * as vscode from "vscode";
import { CodeActionResolveRequest, CreateFile, Middleware, TextDocumentEdit, WorkspaceEdit } from "vscode-languageclient/node";
import { Asked, Chat, Question, reason } from "./chat";
import { Gone, Server } from "./client";
import type { Offer } from "./messages";
import { Preview } from "./preview";
import { About, editorInUse, placeIn } from "./references";
import { SECTION } from "./settings";

const RUN = `${SECTION}.run`;
const MAKE = `${SECTION}.make`;
const DISCARDED = "it was discarded.";
const CHANGED = "The document changed meanwhile, so nothing is changed. Ask again.";

interface Known extends Offer {
  answer: string;
  appliesTo: string;
}

export class Actions implements vscode.Disposable {
  private known: Known[] = [];
  private readonly changed = new vscode.EventEmitter<void>();
  private readonly listening: vscode.Disposable;
  readonly onDidChange = this.changed.event;

  constructor(
    private readonly server: Server,
    private readonly chat: Chat,
    private readonly preview: Preview,
    private readonly reveal: () => Promise<void>,
  ) {
    this.listening = server.onDidStart(() => this.learn());
  }

  /** What may stand behind a slash. */
  get offers(): Offer[] {
    return this.known;
  }

  /** A line of the user's: a question, or an action at what it refers to. */
  question(text: string, about: About[]): Question {
    const [, name, instruction] = /^\/(\S+)\s*([^]*)$/.exec(text) ?? [];
    if (name === undefined) {
      return { shown: text, about, text };
    }
    const editor = editorInUse();
    const here: About[] = editor ? [{ key: "", label: vscode.workspace.asRelativePath(editor.document.uri), reference: placeIn(editor) }] : [];
    const places = about.some((one) => one.reference.range) ? about : here;
    return this.known.some((one) => one.name === name && one.answer !== "show") && editor
      ? { shown: text, about: places, asked: { ...placeIn(editor), action: name, instruction } }
      : { shown: text, about: places, text };
  }

  /** Does the action of that name at the cursor or the selection. */
  async here(name: string): Promise<void> {
    const editor = editorInUse();
    if (!editor) {
      void vscode.window.showWarningMessage("DeepSeek: open a file first, and put the cursor into the code that is meant.");
      return;
    }
    await this.perform({ ...placeIn(editor), action: name, version: editor.document.version });
  }

  /** Explains the selection, or the function at the cursor. */
  async explain(): Promise<void> {
    await this.here(editorInUse()?.selection.isEmpty === false ? "explain" : "explain_symbol");
  }

  /** Asks the user what an action needs to know, then does it. */
  async input(asked: Asked, question: string): Promise<void> {
    const instruction = await vscode.window.showInputBox({ title: "DeepSeek", prompt: question, ignoreFocusOut: true });
    if (instruction) {
      await this.perform({ ...asked, instruction });
    }
  }

  readonly middleware: Middleware = {
    executeCommand: async (command, given, next) => (command === RUN ? this.perform(given[0]) : next(command, given)),
    resolveCodeAction: async (action, stop) => {
      const { converters } = this.server;
      try {
        const asked = converters?.code2ProtocolConverter.asCodeActionSync(action);
        const answer = await this.server.request<{ edit?: WorkspaceEdit }>(CodeActionResolveRequest.method, asked, stop);
        action.command = answer.edit && { title: action.title, command: MAKE, arguments: [action.title, answer.edit] };
      } catch (error) {
        this.say(action.title, error, stop);
      }
      return action;
    },
    workspace: {
      handleApplyEdit: async ({ edit }) => {
        const problem = await this.made(edit);
        return { applied: !problem, failureReason: problem };
      },
    },
  };

  /** Makes an edit, and says so when it could not be made. */
  async make(title: string, edit: WorkspaceEdit): Promise<void> {
    const problem = await this.made(edit);
    if (problem && problem !== DISCARDED) {
      this.say(title, problem);
    }
  }

  /** Makes an edit, once the user wants it if it asks for that, and shows a file that it creates; or why it was not made. */
  private async made(edit: WorkspaceEdit): Promise<string | undefined> {
    const asks = Object.values(edit.changeAnnotations ?? {}).some((annotation) => annotation.needsConfirmation);
    if (asks && !(await this.preview.isWanted(edit))) {
      return DISCARDED;
    }
    const confirmed = Object.entries(edit.changeAnnotations ?? {}).map(([id, annotation]) => [id, { ...annotation, needsConfirmation: false }]);
    const converted = await this.server.converters?.protocol2CodeConverter.asWorkspaceEdit({ ...edit, changeAnnotations: Object.fromEntries(confirmed) });
    if (!isCurrent(edit)) {
      return CHANGED; // nothing is awaited between this and the edit
    }
    if (!converted || !(await vscode.workspace.applyEdit(converted))) {
      return "VS Code did not make the change.";
    }
    const created = edit.documentChanges?.find((change) => CreateFile.is(change));
    if (created) {
      const { document } = await vscode.window.showTextDocument(vscode.Uri.parse(created.uri), { preview: false });
      await document.save(); // else an empty one would stay behind
    }
    return undefined;
  }

  private async perform(asked: Asked): Promise<void> {
    const action = this.known.find((one) => one.name === asked.action);
    if (action?.answer === "show") {
      const about = this.place(asked);
      await this.reveal();
      await this.chat.ask({ shown: action.title, about: [about], text: `/${asked.action} ${asked.instruction ?? ""}`.trim() });
      return;
    }
    try {
      await this.server.request("workspace/executeCommand", { command: RUN, arguments: [asked] });
    } catch (error) {
      if (!reason(error).endsWith(DISCARDED)) {
        this.say(action?.title ?? asked.action, error);
      }
    }
  }

  private place({ uri, range, diagnostics }: Asked): About {
    const name = vscode.workspace.asRelativePath(vscode.Uri.parse(uri));
    const last = range.end.character === 0 && range.end.line > range.start.line ? range.end.line - 1 : range.end.line;
    const lines = last > range.start.line ? `${range.start.line + 1}-${last + 1}` : `${range.start.line + 1}`;
    return { key: uri, label: `${name}:${lines}`, reference: { uri, range, diagnostics } };
  }

  private say(title: string, error: unknown, stop?: vscode.CancellationToken): void {
    if (!stop?.isCancellationRequested && !(error instanceof vscode.CancellationError)) {
      void vscode.window.showWarningMessage(`${title}: ${reason(error)}`);
    }
  }

  private async learn(): Promise<void> {
    try {
      this.known = await this.server.request<Known[]>("deepseek/chat/actions", undefined);
    } catch (error) {
      if (!(error instanceof Gone)) {
        throw error;
      }
    }
    this.changed.fire();
  }

  dispose(): void {
    this.listening.dispose();
    this.changed.dispose();
  }
}

/** Whether the documents are still those that the edit is for. */
function isCurrent(edit: WorkspaceEdit): boolean {
  const versions = new Map(vscode.workspace.textDocuments.map((document) => [String(document.uri), document.version]));
  const changes = edit.documentChanges?.filter((change) => TextDocumentEdit.is(change)) ?? [];
  return changes.every(({ textDocument }) => {
    const now = versions.get(String(vscode.Uri.parse(textDocument.uri)));
    return textDocument.version === null || now === undefined || now === textDocument.version;
  });
}
