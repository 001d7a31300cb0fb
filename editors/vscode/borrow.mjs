// What the package needs of the rest of the repository: the licence, and pictures for the walkthrough.
import { copyFileSync } from "node:fs";

copyFileSync("../../LICENSE", "LICENSE");
copyFileSync("../../docs/pictures/vscode.png", "media/ghost.png");
copyFileSync("../../docs/pictures/vscode-panel.png", "media/panel.png");
