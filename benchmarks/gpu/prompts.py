"""Many tokens at once: prompts held against the operations they take, and the forms that attention over them can have."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import seconds
from benchmarks.gpu.decoding import token_bytes
from benchmarks.gpu.shapes import Sequences, plain_path
from model_host.batch import Step
from model_host.config import ModelConfig
from model_host.latents import Layout
from model_host.pages import PAGE_TOKENS


def prompt_operations(config: ModelConfig, tokens: int) -> float:
    """Floating point operations of a prompt: two for each active weight and token, and causal attention over expanded keys."""
    weights = token_bytes(config, 1, 0, 1) - config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * tokens**2
    return 2 * weights * tokens + attention


def prefill(bench: Bench) -> None:
    assert bench.model and bench.latents
    found, rows_found = bench.sections["prefill"], []
    forward, rate = plain_path(bench.model, bench.latents), bench.metrics.get("matmul_tflop_s", math.nan) * 1e12
    pages = len(bench.latents.c_kv[0]) // PAGE_TOKENS
    longest = bench.prompts[-1]
    plan: list[tuple[int, int, SDPBackend | None]] = [(tokens, tokens, None) for tokens in bench.prompts]
    plan += [(longest, longest // 4, None), (longest, longest // 16, None)]
    if bench.device.type == "cuda":
        plan += [(longest, longest, SDPBackend.CUDNN_ATTENTION), (longest, longest, SDPBackend.EFFICIENT_ATTENTION)]
    for tokens, chunk, backend in plan:
        ids = torch.randint(0, bench.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()

        def work(ids: list[int] = ids, chunk: int = chunk) -> object:
            sequences = Sequences(1, 0, len(ids), pages, bench.config.vocab_size)
            return [forward(sequences.step(ids[at : at + chunk])) for at in range(0, len(ids), chunk)][-1].argmax().item()

        row: dict[str, Any] = {"tokens": tokens, "chunk": chunk, "attention": str(backend)}
        rows_found.append(row)
        found["prompts"] = rows_found
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                took = seconds(bench.device, work, 3 if tokens < longest else 1)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        operations = prompt_operations(bench.config, tokens)
        row |= {"ms": took * 1e3, "tokens/s": tokens / took, "TFLOP/s": operations / took / 1e12}
        row |= {"floor ms": operations / rate * 1e3, "share of ceiling": operations / rate / took}
        if chunk == tokens and backend is None:
            bench.metrics[f"prefill_{tokens}_tokens_s"] = tokens / took
            bench.metrics[f"prefill_{tokens}_share_of_ceiling"] = operations / rate / took


def prompt_attention(bench: Bench) -> None:
    """Which of torch's attention forms is the fastest for keys of 192 and values of 128 numbers a head."""
    found, rows_found, config, device = bench.sections["attention of a prompt"], [], bench.config, bench.device
    for tokens, context in [(n, n) for n in bench.prompts[1:]] + [(bench.prompts[0], bench.prompts[-1])]:
        q = torch.randn(1, config.num_attention_heads, tokens, config.qk_head_dim, dtype=bench.dtype, device=device)
        k = torch.randn(1, config.num_attention_heads, context, config.qk_head_dim, dtype=bench.dtype, device=device)
        v = torch.randn(1, config.num_attention_heads, context, config.v_head_dim, dtype=bench.dtype, device=device)
        widened = F.pad(v, (0, config.qk_head_dim - config.v_head_dim))
        mask = torch.ones(tokens, context, dtype=torch.bool, device=device).tril(context - tokens)
        whole = tokens == context
        flops = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (2 * context - tokens) * tokens
        for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            for label, values, causal in (("values 128", v, None), ("values 192", widened, None), ("mask", v, mask)):
                row: dict[str, Any] = {"tokens": tokens, "context": context, "backend": str(backend), "form": label}
                attend = partial(attention_of, backend, q, k, values, mask if not whole else causal)
                try:
                    row["ms"] = (took := seconds(device, attend, 3)) * 1e3
                    row["TFLOP/s"] = flops / took / 1e12
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
                rows_found.append(row)
                found["forms"] = rows_found
        row = {"tokens": tokens, "context": context, "backend": "causal_lower_right", "form": "values 192"}
        try:
            row["ms"] = seconds(device, partial(lower_right_attention, q, k, widened), 3) * 1e3
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
        rows_found.append(row)


def attention_of(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def lower_right_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))


def short_spans(bench: Bench) -> None:
    """How long a span is worth attending over latents: one step of a few hundred new tokens on a long context, in both forms."""
    assert bench.model and bench.latents
    found, rows_found = bench.sections["short spans, plain torch"], []
    pages = len(bench.latents.c_kv[0]) // PAGE_TOKENS
    for context in bench.contexts[1:]:
        for tokens in (32, 64, 128, 256):
            row: dict[str, Any] = {"context": context, "tokens": tokens}
            for form, limit in (("over latents ms", tokens), ("expanded ms", 0)):
                sequences = Sequences(1, context, tokens, pages, bench.config.vocab_size)
                step = sequences.step(range(tokens)) if bench.config.vocab_size >= tokens else sequences.step([5] * tokens)

                def work(step: Step = step, limit: int = limit) -> object:
                    assert bench.model and bench.latents
                    return bench.model(Layout.of(step, bench.device, limit), bench.latents)

                row[form] = seconds(bench.device, work, 3) * 1e3
            rows_found.append(row)
            found["steps"] = rows_found
