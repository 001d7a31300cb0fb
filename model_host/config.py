"""What `config.json` of a DeepSeek-V2 checkpoint says, typed and checked, and what follows from it alone: how many parameters.

Reads the hub's files (`rope_scaling`, `auto_map`) and those transformers 5 writes (`rope_parameters`) alike. What the model
code does not support is refused by name instead of being computed wrongly. Nothing of tensors or devices.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_host.errors import CheckpointError


class Yarn(BaseModel):
    """YaRN context extension (arXiv 2309.00071), as DeepSeek-V2 uses it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, weight: float) -> float:
        """Attention temperature: 0.1 * weight * ln(factor) + 1 (YaRN, section 3.4)."""
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What of every layer one of several ranks computes, beside its routed experts."""

    heads: range
    inner: range
    """Of the inner dimension of the layers without experts."""
    shared: range
    """Of the experts that see every token."""


class ModelConfig(BaseModel):
    """The numbers of one checkpoint; field names are those of `config.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["deepseek_v2"]
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    first_k_dense_replace: int = 0
    moe_layer_freq: Literal[1] = 1
    q_lora_rank: int | None = None
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2)
    v_head_dim: int = Field(gt=0)
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: Literal[False] = False
    scoring_func: Literal["softmax"] = "softmax"
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    max_position_embeddings: int = Field(gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int
    eos_token_id: int | list[int]

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Brings the two spellings of the rope settings, and the hub's "gready" typo, to one."""
        config = dict(raw)
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        if rope:
            kind = rope.get("rope_type", rope.get("type", "default"))
            config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
            if kind == "yarn":
                config["yarn"] = rope
            elif kind != "default":
                raise ValueError(f"rope scaling of type {kind!r} is not supported, only yarn")
        if config.get("topk_method") in (None, "gready"):
            config["topk_method"] = "greedy"
        return config

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.first_k_dense_replace < self.num_hidden_layers and not (self.n_routed_experts and self.num_experts_per_tok):
            raise ValueError("n_routed_experts and num_experts_per_tok are needed for the layers with experts")
        if self.topk_method == "group_limited_greedy" and not (self.n_group and self.topk_group):
            raise ValueError("group_limited_greedy needs n_group and topk_group")
        experts, per_token = self.n_routed_experts or 0, self.num_experts_per_tok or 0
        groups, chosen = (self.n_group or 1, self.topk_group or 1) if self.topk_method == "group_limited_greedy" else (1, 1)
        if experts % groups or chosen > groups:
            raise ValueError(f"{experts} experts cannot be routed to {chosen} of {groups} groups")
        if per_token > experts // groups * chosen:
            raise ValueError(
                f"num_experts_per_tok is {per_token}, but a token has only {experts // groups * chosen} experts to choose from"
            )
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The configuration of the checkpoint in `folder`. Raises CheckpointError, naming the field, when it cannot be used."""
        file = folder / "config.json"
        try:
            raw = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no config.json: give the folder of a DeepSeek-V2 checkpoint.") from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as JSON ({error}): download the checkpoint again.") from error
        found = raw.get("model_type") if isinstance(raw, dict) else None
        if found != "deepseek_v2":
            raise CheckpointError(f"{folder} holds a model of type {found!r}, not 'deepseek_v2': choose a DeepSeek-V2 checkpoint.")
        if quantization := raw.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(
                f"{folder} holds quantized weights ({method!r} by quantization_config), which cannot be read: choose the checkpoint"
                " it was made from, in bfloat16, float16 or float32."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"{file} describes a model that is not supported ({what}).") from error

    def of(self, layers: range) -> Self:
        """What describes a model of some of the layers alone, counted from 0."""
        dense = min(max(self.first_k_dense_replace - layers.start, 0), len(layers))
        return self.model_copy(update={"num_hidden_layers": len(layers), "first_k_dense_replace": dense})

    def portion(self, portion: Portion) -> Self:
        """What describes a model of a portion of every layer. The gate still chooses among all experts."""
        numbers = {"num_attention_heads": portion.heads, "intermediate_size": portion.inner, "n_shared_experts": portion.shared}
        return self.model_copy(update={name: len(part) for name, part in numbers.items()})

    def cut(self, name: str, portion: Portion) -> tuple[slice, slice]:
        """The rows and columns that a portion has of the matrix called so in a checkpoint."""
        *_, stem, kind = ("", *name.removesuffix(".weight").split("."))
        per_head = {
            "q_proj": self.qk_head_dim,
            "q_b_proj": self.qk_head_dim,
            "kv_b_proj": self.qk_nope_head_dim + self.v_head_dim,
            "o_proj": self.v_head_dim,
        }
        part, size = range(0), 0
        if stem == "self_attn":
            part, size = portion.heads, per_head.get(kind, 0)
        elif stem == "shared_experts":
            part, size = portion.shared, self.moe_intermediate_size
        elif stem == "mlp" and kind != "gate":
            part, size = portion.inner, 1
        everything, own = slice(None), slice(part.start * size, part.stop * size)
        if not size:
            return everything, everything
        return (everything, own) if kind in ("o_proj", "down_proj") else (own, everything)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        return self._count(self.n_routed_experts or 0) + (0 if self.tie_word_embeddings else self._embedding)

    @property
    def active_parameters(self) -> int:
        """Numbers one token is multiplied with: only its own experts, and of the two vocabulary matrices only the output's."""
        return self._count(self.num_experts_per_tok or 0)

    @property
    def rounded_parameters(self) -> int:
        """Those that stay in 16 bits when the others are quantized: embeddings, router and norms, as few as they are dear."""
        routers = self._mixture_layers * (self.n_routed_experts or 0) * self.hidden_size
        return (1 if self.tie_word_embeddings else 2) * self._embedding + routers + self._norms

    @property
    def _embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def _mixture_layers(self) -> int:
        return max(self.num_hidden_layers - self.first_k_dense_replace, 0)

    @property
    def _norms(self) -> int:
        per_layer = 2 * self.hidden_size + self.kv_lora_rank + (self.q_lora_rank or 0)
        return self.num_hidden_layers * per_layer + self.hidden_size

    def _count(self, experts: int) -> int:
        """Parameters with `experts` routed experts a layer and one vocabulary matrix (DeepSeek-V2, sections 2.1 and 2.2)."""
        d, heads = self.hidden_size, self.num_attention_heads
        q_dim = heads * self.qk_head_dim
        query = d * q_dim if self.q_lora_rank is None else (d + q_dim) * self.q_lora_rank
        latent = d * self.latent_dim + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention = query + latent + heads * self.v_head_dim * d
        dense_layers = self.num_hidden_layers - self._mixture_layers
        router = d * (self.n_routed_experts or 0)
        mixture = router + 3 * d * self.moe_intermediate_size * (experts + (self.n_shared_experts or 0))
        layers = self.num_hidden_layers * attention + dense_layers * 3 * d * self.intermediate_size + self._mixture_layers * mixture
        return self._embedding + layers + self._norms

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's squared temperature where the file asks for it (hub modeling code, `mscale_all_dim`)."""
        scale = float(self.qk_head_dim**-0.5)
        if self.yarn and self.yarn.mscale_all_dim:
            scale *= self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2
        return scale

    @property
    def rope_magnitude(self) -> float:
        """Factor on cos and sin: the ratio of YaRN's two temperatures, 1.0 in every released checkpoint."""
        if not self.yarn:
            return 1.0
        if self.yarn.mscale and self.yarn.mscale_all_dim:
            return self.yarn.magnitude(self.yarn.mscale) / self.yarn.magnitude(self.yarn.mscale_all_dim)
        return self.yarn.magnitude(1.0)
