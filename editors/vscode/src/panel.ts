/** The panel: a webview that shows the conversation, and what its buttons do. The conversation outlives it. */
import { randomBytes } from "node:crypto";
import * as vscode from "vscode";
import { Actions } from "./actions";
import { Chat } from "./chat";
import type { FromView, ToView } from "./messages";
import { References, editorInUse } from "./references";

export const VIEW = "deepseek-lsp.panel";
const EVERY_MS = 40;

export class Panel implements vscode.WebviewViewProvider, vscode.Disposable {
  private view: vscode.WebviewView | undefined;
  private wantsFocus = false;
  private answering: NodeJS.Timeout | undefined;
  private readonly listening: vscode.Disposable;

  constructor(
    private readonly folder: vscode.Uri,
    private readonly chat: Chat,
    private readonly references: References,
    private readonly actions: Actions,
  ) {
    this.listening = vscode.Disposable.from(
      vscode.window.registerWebviewViewProvider(VIEW, this),
      chat.onDidChange(() => this.show()),
      references.onDidChange(() => this.show()),
      actions.onDidChange(() => this.show()),
      chat.onDidHear(({ id }) => {
        this.answering ??= setTimeout(() => {
          this.answering = undefined;
          const turn = chat.turns.find((one) => one.id === id);
          if (turn) {
            this.post({ type: "answer", id, answer: turn.answer });
          }
        }, EVERY_MS);
      }),
    );
  }

  /** Shows the panel; `isToType` puts the cursor into its input. */
  async reveal(isToType = false): Promise<void> {
    if (isToType) {
      this.wantsFocus = true;
      await vscode.commands.executeCommand(`${VIEW}.focus`);
      this.focus();
    } else if (this.view) {
      this.view.show(true);
    } else {
      const editor = editorInUse();
      await vscode.commands.executeCommand(`${VIEW}.focus`);
      if (editor) {
        await vscode.window.showTextDocument(editor.document, editor.viewColumn);
      }
    }
  }

  resolveWebviewView(view: vscode.WebviewView): void {
    this.view = view;
    view.webview.options = { enableScripts: true, localResourceRoots: [this.folder] };
    view.webview.onDidReceiveMessage((message: FromView) => this.heard(message));
    view.onDidDispose(() => (this.view = undefined));
    view.webview.html = page(view.webview, this.folder);
  }

  private async heard(message: FromView): Promise<void> {
    switch (message.type) {
      case "ready":
        this.show();
        return this.focus();
      case "ask":
        return this.chat.ask(this.actions.question(message.text, this.references.chosen));
      case "again":
        return this.chat.again(message.id);
      case "stop":
        return this.chat.stop();
      case "chip":
        return this.references.toggle(message.key);
      case "copy":
        return vscode.env.clipboard.writeText(message.code);
      case "insert":
        return insert(message.code);
    }
  }

  private show(): void {
    this.post({ type: "shown", turns: this.chat.turns, chips: this.references.chips, offers: this.actions.offers });
  }

  private focus(): void {
    if (this.wantsFocus && this.view?.visible) {
      this.post({ type: "focus" });
    }
  }

  private post(message: ToView): void {
    void this.view?.webview.postMessage(message).then((isHeard) => {
      this.wantsFocus &&= !(isHeard && message.type === "focus");
    });
  }

  dispose(): void {
    clearTimeout(this.answering);
    this.listening.dispose();
  }
}

/** Puts code at the cursor of the editor in use, as one edit; where the cursor stands in a line's margin, all lines get that margin. */
async function insert(code: string): Promise<void> {
  const editor = editorInUse();
  if (!editor) {
    void vscode.window.showWarningMessage("DeepSeek: open a file first; the code goes to its cursor.");
    return;
  }
  const at = editor.selection.active;
  const before = editor.document.lineAt(at).text.slice(0, at.character);
  const text = before.trim() ? code : code.split("\n").join(`\n${before}`);
  const isDone = await editor.edit((edit) => edit.insert(at, text));
  if (!isDone) {
    void vscode.window.showWarningMessage("DeepSeek: the code could not be inserted: the file cannot be changed.");
    return;
  }
  await vscode.window.showTextDocument(editor.document, editor.viewColumn);
}

function page(webview: vscode.Webview, folder: vscode.Uri): string {
  const nonce = randomBytes(16).toString("base64");
  const at = (...path: string[]) => webview.asWebviewUri(vscode.Uri.joinPath(folder, ...path)).toString();
  const policy = [
    "default-src 'none'",
    `style-src ${webview.cspSource}`,
    `script-src 'nonce-${nonce}'`,
    "base-uri 'none'",
    "form-action 'none'",
  ];
  return `<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta http-equiv="Content-Security-Policy" content="${policy.join("; ")}">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <link rel="stylesheet" href="${at("media", "panel.css")}">
  <title>DeepSeek</title>
</head>
<body>
  <main id="talk" role="log" aria-label="Conversation" tabindex="0"></main>
  <form id="ask">
    <ul id="offers" role="listbox" aria-label="Actions" hidden></ul>
    <div id="chips" role="group" aria-label="What the question is about"></div>
    <div id="box">
      <textarea id="text" rows="1" aria-label="Ask about your code" aria-controls="offers" aria-autocomplete="list"
        placeholder="Ask, or / for actions"></textarea>
      <button id="send" type="submit"></button>
    </div>
  </form>
  <script nonce="${nonce}" src="${at("dist", "view.js")}"></script>
</body>
</html>`;
}
