// What the package needs of the rest of the repository: the licence, and the pictures of the walkthrough and the README.
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";

copyFileSync("../../LICENSE", "LICENSE");
copyFileSync("../../docs/pictures/vscode.png", "media/ghost.png");
copyFileSync("../../docs/pictures/vscode-panel.png", "media/panel.png");
writeFileSync("dist/README.md", readFileSync("README.md", "utf8").replace("../../docs/pictures/vscode-panel.png", "media/panel.png"));
