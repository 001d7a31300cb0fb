"""A model on a GPU behind the step contract: small steps over static buffers and captured graphs, longer ones as plain torch.

Owns: the graphs, the buffers they read, and which path a step takes. Knows nothing of requests; the latent pool is handed in.

A step of up to `MAX_ROWS` tokens (decode of several sequences, or a few drafted tokens to verify, or both) is a set of rows: each
token attends to its own context, and rows of one sequence share a page table. All that changes from step to step are integers, which
go to the device in one asynchronous copy from pinned memory; then the graph of the next larger number of rows is replayed.

Where experts lie in the CPU's memory a step is several graphs, and between them the host computes what the next one needs (`aside`),
while the device computes the experts it has.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_host.batch import Step
from model_host.experts import Spread, SpreadLayer
from model_host.gpu.aside import Aside
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import MLP, Attention, Block, Model, MoE
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.quantized import Packed, PackedLinear

GRAPH_ROWS = (1, 2, 4, 8, 16)
MAX_ROWS = GRAPH_ROWS[-1]
SHORT_TOKENS = 64
"""Longer steps with spans up to this long attend over latents; still longer spans over expanded keys."""


class Operations(Protocol):
    """What `plain` and `kernels` have in common."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    latent_queries: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    values: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    linear: Callable[..., Tensor]


class Rows:
    """The integers of a small step, on the host (pinned where there is a GPU) and on the device, always at the same addresses."""

    FIELDS = 5

    def __init__(self, max_pages: int, device: torch.device) -> None:
        size = MAX_ROWS * (self.FIELDS + max_pages)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.ids, self.positions, self.slots, self.owners, self.wanted = self._fields(self._device)  # [MAX_ROWS] each
        self.tables = self._tables(self._device, max_pages)  # [MAX_ROWS, max_pages]
        self._host_tables = self._tables(self._host, max_pages)
        self._known: list[tuple[int, ...]] = [()] * MAX_ROWS
        """The pages that stand in each host table."""
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def _fields(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return buffer[: MAX_ROWS * self.FIELDS].view(self.FIELDS, MAX_ROWS).unbind()

    def _tables(self, buffer: Tensor, max_pages: int) -> Tensor:
        return buffer[MAX_ROWS * self.FIELDS :].view(MAX_ROWS, max_pages)

    def fill(self, step: Step) -> None:
        """Puts a step of at most `MAX_ROWS` tokens into the buffers. Rows beyond its tokens repeat its first one: they write the
        same latents to the same slot and choose the same experts, so they cost next to nothing and change nothing."""
        positions: list[int] = []
        slots: list[int] = []
        owners: list[int] = []
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading
        for number, span in enumerate(step.spans):
            for position in range(span.context - span.tokens, span.context):
                positions.append(position)
                slots.append(span.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
                owners.append(number)
            self._write_table(number, span.pages)
        columns = (step.ids, positions, slots, owners, step.wanted or (0,))
        padded = [[*column, *[column[0]] * (MAX_ROWS - len(column))] for column in columns]
        self._host[: MAX_ROWS * self.FIELDS] = torch.tensor(padded, dtype=torch.int32).flatten()
        used = MAX_ROWS * self.FIELDS + len(step.spans) * self.tables.shape[1]
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _write_table(self, number: int, pages: tuple[int, ...]) -> None:
        """A sequence that goes on has the pages it had and at times one more."""
        known = len(self._known[number])
        if pages[:known] != self._known[number]:
            known = 0
        if len(pages) > known:
            self._host_tables[number, known : len(pages)] = torch.tensor(pages[known:], dtype=torch.int32)
        self._known[number] = pages


Between = Callable[[int], None]
"""What the host does between two parts of a step of so many tokens."""
Parts = Generator[Between, None, Tensor]
"""A step's parts, and what comes of it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """The graphs of a step, each with what follows it, and the memory that the result is in."""

    graphs: tuple[torch.cuda.CUDAGraph, ...]
    between: tuple[Between, ...]
    out: Tensor

    def replay(self, tokens: int = 1, launch: Callable[[Callable[[], None]], None] = lambda run: run()) -> None:
        for graph, follows in zip(self.graphs, self.between, strict=False):  # nothing follows the last one
            launch(graph.replay)
            follows(tokens)
        launch(self.graphs[-1].replay)


class GpuModel:
    """Runs steps on one GPU. On another device, or without graphs, the same code runs operation by operation."""

    def __init__(
        self, model: Model, operations: Any = None, short_tokens: int = SHORT_TOKENS, spread: Spread | None = None
    ) -> None:  # fmt: skip
        """Takes the model over: the weights of projections that read the same input are laid one after the other. `spread` are its
        experts, where they are not the model's own."""
        if operations is None:
            from model_host.gpu import kernels as operations  # noqa: PLC0415  Triton is there only where CUDA is
        self.model, self.config, self.short_tokens = model, model.config, short_tokens
        self.device, self.latent_dtype = model.device, model.dtype
        self.precision = str(self.latent_dtype).removeprefix("torch.")
        self._do: Operations = operations
        self._input_weights = [_joined(block.self_attn) for block in model.blocks()]
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._rows: Rows | None = None
        self._latents: LatentPool | None = None
        self._graphs: dict[int, Captured] = {}
        has_others = spread is not None and len(spread.here) > 1
        self._aside = Aside(spread, model.config, MAX_ROWS, model.dtype, model.device) if spread is not None and has_others else None
        self._entering = torch.zeros(0 if model.begins else MAX_ROWS, self.config.hidden_size, dtype=model.dtype, device=model.device)
        """[MAX_ROWS, D]: what comes from the layers before these."""

    @torch.inference_mode()
    def forward(self, step: Step, latents: LatentPool, x: Tensor | None = None) -> Tensor:
        """Float32 logits [wanted, vocab] of the step, on the device; x as in `Model.forward`. Nothing here waits for
        the device, but where the CPU computes experts."""
        if len(step.ids) > MAX_ROWS or len(step.wanted) > len(step.ids):
            out: Tensor = self.model(Layout.of(step, self.device, self.short_tokens), latents, x)
            return out
        rows = self._bound(latents)
        rows.fill(step)
        if x is not None:
            self._entering[: len(x)] = x
            self._entering[len(x) :] = x[0]  # as in the rows' other fields
        count = next(size for size in GRAPH_ROWS if size >= len(step.ids))
        if self.device.type == "cuda":
            if count not in self._graphs:
                self._graphs[count] = self._capture(count, rows, latents)
            captured = self._graphs[count]
            if self.model.together is None:
                captured.replay(len(step.ids))
            else:
                captured.replay(len(step.ids), self.model.together.launch)
            out = captured.out
        else:
            out = self._run(count, rows, latents, len(step.ids))
        if not self.model.ends:
            return out[: len(step.ids)].clone()
        return out[: len(step.wanted)].to(torch.float32, copy=True)  # the next replay overwrites them

    def pool(self, pages: int) -> LatentPool:
        return LatentPool(self.config, pages, self.latent_dtype, self.device)

    @torch.inference_mode()
    def prepare(self, latents: LatentPool) -> None:
        """Captures the graphs of all sizes, for a pool that holds nothing yet: its first page is written. Without this, each graph
        is captured when it is first needed, which takes a second or more."""
        self.forget()
        for size in GRAPH_ROWS:
            if self.device.type == "cuda" and size not in self._graphs:
                self._graphs[size] = self._capture(size, self._bound(latents), latents)

    def forget(self) -> None:
        """Lets go of the graphs, and of the step in the buffers that they read."""
        self._graphs.clear()
        self._rows = None

    def _bound(self, latents: LatentPool) -> Rows:
        """The buffers for this pool; graphs hold the addresses of the pool they were captured with."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread: Triton launches on the current one
        if self._rows is None or self._latents is not latents:
            self._graphs.clear()
            most = min(pages_for(self.config.max_position_embeddings), latents.c_kv.shape[1] // PAGE_TOKENS)
            self._rows, self._latents = Rows(most, self.device), latents
        return self._rows

    def _capture(self, count: int, rows: Rows, latents: LatentPool) -> Captured:
        """Runs once so that kernels are compiled and libraries have their workspaces, then records. The step in the buffers is
        simply run again by the replay: it writes the same latents to the same slots."""
        memory = next((known.graphs[0].pool() for known in self._graphs.values()), None)  # one for all, which run one after the other
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        graphs, between = list[torch.cuda.CUDAGraph](), list[Between]()
        with torch.cuda.stream(side):
            self._run(count, rows, latents, count)
            torch.cuda.synchronize(self.device)
            parts = self._parts(count, rows, latents)
            while True:
                graphs.append(torch.cuda.CUDAGraph())
                graphs[-1].capture_begin(pool=memory, capture_error_mode="thread_local")  # other threads may speak to the device
                try:
                    between.append(next(parts))
                except StopIteration as done:
                    out: Tensor = done.value
                    break
                finally:
                    graphs[-1].capture_end()
                memory = graphs[-1].pool()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return Captured(tuple(graphs), tuple(between), out)

    def _run(self, count: int, rows: Rows, latents: LatentPool, tokens: int) -> Tensor:
        """A step of the first `count` rows, of which the first are its `tokens`, part by part."""
        parts = self._parts(count, rows, latents)
        while True:
            try:
                between = next(parts)
            except StopIteration as done:
                out: Tensor = done.value
                return out
            between(tokens)

    def _parts(self, count: int, rows: Rows, latents: LatentPool) -> Parts:
        """The forward pass of the first `count` rows, in the model's type: logits [count, vocab], or what the next layers take
        [count, D]."""
        model, do, together = self.model, self._do, self.model.together
        positions = rows.positions[:count]
        rotation = torch.view_as_real(model.rotation(positions))  # [T, P/2, 2]
        contexts = positions + 1
        x = model.embed_tokens(rows.ids[:count]) if model.begins else self._entering[:count]  # [T, D]
        normed = next(model.blocks()).input_layernorm(x)
        norms = [block.input_layernorm for block in model.blocks()]
        following = [*norms[1:], model.norm if model.ends else norms[-1]]  # what does not end the model has no use for its last one
        for layer, block in enumerate(model.blocks()):
            attended = self._attention(block.self_attn, layer, normed, rotation, contexts, rows, latents)
            if together is not None:
                attended = together.summed(attended)
            norm = block.post_attention_layernorm
            x, normed = do.add_norm(x, attended.unsqueeze(1), None, norm.weight, norm.eps)
            parts, shares = yield from self._mlp(block, layer, normed)
            if together is not None:
                parts, shares = together.summed(weighed(parts, shares)).unsqueeze(1), None
            x, normed = do.add_norm(x, parts, shares, following[layer].weight, following[layer].eps)
        return do.linear(normed[rows.wanted[:count]], model.lm_head.weight) if model.ends else x

    def _attention(
        self, attention: Attention, layer: int, x: Tensor, rotation: Tensor, contexts: Tensor, rows: Rows, latents: LatentPool
    ) -> Tensor:
        """x [T, D] -> [T, D]; writes the rows' latents into the pool."""
        do, count = self._do, len(x)
        if attention.q_is_low_rank:
            q = do.linear(attention.q_a_layernorm(do.linear(x, matrix(attention.q_a_proj))), matrix(attention.q_b_proj))
            projected = torch.cat((q, do.linear(x, matrix(attention.kv_a_proj_with_mqa))), dim=-1)
        else:
            projected = do.linear(x, self._input_weights[layer])
        kv_b = attention.kv_b_proj.weight.view(attention.heads, -1, attention.kv_rank)  # [H, N+V, R]
        c_kv, k_pe = latents.c_kv[layer], latents.k_pe[layer]
        norm = attention.kv_a_layernorm
        queries = do.latent_queries(projected, rotation, rows.slots[:count], norm.weight, norm.eps, kv_b, c_kv, k_pe)
        mixed = do.attend(*queries, c_kv, k_pe, rows.tables, rows.owners[:count], contexts, attention.scale)
        return do.linear(do.values(mixed, kv_b, attention.nope_dim), matrix(attention.o_proj))

    def _mlp(self, block: Block, layer: int, x: Tensor) -> Generator[Between, None, tuple[Tensor, Tensor | None]]:
        """x [T, D] -> parts [T, M, D] and their shares [T, M], or None where they are simply added."""
        mlp, do = block.mlp, self._do
        if isinstance(mlp, MLP):
            inner = F.silu(do.linear(x, matrix(mlp.gate_proj))) * do.linear(x, matrix(mlp.up_proj))
            return do.linear(inner, matrix(mlp.down_proj)).unsqueeze(1), None
        assert isinstance(mlp, MoE)
        gate_up: Tensor | Packed
        down: Tensor | Packed
        first, count, aside = None, len(x), self._aside
        if isinstance(mlp.experts, SpreadLayer):
            *stacks, first = mlp.experts.stacks
            gate_up, down = (stack.matrices for stack in stacks)
        else:
            gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        seen_by_all, shared = 0, None
        if mlp.shared_experts is not None:
            every = mlp.shared_experts
            shared = (matrix(every.gate_proj), matrix(every.up_proj), matrix(every.down_proj))
            seen_by_all = 1 if isinstance(down, Packed) else every.down_proj.in_features // down.shape[-1]
        gate = mlp.gate
        shares, ids = do.route(x, gate.weight, gate.top_k, gate.scaling, seen_by_all, gate.groups, gate.top_groups)
        if aside is None:
            return do.experts(x, ids, gate_up, down, shared, first=None if self.model.together is None else first), shares
        assert isinstance(mlp.experts, SpreadLayer)
        aside.send(x, shares, ids)
        yield lambda tokens: aside.sent()
        parts = do.experts(x, mlp.experts.slots(ids).int(), gate_up, down, shared, first=0)
        yield lambda tokens: aside.compute(layer, tokens, count)
        return torch.cat((parts, aside.back[:count].unsqueeze(1)), dim=1), F.pad(shares, (0, 1), value=1.0)


def weighed(parts: Tensor, shares: Tensor | None) -> Tensor:
    """The sum of parts [T, M, D], each times its share [T, M] where given -> [T, D]"""
    return parts.sum(dim=1) if shares is None else torch.bmm(shares.unsqueeze(1), parts.to(shares.dtype)).squeeze(1)


def matrix(layer: nn.Module) -> Tensor | Packed:
    """What a linear layer multiplies with, plain or packed."""
    if isinstance(layer, PackedLinear):
        return layer.matrix
    assert isinstance(layer, nn.Linear)
    return layer.weight


def _joined(attention: Attention) -> Tensor | Packed:
    """The weights of the queries' and the latents' projections as one matrix [H*(N+P) + R+P, D], of which theirs become parts."""
    if attention.q_is_low_rank:
        return matrix(attention.kv_a_proj_with_mqa)
    projections: tuple[nn.Module, ...] = (attention.q_proj, attention.kv_a_proj_with_mqa)
    joined: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, _ in projections[0].named_parameters():
            own = [projection.get_parameter(name) for projection in projections]
            joined[name] = torch.cat([parameter.data for parameter in own])
            for parameter, part in zip(own, joined[name].split([len(parameter) for parameter in own]), strict=True):
                parameter.data = part
    return joined["weight"] if "weight" in joined else Packed(joined["codes"], joined["scales"], attention.q_proj.in_features)
