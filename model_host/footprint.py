"""The bytes of a model: of every group of its tensors at each precision, of its context, and of what a step works with.

Owns: what stays in 16 bits where the rest is packed. Pure arithmetic, no torch.
"""

from dataclasses import dataclass
from math import ceil

from model_host.catalogue import Entry, Precision
from model_host.config import ModelConfig

GROUP_COLUMNS = 64
"""Columns of a row that share a scale in int4."""
FOUR_BITS = (Precision.INT4, Precision.NF4)
SCALE_BYTES = 2
"""bfloat16: in int8 one a row, in int4 one a group of columns."""
CHUNK_TOKENS = 4096
"""The most of a prompt in one step: what activations are counted for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors of one kind, of all layers."""

    name: str
    bytes: int
    read_bytes: int
    """Of them, what one token is multiplied with; of routed experts that of the chosen ones."""


def matrix_bytes(rows: int, columns: int, precision: Precision) -> int:
    """Memory of a weight matrix; a row of int4 is padded to whole bytes."""
    if precision is Precision.INT8:
        return rows * (columns + SCALE_BYTES)
    if precision is Precision.INT4:
        return rows * (ceil(columns / 2) + ceil(columns / GROUP_COLUMNS) * SCALE_BYTES)
    return int(rows * columns * precision.bits / 8)


def groups(config: ModelConfig, precision: Precision) -> tuple[Group, ...]:
    """The bytes of every group of tensors. Where weights are quantized, the vocabulary, the routers, the norms and kv_b_proj (which
    attention over latents needs in parts) stay in bfloat16; where to four bits, the projections of attention, which are few and see every
    token, to int8."""
    projections = Precision.INT8 if precision in FOUR_BITS else precision
    plain = precision if precision.bits >= 16 else Precision.BFLOAT16
    d, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    mixtures = max(layers - config.first_k_dense_replace, 0)
    vocabulary = matrix_bytes(config.vocab_size, d, plain)
    q_dim = heads * config.qk_head_dim
    attention = matrix_bytes(config.latent_dim, d, projections) + matrix_bytes(d, heads * config.v_head_dim, projections)
    if config.q_lora_rank is None:
        attention += matrix_bytes(q_dim, d, projections)
    else:
        attention += matrix_bytes(config.q_lora_rank, d, projections) + matrix_bytes(q_dim, config.q_lora_rank, projections)
    latent = matrix_bytes(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, plain)
    norms = layers * (2 * d + config.kv_lora_rank + (config.q_lora_rank or 0)) + d
    shared_inner = (config.n_shared_experts or 0) * config.moe_intermediate_size
    routed = mixtures * expert_bytes(config, precision)

    def always(name: str, size: int) -> Group:
        return Group(name=name, bytes=size, read_bytes=size)

    return (
        Group(name="embeddings", bytes=0 if config.tie_word_embeddings else vocabulary, read_bytes=0),
        always("output", vocabulary),
        always("attention", layers * attention),
        always("latents to heads", layers * latent),
        always("norms", matrix_bytes(1, norms, plain)),
        always("routers", mixtures * matrix_bytes(config.n_routed_experts or 0, d, plain)),
        always("dense layers", (layers - mixtures) * mlp_bytes(d, config.intermediate_size, precision)),
        always("shared experts", mixtures * mlp_bytes(d, shared_inner, precision)),
        Group(
            name="routed experts",
            bytes=routed * (config.n_routed_experts or 0),
            read_bytes=routed * (config.num_experts_per_tok or 0),
        ),
    )


def mlp_bytes(hidden: int, inner: int, precision: Precision) -> int:
    """Gate, up and down projection."""
    return 2 * matrix_bytes(inner, hidden, precision) + matrix_bytes(hidden, inner, precision) if inner else 0


def expert_bytes(config: ModelConfig, precision: Precision) -> int:
    """One routed expert of one layer."""
    return mlp_bytes(config.hidden_size, config.moe_intermediate_size, precision)


def cached_bytes_per_token(entry: Entry, precision: Precision) -> int:
    """The context is never held in less than 16 bits."""
    return entry.kv_bytes_per_token(Precision.FLOAT32 if precision is Precision.FLOAT32 else Precision.BFLOAT16)


def working_bytes(config: ModelConfig, precision: Precision, context_tokens: int) -> int:
    """Of a prompt's chunk: keys and values written out for one layer's heads over the context, and what experts pass on: gate, up and
    their product, and what comes of each choice, at last in float32."""
    number = 4 if precision is Precision.FLOAT32 else 2
    per_context_token = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim)
    chosen = (config.num_experts_per_tok or 0) * (3 * config.moe_intermediate_size + 3 * config.hidden_size)
    dense = 3 * config.intermediate_size if config.first_k_dense_replace else 0
    return number * (context_tokens * per_context_token + min(CHUNK_TOKENS, context_tokens) * max(chosen, dense))


def compiled_bytes(config: ModelConfig, precision: Precision) -> int:
    """What compiled kernels hold besides the groups of a whole model on a CPU: the keys' part of kv_b_proj once more, turned, and
    routers in float32."""
    keys = config.num_hidden_layers * config.num_attention_heads * config.qk_nope_head_dim * config.kv_lora_rank
    routers = mixtures(config) * (config.n_routed_experts or 0) * config.hidden_size
    return 4 * keys if precision is Precision.FLOAT32 else 2 * keys + 2 * routers


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """Weights of one layer without its routed experts."""

    attention: int
    """With the layer's norms."""
    mixture: int
    """Router and shared experts, or the one MLP of a layer without experts."""

    @property
    def all(self) -> int:
        return self.attention + self.mixture


def layer_bytes(config: ModelConfig, precision: Precision) -> list[LayerBytes]:
    """Of each layer."""
    found = {group.name: group.bytes for group in groups(config, precision)}
    layers, mixed = config.num_hidden_layers, mixtures(config)
    attention = (found["attention"] + found["latents to heads"]) // layers + _norm_bytes(config, precision)
    dense = found["dense layers"] // max(layers - mixed, 1)
    mixture = (found["routers"] + found["shared experts"]) // max(mixed, 1)
    return [LayerBytes(attention=attention, mixture=dense if layer < layers - mixed else mixture) for layer in range(layers)]


def end_bytes(config: ModelConfig, precision: Precision) -> tuple[int, int]:
    """Weights before the first layer, and behind the last, for devices of their own: embeddings that are the output too are on both."""
    found = {group.name: group.bytes for group in groups(config, precision)}
    return found["output"], found["output"] + found["norms"] - config.num_hidden_layers * _norm_bytes(config, precision)


def _norm_bytes(config: ModelConfig, precision: Precision) -> int:
    """Of one layer."""
    plain = precision if precision.bits >= 16 else Precision.BFLOAT16
    return matrix_bytes(1, 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0), plain)


def mixtures(config: ModelConfig) -> int:
    """Layers with routed experts."""
    return max(config.num_hidden_layers - config.first_k_dense_replace, 0)
