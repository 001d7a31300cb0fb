// Runs inside VS Code's extension host: writes what "Open Default Keyboard Shortcuts (JSON)" shows into the file named in the settings.
const fs = require("node:fs");
const vscode = require("vscode");

exports.run = async () => {
  await vscode.commands.executeCommand("workbench.action.openDefaultKeybindingsFile");
  const results = vscode.workspace.getConfiguration("tests").get("results");
  fs.writeFileSync(`${results}.part`, vscode.window.activeTextEditor.document.getText());
  fs.renameSync(`${results}.part`, results);
};
