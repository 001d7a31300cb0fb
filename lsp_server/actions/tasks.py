"""What is asked for and where: an action, a place in a document, and the lines it is about; or a refusal before any model is asked.

Owns: what a client sends (`Asked`), where an action is offered, and the `Task` it becomes. Changes nothing and asks nobody.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsprotocol import types
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lsp_server import context, symbols
from lsp_server.actions import guard, regions
from lsp_server.actions.regions import Region
from lsp_server.errors import Refusal, Stale
from lsp_server.session import Document, Snapshot
from prompts.library import Action

NEAR_LINES = 12
"""Around a diagnostic that is in no function."""
MAX_FIX_LINES = 150
DO = re.compile(r"<do:[ \t]*(?P<what>[^<>\n]{1,500}?)[ \t]*>")
"""An instruction that stands in the code itself, in a comment: it works in editors that cannot ask for words."""
DO_COMMENT = re.compile(rf"[ \t]*(?:#+|//+|--|;+|%+|/\*+|<!--)?[ \t]*{DO.pattern}[ \t]*(?:\*/|-->)?")
MAX_SAID_CHARS = 60
"""In a menu."""
EDITING = frozenset({"replace", "docstring", "insert_above", "new_file"})


class Place(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    line: int = Field(ge=0)
    character: int = Field(ge=0)


class Span(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    start: Place
    end: Place

    @property
    def is_empty(self) -> bool:
        return self.start == self.end


class Asked(BaseModel):
    """What is asked for: the data of a code action, and the argument of the command `deepseek-lsp.run`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: str
    uri: str
    range: Span
    version: int | None = None
    """The document's version this is about; None: whichever it has when the work begins."""
    diagnostics: tuple[str, ...] = ()
    instruction: str = Field(default="", max_length=4000)

    @classmethod
    def read(cls, value: Any) -> "Asked":
        """From what a client sent. Raises Refusal."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise Refusal(f"The request for an action is not understood: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An action at a place of one version of a document."""

    action: Action
    asked: Asked
    snapshot: Snapshot
    region: Region
    shown_path: str

    @property
    def name(self) -> str:
        return self.region.symbol.name if self.region.symbol else ""

    @property
    def title(self) -> str:
        return self.action.title(self.name)


def fits(action: Action, snapshot: Snapshot, span: Span, diagnostics: int) -> str | None:
    """The title under which the action is offered at a place, or None. Looks at the lines around and asks nobody."""
    head = action.head
    if head.languages and snapshot.language not in head.languages:
        return None
    symbol = symbols.symbol_at(snapshot.lines, snapshot.language, span.start.line) if head.applies_to == "symbol" else None
    if head.applies_to == "symbol" and symbol is None:
        return None
    selected = snapshot.lines[span.start.line : span.end.line + 1]
    if head.applies_to == "selection" and (span.is_empty or not "".join(selected).strip()):
        return None
    if head.applies_to == "diagnostic" and not diagnostics:
        return None
    if head.only_where:
        first, last = (symbol.first, symbol.last) if symbol else (span.start.line, span.end.line)
        if not re.search(head.only_where, "".join(snapshot.lines[first : last + 1])):
            return None
    title = action.title(symbol.name if symbol else "")
    said = marked(action, selected)
    return f"{title.removesuffix(' …')}: {said[:MAX_SAID_CHARS]}" if said else title


def marked(action: Action, lines: Sequence[str]) -> str:
    """The instruction that is written into the code; empty where there is none, or where the answer would not take its place."""
    if not action.head.asks or action.head.answer == "show":
        return ""
    return next((mark["what"] for line in lines if (mark := DO.search(line))), "")


def without_marks(code: str) -> str:
    """The code without instructions that were written into it, once they are done."""
    lines = [(line, DO_COMMENT.sub("", line)) for line in code.split("\n")]
    return "\n".join(bare for line, bare in lines if bare.strip() or bare == line)


def prepare(action: Action, asked: Asked, document: Document | None, shown_path: str, folders: list[str], max_document_chars: int) -> Task:
    """The task that was asked for, about the document as it is now. Raises Refusal."""
    if document is None:
        raise Refusal("The document is not open: the editor has to send textDocument/didOpen first.")
    if asked.version is not None and asked.version != document.version:
        raise Stale("The document changed since the action was offered, so nothing is changed. Ask for actions again.")
    start = types.Position(asked.range.start.line, asked.range.start.character)
    if not document.contains(start):
        raise Refusal(f"Line {start.line + 1} is outside the document, which has {document.line_count} lines.")
    snapshot = document.snapshot(start)
    if reason := context.refusal(snapshot, document.chars, max_document_chars):
        raise Refusal(reason)
    if action.head.answer in EDITING and (reason := guard.refusal(asked.uri, folders, is_open=True)):
        raise Refusal(reason)
    region = region_of(action, asked, snapshot)
    if action.head.asks and not asked.instruction.strip():
        said = marked(action, region.text.split("\n"))
        if not said:
            where = " Or write <do: what> into a comment of the selection." if action.head.answer != "show" else ""
            raise Refusal(f"{action.title('')}: an instruction is needed. {action.head.asks}{where}")
        asked = asked.model_copy(update={"instruction": said})
    if not region.text.strip():
        raise Refusal("There is no code here: select some.")
    if len(region.text) > action.head.max_code_chars:
        raise Refusal(
            f"That is {len(region.text):,} characters of code, and this action takes {action.head.max_code_chars:,}: select less."
        )
    return Task(action=action, asked=asked, snapshot=snapshot, region=region, shown_path=shown_path)


def region_of(action: Action, asked: Asked, snapshot: Snapshot) -> Region:
    """The lines an action is about. Raises Refusal."""
    lines, span = snapshot.lines, asked.range
    symbol = None
    first, last = span.start.line, min(span.end.line, len(lines) - 1)
    if last > first and span.end.line == last and span.end.character == 0:
        last -= 1
    match action.head.applies_to:
        case "symbol":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            if symbol is None:
                raise Refusal("There is no function or class here: put the cursor into one.")
            first, last = symbol.first, symbol.last
        case "diagnostic":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            if symbol and symbol.last - symbol.first < MAX_FIX_LINES:
                first, last = symbol.first, max(symbol.last, last)
            else:
                first, last = block_around(lines, first, last)
        case "file":
            first, last = 0, len(lines) - 1
        case "selection":
            symbol = symbols.symbol_at(lines, snapshot.language, first)
            symbol = symbol if symbol and symbol.first >= first and symbol.last <= last else None
    first, last = regions.trimmed(lines, first, last)
    return Region(lines=lines, language=snapshot.language, newline=snapshot.newline, first=first, last=last, symbol=symbol)


def block_around(lines: tuple[str, ...], first: int, last: int) -> tuple[int, int]:
    """The lines around a place as far as the next blank line, and not far."""
    low, high = first, last
    while low > max(first - NEAR_LINES, 0) and lines[low - 1].strip():
        low -= 1
    while high < min(last + NEAR_LINES, len(lines) - 1) and lines[high + 1].strip():
        high += 1
    return low, high
