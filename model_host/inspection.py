"""What would be loaded and what stands in its way, in words, without reading a weight: for doctor.

Owns: the sentences.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from model_host import catalogue
from model_host.catalogue import CATALOGUE, Entry, Infilling, Precision
from model_host.checkpoints import checked_shards, hub_shapes, locate
from model_host.config import ModelConfig
from model_host.devices import parse_devices
from model_host.errors import CheckpointError, EngineError, RequestError
from model_host.footprint import groups
from model_host.machine import free_bytes, real_devices
from model_host.native.library import available_levels
from model_host.placement import USUAL_CONTEXT_TOKENS, Demand, Impossible, in_words, plan
from model_host.runner import Kernels, choose
from model_host.shards import Shard
from model_host.tokenizer import Tokenizer

WORDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Types that are read, as files and as users name them."""


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
        needed, free = sum(group.bytes for group in groups(config, Precision(kind))), free_bytes(where)
        facts["weights"] = f"{sum(part.bytes for part in parts) / 1e6:,.1f} MB on disk, {needed / 1e6:,.1f} MB in memory"
        if stored := stored_as(parts, config):
            facts["types"] = f"{stored}; all are taken as {kind}"
        facts["would load"] = f"{config.parameters / 1e6:,.1f} M parameters as {kind} on {where}"
        facts["kernels"] = (
            f"plain torch. {form.torch_because}" if form.torch_because else f"compiled for this processor ({available_levels()[-1]})"
        )
        trained = f", trained for {entry.context_tokens:,}" if entry.context_tokens < config.max_position_embeddings else ""
        kv_bytes = entry.kv_bytes_per_token(Precision.FLOAT32 if kind == "float32" else Precision.BFLOAT16)
        facts["context"] = f"{config.max_position_embeddings:,} tokens{trained}, {kv_bytes:,} bytes each"
        if form.spread_in_words:
            facts["plan"] = "\n".join(form.spread_in_words)
        if form.problem:
            problems.append(form.problem)
        elif free is not None and needed > free and not form.shares:
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


def stored_as(parts: list[Shard], config: ModelConfig) -> str:
    """The types of the weights in the files, the most frequent first, where there are several; else nothing."""
    wanted = {name for name, _ in hub_shapes(config)}
    found = Counter(WORDS[tensor.dtype] for part in parts for tensor in part.tensors if tensor.name in wanted)
    return ", ".join(f"{count} tensors in {kind}" for kind, count in found.most_common()) if len(found) > 1 else ""


def placed(name: str, devices: str, dtype: str, context_tokens: int, batch: int) -> Inspection:
    """Where `name` would lie on the `devices` described, or on this machine's, with `batch` sequences of so many tokens; 0: as many as
    it is loaded with. Neither needs to be here, nor to be there at all."""
    facts = {"model": name}
    try:
        entry = catalogue.named(name) or described_here(name)
        found = parse_devices(devices) if devices else real_devices()
        precision = None if dtype == "auto" else Precision(dtype)
        most = entry.shape.max_position_embeddings
        if context_tokens > most:
            raise RequestError(f"{entry.name} takes {most:,} tokens of context at most, not {context_tokens:,}.")
        context = context_tokens or min(USUAL_CONTEXT_TOKENS, most)
        made = plan(Demand(entry=entry, precision=precision, context_tokens=context, batch=batch), found)
    except EngineError as error:
        return Inspection(facts, [str(error)])
    facts["devices"] = ", ".join(f"{device.name} with {device.free_bytes / 1e9:,.1f} GB free" for device in found)
    words = in_words(made)
    if isinstance(made, Impossible):
        return Inspection(facts, [" ".join(words)])
    return Inspection(facts | {"plan": "\n".join(words)}, [])


def described_here(name: str) -> Entry:
    """The entry of a checkpoint that is on this machine. Raises CheckpointError."""
    folder = locate(name)
    entry = catalogue.described(folder, ModelConfig.read(folder))
    return entry if entry in CATALOGUE else replace(entry, name=name)


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


def devices() -> list[str]:
    names = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [*names, f"cpu with {torch.get_num_threads()} threads"]


def hub_checkpoints() -> list[str]:
    """DeepSeek models in the hub's cache of this user."""
    folders = Path(HF_HUB_CACHE).glob("models--*")
    names = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return sorted(name for name in names if "deepseek" in name.lower())
