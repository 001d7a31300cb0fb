"""python -m editors.settings: writes the server's settings into VS Code's package.json and LSP4IJ's settings.schema.json.

Owns: how a field of the server's settings model becomes a setting of an editor, and the few settings that are the VS Code extension's own.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsp_server.settings import SECTION, USER_LEVEL, Settings

PACKAGE = Path(__file__).with_name("vscode") / "package.json"
SCHEMA = Path(__file__).with_name("jetbrains") / "deepseek-lsp/settings.schema.json"
KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum")
OWN: dict[str, dict[str, Any]] = {
    f"{SECTION}.server.path": {
        "type": "string",
        "default": "",
        "scope": "machine",
        "markdownDescription": "The `deepseek-lsp` to start. Empty: the one in the selected Python environment, the one this extension"
        " installed, or the one on PATH.",
    },
    f"{SECTION}.disabledLanguages": {
        "type": "array",
        "items": {"type": "string"},
        "default": [],
        "scope": "window",
        "description": "Language identifiers in which no ghost text is shown.",
    },
    f"{SECTION}.trace.server": {
        "type": "string",
        "enum": ["off", "messages", "verbose"],
        "default": "off",
        "scope": "window",
        "description": "Log the messages between VS Code and the server. They hold your code.",
    },
}


def fields(schema: dict[str, Any], whole: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting below `path` and its schema; a table of settings is gone into."""
    for name, field in schema["properties"].items():
        place = f"{path}.{name}"
        if reference := field.get("$ref"):
            yield from fields(whole["$defs"][reference.rpartition("/")[2]], whole, place)
        else:
            yield place, field


def configuration() -> dict[str, Any]:
    """`contributes.configuration`."""
    schema = Settings.model_json_schema()
    properties = dict(OWN)
    for place, field in fields(schema, schema, SECTION):
        is_users = place.split(".")[1] in USER_LEVEL
        properties[place] = {
            **{key: field[key] for key in KEPT if key in field},
            "default": field["default"],
            "scope": "machine" if is_users else "window",
            "description": field["description"],
        }
    return {"title": "DeepSeek", "properties": properties}


def package() -> dict[str, Any]:
    """package.json as it has to be."""
    given: dict[str, Any] = json.loads(PACKAGE.read_text("utf-8"))
    contributed = configuration()
    given["contributes"]["configuration"] = contributed
    restricted = [name for name, setting in contributed["properties"].items() if setting["scope"] == "machine"]
    given["capabilities"]["untrustedWorkspaces"]["restrictedConfigurations"] = restricted
    return given


def schema() -> dict[str, Any]:
    """settings.schema.json as it has to be: what a workspace's configuration may hold."""
    properties = {
        name: {key: value for key, value in setting.items() if key != "scope"}
        for name, setting in configuration()["properties"].items()
        if name not in OWN and setting["scope"] != "machine"
    }
    return {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": properties, "additionalProperties": False}


def texts() -> dict[Path, str]:
    """What stands in every file that is written."""
    return {file: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for file, value in ((PACKAGE, package()), (SCHEMA, schema()))}


if __name__ == "__main__":
    for file, text in texts().items():
        file.write_text(text, "utf-8")
        sys.stderr.write(f"wrote {file}\n")
