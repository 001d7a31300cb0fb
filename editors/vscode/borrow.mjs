// What the package needs of the rest of the repository: the licence, and the pictures of the walkthrough and the README.
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";

copyFileSync("../../LICENSE", "LICENSE");
copyFileSync("../../docs/pictures/vscode.png", "media/ghost.png");
let readme = readFileSync("README.md", "utf8");
for (const name of ["panel", "menu", "install"]) {
    copyFileSync(`../../docs/pictures/vscode-${name}.png`, `media/${name}.png`);
    readme = readme.replace(`../../docs/pictures/vscode-${name}.png`, `media/${name}.png`);
}
writeFileSync("dist/README.md", readme);
