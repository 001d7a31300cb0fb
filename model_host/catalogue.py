"""The released DeepSeek-V2 checkpoints: what each is good for, and what its files do not tell, such as whether it learned to infill.

Owns: `CATALOGUE`, and recognising one of its entries in a folder. A checkpoint that is not in it is described from its
config.json alone. Sizes follow from the shapes; shapes are held against config.json, so that a folder's name alone decides nothing.
Knows nothing of tensors or devices.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from model_host.config import ModelConfig, Yarn
from model_host.errors import CheckpointError

ORGANISATION = "deepseek-ai"


class Infilling(StrEnum):
    """Whether a checkpoint was trained to fill in the middle. That its tokenizer has the tokens says nothing: all of them do."""

    TRAINED = "trained"
    DOUBTFUL = "doubtful"
    UNTRAINED = "untrained"
    UNKNOWN = "unknown"


class Precision(StrEnum):
    """How weights are held in memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"

    @property
    def bits(self) -> float:
        """Per weight; 64 of four bits share a scale of 16 bits, in NF4 of 32."""
        return {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.0, "int4": 4.0 + 16 / 64, "nf4": 4.0 + 32 / 64}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    name: str
    url: str


CODE_LICENCE = "MIT"
"""Of the code that DeepSeek published beside the weights; none of it is used here."""
GENERAL = Licence(name="DeepSeek Model License", url="https://github.com/deepseek-ai/DeepSeek-V2/blob/main/LICENSE-MODEL")
CODER = Licence(name="DeepSeek Model License", url="https://github.com/deepseek-ai/DeepSeek-Coder-V2/blob/main/LICENSE-MODEL")

LITE = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=102_400,
    hidden_size=2048,
    intermediate_size=10_944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    yarn=Yarn(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163_840,
    bos_token_id=100_000,
    eos_token_id=100_001,
)
"""The 16B (arXiv 2405.04434, appendix B)."""
LARGE = LITE.model_copy(
    update={
        "hidden_size": 5120,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "yarn": Yarn(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    }
)
"""The 236B (section 3.1.2). Its releases differ in mscale, 0.707 or 1.0: what is computed with is always read from the file."""

IDENTIFYING = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "first_k_dense_replace",
)  # fmt: skip
"""Fields that say which of the two shapes a config.json describes. Rope settings do not: the releases spell them differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One checkpoint, released or (with what only its makers know left open) not."""

    name: str
    """The hub's name, ORGANISATION/MODEL; for a checkpoint outside the catalogue its folder's."""
    shape: ModelConfig
    context_tokens: int
    """The longest context its makers say it is good for."""
    infilling: Infilling = Infilling.UNKNOWN
    chat: bool | None = None
    """Trained on conversations, with the chat template that its tokenizer_config.json holds."""
    licence: Licence | None = None
    good_for: str = ""
    """A sentence without its full stop."""

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    @property
    def active_parameters(self) -> int:
        return self.shape.active_parameters

    def weight_bytes(self, precision: Precision) -> int:
        """Memory of the weights. When they are quantized, embeddings, router and norms stay in bfloat16."""
        if precision.bits >= 16:
            return int(self.parameters * precision.bits / 8)
        kept = self.shape.rounded_parameters
        return int(kept * 2 + (self.parameters - kept) * precision.bits / 8)

    def kv_bytes_per_token(self, precision: Precision = Precision.BFLOAT16) -> int:
        """Memory of one token of context: a latent and a rotated key in every layer."""
        return int(self.shape.num_hidden_layers * self.shape.latent_dim * precision.bits / 8)

    def bytes_with(self, context_tokens: int, precision: Precision) -> int:
        """Memory of the weights and of so many tokens of context; the context is never held in less than 16 bits."""
        held = precision if precision is Precision.FLOAT32 else Precision.BFLOAT16
        return self.weight_bytes(precision) + context_tokens * self.kv_bytes_per_token(held)


def _entry(model: str, shape: ModelConfig, infilling: Infilling, *, chat: bool, good_for: str, context_tokens: int = 131_072) -> Entry:
    licence = CODER if "Coder" in model else GENERAL
    name = f"{ORGANISATION}/DeepSeek-{model}"
    return Entry(name=name, shape=shape, context_tokens=context_tokens, infilling=infilling, chat=chat, licence=licence, good_for=good_for)


CATALOGUE: tuple[Entry, ...] = (
    # Coder-V2: arXiv 2406.11931, table 2 (infilling: 16B only), and issue 27 of deepseek-ai/DeepSeek-Coder-V2 (Lite-Instruct)
    _entry("Coder-V2-Lite-Base", LITE, Infilling.TRAINED, chat=False, good_for="completing code while one types; the one to start with"),
    _entry("Coder-V2-Lite-Instruct", LITE, Infilling.DOUBTFUL, chat=True, good_for="questions about code, on one GPU"),
    _entry("Coder-V2-Base", LARGE, Infilling.UNTRAINED, chat=False, good_for="continuing code without a suffix, and fine-tuning"),
    _entry("Coder-V2-Instruct", LARGE, Infilling.UNTRAINED, chat=True, good_for="the hardest questions about code"),
    # the card of V2.5 gives 0724 a score for infilling (DS-FIM-Eval 73.2) beside its own (78.3)
    _entry("Coder-V2-Instruct-0724", LARGE, Infilling.TRAINED, chat=True, good_for="as Coder-V2-Instruct, later and better; infills too"),
    _entry(
        "V2.5", LARGE, Infilling.TRAINED, chat=True, good_for="completing and discussing code in one model, where there is room for 236B"
    ),
    _entry("V2.5-1210", LARGE, Infilling.TRAINED, chat=True, good_for="as V2.5, its last and best revision"),
    # V2: arXiv 2405.04434
    _entry("V2-Lite", LITE, Infilling.UNTRAINED, chat=False, good_for="text in general, and research", context_tokens=32_768),
    _entry("V2-Lite-Chat", LITE, Infilling.UNTRAINED, chat=True, good_for="general questions, on one GPU", context_tokens=32_768),
    _entry("V2", LARGE, Infilling.UNTRAINED, chat=False, good_for="text in general, and research"),
    _entry("V2-Chat", LARGE, Infilling.UNTRAINED, chat=True, good_for="general questions"),
    _entry("V2-Chat-0628", LARGE, Infilling.UNTRAINED, chat=True, good_for="as V2-Chat, later and better"),
)
RECOMMENDED = CATALOGUE[0]


def named(name: str) -> Entry | None:
    """The entry that `name` means: the hub's, or that without the organisation or "DeepSeek-", in any case."""
    short = name.lower().removeprefix(f"{ORGANISATION}/").removeprefix("deepseek-")
    return next((entry for entry in CATALOGUE if entry.name.lower() == f"{ORGANISATION}/deepseek-{short}"), None)


def find(folder: Path, config: ModelConfig) -> Entry | None:
    """The entry that `folder` holds: one of its names (below) is the entry's, and config.json has the entry's shape.

    Base and tuned versions have equal shapes, so a folder with a name of its own is not recognised: see `of_shape`.
    """
    names = names_of(folder)
    return next((entry for entry in of_shape(config) if entry.name.partition("/")[2].lower() in names), None)


def of_shape(config: ModelConfig) -> list[Entry]:
    """Every entry that could have this config.json: several, or none."""
    return [entry for entry in CATALOGUE if all(getattr(config, field) == getattr(entry.shape, field) for field in IDENTIFYING)]


def names_of(folder: Path) -> set[str]:
    """What a folder says it holds, in small letters, without the organisation: in the hub's cache
    (models--ORGANISATION--MODEL/snapshots/REVISION) the model's name, elsewhere the folder's own; links are followed as well."""
    names = set()
    for place in (folder, folder.resolve()):
        in_cache = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
        name = place.parent.parent.name.rpartition("--")[2] if in_cache else place.name
        names.add(name.lower().removeprefix(ORGANISATION).lstrip("_-"))
    return names


def described(folder: Path, config: ModelConfig) -> Entry:
    """The catalogue's entry for `folder`, or one that says what config.json says."""
    own = Entry(name=folder.name, shape=config, context_tokens=config.max_position_embeddings)
    return find(folder, config) or own


def recognised(folder: Path) -> Entry | None:
    """As `find`, for a folder whose config.json was not read yet, or cannot be."""
    try:
        return find(folder, ModelConfig.read(folder))
    except CheckpointError:
        return None


def without_infilling(folder: Path) -> str:
    """Why the checkpoint in `folder` cannot complete code between other code, and which one to choose."""
    entry = recognised(folder)
    if entry is not None and entry.infilling is Infilling.UNTRAINED:
        why = f"{entry.name} was not trained to fill in the middle (its tokenizer has the tokens, but they mean nothing to it)"
    else:
        why = f"The checkpoint {folder} has no fill-in-the-middle tokens"
    return f"{why}, so it cannot complete code between other code: choose {RECOMMENDED.name}, or the embedded 'starter'."


def without_conversation(folder: Path) -> str:
    """Why the checkpoint in `folder` does not converse, and what is done instead."""
    entry = recognised(folder)
    name = entry.name if entry is not None else f"The checkpoint {folder}"
    return (
        f"{name} never learned to converse, so actions are asked by example and their answers are worse: choose one whose name ends in"
        " Instruct or Chat for them."
    )
