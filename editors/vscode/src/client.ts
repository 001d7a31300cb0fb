/** The connection to the server: started, watched, started again after a crash; ghost text passes through here. */
import * as vscode from "vscode";
import { CloseAction, ErrorAction, LanguageClient, LanguageClientOptions, Trace } from "vscode-languageclient/node";
import { find } from "./server";
import { SECTION, disabledLanguages, forServer, userLevel } from "./settings";
import { Status } from "./status";

const RESTARTS = 5;
const FIRST_WAIT_MS = 1000;
const CALM_MS = 60_000;
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

export class Server implements vscode.Disposable {
  private client: LanguageClient | undefined;
  private crashes = 0;
  private startedAt = 0;
  private restarts: Promise<void> = Promise.resolve();
  private waiting: NodeJS.Timeout | undefined;

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
      void this.offerInstall(found.missing);
      return;
    }
    this.status.set("loading", `Starting ${found.program}.`);
    this.log.info(`Starting ${found.program}`);
    const isCurrent = () => this.client === client && client.isRunning();
    const client: LanguageClient = new LanguageClient(SECTION, "DeepSeek", { command: found.program, args: [] }, this.options(isCurrent));
    this.client = client;
    this.startedAt = Date.now();
    try {
      await client.start();
      await client.setTrace(Trace.fromString(vscode.workspace.getConfiguration(SECTION).get("trace.server", "off")));
      await this.refresh();
      await vscode.commands.executeCommand("setContext", "deepseek-lsp.running", true);
    } catch (error) {
      if (this.client === client) {
        this.status.set("error", `The server did not start: ${error instanceof Error ? error.message : error}`);
      }
    }
  }

  async stop(): Promise<void> {
    clearTimeout(this.waiting);
    const client = this.client;
    this.client = undefined;
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

  private options(isCurrent: () => boolean): LanguageClientOptions {
    const extension = this.context.extension;
    return {
      documentSelector: [{ scheme: "file" }, { scheme: "untitled" }],
      initializationOptions: userLevel(extension),
      outputChannel: this.log,
      initializationFailedHandler: () => false,
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => {
          this.ended();
          return { action: CloseAction.DoNotRestart, handled: true };
        },
      },
      middleware: {
        workspace: {
          // what cannot be sent because the change itself ends the server is no error
          didChangeConfiguration: (sections, next) => next(sections).catch((error) => (isCurrent() ? Promise.reject(error) : undefined)),
          configuration: (params) => {
            setImmediate(() => void this.refresh()); // behind the answer, so that the server has heard it by then
            return params.items.map((item) => (item.section === SECTION ? forServer(extension) : null));
          },
        },
        handleWorkDoneProgress: (_token, value) => {
          if (value.kind === "end") {
            void this.refresh();
          } else {
            const percent = value.percentage === undefined ? "" : `${value.percentage}%`;
            this.status.set("loading", value.message ?? "The model is loaded.", percent);
          }
        },
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

  /** A server that ended by itself is started again, each time after twice the wait, and after a few times no more. */
  private ended(): void {
    if (!this.client) {
      return;
    }
    this.client = undefined;
    this.crashes = Date.now() - this.startedAt > CALM_MS ? 1 : this.crashes + 1;
    if (this.crashes > RESTARTS) {
      this.status.set("error", `The server ended by itself ${this.crashes} times. The logs say why; it can be restarted from the menu.`);
      return;
    }
    const wait = FIRST_WAIT_MS * 2 ** (this.crashes - 1);
    this.status.set("error", `The server ended by itself and is started again in ${wait / 1000} s.`);
    this.waiting = setTimeout(() => void this.start(), wait);
  }

  private async offerInstall(missing: string): Promise<void> {
    const chosen = await vscode.window.showErrorMessage(missing, "Install...", "Set the Path");
    if (chosen === "Install...") {
      await vscode.commands.executeCommand("deepseek-lsp.install");
    } else if (chosen) {
      await vscode.commands.executeCommand("workbench.action.openSettings", "deepseek-lsp.server.path");
    }
  }

  dispose(): void {
    clearTimeout(this.waiting);
  }
}
