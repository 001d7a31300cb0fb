/** The connection to the server: started, watched, started again after a crash; ghost text passes through here. */
import * as vscode from "vscode";
import {
  CloseAction,
  ErrorAction,
  ErrorCodes,
  LanguageClient,
  LanguageClientOptions,
  Middleware,
  ProgressToken,
  ResponseError,
  StaticFeature,
  Trace,
  WorkDoneProgressBegin,
  WorkDoneProgressEnd,
  WorkDoneProgressReport,
} from "vscode-languageclient/node";
import { Bar } from "./progress";
import { find } from "./server";
import { SECTION, disabledLanguages, forServer, userLevel } from "./settings";
import { Status } from "./status";

const RESTARTS = 5;
const FIRST_WAIT_MS = 1000;
const CALM_MS = 60_000;
const LOST: number[] = [ErrorCodes.PendingResponseRejected, ErrorCodes.ConnectionInactive];
const STATES = { waiting: "loading", loading: "loading", ready: "ready", failed: "error", disabled: "off" } as const;

/** The answer of deepseek/status, as far as it is shown. */
export interface ServerStatus {
  state: keyof typeof STATES;
  message: string;
  model: { parameters: number; device: string; dtype: string } | null;
  settings: { model: string };
  problems: string[];
  requests: { asked: number; shown: number; accepted: number };
  last: { shown: boolean; reason: string; cost: { computed_tokens: number; cached_tokens: number; new_tokens: number } | null };
}

/** A part of an answer, as `deepseek/stream` brings it. */
export interface Piece {
  id: string;
  text?: string;
  restart?: boolean;
}

/** Says that there is no server to ask, or that it ended before it answered. */
export class Gone extends Error {}

/** What this extension can do beside what every editor can. */
const OWN: StaticFeature = {
  fillClientCapabilities: (capabilities) => {
    capabilities.experimental = { ...capabilities.experimental, deepseekLsp: { input: true } };
  },
  initialize: () => undefined,
  getState: () => ({ kind: "static" }),
  clear: () => undefined,
};

/** Leaves it to `Server` to tell the user that it could not start. */
class Client extends LanguageClient {
  override error(message: string, data?: unknown, show: boolean | "force" = true): void {
    super.error(message, data, this.isRunning() && show);
  }
}

export class Server implements vscode.Disposable {
  private client: LanguageClient | undefined;
  private crashes = 0;
  private startedAt = 0;
  private restarts: Promise<void> = Promise.resolve();
  private waiting: NodeJS.Timeout | undefined;
  private readonly started = new vscode.EventEmitter<void>();
  private readonly streamed = new vscode.EventEmitter<Piece>();
  readonly onDidStart = this.started.event;
  readonly onDidStream = this.streamed.event;
  private readonly bars = new Map<ProgressToken, Bar>();
  /** What becomes of code actions, their commands and edits; set before the start. */
  chosen: Middleware = {};

  constructor(
    private readonly context: vscode.ExtensionContext,
    private readonly log: vscode.LogOutputChannel,
    private readonly status: Status,
  ) {}

  /** Starts the server; where there is none, offers to install it. */
  async start(): Promise<void> {
    const found = await find(this.context);
    if ("missing" in found) {
      this.status.set("error", found.missing);
      this.log.error(found.missing);
      void this.offer(found.missing, {
        "Install...": [`${SECTION}.install`],
        "Set the Path": ["workbench.action.openSettings", `${SECTION}.server.path`],
      });
      return;
    }
    this.status.set("loading", `Starting ${found.program}.`);
    this.log.info(`Starting ${found.program}`);
    const isCurrent = () => this.client === client && client.isRunning();
    const ended = () => this.ended(client, "The server ended by itself");
    const client: Client = new Client(SECTION, "DeepSeek", { command: found.program, args: [] }, this.options(isCurrent, ended));
    client.registerFeature(OWN);
    client.onNotification("deepseek/stream", (piece: Piece) => this.streamed.fire(piece));
    this.client = client;
    this.startedAt = Date.now();
    try {
      await client.start();
      this.started.fire();
      await client.setTrace(Trace.fromString(vscode.workspace.getConfiguration(SECTION).get("trace.server", "off")));
      await this.refresh();
      await vscode.commands.executeCommand("setContext", "deepseek-lsp.running", true);
    } catch (error) {
      if (!client.isRunning()) {
        this.ended(client, "The server did not start");
      } else if (this.client === client) {
        this.status.set("error", `The server does not say how it stands: ${error instanceof Error ? error.message : error}`);
      }
    }
  }

  async stop(): Promise<void> {
    clearTimeout(this.waiting);
    const client = this.client;
    this.client = undefined;
    this.endBars();
    if (client?.isRunning()) {
      await client.stop().catch((error) => this.log.warn(`The server did not stop: ${error}`));
    }
  }

  /** One restart after the other, however many are asked for at once. */
  restart(): Promise<void> {
    this.crashes = 0;
    this.restarts = this.restarts.then(async () => {
      await this.stop();
      await this.start();
    });
    return this.restarts;
  }

  /** Asks the server; raises `Gone` when there is none, or none any more. */
  async request<Answer>(method: string, params: unknown, stop?: vscode.CancellationToken): Promise<Answer> {
    const client = this.client;
    if (!client?.isRunning()) {
      throw new Gone(`No server is running. ${this.status.sentence}`);
    }
    try {
      return await this.status.during(client.sendRequest<Answer>(method, params, stop ?? new vscode.CancellationTokenSource().token));
    } catch (error) {
      const isLost = error instanceof ResponseError && LOST.includes(error.code);
      throw isLost || client !== this.client || !client.isRunning() ? new Gone("The server ended before the answer did.") : error;
    }
  }

  /** Waits while the model is being loaded. */
  async untilLoaded(stop: vscode.CancellationToken): Promise<void> {
    while (this.status.is === "loading" && !stop.isCancellationRequested) {
      await new Promise<void>((resolve) => {
        const both = vscode.Disposable.from(this.status.onDidChange(done), stop.onCancellationRequested(done));
        function done(): void {
          both.dispose();
          resolve();
        }
      });
    }
  }

  /** LSP's form of VS Code's values, and back. */
  get converters(): Pick<LanguageClient, "code2ProtocolConverter" | "protocol2CodeConverter"> | undefined {
    return this.client;
  }

  /** Asks the server how it stands, and shows that. */
  async refresh(): Promise<ServerStatus | undefined> {
    const client = this.client;
    if (!client?.isRunning()) {
      return undefined;
    }
    const answer = await client.sendRequest<ServerStatus>("deepseek/status");
    if (client !== this.client) {
      return undefined; // what a server that is gone still says does not count
    }
    const silent = answer.state === "ready" && answer.requests.asked > 0 && !answer.last.shown;
    const reason = !silent ? "" : ` Last time nothing was shown: ${answer.last.reason}`;
    this.status.set(STATES[answer.state], answer.message + reason);
    return answer;
  }

  private options(isCurrent: () => boolean, ended: () => void): LanguageClientOptions {
    const extension = this.context.extension;
    return {
      documentSelector: [{ scheme: "file" }, { scheme: "untitled" }],
      initializationOptions: userLevel(extension),
      outputChannel: this.log,
      initializationFailedHandler: () => false,
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => {
          ended();
          return { action: CloseAction.DoNotRestart, handled: true };
        },
      },
      middleware: {
        ...this.chosen,
        workspace: {
          ...this.chosen.workspace,
          // what cannot be sent because the change itself ends the server is no error
          didChangeConfiguration: (sections, next) => next(sections).catch((error) => (isCurrent() ? Promise.reject(error) : undefined)),
          configuration: (params) => {
            setImmediate(() => void this.refresh()); // behind the answer, so that the server has heard it by then
            return params.items.map((item) => (item.section === SECTION ? forServer(extension) : null));
          },
        },
        handleWorkDoneProgress: (token, value) => this.progress(token, value),
        provideInlineCompletionItems: async (document, position, context, token, next) => {
          if (disabledLanguages().includes(document.languageId)) {
            return [];
          }
          const found = await this.status.during(Promise.resolve(next(document, position, context, token)));
          const items = Array.isArray(found) ? found : (found?.items ?? []);
          if (!items.length && !token.isCancellationRequested) {
            void this.refresh();
          }
          return found;
        },
      },
    };
  }

  /** Work that the user can stop has a bar of its own; everything else is the model being loaded. */
  private progress(token: ProgressToken, value: WorkDoneProgressBegin | WorkDoneProgressReport | WorkDoneProgressEnd): void {
    const bar = this.bars.get(token);
    if (value.kind === "begin" && value.cancellable) {
      const begun = new Bar(value.title, () => void this.client?.sendNotification("window/workDoneProgress/cancel", { token }));
      this.bars.set(token, begun);
      void this.status.during(begun.ended);
    } else if (value.kind !== "end") {
      const percent = value.percentage === undefined ? "" : `${value.percentage}%`;
      void (bar ? bar.report(value.message, value.percentage) : this.status.set("loading", value.message ?? "The model is loaded.", percent));
    } else if (bar) {
      bar.end();
      this.bars.delete(token);
    } else {
      void this.refresh();
    }
  }

  private endBars(): void {
    this.bars.forEach((bar) => bar.end());
    this.bars.clear();
  }

  /** A server that went on its own is started again, each time after twice the wait, and after a few times no more. */
  private ended(client: Client, how: string): void {
    if (this.client !== client) {
      return; // it was stopped, or a start that failed was heard of already
    }
    this.client = undefined;
    this.endBars();
    this.crashes = Date.now() - this.startedAt > CALM_MS ? 1 : this.crashes + 1;
    if (this.crashes > RESTARTS) {
      const why = `${how} (${this.crashes} times) and is not started again. The logs say why.`;
      this.status.set("error", why);
      void this.offer(`DeepSeek: ${why}`, { "Restart the Server": [`${SECTION}.restart`], "Show the Logs": [`${SECTION}.logs`] });
      return;
    }
    const wait = FIRST_WAIT_MS * 2 ** (this.crashes - 1);
    this.status.set("error", `${how} and is started again in ${wait / 1000} s.`);
    this.waiting = setTimeout(() => void this.start(), wait);
  }

  /** An error with buttons that run commands. */
  private async offer(why: string, ways: Record<string, [command: string, ...given: string[]]>): Promise<void> {
    const chosen = await vscode.window.showErrorMessage(why, ...Object.keys(ways));
    if (chosen) {
      await vscode.commands.executeCommand(...ways[chosen]);
    }
  }

  dispose(): void {
    clearTimeout(this.waiting);
    this.started.dispose();
    this.streamed.dispose();
  }
}
