"""Trains the starter model: the loop, the optimiser, the schedule, resumable state, and the export in the hub's format.

Owns: how the weights come to be. The model is the one of `models/deepseek_v2.py`, run over whole sequences with expanded
attention and every expert computed (`Experts.every`), which costs more arithmetic and no dispatch.

Hidden matrices learn by Muon (orthogonalised momentum, Keller Jordan 2024, scaled to AdamW's step size as in arXiv 2502.16982),
everything else by AdamW. Float32 master weights; forward and backward in the shipped precision.
"""

import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_host.checkpoints import load_model
from model_host.config import ModelConfig
from model_host.models.deepseek_v2 import Model, MoE
from model_host.starter.examples import ExampleSource

BALANCE_WEIGHT = 0.003
"""Expert-level balance loss, alpha_1 of DeepSeek-V2 section 2.2.3."""
SHARD_BYTES = 15_000_000
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Best first; flash attention wants values as wide as keys, which ours are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast to train. One step sees `tokens_per_step` tokens."""

    steps: int
    tokens_per_step: int
    learning_rate: float
    context: int = 2048
    long_context: int = 16_384
    long_share: float = 0.12
    """The last share of the steps, of which every second one sees sequences of `long_context`."""
    warmup_steps: int = 200
    decay_share: float = 0.35
    weight_decay: float = 0.05
    seed: int = 0
    report_every: int = 100
    answers_only: bool = False
    """Whether only the middles of fill-in-the-middle examples count, for a last stage."""

    def rate(self, step: int) -> float:
        """Warm-up, constant, then linear decay to 2 % (WSD)."""
        decay_steps = int(self.steps * self.decay_share)
        left = (self.steps - step) / max(decay_steps, 1)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, 0.02 + 0.98 * left)

    def context_at(self, step: int) -> int:
        return self.long_context if step >= self.steps * (1 - self.long_share) and step % 2 else self.context


def initialise(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = scale if "o_proj" in name or "down_proj" in name else 0.02
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def answers(ids: Tensor, opening: int) -> Tensor:
    """Which targets of ids [B, T+1] lie between `opening` and the end of sequence that follows it, itself included: [B, T]"""
    eos = opening - 3  # the five special tokens lie in a row: bos, eos, hole, begin, end
    ended = (ids == eos).cumsum(1)
    seen = torch.where(ids == opening, ended + 1, 0).cummax(1).values  # 1 + the number of sequences that ended before the opening
    return (seen == ended + 1)[:, :-1]


def training_loss(model: Model, ids: Tensor, answers_only: bool = False) -> tuple[Tensor, Tensor]:
    """Next-token loss and balance loss of ids [B, T+1]; of the middles of fill-in-the-middle examples only, where so told."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    rotation = model.rotation(torch.arange(inputs.shape[1], device=ids.device))
    x = model.embed_tokens(inputs)  # [B, T, D]
    balance = x.new_zeros((), dtype=torch.float32)
    for block in model.blocks():
        attention, mlp = block.self_attn, block.mlp
        h = block.input_layernorm(x)
        x = x + attention.o_proj(attention.expanded(*attention.queries(h, rotation), *attention.latents(h, rotation), None))
        h = block.post_attention_layernorm(x)
        if isinstance(mlp, MoE):
            weights, chosen = mlp.gate(h)
            affinities = mlp.gate.affinities(h).mean((0, 1))  # [E]
            load = (chosen.unsqueeze(-1) == torch.arange(len(affinities), device=ids.device)).sum((0, 1, 2))  # [E]
            balance = balance + (affinities * load).sum() * len(load) / chosen.numel()
            # a CPU computes the chosen experts alone: there arithmetic is dear and dispatch is cheap
            x = x + (mlp.every(h, weights, chosen) if h.is_cuda else mlp(h.flatten(0, 1)).view_as(h))
        else:
            x = x + mlp(h)
    logits = model.lm_head(model.norm(x))
    if answers_only:
        kept = answers(ids, model.config.bos_token_id + 4)
        logits, targets = logits[kept], targets[kept]
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten()), balance


def orthogonalised(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices [..., r, c], in bfloat16 (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram: Tensor = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


@dataclass
class Optimiser:
    """Muon for the hidden matrices, AdamW for embeddings, head, gates and norms; both over float32 masters."""

    masters: dict[str, Tensor]
    weight_decay: float
    moments: dict[str, Tensor] = field(default_factory=dict)

    def _is_hidden(self, name: str) -> bool:
        return self.masters[name].dim() > 1 and not any(part in name for part in ("embed_tokens", "lm_head", "gate.weight"))

    def step(self, gradients: dict[str, Tensor], rate: float, step: int) -> None:
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, gradient in gradients.items():
            if self._is_hidden(name):
                momentum = self.moments.setdefault(f"{name}.m", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 0.05)
                by_shape.setdefault(gradient.shape[-2:], []).append((name, gradient.lerp(momentum, 0.95)))
            else:
                self._adam(name, gradient, rate, step)
        for shape, members in by_shape.items():
            updates = orthogonalised(torch.cat([update.reshape(-1, *shape) for _, update in members])).float()
            scale = 0.2 * math.sqrt(max(shape))
            for (name, _), update in zip(members, updates.split([m.numel() // shape.numel() for _, m in members]), strict=True):
                master = self.masters[name]
                master.mul_(1 - rate * self.weight_decay).add_(update.reshape(master.shape), alpha=-rate * scale)

    def _adam(self, name: str, gradient: Tensor, rate: float, step: int) -> None:
        first = self.moments.setdefault(f"{name}.m", torch.zeros_like(gradient))
        second = self.moments.setdefault(f"{name}.v", torch.zeros_like(gradient))
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        self.masters[name].add_(update, alpha=-rate)


_source: ExampleSource
"""The stream of examples, inherited by the worker processes when they are forked."""


def _sequences(task: tuple[int, int, int]) -> NDArray[np.uint16]:
    return _source.sequences(*task)


def batches(plan: Plan, source: ExampleSource, first_step: int, workers: int) -> Iterator[Tensor]:
    """The batch [B, context + 1] of every step from `first_step` on, made ahead by worker processes; a step's batch depends
    on the plan's seed and the step alone."""
    global _source
    _source = source

    def tasks() -> Iterator[tuple[int, int, int]]:
        for step in range(first_step, plan.steps):
            context = plan.context_at(step)
            yield context, plan.tokens_per_step // context, plan.seed * 1_000_003 + step

    with multiprocessing.get_context("fork").Pool(workers) as pool:
        ahead = []
        todo = tasks()
        for task in todo:
            ahead.append(pool.apply_async(_sequences, (task,)))
            if len(ahead) > 4 * workers:
                yield torch.from_numpy(ahead.pop(0).get().astype(np.int64))
        for made in ahead:
            yield torch.from_numpy(made.get().astype(np.int64))


@dataclass
class Run:
    """One training run on disk: `folder` holds its state, its log and nothing else."""

    plan: Plan
    config: ModelConfig
    folder: Path
    device: torch.device
    start: Path | None = None
    """A checkpoint to begin with, instead of random numbers."""

    @sdpa_kernel(ATTENTION, set_priority=True)
    def train(self, source: ExampleSource, held_out: Tensor, minutes: float, workers: int) -> bool:
        """Trains on from the saved state until done or `minutes` are over; saves; says whether the plan is finished."""
        started = time.monotonic()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if self.start:
            model = load_model(self.start, device=torch.device("cpu"), dtype=torch.float32, progress=lambda what, share: None).train()
            model.requires_grad_(True)
        else:
            model = Model(self.config)
            initialise(model, self.plan.seed)
        masters = {n: p.detach().to(self.device, torch.float32, copy=True) for n, p in model.named_parameters()}
        model = model.to(self.device, dtype)
        model.rotation(torch.arange(1, device=self.device))  # or the second step would be compiled again
        optimiser = Optimiser(masters, self.plan.weight_decay)
        step = self._load(optimiser)
        loss_of: Callable[[Model, Tensor, bool], tuple[Tensor, Tensor]] = training_loss
        if self.device.type == "cuda":
            loss_of = torch.compile(training_loss, dynamic=False)
        losses: list[Tensor] = []
        rows: list[dict[str, float]] = []
        last_report = time.monotonic()
        for batch in batches(self.plan, source, step, workers):
            ids = (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device, non_blocking=True)
            for name, parameter in model.named_parameters():
                parameter.data.copy_(masters[name])
            model.zero_grad(set_to_none=True)
            loss, balance = loss_of(model, ids, self.plan.answers_only)
            (loss + BALANCE_WEIGHT * balance).backward()
            gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
            norm = torch.stack([g.norm() for g in gradients.values()]).norm()
            for gradient in gradients.values():
                gradient.mul_((1.0 / norm).clamp(max=1.0))
            optimiser.step(gradients, self.plan.rate(step), step)
            losses.append(loss.detach())
            step += 1
            out_of_time = time.monotonic() - started > minutes * 60
            if step % self.plan.report_every == 0 or step == self.plan.steps or out_of_time:
                now = time.monotonic()
                rate = len(losses) * self.plan.tokens_per_step / (now - last_report)
                with torch.no_grad():
                    parts = (part.to(self.device) for part in held_out.split(4))
                    checked = torch.stack([training_loss(model, part, self.plan.answers_only)[0] for part in parts]).mean()
                row = {"step": step, "loss": float(torch.stack(losses).mean()), "held_out": float(checked), "tokens_per_s": rate}
                row["balance"] = float(balance.detach()) / sum(isinstance(b.mlp, MoE) for b in model.blocks())
                rows.append(row)
                sys.stderr.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
                losses.clear()
                last_report = time.monotonic()
            if out_of_time:
                break
        self._save(optimiser, step, rows)
        return step >= self.plan.steps

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights of the last saved state."""
        state = load_file(self.folder / "state.safetensors")
        return {key.removeprefix("master/"): tensor for key, tensor in state.items() if key.startswith("master/")}

    def _load(self, optimiser: Optimiser) -> int:
        state, steps = self.folder / "state.safetensors", self.folder / "state.json"
        if not steps.exists():
            return 0
        for key, tensor in load_file(state, device=str(self.device)).items():
            kind, name = key.split("/", 1)
            if kind == "master":
                optimiser.masters[name].copy_(tensor)
            else:
                optimiser.moments[name] = tensor
        return int(json.loads(steps.read_text())["step"])

    def _save(self, optimiser: Optimiser, step: int, rows: list[dict[str, float]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {f"master/{n}": t for n, t in optimiser.masters.items()} | {f"moment/{n}": t for n, t in optimiser.moments.items()}
        save_file({n: t.cpu().contiguous() for n, t in state.items()}, self.folder / "state.safetensors")
        (self.folder / "state.json").write_text(json.dumps({"step": step}) + "\n")
        with (self.folder / "loss.jsonl").open("a") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """The configuration as the hub's DeepSeek-V2 checkpoints write it."""
    fields = config.model_dump(exclude={"yarn"})
    if config.yarn:
        fields["rope_scaling"] = {"type": "yarn", **config.yarn.model_dump()}
    return {"architectures": ["DeepseekV2ForCausalLM"], **fields, "attention_dropout": 0.0, "torch_dtype": "bfloat16", "use_cache": True}


def export(config: ModelConfig, masters: dict[str, Tensor], folder: Path, vocabulary: Path) -> None:
    """Writes config.json and bfloat16 shards with one tensor per expert, named as in the hub's checkpoints, and brings the
    tokenizer's files from the folder `vocabulary`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in masters.items():
        hub_name = name if name.startswith("lm_head") else f"model.{name}"
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                stem = hub_name.removesuffix("gate_up_proj") + str(expert)
                tensors[f"{stem}.gate_proj.weight"], tensors[f"{stem}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{hub_name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            tensors[hub_name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(vocabulary / file, folder / file)
    (folder / "config.json").write_text(json.dumps(hub_config(config), indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.numel() * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.to("cpu", torch.bfloat16).contiguous()
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
