"""The actions there are: one Markdown file each, a typed head in TOML between `+++` lines, then the prompt's words with $variables.

Owns: what a head may say, and that a file which says anything else is refused when it is read, by name and with the reason. A user's own
files lie in a folder of the user's, never in a workspace. Knows nothing of documents, editors or models; "applies_to" and "answer" are our
own words, which the server translates.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

FENCE = "+++"
VARIABLES = frozenset({"path", "language", "fence_language", "code", "name", "instruction", "diagnostics", "framework", "module"})
"""What a prompt's words can ask for."""
ONLY_WITH = {"diagnostics": ("diagnostic", "applies_to"), "framework": ("new_file", "answer"), "module": ("new_file", "answer")}
"""Variables that have a value only where the head says so."""
Context = Literal["file", "callees", "tests"]


class PromptError(Exception):
    """A prompt's file is not as it should be; the message names the file and what to change."""


def compiled(source: str) -> str:
    """`source`, once it has proved to be a regular expression."""
    try:
        re.compile(source)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return source


class Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(min_length=1, max_length=80, description="As the editor's menu shows it; may hold $name, the symbol's name.")
    kind: str = Field(pattern=r"^[a-z]+(\.[a-zA-Z]+)*$", description="LSP's code action kind, by which editors filter and group.")
    applies_to: Literal["selection", "symbol", "diagnostic", "file"]
    answer: Literal["show", "replace", "docstring", "insert_above", "new_file"]
    context: tuple[Context, ...] = Field(default=(), description="What goes before the prompt, the most important first.")
    max_new_tokens: int = Field(default=800, ge=16, le=16_384)
    max_code_chars: int = Field(default=24_000, ge=100, description="More code than this is refused.")
    languages: tuple[str, ...] = Field(default=(), description="LSP language ids it is for; empty: any.")
    only_where: Annotated[str, AfterValidator(compiled)] = Field(default="", description="A regular expression the code must hold.")
    asks: str = Field(default="", max_length=200, description="What to ask the user for; the answer is $instruction.")
    offers: tuple[Annotated[str, Field(min_length=1, max_length=60)], ...] = Field(
        default=(), max_length=8, description="Instructions to choose from, in editors that cannot ask for words."
    )
    confirm: bool = Field(default=False, description="Show the change and ask before it is made, where the editor can.")


class Action(BaseModel):
    """One action: its name is its file's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    head: Head
    body: str

    def title(self, name: str) -> str:
        return Template(self.head.title).safe_substitute(name=name)

    def words(self, values: Mapping[str, str]) -> str:
        """The prompt. `values` may hold more than the words ask for; one that they ask for and that is missing is a KeyError."""
        return Template(self.body).substitute(values)


def parsed(name: str, text: str, place: str) -> Action:
    """The action a file's text describes. Raises PromptError, whose message begins with `place`."""
    opening, _, rest = text.replace("\r\n", "\n").partition("\n")
    head, closing, body = rest.partition(f"\n{FENCE}\n")
    if opening.strip() != FENCE or not closing:
        raise PromptError(f"{place}: it has to begin with a line {FENCE}, then the head in TOML, then {FENCE} again, then the prompt.")
    try:
        action = Action(name=name, head=Head.model_validate(tomllib.loads(head)), body=body.strip())
    except tomllib.TOMLDecodeError as error:
        raise PromptError(f"{place}: the head is no TOML: {error}.") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())
        raise PromptError(f"{place}: {wrong}.") from error
    if problem := wrong_words(action):
        raise PromptError(f"{place}: {problem}")
    return action


def wrong_words(action: Action) -> str | None:
    """What is wrong between an action's head and its words; None when they fit."""
    template = Template(action.body)
    if not action.body:
        return "there is no prompt below the head."
    if not template.is_valid():
        return "a $ in the prompt belongs to no variable: write $$ for a plain one."
    used = set(template.get_identifiers())
    if unknown := sorted(used - VARIABLES):
        return f"${unknown[0]} is no variable: there are {', '.join(sorted(VARIABLES))}."
    for variable, (value, field) in ONLY_WITH.items():
        if variable in used and getattr(action.head, field) != value:
            return f'${variable} has a value only where {field} = "{value}".'
    if bool(action.head.asks) != ("instruction" in used):
        return "asks and $instruction go together: one of them is missing."
    if action.head.offers and not action.head.asks:
        return "offers are answers to asks, which is missing."
    if "code" not in used:
        return "the prompt never says $code, so the model would see nothing of the user's."
    if action.head.applies_to == "diagnostic" and "diagnostics" not in used:
        return "an action on a diagnostic has to say $diagnostics."
    return None


def shipped() -> Traversable:
    return files("prompts") / "actions"


def load(own: Path | None = None) -> tuple[tuple[Action, ...], list[str]]:
    """All actions, by name, and a sentence for each of the user's own files that is left out. One of the user's replaces the shipped one of
    its name. A shipped file that is wrong raises PromptError."""
    actions = {action.name: action for action in (parsed(*of_file(file)) for file in markdown_in(shipped()))}
    problems = []
    for file in markdown_in(own) if own is not None and own.is_dir() else ():
        try:
            action = parsed(*of_file(file))
        except (PromptError, OSError, UnicodeDecodeError) as error:
            problems.append(f"The action in {file} is left out. {error}")
        else:
            actions[action.name] = action
    return tuple(actions[name] for name in sorted(actions)), problems


def markdown_in(folder: Traversable) -> Iterable[Traversable]:
    return sorted((file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)


def of_file(file: Traversable) -> tuple[str, str, str]:
    return file.name.removesuffix(".md"), file.read_text("utf-8"), file.name
