"""Finds checkpoints and reads their weights: hub names and folders -> a `Model` on its device, with progress.

Owns: file names, safetensors indices, the per-expert names of the hub. Only safetensors are read, no code and no pickle, and
nothing is downloaded unless `download` says that the user asked for it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.generation import Progress
from model_host.models.deepseek_v2 import Model
from model_host.tokenizer import Tokenizer

STARTER = Path(__file__).parent / "starter" / "checkpoint"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_PARAMETERS = 500_000_000
"""Up to this many a CPU computes in float32: twice the memory of bfloat16, and exact."""


def locate(name: str, *, download: bool = False) -> Path:
    """The folder of a checkpoint: "starter", a path, or a hub name whose files lie in the hub's cache (or are fetched now)."""
    if name == "starter":
        return STARTER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"No model at {name!r}: give a folder that exists, a hub name such as ORGANISATION/MODEL, or 'starter'.")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not download))
    except LocalEntryNotFoundError:
        told = "the hub cannot be reached" if download else f"fetch it once with: deepseek-lsp download {name}"
        raise CheckpointError(f"{name} is not on this machine: {told}.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file and the names of the tensors it holds."""

    file: Path
    names: tuple[str, ...]
    bytes: int


def shards(folder: Path) -> list[Shard]:
    """The checkpoint's shards, each checked to be there whole, before anything is loaded. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}): download it again.") from error
    elif (folder / "model.safetensors").is_file():
        wanted = ["model.safetensors"]
    elif any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} holds pickled weights (*.bin), which can run code: only safetensors are read. Get those instead.")
    else:
        raise CheckpointError(f"{folder} holds no model.safetensors and no model.safetensors.index.json: download the weights.")
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(wanted)} shards, first {missing[0]}: download it again.")
    return [_shard(folder / name) for name in wanted]


def _shard(file: Path) -> Shard:
    """Reads a shard's header (8 bytes of length, then JSON with every tensor's offsets) and holds it against the file's size."""
    actual = file.stat().st_size
    with file.open("rb") as start:
        header_bytes = int.from_bytes(start.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(start.read(header_bytes)) if header_bytes < actual else {}
        except ValueError:
            header = {}
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if not tensors or end != actual:
        raise CheckpointError(f"{file} is truncated or damaged (it has {actual:,} bytes): download this shard again.")
    return Shard(file, tuple(tensors), actual)


def tensors(parts: list[Shard], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the shards, in the order of the files, still on disk until it is used."""
    total, done = sum(part.bytes for part in parts), 0
    for part in parts:
        try:
            with safe_open(part.file, framework="pt") as opened:
                for name in part.names:
                    tensor = opened.get_tensor(name)
                    yield name, tensor
                    done += tensor.nbytes
                    progress("reading weights", done / total)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{part.file} cannot be read ({error}): download this shard again.") from error


def choose_device(wanted: str) -> torch.device:
    """`wanted`, or for "auto" the first CUDA device, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"Device {wanted!r} cannot be used ({str(error).splitlines()[0]}): set device to 'auto' or 'cpu'.") from error
    return device


def choose_dtype(wanted: str, device: torch.device, parameters: int) -> torch.dtype:
    """`wanted`, or for "auto" float32 where it is cheap (a small model on a CPU), else bfloat16."""
    if wanted == "auto":
        return torch.float32 if device.type == "cpu" and parameters <= SMALL_PARAMETERS else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def load_model(folder: Path, *, device: str, dtype: str, progress: Progress) -> Model:
    """Builds the model of `folder` and fills it shard by shard. Raises CheckpointError, naming what is wrong."""
    config = ModelConfig.read(folder)
    parts = shards(folder)
    with torch.device("meta"):
        model = Model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    where = choose_device(device)
    model = model.to(choose_dtype(dtype, where, parameters)).to_empty(device=where).requires_grad_(False).eval()
    destinations = dict(destinations_in(model))
    for name, tensor in tensors(parts, progress):
        destination = destinations.pop(name, None)
        if destination is None:
            continue  # buffers that older exports carry, such as rotary inverse frequencies
        if destination.shape != tensor.shape:
            raise CheckpointError(f"{folder}: {name} has shape {list(tensor.shape)}, config.json says {list(destination.shape)}.")
        destination.copy_(tensor)
    if destinations:
        raise CheckpointError(f"{folder} lacks {len(destinations)} tensors, first {min(destinations)}: download it again.")
    return model


def destinations_in(model: Model) -> Iterator[tuple[str, Tensor]]:
    """For every tensor name of a hub checkpoint, the (slice of a) parameter it is copied to."""
    for name, parameter in model.named_parameters():
        hub_name = name if name.startswith("lm_head") else f"model.{name}"
        stem, _, kind = hub_name.rpartition(".")
        if stem.endswith(".experts"):
            for expert, matrix in enumerate(parameter):
                if kind == "gate_up_proj":
                    gate, up = matrix.chunk(2)  # [I, D] each
                    yield f"{stem}.{expert}.gate_proj.weight", gate
                    yield f"{stem}.{expert}.up_proj.weight", up
                else:
                    yield f"{stem}.{expert}.down_proj.weight", matrix  # [D, I]
        else:
            yield hub_name, parameter


@dataclass(frozen=True, slots=True)
class Inspection:
    """What would be loaded, in words, and what stands in its way."""

    facts: dict[str, str]
    problems: list[str]


def inspect(name: str, device: str, dtype: str) -> Inspection:
    """Looks at a checkpoint and the machine as loading would, without reading a weight."""
    facts = {"devices": ", ".join(devices()), "models found": ", ".join(["starter", *hub_checkpoints()]), "model": name}
    problems: list[str] = []
    try:
        folder = locate(name)
        facts["folder"] = str(folder)
        config = ModelConfig.read(folder)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Model(config).parameters())
        where = choose_device(device)
        kind = choose_dtype(dtype, where, parameters)
        total = sum(part.bytes for part in shards(folder))
        facts["weights"] = f"{total / 1e6:,.1f} MB on disk, {parameters * kind.itemsize / 1e6:,.1f} MB in memory"
        facts["would load"] = f"{parameters / 1e6:,.1f} M parameters as {str(kind).removeprefix('torch.')} on {where}"
        facts["context"] = (
            f"{config.max_position_embeddings:,} tokens, {config.latent_dim * config.num_hidden_layers * kind.itemsize:,} bytes each"
        )
        tokenizer = Tokenizer(folder)
        facts["fill-in-the-middle"] = "yes" if tokenizer.has_fim else "no"
        if not tokenizer.has_fim:
            problems.append(f"{name} has no fill-in-the-middle tokens: choose DeepSeek-Coder-V2-Lite, DeepSeek-V2.5 or the starter.")
    except CheckpointError as error:
        problems.append(str(error))
    return Inspection(facts, problems)


def devices() -> list[str]:
    names = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [*names, f"cpu with {torch.get_num_threads()} threads"]


def hub_checkpoints() -> list[str]:
    """DeepSeek models in the hub's cache of this user."""
    folders = Path(HF_HUB_CACHE).glob("models--*")
    names = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return sorted(name for name in names if "deepseek" in name.lower())
