/** The conversation: questions, answers as they come, and what becomes of them when the server ends. Knows no view. */
import { randomUUID } from "node:crypto";
import * as vscode from "vscode";
import { Server } from "./client";
import type { Turn } from "./messages";
import type { About, Reference, Span } from "./references";

/** What `deepseek-lsp.run` is asked. */
export interface Asked {
  action: string;
  uri: string;
  range: Span;
  version?: number;
  diagnostics?: string[];
  instruction?: string;
}

/** `text` goes to the chat; `asked` is a change, which the server has the editor make. */
export interface Question {
  shown: string;
  about: About[];
  text?: string;
  asked?: Asked;
}

interface Answer {
  conversation?: string | null;
  title?: string;
  text: string;
  notes: string[];
}

const FORGOTTEN = "The server was started again and no longer knows what was said above.";

export class Chat implements vscode.Disposable {
  readonly turns: Turn[] = [];
  private readonly questions = new Map<string, Question>();
  private conversation: string | undefined;
  private sent = new Set<string>();
  private isForgotten = false;
  private running: { stop: vscode.CancellationTokenSource; ended: Promise<void> } | undefined;
  private readonly changed = new vscode.EventEmitter<void>();
  private readonly heard = new vscode.EventEmitter<Turn>();
  private readonly listening: vscode.Disposable;
  readonly onDidChange = this.changed.event;
  readonly onDidHear = this.heard.event;

  constructor(private readonly server: Server) {
    this.listening = vscode.Disposable.from(
      server.onDidStart(() => this.forget()),
      server.onDidStream(({ id, text, restart }) => {
        const turn = this.turns.find((one) => one.id === id);
        if (turn && (text || restart)) {
          const isFirst = turn.state === "waiting";
          turn.answer = restart ? "" : turn.answer + text;
          turn.state = "answering";
          if (isFirst) {
            this.changed.fire();
          } else {
            this.heard.fire(turn);
          }
        }
      }),
    );
  }

  /** Asks; an answer that is still coming is stopped. Ends with the answer, or with why there is none. */
  async ask(question: Question): Promise<void> {
    while (this.running) {
      await this.stop(); // whoever else waited for this may have begun before
    }
    const stop = new vscode.CancellationTokenSource();
    const turn: Turn = {
      id: randomUUID(),
      question: question.shown,
      about: question.about.map((one) => one.label),
      answer: "",
      notes: [],
      state: "waiting",
      problem: "",
      news: this.isForgotten ? FORGOTTEN : "",
    };
    this.isForgotten = false;
    this.turns.push(turn);
    this.questions.set(turn.id, question);
    const ended = this.answer(turn, question, stop.token);
    this.running = { stop, ended };
    this.changed.fire();
    await ended;
    if (this.running?.stop === stop) {
      this.running = undefined;
    }
  }

  /** Asks a question whose answer did not come once more. */
  async again(id: string): Promise<void> {
    const question = this.questions.get(id);
    const turn = this.turns.findIndex((one) => one.id === id);
    if (question && turn >= 0) {
      const [{ news }] = this.turns.splice(turn, 1);
      this.isForgotten ||= Boolean(news);
      await this.ask(question);
    }
  }

  async stop(): Promise<void> {
    const { running } = this;
    running?.stop.cancel();
    await running?.ended;
  }

  /** Begins a new conversation. */
  async clear(): Promise<void> {
    await this.stop();
    if (this.conversation) {
      void this.server.request("deepseek/chat/end", { conversation: this.conversation }).catch(() => undefined); // it ends with the server anyway
    }
    this.turns.length = 0;
    this.questions.clear();
    this.forget();
    this.isForgotten = false;
    this.changed.fire();
  }

  private forget(): void {
    this.isForgotten ||= this.conversation !== undefined;
    this.conversation = undefined;
    this.sent.clear();
  }

  private async answer(turn: Turn, question: Question, stop: vscode.CancellationToken): Promise<void> {
    try {
      await this.server.untilLoaded(stop);
      const { conversation, title, text, notes } = await (question.asked ? this.change(question.asked, stop) : this.words(turn.id, question, stop));
      turn.question = title ?? turn.question;
      turn.answer = text || "The change is in the editor.";
      turn.notes = notes;
      turn.state = "done";
      this.conversation = conversation ?? this.conversation;
    } catch (error) {
      turn.state = stop.isCancellationRequested ? "stopped" : "failed";
      turn.problem = reason(error);
    }
    this.changed.fire();
  }

  private async words(stream: string, question: Question, stop: vscode.CancellationToken): Promise<Answer> {
    const text = question.text ?? "";
    const wanted = text.startsWith("/") ? question.about : question.about.filter((one) => !this.sent.has(this.stamp(one.reference)));
    const references = wanted.map((one) => one.reference);
    const answer = await this.server.request<Answer>("deepseek/chat", { text, conversation: this.conversation, references, stream }, stop);
    references.forEach((one) => this.sent.add(this.stamp(one)));
    return answer;
  }

  private change(asked: Asked, stop: vscode.CancellationToken): Promise<Answer> {
    return this.server.request<Answer>("workspace/executeCommand", { command: "deepseek-lsp.run", arguments: [asked] }, stop);
  }

  /** The same for a text that the conversation holds already. */
  private stamp(reference: Reference): string {
    const document = vscode.workspace.textDocuments.find((one) => one.uri.toString() === reference.uri);
    return JSON.stringify([reference, document?.version]);
  }

  dispose(): void {
    this.running?.stop.cancel();
    this.listening.dispose();
    this.changed.dispose();
    this.heard.dispose();
  }
}

export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
