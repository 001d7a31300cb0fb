"""Finds checkpoints and reads their weights: hub names and folders -> a `Model` on its device, with progress.

Owns: the per-expert names of the hub, and that each tensor goes from its file straight into its place. Only safetensors are read,
no code and no pickle, and nothing is downloaded unless `download` says that the user asked for it.
"""

import ctypes
import gc
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.generation import Progress
from model_host.models.deepseek_v2 import Model
from model_host.shards import Shard, shards

STARTER = Path(__file__).parent / "starter" / "checkpoint"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
SIGN_S = 1.0
"""Whoever reads says so at least so often, unless a single tensor takes longer."""
READABLE = ("BF16", "F16", "F32", "F64")
"""Types of weights in files; each is converted to the one that is computed with."""
OF_PACKED = (".qweight", ".q_weight", ".weight_packed")
"""How GPTQ, AWQ, EXL2 and compressed-tensors name what stands in the place of a weight."""


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
    """Every tensor of the shards, in the order in which they lie, still on disk until it is used. Progress is told in percents, and where
    they take longer, every SIGN_S, a tensor's time apart at most. What that raises ends the reading."""
    total, done, told, told_at = sum(part.bytes for part in parts), 0, 0, time.monotonic()
    for part in parts:
        try:
            with safe_open(part.file, framework="pt") as opened:
                for stored in part.tensors:
                    yield stored.name, opened.get_tensor(stored.name)
                    done += stored.bytes
                    if done * 100 // total > told or time.monotonic() - told_at > SIGN_S:
                        told, told_at = done * 100 // total, time.monotonic()
                        progress("reading weights", done / total)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{part.file} cannot be read ({error}): download this shard again.") from error


def of_layers(weights: Iterable[tuple[str, Tensor]], layers: range) -> Iterator[tuple[str, Tensor]]:
    """Those of some layers by the names that they have in a model of these alone, and those of no layer."""
    for name, tensor in weights:
        match = LAYER.match(name)
        if match is None:
            yield name, tensor
        elif int(match[1]) in layers:
            yield f"model.layers.{int(match[1]) - layers.start}.{name[match.end() :]}", tensor


def choose_device(wanted: str) -> torch.device:
    """`wanted`, or for "auto" the first CUDA device, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        instead = "'cpu'" if wanted == "auto" else "'auto' or 'cpu'"
        raise CheckpointError(f"Device {wanted!r} cannot be used ({str(error).splitlines()[0]}): set device to {instead}.") from error
    return device


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype, progress: Progress) -> Model:
    """Builds the torch model of `folder` and fills it tensor by tensor. Raises CheckpointError, naming what is wrong."""
    config = ModelConfig.read(folder)
    parts = checked_shards(folder, config)
    model = outline(config)
    allocate(model, device, dtype)
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


def outline(config: ModelConfig, *, begins: bool = True, ends: bool = True) -> Model:
    """The model without memory: names and shapes."""
    with torch.device("meta"), _Unfilled():
        return Model(config, begins=begins, ends=ends)


def allocate(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter of an outline its memory, not filled. Those that were one (tied embeddings) stay one, and those that have
    memory keep it."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
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


def checked_shards(folder: Path, config: ModelConfig) -> list[Shard]:
    """The shards of `folder`, their headers held against `config`: what is wrong is known before memory is taken. Raises
    CheckpointError."""
    parts = shards(folder)
    wanted = dict(hub_shapes(config))
    for stored in (stored for part in parts for stored in part.tensors):
        shape, is_packed = wanted.pop(stored.name, None), stored.name.endswith(OF_PACKED)
        if shape is None and not is_packed:
            continue
        if is_packed or stored.dtype not in READABLE:
            raise CheckpointError(
                f"{folder}: {stored.name} is stored as {stored.dtype}, so these weights are quantized, which cannot be read:"
                " choose the checkpoint they were made from, in bfloat16, float16 or float32."
            )
        if shape != stored.shape:
            raise CheckpointError(f"{folder}: {stored.name} has shape {list(stored.shape)}, config.json says {list(shape or ())}.")
    if wanted:
        raise CheckpointError(f"{folder} lacks {len(wanted)} tensors, first {min(wanted)}: download it again.")
    return parts


def hub_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor in a checkpoint of `config`, one per expert as the hub has them."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        yield f"{stem}.input_layernorm.weight", (hidden,)
        if config.q_lora_rank is None:
            yield f"{stem}.self_attn.q_proj.weight", (heads * config.qk_head_dim, hidden)
        else:
            yield f"{stem}.self_attn.q_a_proj.weight", (config.q_lora_rank, hidden)
            yield f"{stem}.self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
            yield f"{stem}.self_attn.q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank)
        yield f"{stem}.self_attn.kv_a_proj_with_mqa.weight", (config.latent_dim, hidden)
        yield f"{stem}.self_attn.kv_a_layernorm.weight", (latent,)
        yield f"{stem}.self_attn.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
        yield f"{stem}.self_attn.o_proj.weight", (hidden, heads * config.v_head_dim)
        yield f"{stem}.post_attention_layernorm.weight", (hidden,)
        if layer < config.first_k_dense_replace:
            yield from _mlp_shapes(f"{stem}.mlp", hidden, config.intermediate_size)
            continue
        yield f"{stem}.mlp.gate.weight", (config.n_routed_experts or 0, hidden)
        for expert in range(config.n_routed_experts or 0):
            yield from _mlp_shapes(f"{stem}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
        if config.n_shared_experts:
            yield from _mlp_shapes(f"{stem}.mlp.shared_experts", hidden, config.n_shared_experts * config.moe_intermediate_size)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _mlp_shapes(stem: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{stem}.gate_proj.weight", (inner, hidden)
    yield f"{stem}.up_proj.weight", (inner, hidden)
    yield f"{stem}.down_proj.weight", (hidden, inner)


def destinations_in(model: Model) -> Iterator[tuple[str, Tensor]]:
    """For every tensor name of a hub checkpoint, the (slice of a) parameter it is copied to."""
    for name, parameter in model.named_parameters():
        hub_name = name if name.startswith("lm_head") else f"model.{name}"
        if hub_name == "lm_head.weight" and model.config.tie_word_embeddings:  # of layers that end a model and do not begin it
            hub_name = "model.embed_tokens.weight"
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
