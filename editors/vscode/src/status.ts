/** The item in the status bar: loading, ready, busy, off or error, and why. */
import * as vscode from "vscode";

export type Kind = "loading" | "ready" | "off" | "error";

const ICONS = { loading: "$(sync~spin)", ready: "$(sparkle)", busy: "$(ellipsis)", off: "$(circle-slash)", error: "$(error)" };

export class Status implements vscode.Disposable {
  private readonly item = vscode.window.createStatusBarItem("deepseek-lsp.status", vscode.StatusBarAlignment.Right, 100);
  private kind: Kind = "off";
  private label = "";
  private detail = "Not started yet.";
  private asking = 0;
  private languageOff = false;
  private readonly changed = new vscode.EventEmitter<void>();
  readonly onDidChange = this.changed.event;

  constructor() {
    this.item.name = "DeepSeek";
    this.item.command = "deepseek-lsp.menu";
    this.item.show();
    this.draw();
  }

  /** `label` is short and stands in the bar; `detail` is a sentence. */
  set(kind: Kind, detail: string, label = ""): void {
    [this.kind, this.detail, this.label] = [kind, detail, label];
    this.draw();
    this.changed.fire();
  }

  setLanguageOff(off: boolean): void {
    this.languageOff = off;
    this.draw();
  }

  get is(): Kind {
    return this.kind;
  }

  /** Why it stands as it does. */
  get sentence(): string {
    return this.detail;
  }

  /** Shows that something was asked for while `work` runs. */
  async during<T>(work: PromiseLike<T>): Promise<T> {
    this.asking += 1;
    this.draw();
    try {
      return await work;
    } finally {
      this.asking -= 1;
      this.draw();
    }
  }

  private draw(): void {
    const off = this.kind === "ready" && this.languageOff;
    const kind = off ? "off" : this.kind === "ready" && this.asking > 0 ? "busy" : this.kind;
    this.item.text = `${ICONS[kind]} DeepSeek${this.label && ` ${this.label}`}`;
    const detail = off ? "Ghost text is switched off for this language." : this.detail;
    this.item.tooltip = `DeepSeek is ${kind}. ${detail}`;
    this.item.accessibilityInformation = { label: `DeepSeek is ${kind}. ${detail}` };
    this.item.backgroundColor = kind === "error" ? new vscode.ThemeColor("statusBarItem.errorBackground") : undefined;
  }

  dispose(): void {
    this.item.dispose();
    this.changed.dispose();
  }
}
