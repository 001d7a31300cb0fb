/** What the user set, as the server wants it: only values set somewhere, so that VS Code's defaults do not hide config.toml. */
import * as vscode from "vscode";

export const SECTION = "deepseek-lsp";

type Values = { [name: string]: unknown };

interface Declared {
  [name: string]: { scope: string };
}

const OWN = [`${SECTION}.server.path`, `${SECTION}.disabledLanguages`, `${SECTION}.trace.server`];

/** The server's settings as package.json declares them; those of scope "machine" are the user's alone. */
function declared(extension: vscode.Extension<unknown>, scope: "machine" | "window"): string[] {
  const properties: Declared = extension.packageJSON.contributes.configuration.properties;
  return Object.keys(properties).filter((name) => !OWN.includes(name) && properties[name].scope === scope);
}

function collect(names: string[], valueOf: (name: string) => unknown): Values {
  const values: Values = {};
  for (const name of names) {
    const value = valueOf(name);
    if (value !== undefined) {
      const path = name.split(".").slice(1);
      const table = path.slice(0, -1).reduce((table, part) => (table[part] ??= {}) as Values, values);
      table[path[path.length - 1]] = value;
    }
  }
  return values;
}

/** For initializationOptions: model, device and the like, from the user's settings only. */
export function userLevel(extension: vscode.Extension<unknown>): Values {
  const configuration = vscode.workspace.getConfiguration();
  return collect(declared(extension, "machine"), (name) => configuration.inspect(name)?.globalValue);
}

/** For workspace/configuration: everything else. */
export function forServer(extension: vscode.Extension<unknown>): Values {
  const configuration = vscode.workspace.getConfiguration();
  return collect(declared(extension, "window"), (name) => {
    const found = configuration.inspect(name);
    return found?.workspaceFolderValue ?? found?.workspaceValue ?? found?.globalValue;
  });
}

/** Whether a change asks for a new server: the model's settings, or the server itself. */
export function needsRestart(extension: vscode.Extension<unknown>, event: vscode.ConfigurationChangeEvent): boolean {
  return [`${SECTION}.server.path`, ...declared(extension, "machine")].some((name) => event.affectsConfiguration(name));
}

export function serverPath(): string {
  return vscode.workspace.getConfiguration(SECTION).inspect<string>("server.path")?.globalValue ?? "";
}

export function disabledLanguages(): string[] {
  return vscode.workspace.getConfiguration(SECTION).get<string[]>("disabledLanguages", []);
}

export async function toggleLanguage(language: string): Promise<void> {
  const now = disabledLanguages();
  const next = now.includes(language) ? now.filter((name) => name !== language) : [...now, language];
  await vscode.workspace.getConfiguration(SECTION).update("disabledLanguages", next, vscode.ConfigurationTarget.Global);
}
