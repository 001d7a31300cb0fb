"""The model on a CPU by compiled kernels: packed weights, and steps run on them.

Owns: which tensor of a checkpoint goes where in the packed weights, the number of threads. The arithmetic is in forward.cpp.
"""

import ctypes
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from ctypes import c_float, c_int32
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from model_host.batch import Span, Step
from model_host.checkpoints import checked_shards, hub_shapes, tensors
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.experts import first_slots
from model_host.generation import Progress
from model_host.latents import LatentPool
from model_host.native.library import Attention, Config, Pool, Sequence, Slot, available_levels, load, why_unavailable
from model_host.rotation import rope_frequencies

KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
GLOBAL = {"lm_head": Slot.HEAD, "model.norm": Slot.FINAL_NORM}
OF_LAYER = {
    "input_layernorm": Slot.INPUT_NORM,
    "post_attention_layernorm": Slot.POST_NORM,
    "self_attn.q_proj": Slot.Q,
    "self_attn.q_a_proj": Slot.Q,
    "self_attn.q_a_layernorm": Slot.Q_NORM,
    "self_attn.q_b_proj": Slot.Q_B,
    "self_attn.kv_a_proj_with_mqa": Slot.KV_A,
    "self_attn.kv_a_layernorm": Slot.LATENT_NORM,
    "self_attn.o_proj": Slot.O,
    "mlp.gate": Slot.GATE,
    "mlp.gate_proj": Slot.SHARED_GATE,
    "mlp.up_proj": Slot.SHARED_UP,
    "mlp.down_proj": Slot.SHARED_DOWN,
    "mlp.shared_experts.gate_proj": Slot.SHARED_GATE,
    "mlp.shared_experts.up_proj": Slot.SHARED_UP,
    "mlp.shared_experts.down_proj": Slot.SHARED_DOWN,
}
OF_EXPERT = {"gate_proj": Slot.EXPERT_GATE, "up_proj": Slot.EXPERT_UP, "down_proj": Slot.EXPERT_DOWN}
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")
MEASURED_S = 0.3
MEASURED_STEPS = 4
ROWS_TOGETHER = 512
"""Of a long step: bounds the scratch memory of experts."""


class Packed:
    """The compiled model's memory: weights packed one tensor after the other, and its threads. Frees them when it goes."""

    def __init__(self, config: ModelConfig, dtype: str, threads: int, level: str | None) -> None:
        """At most so many threads; 0: as many as there are cores. Raises CheckpointError."""
        if reason := why_unavailable():
            raise CheckpointError(reason)
        self.config, self.level = config, level or available_levels()[-1]
        self.library = load(self.level)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        most = min(threads or cores, cores)
        frequencies = rope_frequencies(config).tolist()
        numbers = _numbers(config, KINDS[dtype])
        self.handle = self.library.native_create(ctypes.byref(numbers), (c_float * len(frequencies))(*frequencies), most)
        if not self.handle:
            raise CheckpointError("There is not enough memory for this model.")
        self.use_threads(most)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.native_destroy(self.handle)

    def use_threads(self, threads: int) -> None:
        self.threads = threads
        self.library.native_use_threads(self.handle, threads)

    @property
    def bytes(self) -> int:
        return int(self.library.native_weight_bytes(self.handle))

    def put_all(self, weights: Iterable[tuple[str, Tensor]], wanted: dict[str, tuple[int, ...]]) -> None:
        """Takes the `wanted` of the weights. Raises CheckpointError when one is missing or of another shape."""
        missing = dict(wanted)
        for name, tensor in weights:
            shape = missing.pop(name, None)
            if shape is None:
                continue  # somebody else's, or a buffer that older exports carry, such as rotary inverse frequencies
            if shape != tuple(tensor.shape):
                raise CheckpointError(f"{name} has shape {list(tensor.shape)}, config.json says {list(shape)}.")
            self._put_named(name, tensor)
        if missing:
            raise CheckpointError(f"The checkpoint lacks {len(missing)} tensors, first {min(missing)}: download it again.")

    def _put_named(self, name: str, tensor: Tensor) -> None:
        if slot := GLOBAL.get(name.removesuffix(".weight")):
            return self.put(slot, -1, 0, tensor)
        if name == "model.embed_tokens.weight":
            self.put(Slot.EMBEDDING, -1, 0, tensor)
            if self.config.tie_word_embeddings:
                self.put(Slot.HEAD, -1, 0, tensor)
            return None
        match = LAYER_NAME.fullmatch(name)
        assert match
        layer, stem = int(match[1]), match[2]
        if expert := EXPERT_NAME.fullmatch(stem):
            return self.put(OF_EXPERT[expert[2]], layer, int(expert[1]), tensor)
        if stem == "self_attn.kv_b_proj":
            nope = self.config.qk_nope_head_dim
            for head, rows in enumerate(tensor.chunk(self.config.num_attention_heads)):  # [N+V, R]
                self.put(Slot.KEY_UP, layer, head, rows[:nope])
                self.put(Slot.KEY_ABSORB, layer, head, rows[:nope].T)
                self.put(Slot.VALUE_UP, layer, head, rows[nope:])
            return None
        return self.put(OF_LAYER[stem], layer, 0, tensor)

    def put(self, slot: Slot, layer: int, index: int, tensor: Tensor) -> None:
        tensor = tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        failed = self.library.native_put(
            self.handle, slot, layer, index, matrix.data_ptr(), matrix.dtype == torch.bfloat16, *matrix.shape, *matrix.stride()
        )
        if failed:
            raise CheckpointError("There is not enough memory for this model: choose a smaller one, or int4 weights.")


class NativeModel:
    """A model whose `forward` is one call of compiled code. Satisfies model_host.runner.StepModel; used by one thread at a time."""

    def __init__(
        self, config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: str, threads: int = 0, level: str | None = None
    ) -> None:
        """Packs `weights`, named as in a checkpoint, one after the other. 0 threads: as many as `prepare` finds to be
        fastest.
        Raises CheckpointError when a tensor is missing or of another shape than `config` says."""
        self._packed = Packed(config, dtype, threads, level)
        self.config, self.precision, self.device, self.level = config, dtype, torch.device("cpu"), self._packed.level
        self.latent_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._library, self._has_choice = self._packed.library, not threads
        self._packed.put_all(weights, dict(hub_shapes(config)))
        self.weight_bytes = self._packed.bytes

    @property
    def threads(self) -> int:
        return self._packed.threads

    @classmethod
    def load(cls, folder: Path, dtype: str, progress: Progress, threads: int = 0, level: str | None = None) -> Self:
        """Reads the checkpoint in `folder` tensor by tensor. Raises CheckpointError, naming what is wrong."""
        config = ModelConfig.read(folder)
        return cls(config, tensors(checked_shards(folder, config), progress), dtype, threads, level)

    @classmethod
    def random(cls, config: ModelConfig, dtype: str, seed: int, threads: int = 0, level: str | None = None) -> Self:
        """Weights with unit gain, so that routing and attention are not degenerate; for measuring."""
        return cls(config, random_weights(config, seed), dtype, threads, level)

    def pool(self, pages: int) -> LatentPool:
        return LatentPool(self.config, pages, self.latent_dtype, self.device)

    def prepare(self, latents: LatentPool) -> None:
        if self._has_choice:
            self._packed.use_threads(self._fastest(self.threads, latents))

    @torch.inference_mode()
    def forward(self, step: Step, latents: LatentPool) -> Tensor:
        """Runs `step`, writes its tokens' latents, and returns float32 logits [wanted, vocab]."""
        assert latents.c_kv.is_contiguous() and latents.c_kv.dtype in (torch.float32, torch.bfloat16)
        logits = torch.empty(len(step.wanted), self.config.vocab_size)
        sequences = (Sequence * len(step.spans))()
        for sequence, span in zip(sequences, step.spans, strict=True):
            sequence.pages = (c_int32 * len(span.pages))(*span.pages)
            sequence.tokens, sequence.context = span.tokens, span.context
        is_bf16 = latents.c_kv.dtype == torch.bfloat16
        pool = Pool(latents.c_kv.data_ptr(), latents.k_pe.data_ptr(), latents.c_kv.shape[1], is_bf16)
        ids = (c_int32 * len(step.ids))(*step.ids)
        wanted = (c_int32 * len(step.wanted))(*step.wanted)
        if self._library.native_forward(
            self._packed.handle, ctypes.byref(pool), sequences, len(sequences), ids, wanted, len(wanted), logits.data_ptr()
        ):
            raise MemoryError("no memory for the activations of a step")
        return logits

    def use_attention(self, form: Attention) -> None:
        """Fixes the form of attention that is otherwise chosen by its cost."""
        self._library.native_use_attention(self._packed.handle, form)

    def _fastest(self, most: int, latents: LatentPool) -> int:
        """The number of threads (1, 2, 4.. `most`) that decodes fastest here and now."""
        step = Step(ids=(0,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,))
        counts = [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]
        took: dict[int, float] = {}
        end = time.perf_counter() + MEASURED_S
        for threads in counts:
            self._packed.use_threads(threads)
            for _ in range(MEASURED_STEPS):
                started = time.perf_counter()
                self.forward(step, latents)
                took[threads] = min(took.get(threads, float("inf")), time.perf_counter() - started)
            if time.perf_counter() > end:
                break
        return min(took, key=lambda threads: took[threads])


class NativeExperts:
    """Some routed experts of every layer, computed by compiled code. Satisfies model_host.experts.Held; used by one thread at a time."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        dtype: str,
        held: range,
        threads: int = 0,
        level: str | None = None,
    ) -> None:
        """Packs those of `weights`, named as in a checkpoint, that belong to the experts in `held`. Raises CheckpointError."""
        self.held, self.device = held, torch.device("cpu")
        self._packed, self._slots = Packed(config, dtype, threads, level), first_slots(config, held)
        self._packed.put_all(_moved(weights, held), dict(shapes_of_experts(config, range(len(held)))))
        self.weight_bytes = self._packed.bytes

    def replace(self, layer: int, old: int, new: int, weights: Mapping[str, Tensor]) -> None:
        slot = int(self._slots[layer, old])
        for kind, weight in weights.items():
            self._packed.put(OF_EXPERT[kind], layer, slot, weight)  # into memory that is there
        self._slots[layer, new], self._slots[layer, old] = slot, -1

    def partial(self, layer: int, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, D], weights and experts [T, K] on any device -> float32 [T, D] on the CPU: the sum over the experts that are here."""
        x = x.to("cpu", torch.float32).contiguous()
        ids = self._slots[layer][experts.to("cpu", torch.long)].int().contiguous()
        shares, out = weights.to("cpu", torch.float32).contiguous(), torch.empty_like(x)
        for begin in range(0, len(x), ROWS_TOGETHER):
            part = slice(begin, begin + ROWS_TOGETHER)
            if self._packed.library.native_experts(
                self._packed.handle,
                layer,
                x[part].data_ptr(),
                len(x[part]),
                ids[part].data_ptr(),
                shares[part].data_ptr(),
                out[part].data_ptr(),
            ):
                raise MemoryError("no memory for the experts of a step")
        return out


def _moved(weights: Iterable[tuple[str, Tensor]], held: range) -> Iterator[tuple[str, Tensor]]:
    """The experts in `held` by the names of the places they get, the first of which is 0."""
    for name, tensor in weights:
        if (match := EXPERT_NAME.search(name)) and int(match[1]) in held:
            yield name[: match.start(1)] + str(int(match[1]) - held.start) + name[match.end(1) :], tensor


def shapes_of_experts(config: ModelConfig, held: range) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the routed experts in `held`."""
    for name, shape in hub_shapes(config):
        if (match := EXPERT_NAME.search(name)) and int(match[1]) in held:
            yield name, shape


def _numbers(config: ModelConfig, kind: int) -> Config:
    grouped = config.topk_method == "group_limited_greedy"
    return Config(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        dense_inner=config.intermediate_size,
        expert_inner=config.moe_intermediate_size,
        layers=config.num_hidden_layers,
        dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers),
        heads=config.num_attention_heads,
        q_rank=config.q_lora_rank or 0,
        latent=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        experts=config.n_routed_experts or 0,
        shared=config.n_shared_experts or 0,
        top_k=config.num_experts_per_tok or 0,
        groups=(config.n_group or 1) if grouped else 1,
        top_groups=(config.topk_group or 1) if grouped else 1,
        kind=kind,
        routed_scale=config.routed_scaling_factor,
        eps=config.rms_norm_eps,
        softmax_scale=config.softmax_scale,
        rope_magnitude=config.rope_magnitude,
    )


def random_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, drawn with unit gain; large ones share their numbers, since drawing takes longer than packing."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1 << 24, generator=generator)
    for name, shape in hub_shapes(config):
        if len(shape) == 1:
            yield name, torch.ones(shape)
            continue
        size = shape[0] * shape[1]
        first = int(torch.randint(0, max(1, len(drawn) - size), (1,), generator=generator))
        numbers = (drawn[first : first + size] if size <= len(drawn) else drawn.repeat(-(-size // len(drawn)))[:size]).view(shape)
        yield name, numbers if "embed_tokens" in name else numbers / shape[1] ** 0.5
