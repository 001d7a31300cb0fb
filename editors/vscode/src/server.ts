/** Where the server is, and how it gets there: the configured path, the Python environment, our own installation, PATH. */
import { access, constants } from "node:fs/promises";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import * as vscode from "vscode";
import { serverPath } from "./settings";

const WINDOWS = process.platform === "win32";
const PROGRAM = WINDOWS ? "deepseek-lsp.exe" : "deepseek-lsp";
const BIN = WINDOWS ? "Scripts" : "bin";

async function isThere(file: string): Promise<boolean> {
  return access(file, constants.X_OK).then(
    () => true,
    () => false,
  );
}

/** The Python extension's environments, as far as they matter here. */
interface Environments {
  getActiveEnvironmentPath(): { path: string } | undefined;
  onDidChangeActiveEnvironmentPath: vscode.Event<unknown>;
}

/** Where the Python extension is, and the workspace trusted: one that is not may have chosen the environment. */
async function environments(): Promise<Environments | undefined> {
  const python = vscode.extensions.getExtension<{ environments?: Environments }>("ms-python.python");
  return python && vscode.workspace.isTrusted ? (await python.activate())?.environments : undefined;
}

/** The folder of programs of the Python environment the user selected. */
async function environmentFolder(): Promise<string | undefined> {
  const interpreter = (await environments())?.getActiveEnvironmentPath()?.path;
  return interpreter && dirname(interpreter);
}

/** Calls back when another server is to be used: the user selected another environment, or trusts the workspace now. */
export async function watchEnvironment(context: vscode.ExtensionContext, changed: () => void): Promise<void> {
  let before = await environmentFolder();
  const look = async () => {
    const now = await environmentFolder();
    if (now !== before) {
      before = now;
      changed();
    }
  };
  const watch = async () => {
    const found = await environments();
    if (found) {
      context.subscriptions.push(found.onDidChangeActiveEnvironmentPath(look));
    }
  };
  const trusted = async () => {
    await watch();
    await look();
  };
  context.subscriptions.push(vscode.workspace.onDidGrantWorkspaceTrust(trusted));
  await watch();
}

function ownFolder(context: vscode.ExtensionContext): string {
  return join(context.globalStorageUri.fsPath, "server");
}

/** The server's program, or why there is none. */
export async function find(context: vscode.ExtensionContext): Promise<{ program: string } | { missing: string }> {
  const configured = serverPath().replace(/^~(?=[\\/])/, homedir());
  if (configured) {
    const missing = `deepseek-lsp.server.path names ${configured}, which is no program.`;
    return (await isThere(configured)) ? { program: configured } : { missing };
  }
  const environment = await environmentFolder();
  const folders = [join(ownFolder(context), BIN), ...(process.env.PATH ?? "").split(delimiter)];
  for (const folder of environment ? [environment, ...folders] : folders) {
    const program = join(folder, PROGRAM);
    if (folder && (await isThere(program))) {
      return { program };
    }
  }
  return { missing: "deepseek-lsp is not installed: not in the selected Python environment, not by this extension, not on PATH." };
}

/** Has pip install what the user names into an environment of our own, in a terminal; says whether that went well. */
export async function install(context: vscode.ExtensionContext, source?: string): Promise<boolean> {
  const wanted =
    source ??
    (await vscode.window.showInputBox({
      title: "Install deepseek-lsp",
      prompt: "What pip is to install: a folder with a clone of deepseek-lsp, or its Git address (git+https://...). About 2 GB.",
      ignoreFocusOut: true,
    }));
  if (!wanted) {
    return false;
  }
  const folder = ownFolder(context);
  const python = WINDOWS ? "py" : "python3";
  await vscode.workspace.fs.createDirectory(context.globalStorageUri);
  return (
    (await ran("Make an environment", python, ["-m", "venv", folder])) &&
    (await ran("Install deepseek-lsp", join(folder, BIN, "python"), ["-m", "pip", "install", "--upgrade", wanted]))
  );
}

async function ran(name: string, program: string, args: string[]): Promise<boolean> {
  const execution = new vscode.ProcessExecution(program, args);
  const task = new vscode.Task({ type: "deepseek-lsp" }, vscode.TaskScope.Global, name, "deepseek-lsp", execution);
  let ended: vscode.Disposable | undefined;
  const status = new Promise<number | undefined>((resolve) => {
    ended = vscode.tasks.onDidEndTaskProcess((event) => {
      if (event.execution.task.name === name && event.execution.task.source === "deepseek-lsp") {
        resolve(event.exitCode);
      }
    });
  });
  await vscode.tasks.executeTask(task);
  return (await status.finally(() => ended?.dispose())) === 0;
}
