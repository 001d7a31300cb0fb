"""What would be loaded and what stands in its way, in words, without reading a weight: for doctor.

Owns: the sentences, and what this machine has free.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from model_host import catalogue
from model_host.catalogue import CATALOGUE, Entry, Infilling, Precision
from model_host.checkpoints import checked_shards, locate
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.native.library import available_levels
from model_host.runner import Kernels, choose
from model_host.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Inspection:
    """What would be loaded, in words, and what stands in its way."""

    facts: dict[str, str]
    problems: list[str]


def inspect(name: str, device: str, dtype: str, kernels: Kernels) -> Inspection:
    """Looks at a checkpoint and the machine as loading would, without reading a weight."""
    facts = {"devices": ", ".join(devices()), "models found": ", ".join(["starter", *hub_checkpoints()]), "model": name}
    problems: list[str] = []
    try:
        folder = locate(name)
        facts["folder"] = str(folder)
        config = ModelConfig.read(folder)
        entry = catalogue.described(folder, config)
        facts |= known(entry)
        parts = checked_shards(folder, config)
        form = choose(config, device=device, dtype=dtype, kernels=kernels)
        where, kind = form.device, form.precision
        needed, free = entry.weight_bytes(Precision(kind)), free_bytes(where)
        facts["weights"] = f"{sum(part.bytes for part in parts) / 1e6:,.1f} MB on disk, {needed / 1e6:,.1f} MB in memory"
        facts["would load"] = f"{config.parameters / 1e6:,.1f} M parameters as {kind} on {where}"
        facts["kernels"] = (
            f"plain torch. {form.torch_because}" if form.torch_because else f"compiled for this processor ({available_levels()[-1]})"
        )
        trained = f", trained for {entry.context_tokens:,}" if entry.context_tokens < config.max_position_embeddings else ""
        kv_bytes = entry.kv_bytes_per_token(Precision.FLOAT32 if kind == "float32" else Precision.BFLOAT16)
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
