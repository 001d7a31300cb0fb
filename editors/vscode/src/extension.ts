/** The extension: one server, one status bar item, the commands. */
import * as vscode from "vscode";
import { WorkspaceEdit } from "vscode-languageclient/node";
import { Actions } from "./actions";
import { Asked, Chat } from "./chat";
import { Server, ServerStatus } from "./client";
import { Panel } from "./panel";
import { Preview } from "./preview";
import { References, editorInUse } from "./references";
import { install, watchEnvironment } from "./server";
import { SECTION, disabledLanguages, needsRestart, toggleLanguage } from "./settings";
import { Status } from "./status";

let server: Server | undefined;

export async function activate(context: vscode.ExtensionContext): Promise<void> {
  const log = vscode.window.createOutputChannel("DeepSeek", { log: true });
  const status = new Status();
  const running = new Server(context, log, status);
  server = running;
  const chat = new Chat(running);
  const references = new References();
  const preview = new Preview();
  const actions: Actions = new Actions(running, chat, preview, () => panel.reveal());
  const panel = new Panel(context.extensionUri, chat, references, actions);
  running.chosen = actions.middleware;
  const language = () => vscode.window.activeTextEditor?.document.languageId;
  const showLanguage = () => status.setLanguageOff(disabledLanguages().includes(language() ?? ""));

  const commands: Record<string, (...given: never[]) => unknown> = {
    menu: () => menu(running, language()),
    status: async () => {
      const found = await running.refresh();
      showStatus(found);
      return found;
    },
    restart: () => running.restart(),
    logs: () => log.show(),
    toggle: async () => {
      const inline = vscode.workspace.getConfiguration(SECTION);
      await inline.update("inline.enabled", !inline.get("inline.enabled", true), vscode.ConfigurationTarget.Global);
    },
    toggleLanguage: async () => {
      const current = language();
      if (current) {
        await toggleLanguage(current);
      }
    },
    chat: () => panel.reveal(true),
    newChat: async () => {
      references.clear();
      await chat.clear();
      await panel.reveal(true);
    },
    stop: () => chat.stop(),
    addToChat: async () => {
      const editor = editorInUse();
      if (editor) {
        references.add(editor);
      }
      await panel.reveal(true);
    },
    explain: () => actions.explain(),
    tests: () => actions.here("tests"),
    docstring: () => actions.here("docstring"),
    input: (asked: Asked, question: string) => actions.input(asked, question),
    make: (title: string, edit: WorkspaceEdit) => actions.make(title, edit),
    apply: () => preview.decide(true),
    discard: () => preview.decide(false),
    install: async (source?: string) => {
      if (await install(context, source)) {
        await running.restart();
      }
    },
  };
  for (const [name, run] of Object.entries(commands)) {
    context.subscriptions.push(vscode.commands.registerCommand(`${SECTION}.${name}`, run));
  }
  context.subscriptions.push(
    log,
    status,
    running,
    chat,
    references,
    preview,
    actions,
    panel,
    vscode.window.onDidChangeActiveTextEditor(showLanguage),
    vscode.workspace.onDidChangeConfiguration(async (event) => {
      showLanguage();
      if (needsRestart(context.extension, event)) {
        await running.restart();
      }
    }),
  );
  showLanguage();
  await running.start();
  await watchEnvironment(context, () => void running.restart());
}

export async function deactivate(): Promise<void> {
  await server?.stop();
}

async function menu(running: Server, language: string | undefined): Promise<void> {
  const status = await running.refresh();
  const off = language !== undefined && disabledLanguages().includes(language);
  const enabled = vscode.workspace.getConfiguration(SECTION).get("inline.enabled", true);
  const entries: (vscode.QuickPickItem & { command: string; arguments?: unknown[] })[] = [
    { label: "$(comment) Open the chat", command: `${SECTION}.chat` },
    { label: `$(${enabled ? "circle-slash" : "sparkle"}) Switch ghost text ${enabled ? "off" : "on"}`, command: `${SECTION}.toggle` },
    ...(language
      ? [{ label: `$(file-code) Switch ghost text ${off ? "on" : "off"} for ${language}`, command: `${SECTION}.toggleLanguage` }]
      : []),
    {
      label: "$(chip) Choose the model",
      description: status?.settings.model,
      command: "workbench.action.openSettings",
      arguments: [`${SECTION}.model`],
    },
    { label: "$(info) Status", description: status?.message, command: `${SECTION}.status` },
    { label: "$(output) Logs", command: `${SECTION}.logs` },
    { label: "$(debug-restart) Restart the server", command: `${SECTION}.restart` },
  ];
  const chosen = await vscode.window.showQuickPick(entries, { title: "DeepSeek" });
  if (chosen) {
    await vscode.commands.executeCommand(chosen.command, ...(chosen.arguments ?? []));
  }
}

function showStatus(status: ServerStatus | undefined): void {
  if (!status) {
    void vscode.window.showWarningMessage("DeepSeek: no server is running.");
    return;
  }
  const { asked, shown, accepted } = status.requests;
  const lines = [
    status.message,
    ...(status.model?.parameters ? [`${(status.model.parameters / 1e6).toFixed(1)} M parameters, ${status.model.dtype} on ${status.model.device}.`] : []),
    `Asked ${asked} times, shown ${shown}, accepted ${accepted}.`,
    ...(status.last.reason ? [`Last time nothing was shown: ${status.last.reason}`] : []),
    ...status.problems,
  ];
  void vscode.window.showInformationMessage(`DeepSeek is ${status.state}`, { modal: true, detail: lines.join("\n") });
}
