"""The same weights in transformers' model."""

import time
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import wait
from benchmarks.gpu.shapes import Sequences, plain_path
from model_host.pages import PAGE_TOKENS


def transformers_model(bench: Bench) -> Any:
    """transformers' own model over the very same tensors."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # noqa: PLC0415

    assert bench.model
    shape = {key: value for key, value in bench.shape.items() if key not in ("rope_scaling", "rope_theta", "model_type")}
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0} | {k: v for k, v in bench.shape["rope_scaling"].items() if k != "type"}
    config = DeepseekV2Config(**shape, rope_parameters=rope)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        peer: Any = DeepseekV2ForCausalLM(config)
        peer = peer.to(bench.dtype)
    tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in bench.model.state_dict().items()}
    missing = peer.load_state_dict(tensors, strict=False, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(bench.device)
    bench.sections["transformers"]["missing tensors"] = str(missing)
    return peer.eval()


def transformers(bench: Bench) -> None:
    import transformers as library  # noqa: PLC0415

    assert bench.model and bench.latents
    found, device, config = bench.sections["transformers"], bench.device, bench.config
    found["version"] = library.__version__
    peer = transformers_model(bench)
    ids = torch.randint(0, config.vocab_size, (1, 40), device=device, generator=torch.Generator(device).manual_seed(1))
    sequences = Sequences(1, 0, 40, len(bench.latents.c_kv[0]) // PAGE_TOKENS, config.vocab_size)
    ours, theirs = plain_path(bench.model, bench.latents)(sequences.step(ids[0].tolist())), peer(ids).logits[:, -1].float()
    found["our logits off theirs"] = float((ours - theirs).abs().max() / theirs.std())
    prompts, steps = [], []
    for context in bench.contexts:
        if bench.left_s < 45 and not bench.is_tiny:
            found["cut short"] = context
            break
        prompt = torch.randint(0, config.vocab_size, (1, context), device=device)
        cache = library.DynamicCache(config=peer.config)
        for _ in range(2 if context < 32_768 else 1):
            cache = library.DynamicCache(config=peer.config)
            wait(device)
            began = time.perf_counter()
            token = peer(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            took = time.perf_counter() - began
        prompts.append({"tokens": context, "ms": took * 1e3, "tokens/s": context / took})
        found["prefill"] = prompts
        for experts in ("grouped_mm", "batched_mm"):
            row: dict[str, Any] = {"context": context, "experts": experts}
            try:
                peer.set_experts_implementation(experts)
                times = []
                for _ in range(10):
                    began = time.perf_counter()
                    token = peer(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                    token.tolist()
                    times.append(time.perf_counter() - began)
                took = sorted(times[3:])[3]
                row |= {"ms a step": took * 1e3, "tokens/s": 1 / took}
                name = f"transformers_decode_1x{context}_tokens_s"
                bench.metrics[name] = max(bench.metrics.get(name, 0.0), 1 / took)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            steps.append(row)
            found["decode"] = steps
        with suppress(Exception):
            peer.set_experts_implementation("grouped_mm")
