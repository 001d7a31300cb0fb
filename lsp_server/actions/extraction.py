"""The code within a model's answer: out of its fences and prose, whole, and nothing that would surprise whoever pastes it.

Owns: what counts as the answer's code, and when there is none. Pure functions of text; every refusal is an `Unusable` with a sentence.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lsp_server.actions import syntax
from lsp_server.errors import Unusable

OPENING = re.compile(r"[ \t]*(?P<marks>`{3,}|~{3,})[ \t]*(?P<tag>[\w+#.-]*)[^`\n]*$")
SPECIAL = re.compile(r"<[｜|][^｜|<>\n]{1,40}[｜|]>")
FORGED = re.compile(r"(?:\r?\n){2}(User|Assistant):")
UNSEEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
"""Control characters, and those that make text read otherwise than it runs (CVE-2021-42574)."""
TAGS = {
    "python": {"python", "py", "python3"},
    "javascript": {"javascript", "js", "jsx"},
    "javascriptreact": {"javascript", "js", "jsx"},
    "typescript": {"typescript", "ts", "tsx"},
    "typescriptreact": {"typescript", "ts", "tsx"},
    "cpp": {"cpp", "c++", "cc"},
    "csharp": {"csharp", "cs", "c#"},
    "shellscript": {"shellscript", "sh", "bash", "shell"},
    "rust": {"rust", "rs"},
}
CODE_MARKS = re.compile(r"[{};=()\[\]]")
DEFINES = re.compile(r"^\s*(?:async\s+)?(?:def|class)\s+\w+", re.M)
LOOPED_TIMES = 8
MAX_LOOP_LINES = 6
MAX_PERIOD, MIN_LOOP_CHARS = 80, 320
PARAGRAPH = re.compile(r"(?:^[ \t]*\S.*(?:\n|\Z))+", re.M)
MOST_PROSE = 5
"""So many paragraphs of prose may stand before the code, and behind it."""
MOST_CANDIDATES = 20


def fence_language(language: str) -> str:
    return {"shellscript": "sh", "javascriptreact": "jsx", "typescriptreact": "tsx", "plaintext": ""}.get(language, language)


@dataclass(frozen=True, slots=True)
class Block:
    tag: str
    lines: tuple[str, ...]
    closings: tuple[int, ...]
    """Where it may end: indices into `lines`. More than one when its code holds fences itself."""
    is_closed: bool

    def texts(self) -> Iterator[str]:
        for end in self.closings or (len(self.lines),):
            yield "\n".join(self.lines[:end])


def blocks(answer: str) -> list[Block]:
    """The fenced blocks of an answer, in order."""
    lines, found, index = answer.split("\n"), [], 0
    while index < len(lines):
        opening = OPENING.match(lines[index])
        if opening is None:
            index += 1
            continue
        marks, body = opening["marks"], lines[index + 1 :]
        closing = re.compile(rf"[ \t]*{re.escape(marks[0])}{{{len(marks)},}}[ \t]*$")
        closings = tuple(number for number, line in enumerate(body) if closing.match(line))
        found.append(Block(opening["tag"].lower(), tuple(body), closings, bool(closings)))
        index += 2 + (closings[0] if closings else len(body))
    return found


def is_looping(text: str) -> bool:
    """Whether the answer has come to say the same over and over: few words many times, or some lines."""
    for period in range(1, MAX_PERIOD + 1):
        times = max(LOOPED_TIMES, MIN_LOOP_CHARS // period)
        if len(text) >= period * times and text.endswith(text[-period:] * times) and text[-period:].strip():
            return True
    lines = text[-4000:].split("\n")[:-1]
    for size in range(1, MAX_LOOP_LINES + 1):
        tail = lines[-size * LOOPED_TIMES :]
        if len(tail) == size * LOOPED_TIMES and any(line.strip() for line in tail[-size:]) and tail == tail[-size:] * LOOPED_TIMES:
            return True
    return False


def cleaned(answer: str, original: str) -> str:
    """The answer with \\n for line endings, up to where it would go on as somebody else."""
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    if not SPECIAL.search(original) and (special := SPECIAL.search(text)):
        text = text[: special.start()]
    if not FORGED.search("\n\n" + original) and (forged := FORGED.search("\n\n" + text)):
        text = text[: max(forged.start() - 2, 0)]
    if unseen := next((mark for mark in UNSEEN.findall(text) if mark not in original), None):
        raise Unusable(f"The model's answer holds an invisible character (U+{ord(unseen):04X}), so it is not used. Ask again.")
    return text


def code_in(answer: str, original: str, language: str, *, is_cut_off: bool = False) -> str:
    """The code in `answer`, which is to take the place of `original` (or to go beside it). Raises Unusable."""
    text = cleaned(answer, original)
    if not text.strip():
        raise Unusable("The model gave no answer. Ask again, or select other code.")
    found = blocks(text)
    if found:
        return in_fences(found, original, language, is_cut_off=is_cut_off)
    if is_cut_off:
        raise Unusable("The model's answer was cut off, or went in circles, so it is not used. Ask again, or select less code.")
    code = within_prose(text, original, language)
    if not code:
        raise Unusable("The model answered in words, without code, so nothing is changed. Ask again, or use an action that explains.")
    return code


def new_code(answer: str, language: str, *, is_cut_off: bool = False) -> str:
    """The code of an answer that stands for itself and takes no other's place. Raises Unusable."""
    text = cleaned(answer, "")
    found = blocks(text)
    if found:
        return in_fences(found, "def x" if language == "python" else "", language, is_cut_off=is_cut_off)
    if is_cut_off:
        raise Unusable("The model's answer was cut off, or went in circles, so it is not used. Ask again, or select less code.")
    if language == "python" and DEFINES.search(text) and syntax.parses("python", text):
        return text.strip("\n")
    raise Unusable("The model answered without a block of code, so nothing is changed. Ask again.")


def in_fences(found: list[Block], original: str, language: str, *, is_cut_off: bool) -> str:
    tags = TAGS.get(language, {language})
    fitting = [block for block in found if block.tag in tags] or [block for block in found if not block.tag] or found
    if is_cut_off and not fitting[0].is_closed:
        raise Unusable("The model's answer was cut off, or went in circles, so it is not used. Ask again, or select less code.")
    candidates = list(itertools.islice((text for block in fitting for text in block.texts()), MOST_CANDIDATES))
    if language == "python" and DEFINES.search(original):
        candidates = [text for text in candidates if DEFINES.search(text)] or candidates
    if len(candidates) > 1 and syntax.is_known(language):
        faults = syntax.faults(language, candidates)
        candidates = [text for text, fault in zip(candidates, faults, strict=True) if fault is None] or candidates
    code = candidates[0].strip("\n")
    if not code.strip():
        raise Unusable("The model answered with an empty block of code, so nothing is changed. Ask again.")
    return code


def within_prose(text: str, original: str, language: str) -> str:
    """The code of an answer without fences: without the paragraphs of prose before and behind it; empty when nothing is left."""
    spans = [found.span() for found in PARAGRAPH.finditer(text)]
    parts = [text[start:end] for start, _ in spans[:MOST_PROSE] for _, end in reversed(spans[-MOST_PROSE:])]
    if language != "python":  # in other languages words may parse
        parts = [part for part in parts if CODE_MARKS.search(part.split("\n", 1)[0])]
    parts = [part for part in parts if resembles(part, original)]
    if parts and syntax.is_known(language):
        before, *faults = syntax.faults(language, [original, *parts])
        parts = [part for part, fault in zip(parts, faults, strict=True) if fault is None or before is not None]
    return parts[0] if parts else ""


def resembles(code: str, original: str) -> bool:
    """Whether `code` is a version of `original`: it shares a line with it."""
    lines = {line.strip() for line in original.splitlines() if len(line.strip()) > 2}
    return any(line.strip() in lines for line in code.splitlines())
