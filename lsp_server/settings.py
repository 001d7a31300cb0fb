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
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

SECTION = "deepseek-lsp"
ENVIRONMENT_PREFIX = "DEEPSEEK_LSP_"
LOG_VARIABLE = ENVIRONMENT_PREFIX + "LOG"
"""How much is logged; no setting."""
USER_LEVEL = frozenset(
    {
        "model", "chat_model", "share_model", "keep_model_s", "device", "dtype", "threads", "kernels", "cache_mb", "ram_cache_mb",
        "disk_cache_mb", "tests_python", "engine", "remote",
    }
)  # fmt: skip


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InlineSettings(Part):
    """Ghost text and completion items."""

    enabled: bool = Field(default=True, description="Offer completions at all.")
    max_new_tokens: int = Field(default=96, ge=1, le=4096, description="Longest completion, in tokens.")
    max_lines: int = Field(default=12, ge=1, le=200, description="Longest completion, in lines.")
    deadline_s: float = Field(default=6.0, gt=0, le=120, description="A completion that takes longer is shown as far as it came.")
    context_tokens: int = Field(default=2048, ge=64, le=131_072, description="How much of the file the model sees, in tokens, about.")
    repository_tokens: int = Field(
        default=-1,
        ge=-1,
        le=32_768,
        description="How much of other files, their outlines, in tokens, about; 0: nothing, -1: what suits the model.",
    )
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 always gives the likeliest completion.")
    reuse: Literal["off", "exact", "shifted"] = Field(
        default="shifted",
        description="What may be reused of earlier work: nothing; what gives the very same answer; or, after an edit above the"
        " cursor, also what gives nearly the same at once, until the exact work is done at rest.",
    )
    ahead: bool = Field(default=True, description="Compute what may be wanted next while the user looks or rests.")
    max_document_chars: int = Field(default=2_000_000, ge=1000, description="Larger documents are not completed.")
    ignored_files: bool = Field(default=False, description="Complete documents that git ignores, too.")


class ActionSettings(Part):
    """Code actions and chat."""

    enabled: bool = Field(default=True, description="Offer code actions at all.")
    context_tokens: int = Field(default=6144, ge=256, le=131_072, description="How much of the project the model sees, in tokens, about.")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 always gives the likeliest answer.")
    max_new_tokens: int = Field(default=1024, ge=16, le=16_384, description="Longest answer in the chat, in tokens.")
    first_words_s: float = Field(default=60.0, gt=0, le=3600, description="An answer whose first words take longer is given up.")
    deadline_s: float = Field(default=300.0, gt=0, le=3600, description="An answer that takes longer is cut off.")


class RemoteSettings(Part):
    """The server that `engine = "openai"` asks: vLLM, SGLang, llama-server, or another that speaks OpenAI's protocol. Its token stands
    in the environment as DEEPSEEK_ENGINE_TOKEN, or in a file."""

    url: str = Field(default="", description="Where it listens, such as https://gpu.example.org/v1.")
    model: str = Field(default="", description="The name it serves the model under; empty: the first it lists.")
    fim: Literal["tokens", "suffix", "infill", "none"] = Field(
        default="tokens",
        description="How holes are asked for: DeepSeek's own tokens, the parameter 'suffix', llama-server's /infill, not at all.",
    )
    token_file: str = Field(default="", description="A file that only its owner can read, with the token that it wants.")
    ca_file: str = Field(default="", description="Certificates to trust instead of the system's, as a PEM file.")
    plain_http: bool = Field(default=False, description="Allow http:// to another machine, where everybody between can read the code.")
    timeout_s: float = Field(default=60.0, gt=0, le=3600, description="How long it may take to begin an answer.")
    stall_s: float = Field(default=20.0, gt=0, le=3600, description="How long it may be silent within an answer.")


INSTEAD = {"fp4": "int4", "4bit": "int4", "q4_k_m": "int4", "fp8": "int8", "8bit": "int8", "q8_0": "int8"}
"""Formats that other engines have, and what takes about as much memory here and loses about as little."""


def of_this_engine(dtype: Any) -> Any:
    """Raises ValueError for a format of other engines, with what to choose."""
    if instead := INSTEAD.get(dtype) if isinstance(dtype, str) else None:
        raise ValueError(
            f"weights are not held as {dtype} here: choose {instead}, which takes about as much memory and loses about as little"
        )
    return dtype


class Settings(Part):
    """All settings of the server."""

    engine: Literal["local", "openai"] = Field(default="local", description="'openai' asks the server of [remote] instead of this machine.")

    model: str = Field(default="starter", description="'starter', a checkpoint's folder, or a hub name that was downloaded.")
    share_model: bool = Field(default=True, description="One process holds the model for all editors; false: each server has its own.")
    keep_model_s: float = Field(default=300.0, ge=0, description="That process ends when no editor has used it for so long.")
    chat_model: str = Field(default="", description="Another checkpoint for actions and chat, loaded when first needed; empty: the same.")
    chat_idle_s: float = Field(default=900.0, ge=1, description="chat_model is let go when nobody asked it for so long.")
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "nf4"], BeforeValidator(of_this_engine)] = Field(
        default="auto",
        description="Type of the weights in memory; nf4 is bitsandbytes', to be installed beside, and slower than int4.",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of the engine; 0 takes as many as prove fastest.")
    kernels: Literal["auto", "torch"] = Field(default="auto", description="'torch' does without the compiled kernels for CPUs.")
    cache_mb: int = Field(default=1024, ge=16, description="Memory for what was computed of prompts and answers, in MB.")
    ram_cache_mb: int = Field(default=4096, ge=0, description="Beside a GPU: the computer's memory for what leaves the GPU's, in MB.")
    disk_cache_mb: int = Field(default=0, ge=0, description="Files that keep opened documents warm over restarts, in MB; 0 writes none.")
    tests_python: str = Field(default="", description="The Python that tries generated tests, in a sandbox (Linux); empty: none are run.")
    inline: InlineSettings = InlineSettings()
    actions: ActionSettings = ActionSettings()
    remote: RemoteSettings = RemoteSettings()


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
        if name.startswith(ENVIRONMENT_PREFIX) and name != LOG_VARIABLE:
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            nested: Any = value
            for part in reversed(path):
                nested = {part: nested}
            values = overlaid(values, nested)
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
