/** Code actions and commands: those that explain are answered in the panel, those that change code show what they change. */
import * as vscode from "vscode";
import { CodeActionResolveRequest, CreateFile, Middleware, WorkspaceEdit } from "vscode-languageclient/node";
import { Asked, Chat, Question, reason } from "./chat";
import { Gone, Server } from "./client";
import type { Offer } from "./messages";
import { About, editorInUse, placeIn } from "./references";
import { SECTION } from "./settings";

const RUN = `${SECTION}.run`;
const OPEN = `${SECTION}.open`;

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
      ? { shown: text, about: places, asked: { ...placeIn(editor), action: name, version: editor.document.version, instruction } }
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
        action.edit = await converters?.protocol2CodeConverter.asWorkspaceEdit(answer.edit, stop);
        action.command = opening(answer.edit);
      } catch (error) {
        this.say(action.title, error, stop);
      }
      return action;
    },
    workspace: {
      handleApplyEdit: async (params, next) => {
        const done = await next(params, new vscode.CancellationTokenSource().token);
        const open = opening(params.edit);
        if (open && "applied" in done && done.applied) {
          await vscode.commands.executeCommand(open.command, ...(open.arguments ?? []));
        }
        return done;
      },
    },
  };

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
      this.say(action?.title ?? asked.action, error);
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

/** A command that shows the file which an edit makes. */
function opening(edit: WorkspaceEdit | undefined): vscode.Command | undefined {
  const made = edit?.documentChanges?.find((change) => CreateFile.is(change));
  return made && { title: "Open", command: OPEN, arguments: [made.uri] };
}

/** Shows a file that an edit made, unless the user did not want it. */
export async function open(uri: string): Promise<void> {
  const file = vscode.Uri.parse(uri);
  const isThere = await vscode.workspace.fs.stat(file).then(
    () => true,
    () => false,
  );
  if (isThere) {
    await vscode.window.showTextDocument(file, { preview: false });
  }
}
