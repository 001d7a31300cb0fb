"""Finds checkpoints and reads their weights: hub names and folders -> a `Model` on its device, with progress.

Owns: the per-expert names of the hub, and that each tensor goes from its file straight into its place. Only safetensors are read,
no code and no pickle, and nothing is downloaded unless `download` says that the user asked for it.
"""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model_host import catalogue
from model_host.catalogue import CATALOGUE, Entry, Infilling, Precision
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.generation import Progress
from model_host.models.deepseek_v2 import Model
from model_host.shards import Shard, shards
from model_host.tokenizer import Tokenizer

STARTER = Path(__file__).parent / "starter" / "checkpoint"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
READABLE = ("BF16", "F16", "F32", "F64")
"""Types of weights in files; each is converted to the one that is computed with."""
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


def tensors(parts: list[Shard], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the shards, in the order in which they lie, still on disk until it is used. Progress is told in percents."""
    total, done, told = sum(part.bytes for part in parts), 0, 0
    for part in parts:
        try:
            with safe_open(part.file, framework="pt") as opened:
                for stored in part.tensors:
                    yield stored.name, opened.get_tensor(stored.name)
                    done += stored.bytes
                    if done * 100 // total > told:
                        told = done * 100 // total
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
    """Builds the model of `folder` and fills it tensor by tensor. Raises CheckpointError, naming what is wrong, before memory
    is taken: everything but the weights themselves is known from the headers."""
    config = ModelConfig.read(folder)
    parts = shards(folder)
    model = outline(config)
    check(folder, parts, model)
    where = choose_device(device)
    allocate(model, where, choose_dtype(dtype, where, config.parameters))
    destinations = dict(destinations_in(model))
    for name, tensor in tensors(parts, progress):
        if name in destinations:  # older exports carry buffers too, such as rotary inverse frequencies
            destinations[name].copy_(tensor)
    return model.eval()


class _Unfilled(TorchFunctionMode):
    """Leaves out the random numbers that torch's layers are made with. On the meta device, where there is nothing to fill, torch
    imports 800 modules on its way to finding that out: 1.3 seconds and 73 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def outline(config: ModelConfig) -> Model:
    """The model without memory: names and shapes."""
    with torch.device("meta"), _Unfilled():
        return Model(config)


def allocate(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter of an outline its memory, not filled. Those that were one (tied embeddings) stay one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                memory = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(memory, requires_grad=False)
            setattr(module, name, made[parameter])


def release_memory() -> None:
    """To be called once a model was let go: returns to the system what torch and the C library keep for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)  # glibc keeps freed blocks of less than 32 MB


def check(folder: Path, parts: list[Shard], model: Model) -> None:
    """Holds what the shards' headers say against the model. Raises CheckpointError."""
    wanted = {name: tuple(tensor.shape) for name, tensor in destinations_in(model)}
    for stored in (stored for part in parts for stored in part.tensors):
        shape = wanted.pop(stored.name, None)
        if shape is None:
            continue
        if shape != stored.shape:
            raise CheckpointError(f"{folder}: {stored.name} has shape {list(stored.shape)}, config.json says {list(shape)}.")
        if stored.dtype not in READABLE:
            raise CheckpointError(
                f"{folder}: {stored.name} is stored as {stored.dtype}, so these weights are quantized, which cannot be read:"
                " choose the checkpoint they were made from, in bfloat16, float16 or float32."
            )
    if wanted:
        raise CheckpointError(f"{folder} lacks {len(wanted)} tensors, first {min(wanted)}: download it again.")


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
        entry = catalogue.described(folder, config)
        facts |= known(entry)
        parts = shards(folder)
        check(folder, parts, outline(config))
        where = choose_device(device)
        kind = choose_dtype(dtype, where, config.parameters)
        needed, free = config.parameters * kind.itemsize, free_bytes(where)
        facts["weights"] = f"{sum(part.bytes for part in parts) / 1e6:,.1f} MB on disk, {needed / 1e6:,.1f} MB in memory"
        facts["would load"] = f"{config.parameters / 1e6:,.1f} M parameters as {str(kind).removeprefix('torch.')} on {where}"
        trained = f", trained for {entry.context_tokens:,}" if entry.context_tokens < config.max_position_embeddings else ""
        kv_bytes = config.latent_dim * config.num_hidden_layers * kind.itemsize
        facts["context"] = f"{config.max_position_embeddings:,} tokens{trained}, {kv_bytes:,} bytes each"
        if free is not None and needed > free:
            problems.append(
                f"{name} needs {needed / 1e9:,.1f} GB for its weights, {where} has {free / 1e9:,.1f} GB free: choose a smaller model"
                " (deepseek-lsp doctor --models), another device or dtype."
            )
        tokenizer = Tokenizer(folder)
        facts["fill-in-the-middle"] = infilling_in_words(entry) if tokenizer.has_fim else "no"
        if not tokenizer.has_fim:
            problems.append(catalogue.without_infilling(folder))
    except CheckpointError as error:
        problems.append(str(error))
    return Inspection(facts, problems)


def known(entry: Entry) -> dict[str, str]:
    """What the catalogue says of a checkpoint, or why it says nothing."""
    if entry.licence is not None:
        return {"known as": f"{entry.name}, good for {entry.good_for}", "licence": f"{entry.licence.name}, {entry.licence.url}"}
    alike = [other.name.partition("/")[2] for other in catalogue.of_shape(entry.shape)]
    if not alike:
        return {}
    return {"known as": f"one of {', '.join(alike)}, or made from it: they differ in weights only. A folder named so is told apart."}


def infilling_in_words(entry: Entry) -> str:
    if entry.infilling is Infilling.DOUBTFUL:
        return f"has the tokens, but is said to do it badly: {catalogue.RECOMMENDED.name} does it well"
    return "yes" if entry.infilling is Infilling.TRAINED else "yes, by its tokenizer"


FIRST_CONTEXT_TOKENS = 16_384
"""Context that has to fit beside the weights before a model is called fitting."""


def fitting() -> list[tuple[Entry, list[str]]]:
    """Every entry of the catalogue with the devices whose free memory holds it in bfloat16."""
    places = {"cpu": free_bytes(torch.device("cpu"))}
    places |= {f"cuda:{index}": free_bytes(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    return [
        (entry, [name for name, free in places.items() if free and free >= entry.bytes_with(FIRST_CONTEXT_TOKENS, Precision.BFLOAT16)])
        for entry in CATALOGUE
    ]


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken now; of the CPU including what the system would give up of its file cache. None: not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


def devices() -> list[str]:
    names = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [*names, f"cpu with {torch.get_num_threads()} threads"]


def hub_checkpoints() -> list[str]:
    """DeepSeek models in the hub's cache of this user."""
    folders = Path(HF_HUB_CACHE).glob("models--*")
    names = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return sorted(name for name in names if "deepseek" in name.lower())
