"""The template folder by the rules that LSP4IJ 0.20 reads it with; the server started from it, spoken to as LSP4IJ speaks. No IDE."""

import asyncio
import json
import os
import shlex
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest
from rich.text import Text

from editors.settings import SCHEMA
from lsp_server.settings import SECTION
from tests.editors import install
from tests.editors.processes import LIMIT_S
from tests.editors.terminal import save

TEMPLATE = SCHEMA.parent
INVENTORY = (Path(__file__).parents[2] / "examples/inventory.py").read_text("utf-8")
URI = "file:///project/inventory.py"
FILES = {
    "README.md", "clientSettings.json", "experimental.json", "initializationOptions.json", "installer.json", "settings.json",
    "settings.schema.json", "template.json", "workspaceFolderSettings.json",
}  # fmt: skip
KEYS = {
    "dev", "disablePromotionFor", "env", "expandConfiguration", "fileTypeMappings", "id", "languageMappings", "name", "programArgs",
    "url", "workingDir",
}  # fmt: skip
SYSTEMS = {"default", "windows", "mac", "unix"}
CAPABILITIES = {
    "general": {"positionEncodings": ["utf-16"]},
    "textDocument": {
        "codeAction": {
            "codeActionLiteralSupport": {
                "codeActionKind": {
                    "valueSet": [
                        "quickfix",
                        "refactor",
                        "refactor.extract",
                        "refactor.inline",
                        "refactor.rewrite",
                        "source",
                        "source.organizeImports",
                    ]
                }
            },
            "dataSupport": True,
            "dynamicRegistration": True,
            "resolveSupport": {"properties": ["edit"]},
        },
        "completion": {"completionItem": {"snippetSupport": True}, "dynamicRegistration": True},
        "inlineCompletion": {"dynamicRegistration": True},
        "synchronization": {"didSave": True, "willSave": True, "willSaveWaitUntil": True},
    },
    "window": {"showDocument": {"support": True}, "workDoneProgress": True},
    "workspace": {
        "applyEdit": True,
        "configuration": True,
        "didChangeConfiguration": {"dynamicRegistration": True},
        "executeCommand": {"dynamicRegistration": True},
        "workspaceEdit": {"documentChanges": True, "resourceOperations": ["create", "delete", "rename"]},
        "workspaceFolders": True,
    },
}


def read(name: str) -> Any:
    return json.loads((TEMPLATE / name).read_text("utf-8"))


def test_every_file_is_one_that_the_import_reads_and_is_json():
    found = {file.name for file in TEMPLATE.iterdir()}
    assert "template.json" in found and found <= FILES
    for name in found - {"README.md"}:
        assert isinstance(read(name), dict), name


def test_the_template_has_what_lsp4ij_needs_and_nothing_it_would_pass_over():
    template = read("template.json")
    assert set(template) <= KEYS
    assert template["id"] and template["name"]
    assert "default" in template["programArgs"] and set(template["programArgs"]) <= SYSTEMS
    for mapping in template["fileTypeMappings"]:
        assert set(mapping) == {"fileType", "languageId"} and set(mapping["fileType"]) == {"patterns"}
        assert all(pattern.startswith("*.") for pattern in mapping["fileType"]["patterns"])
    for mapping in template["languageMappings"]:
        assert set(mapping) == {"language", "languageId"}


def test_the_settings_and_those_of_the_readme_fit_their_schema():
    schema = read("settings.schema.json")
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(read("settings.json"), schema)
    jsonschema.validate({f"{SECTION}.inline.max_lines": 3}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({f"{SECTION}.model": "theirs"}, schema)


ANSWERS = {"workspace/applyEdit": {"applied": True}, "window/showDocument": {"success": True}}
IN_ADD = {"start": {"line": 19, "character": 8}, "end": {"line": 19, "character": 8}}


class Ide:
    """The wire as LSP4IJ uses it: ids are strings, the server's requests are answered, every completion is called automatic."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout
        self._in, self._out = process.stdin, process.stdout
        self._id = 0
        self.progress: list[str] = []
        self.refusals: list[str] = []
        self.settings: Any = {}
        self.asked_of: dict[str, Any] = {}
        """The server's own requests: the parameters of the last one of each method."""

    async def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._in.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await self._in.drain()

    async def receive(self) -> Any:
        length = 0
        while line := (await self._out.readline()).strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        message = json.loads(await self._out.readexactly(length))
        await self.hear(message)
        return message

    async def hear(self, message: Any) -> None:
        method, params = message.get("method"), message.get("params")
        if method == "$/progress":
            self.progress.append(params["value"]["kind"])
        elif method == "window/showMessage":
            self.refusals.append(params["message"])
        elif method and "id" in message:
            self.asked_of[method] = params
            await self.send(id=message["id"], result=ANSWERS.get(method, [self.settings] if method == "workspace/configuration" else None))

    async def ask(self, method: str, params: Any) -> Any:
        self._id += 1
        await self.send(id=str(self._id), method=method, params=params)
        async with asyncio.timeout(LIMIT_S):
            while (message := await self.receive()).get("id") != str(self._id) or "method" in message:
                pass
        assert "error" not in message, message
        return message["result"]

    async def start(self) -> Any:
        params = {
            "processId": os.getpid(),
            "rootUri": None,
            "clientInfo": {"name": "PyCharm"},
            "capabilities": CAPABILITIES,
            "initializationOptions": read("initializationOptions.json"),
        }
        result = await self.ask("initialize", params)
        await self.send(method="initialized", params={})
        await self.send(method="workspace/didChangeConfiguration", params={"settings": {SECTION: self.settings}})
        item = {"uri": URI, "languageId": "python", "version": 0, "text": INVENTORY}
        await self.send(method="textDocument/didOpen", params={"textDocument": item})
        return result["capabilities"]

    async def until_loaded(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            while "end" not in self.progress:
                await self.receive()

    async def actions(self) -> dict[str, Any]:
        """The menu of intentions in `add`, by title."""
        params = {"textDocument": {"uri": URI}, "range": IN_ADD, "context": {"diagnostics": []}}
        return {action["title"]: action for action in await self.ask("textDocument/codeAction", params)}

    async def grey_text(self, line: int, character: int) -> str:
        """What LSP4IJ would draw: the item's text without what its range says is typed already."""
        found = await self.ask(
            "textDocument/inlineCompletion",
            {
                "textDocument": {"uri": URI},
                "position": {"line": line, "character": character},
                "context": {"triggerKind": 2},
            },
        )
        items = found["items"] if isinstance(found, dict) else found or []
        if not items:
            return ""
        text, start = items[0]["insertText"], items[0]["range"]["start"]
        assert isinstance(text, str), "a snippet would be shown raw"
        return text[character - start["character"] :]


@pytest.fixture
async def ide() -> AsyncIterator[Ide]:
    program, *arguments = shlex.split(read("template.json")["programArgs"]["default"])
    process = await asyncio.create_subprocess_exec(
        install.SCRIPTS / program, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**22
    )
    try:
        yield Ide(process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


def draw(grey: str, picture: Path) -> None:
    """The lines around the cursor with grey text in them, as LSP4IJ has the IDE draw it."""
    above, below = INVENTORY.splitlines()[15:23], INVENTORY.splitlines()[24:]
    lines = [Text(line) for line in above] + [Text(" " * 8 + grey, style="bright_black")] + [Text(line) for line in below]
    save(lines, 80, picture, "inventory.py, drawn from the server's answer")


async def test_the_templates_command_starts_a_server_that_completes_as_lsp4ij_asks(ide: Ide, pictures: Path):
    capabilities = await ide.start()
    assert "inlineCompletionProvider" in capabilities and capabilities["positionEncoding"] == "utf-16"
    await ide.until_loaded()
    grey = await ide.grey_text(23, 8)
    assert grey.startswith("return self.items[name]")
    draw(grey, pictures / "jetbrains.svg")
    here = {"line": 23, "character": 8}
    change = {"range": {"start": here, "end": here}, "text": grey}
    document = {"uri": URI, "version": 1}
    await ide.send(method="textDocument/didChange", params={"textDocument": document, "contentChanges": [change]})
    assert (await ide.ask("deepseek/status", None))["requests"]["accepted"] == 1  # though the item's command is never run
    await ide.ask("shutdown", None)
    await ide.send(method="exit")


async def test_an_intention_that_changes_code_is_resolved_into_an_edit_of_this_version(ide: Ide):
    await ide.start()
    await ide.until_loaded()
    action = (await ide.actions())["Document add"]
    assert "edit" not in action and "command" not in action, "LSP4IJ resolves what has neither"
    edit = (await ide.ask("codeAction/resolve", action))["edit"]
    (document,) = edit["documentChanges"]
    (change,) = document["edits"]
    assert (
        document["textDocument"] == {"uri": URI, "version": 0}
        and change["range"]["start"] == {"line": 20, "character": 0}
        and change["newText"].strip().startswith('"""')
    )


async def test_an_intention_that_explains_opens_its_words_as_a_file(ide: Ide):
    await ide.start()
    await ide.until_loaded()
    command = (await ide.actions())["Explain add"]["command"]
    await ide.ask("workspace/executeCommand", {"command": command["command"], "arguments": command["arguments"]})
    shown = ide.asked_of["window/showDocument"]
    assert Path(unquote(urlsplit(shown["uri"]).path)).read_text("utf-8").startswith("# Explain add\n\n")


async def test_settings_written_in_the_ide_reach_the_server_and_a_model_named_there_is_refused(ide: Ide):
    ide.settings = {"inline": {"enabled": False}, "model": "theirs"}
    await ide.start()
    await ide.until_loaded()
    assert await ide.grey_text(23, 8) == ""
    assert any(text.startswith("model in ") for text in ide.refusals)
