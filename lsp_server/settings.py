"""Every setting, its default and where it may come from: one pydantic model, filled from layers, lowest first.

defaults < the user's TOML file < environment < the client's initializationOptions < workspace/configuration

Owns: names, limits, defaults, and what happens to a bad value: it is reported by name, and the rest applies. What can run code
or reach files outside the workspace (`USER_LEVEL`) is never taken from workspace/configuration, which a cloned project can carry.
"""

import copy
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

SECTION = "deepseek-lsp"
ENVIRONMENT_PREFIX = "DEEPSEEK_LSP_"
USER_LEVEL = frozenset({"model", "device", "dtype", "threads", "kernels", "cache_mb"})


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InlineSettings(Part):
    """Ghost text and completion items."""

    enabled: bool = Field(default=True, description="Offer completions at all.")
    max_new_tokens: int = Field(default=96, ge=1, le=4096, description="Longest completion, in tokens.")
    max_lines: int = Field(default=12, ge=1, le=200, description="Longest completion, in lines.")
    deadline_s: float = Field(default=6.0, gt=0, le=120, description="A completion that takes longer is shown as far as it came.")
    context_tokens: int = Field(default=2048, ge=64, le=131_072, description="How much of the file the model sees, in tokens, about.")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 always gives the likeliest completion.")
    ahead: bool = Field(default=True, description="Compute what would follow a suggestion while it is looked at.")
    max_document_chars: int = Field(default=2_000_000, ge=1000, description="Larger documents are not completed.")


class Settings(Part):
    """All settings of the server."""

    model: str = Field(default="starter", description="'starter', a checkpoint's folder, or a hub name that was downloaded.")
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(default="auto", description="Type of the weights in memory.")
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of the engine; 0 takes as many as prove fastest.")
    kernels: Literal["auto", "torch"] = Field(default="auto", description="'torch' does without the compiled kernels for CPUs.")
    cache_mb: int = Field(default=1024, ge=16, description="Memory for what was computed of prompts and answers, in MB.")
    inline: InlineSettings = InlineSettings()


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place, and what that place is called when something there is wrong."""

    place: str
    values: Mapping[str, Any]


def merge(layers: Iterable[Layer]) -> tuple[Settings, list[str]]:
    """The settings the layers give, and a sentence for every value that was left out."""
    accepted: dict[str, Any] = {}
    problems: list[str] = []
    for layer in layers:
        values = copy.deepcopy(dict(layer.values))
        while True:
            candidate = overlaid(accepted, values)
            try:
                Settings.model_validate(candidate)
            except ValidationError as error:
                for wrong in error.errors():
                    place = tuple(str(part) for part in wrong["loc"])
                    problems.append(f"{'.'.join(place)} in {layer.place} is left out: {wrong['msg']}.")
                    remove(values, place)
            else:
                accepted = candidate
                break
    return Settings.model_validate(accepted), problems


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def remove(values: dict[str, Any], place: tuple[str, ...]) -> None:
    """Takes out the value at `place`, or the first part of the way that is no table."""
    head, *rest = place
    inner = values.get(head)
    if rest and isinstance(inner, dict) and rest[0] in inner:
        remove(inner, tuple(rest))
    else:
        values.pop(head, None)


def user_file() -> Path:
    return platformdirs.user_config_path("deepseek-lsp", appauthor=False) / "config.toml"


def file_layer(file: Path) -> tuple[Layer, list[str]]:
    place = str(file)
    try:
        return Layer(place, tomllib.loads(file.read_text("utf-8"))), []
    except FileNotFoundError:
        return Layer(place, {}), []
    except (OSError, ValueError) as error:
        return Layer(place, {}), [f"{place} is left out, it cannot be read as TOML: {error}."]


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """DEEPSEEK_LSP_INLINE__MAX_LINES=3 is inline.max_lines = 3."""
    values: dict[str, Any] = {}
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            *tables, leaf = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            table = values
            for part in tables:
                table = table.setdefault(part, {})
            table[leaf] = value
    return Layer("the environment", values)


def table_layer(place: str, values: Any) -> tuple[Layer, list[str]]:
    """A layer of what a client sent, which may be anything."""
    if values is None or isinstance(values, Mapping):
        return Layer(place, values or {}), []
    return Layer(place, {}), [f"{place} is left out: a table of settings is needed there, not {values!r}."]


def workspace_layer(values: Any) -> tuple[Layer, list[str]]:
    """A layer of workspace/configuration, without what only the user may set."""
    layer, problems = table_layer("the editor's workspace configuration", values)
    refused = sorted(USER_LEVEL & layer.values.keys())
    problems += [f"{name} in {layer.place} is left out: set it in initializationOptions or in {user_file()}." for name in refused]
    return Layer(layer.place, {name: value for name, value in layer.values.items() if name not in USER_LEVEL}), problems


def user_settings(environment: Mapping[str, str] = os.environ) -> tuple[list[Layer], list[str]]:
    """The layers below the client's: file and environment."""
    from_file, problems = file_layer(user_file())
    return [from_file, environment_layer(environment)], problems
