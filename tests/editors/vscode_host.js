// Runs inside VS Code's extension host. `run` is called by VS Code; what fails is written to the file named in the workspace's settings.
const assert = require("node:assert");
const fs = require("node:fs");
const vscode = require("vscode");

const OWN = "deepseek-lsp.deepseek-lsp";

const trusted = {
  async "every command in package.json is there once the extension is active"() {
    const extension = vscode.extensions.getExtension(OWN);
    const there = new Set(await vscode.commands.getCommands(true));
    for (const { command } of extension.packageJSON.contributes.commands) {
      assert.ok(there.has(command), command);
    }
    for (const { command } of extension.packageJSON.contributes.keybindings) {
      assert.ok(there.has(command), command);
    }
  },

  async "a value from config.toml holds, since only what is set in VS Code is sent"() {
    assert.strictEqual((await status()).settings.inline.max_new_tokens, 77);
  },

  async "a setting of the workspace reaches the server at once"() {
    const inline = vscode.workspace.getConfiguration("deepseek-lsp.inline");
    await inline.update("max_lines", 3, vscode.ConfigurationTarget.Workspace);
    await until(async () => (await status()).settings.inline.max_lines === 3);
  },

  async "a workspace cannot name the model, nor the server"() {
    const before = await status();
    const file = vscode.Uri.joinPath(vscode.workspace.workspaceFolders[0].uri, ".vscode/settings.json");
    const settings = JSON.parse(fs.readFileSync(file.fsPath, "utf8"));
    fs.writeFileSync(file.fsPath, JSON.stringify({ ...settings, "deepseek-lsp.model": "/evil", "deepseek-lsp.server.path": "/evil" }));
    const inspect = () => vscode.workspace.getConfiguration("deepseek-lsp").inspect("inline.max_lines").workspaceValue;
    fs.writeFileSync(file.fsPath, JSON.stringify({ ...JSON.parse(fs.readFileSync(file.fsPath)), "deepseek-lsp.inline.max_lines": 4 }));
    await until(() => inspect() === 4);
    await vscode.commands.executeCommand("deepseek-lsp.restart");
    await until(async () => (await status())?.state === "ready");
    const after = await status();
    assert.strictEqual(after.settings.model, before.settings.model);
    assert.strictEqual(after.settings.inline.max_lines, 4);
    assert.deepStrictEqual(after.problems, []);
  },

  async "an accepted suggestion is counted by the server"() {
    const file = vscode.Uri.joinPath(vscode.workspace.workspaceFolders[0].uri, "inventory.py");
    const editor = await vscode.window.showTextDocument(await vscode.workspace.openTextDocument(file));
    const before = (await status()).requests.accepted;
    editor.selection = new vscode.Selection(23, 8, 23, 8);
    await vscode.commands.executeCommand("type", { text: "r" });
    await until(async () => {
      await vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
      await vscode.commands.executeCommand("editor.action.inlineSuggest.commit");
      return editor.document.lineAt(23).text.includes("items[name]");
    });
    await until(async () => (await status()).requests.accepted === before + 1);
  },

  async "the server of the selected Python environment is started, and another one once another is selected"() {
    assert.strictEqual((await status()).settings.inline.deadline_s, 6);
    const python = await vscode.extensions.getExtension("ms-python.python").activate();
    python.select(given("environment"));
    await until(async () => (await status())?.settings.inline.deadline_s === 7);
    python.select("");
    await until(async () => (await status())?.settings.inline.deadline_s === 6);
  },

  async "a server that the extension installs is started"() {
    await vscode.commands.executeCommand("deepseek-lsp.install", given("wheel"));
    await until(async () => (await status())?.settings.inline.deadline_s === 8);
  },
};

const restricted = {
  async "the selected environment's server is started once the workspace is trusted, and not before"() {
    assert.ok(!vscode.workspace.isTrusted);
    const python = await vscode.extensions.getExtension("ms-python.python").activate();
    python.select(given("environment"));
    await vscode.commands.executeCommand("deepseek-lsp.restart");
    await until(async () => (await status())?.state === "ready");
    assert.strictEqual((await status()).settings.inline.deadline_s, 6);
    fs.writeFileSync(given("ready"), "");
    await until(async () => vscode.workspace.isTrusted && (await status())?.settings.inline.deadline_s === 7);
  },
};

const given = (name) => vscode.workspace.getConfiguration("tests").get(name);

const status = () => vscode.commands.executeCommand("deepseek-lsp.status");

async function until(condition) {
  const deadline = Date.now() + 90_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `never: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

exports.run = async () => {
  const extension = vscode.extensions.getExtension(OWN);
  const results = given("results");
  const found = {};
  try {
    await extension.activate();
    await until(async () => (await status())?.state === "ready");
    for (const [name, test] of Object.entries({ trusted, restricted }[given("set")])) {
      found[name] = await test().then(() => "", (error) => String(error.stack));
    }
  } catch (error) {
    found["the extension becomes active and its server ready"] = String(error.stack);
  }
  fs.writeFileSync(`${results}.part`, JSON.stringify(found));
  fs.renameSync(`${results}.part`, results);
};
