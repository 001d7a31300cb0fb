/** What a question is about: the selection or the file in the editor, and places that the user added. */
import * as vscode from "vscode";
import type { Chip } from "./messages";

interface Position {
  line: number;
  character: number;
}

export interface Span {
  start: Position;
  end: Position;
}

/** A place as the server wants it. */
export interface Reference {
  uri: string;
  range?: Span;
  diagnostics?: string[];
}

/** A place as the user sees it. */
export interface About {
  key: string;
  label: string;
  reference: Reference;
}

export function span(range: vscode.Range): Span {
  const place = (position: vscode.Position) => ({ line: position.line, character: position.character });
  return { start: place(range.start), end: place(range.end) };
}

/** The editor that a question can be about: one with a document that the server knows. */
export function editorInUse(): vscode.TextEditor | undefined {
  const editor = vscode.window.activeTextEditor;
  return editor && ["file", "untitled"].includes(editor.document.uri.scheme) ? editor : undefined;
}

/** The selection, or the cursor's place, with what is reported there. */
export function placeIn(editor: vscode.TextEditor): Reference & { range: Span; diagnostics: string[] } {
  const reported = vscode.languages
    .getDiagnostics(editor.document.uri)
    .filter((one) => one.range.intersection(editor.selection) ?? one.range.start.line === editor.selection.active.line);
  const said = reported.map((one) => `line ${one.range.start.line + 1}: ${one.source ? `${one.source}: ` : ""}${one.message}`);
  return { uri: editor.document.uri.toString(), range: span(editor.selection), diagnostics: said };
}

function about(document: vscode.TextDocument, selection: vscode.Selection | undefined): About {
  const name = vscode.workspace.asRelativePath(document.uri);
  const uri = document.uri.toString();
  if (!selection || selection.isEmpty) {
    return { key: uri, label: name, reference: { uri } };
  }
  const last = selection.end.character === 0 ? selection.end.line - 1 : selection.end.line;
  const lines = last > selection.start.line ? `${selection.start.line + 1}-${last + 1}` : `${selection.start.line + 1}`;
  const end = document.lineAt(last).range.end;
  return { key: `${uri}#${lines}`, label: `${name}:${lines}`, reference: { uri, range: span(new vscode.Range(selection.start, end)) } };
}

/** Beside what was added, the editor's selection is referred to unless it is switched off, and the file without one if it is switched on. */
export class References implements vscode.Disposable {
  private added: About[] = [];
  private switched = new Set<string>();
  private readonly changed = new vscode.EventEmitter<void>();
  private readonly watching: vscode.Disposable;
  readonly onDidChange = this.changed.event;

  constructor() {
    const fire = () => this.changed.fire();
    this.watching = vscode.Disposable.from(
      vscode.window.onDidChangeActiveTextEditor(fire),
      vscode.window.onDidChangeTextEditorSelection((event) => event.textEditor === editorInUse() && fire()),
    );
  }

  get chips(): Chip[] {
    return [
      ...this.added.map(({ key, label }) => ({ key, label, isOn: true })),
      ...(this.current ? [{ key: this.current.key, label: this.current.label, isOn: this.isOn(this.current) }] : []),
    ];
  }

  /** What the next question refers to. */
  get chosen(): About[] {
    return [...this.added, ...(this.current && this.isOn(this.current) ? [this.current] : [])];
  }

  /** Keeps the selection, or the file, for all questions to come. */
  add(editor: vscode.TextEditor): void {
    const found = about(editor.document, editor.selection);
    this.added = [...this.added.filter((one) => one.key !== found.key), found];
    this.changed.fire();
  }

  /** Takes an added place away, or switches the editor's on or off. */
  toggle(key: string): void {
    if (this.added.some((one) => one.key === key)) {
      this.added = this.added.filter((one) => one.key !== key);
    } else if (!this.switched.delete(key)) {
      this.switched.add(key);
    }
    this.changed.fire();
  }

  clear(): void {
    this.added = [];
    this.switched.clear();
    this.changed.fire();
  }

  private get current(): About | undefined {
    const editor = editorInUse();
    const found = editor && about(editor.document, editor.selection);
    return found && !this.added.some((one) => one.key === found.key) ? found : undefined;
  }

  private isOn(one: About): boolean {
    return (one.reference.range !== undefined) !== this.switched.has(one.key);
  }

  dispose(): void {
    this.watching.dispose();
    this.changed.dispose();
  }
}
