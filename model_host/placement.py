"""What of a model lies on which device, and at which precision: a plan made of bytes and bandwidths alone, explained in words.

Owns: the bytes of every group of tensors, how experts are divided over devices, what a plan leaves for context, how fast decoding can
be at best, and the nearest plan when there is none. Knows nothing of torch: devices are facts handed in, real or imagined.

Two ways to divide a model. Either one device computes everything but the routed experts and keeps the context, and the routed experts are
spread over it and others, every layer alike: several devices read one layer's experts at the same time. Or the layers are divided, each
with its part of the context: nothing is read at the same time, little is sent, and no device has to hold what every layer needs. In both,
experts may lie in the CPU's memory, where they are computed.

The heads of attention are not divided: what each token's heads read is found in docs/log.md beside what sending their parts would cost.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import ceil, comb
from typing import Literal

from model_host.catalogue import CATALOGUE, Entry, Precision
from model_host.config import ModelConfig, Portion
from model_host.errors import RequestError

GROUP_COLUMNS = 64
"""Columns of a row that share a scale in int4."""
SCALE_BYTES = 2
"""bfloat16: in int8 one a row, in int4 one a group of columns."""
PREFERRED = (Precision.BFLOAT16, Precision.INT8, Precision.INT4)
"""What "auto" tries, the best first."""
CHUNK_TOKENS = 2048
"""Of a prompt, in one step: what activations are counted for."""
RESERVED_BYTES = {"gpu": 700_000_000, "cpu": 1_000_000_000}
"""For libraries, kernels and captured graphs; in the host's own memory for Python and torch."""
HOP_S = 25e-6
"""From one device to another or back, launch and wait included."""
USUAL_CONTEXT_TOKENS = 16_384

Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    kind: Kind
    free_bytes: int
    bytes_per_s: float
    """At which its memory is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors of one kind, of all layers."""

    name: str
    bytes: int
    read_bytes: int
    """Of them, what one token is multiplied with; of routed experts that of the chosen ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What has to fit."""

    entry: Entry
    precision: Precision | None = None
    """None: the best that fits."""
    context_tokens: int = USUAL_CONTEXT_TOKENS
    batch: int = 1
    """Sequences of that context, decoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one device holds."""

    device: Device
    layers: range
    """Those of which all but the routed experts, and the context, are here. The first has the embeddings, the last the output."""
    experts: range
    """Routed experts: of those layers, or, on a device that has none, of all."""
    weight_bytes: int
    portion: Portion | None = None
    """Where several devices have every layer: what of each this one computes, as a rank of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    demand: Demand
    precision: Precision
    shares: tuple[Share, ...]
    cache_bytes: int
    """Left for context on the devices that keep it."""
    step_s: float
    """One decode step at best: bytes over bandwidth, and the hops between devices."""

    @property
    def weight_bytes(self) -> int:
        return sum(share.weight_bytes for share in self.shares)

    @property
    def cache_tokens(self) -> int:
        return self.cache_bytes // cached_bytes_per_token(self.demand.entry, self.precision)

    @property
    def tokens_per_s(self) -> float:
        return self.demand.batch / self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Impossible:
    """Why nothing fits, and what would."""

    demand: Demand
    needed_bytes: int
    """Of the weights, the context and the working memory, at the least precision that was allowed."""
    free_bytes: int
    nearest: tuple[tuple[str, Plan], ...]
    """What to change, a sentence's beginning, and the plan there is then."""


def matrix_bytes(rows: int, columns: int, precision: Precision) -> int:
    """Memory of a weight matrix; a row of int4 is padded to whole bytes."""
    if precision is Precision.INT8:
        return rows * (columns + SCALE_BYTES)
    if precision is Precision.INT4:
        return rows * (ceil(columns / 2) + ceil(columns / GROUP_COLUMNS) * SCALE_BYTES)
    return int(rows * columns * precision.bits / 8)


def groups(config: ModelConfig, precision: Precision) -> tuple[Group, ...]:
    """The bytes of every group of tensors. Where weights are quantized, the vocabulary, the routers, the norms and kv_b_proj (which
    attention over latents needs in parts) stay in bfloat16; where to int4, the projections of attention, which are few and see every
    token, to int8."""
    projections = Precision.INT8 if precision is Precision.INT4 else precision
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


def working_bytes(config: ModelConfig, context_tokens: int) -> int:
    """Of a prompt's chunk: keys and values written out for one layer's heads over the context, and what experts pass on."""
    per_context_token = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim) * 2
    chosen = (config.num_experts_per_tok or 0) * (3 * config.moe_intermediate_size + config.hidden_size)
    dense = 3 * config.intermediate_size if config.first_k_dense_replace else 0
    return context_tokens * per_context_token + min(CHUNK_TOKENS, context_tokens) * max(chosen, dense) * 2


def plan(demand: Demand, devices: Sequence[Device]) -> Plan | Impossible:
    """The best plan: the highest precision that GPUs alone hold, divided in the way and over as many as is fastest; where they do not, the
    highest that fits with the CPU's help."""
    found = _found(demand, devices)
    return found if found is not None else _impossible(demand, devices)


def _found(demand: Demand, devices: Sequence[Device]) -> Plan | None:
    gpus = sorted((device for device in devices if device.kind == "gpu"), key=lambda device: -device.free_bytes)
    cpus = [device for device in devices if device.kind == "cpu"]
    for helpers in ([], cpus):
        for precision in _allowed(demand):
            apart = (_experts_apart(demand, precision, [*gpus[:count], *helpers]) for count in range(1, len(gpus) + 1))
            layers = (_layers_apart(demand, precision, gpus[:count], helpers) for count in range(2, len(gpus) + 1))
            if found := [made for made in (*apart, *layers) if made is not None]:
                return min(found, key=lambda made: made.step_s)
    on_cpu = (_experts_apart(demand, precision, cpus) for precision in _allowed(demand) if cpus)
    return next((made for made in on_cpu if made is not None), None)


def _allowed(demand: Demand) -> tuple[Precision, ...]:
    return (demand.precision,) if demand.precision else PREFERRED


def _experts_apart(demand: Demand, precision: Precision, devices: Sequence[Device]) -> Plan | None:
    """The plan in which the first device computes all but the experts and all of them hold experts, or None."""
    config = demand.entry.shape
    first, experts = devices[0], config.n_routed_experts or 0
    rest = sum(group.bytes for group in groups(config, precision) if group.name != "routed experts")
    per_expert = _mixtures(config) * expert_bytes(config, precision)  # of all layers
    context = demand.batch * demand.context_tokens * cached_bytes_per_token(demand.entry, precision)
    room = [device.free_bytes - RESERVED_BYTES[device.kind] for device in devices]
    room[0] -= rest + context + working_bytes(config, demand.context_tokens)
    if room[0] < 0:
        return None
    most = [max(left, 0) // per_expert if per_expert else 0 for left in room]
    counts = _counts(config, devices, most)
    if counts is None:
        return None
    shares, start = [], 0
    for device, count in zip(devices, counts, strict=True):
        if count or device is first:
            size = count * per_expert + (rest if device is first else 0)
            held = range(start, start + count)
            layers = range(config.num_hidden_layers if device is first else 0)
            shares.append(Share(device=device, layers=layers, experts=held, weight_bytes=size))
            start += count
    assert start == experts
    return Plan(
        demand=demand,
        precision=precision,
        shares=tuple(shares),
        cache_bytes=context + room[0] - counts[0] * per_expert,
        step_s=_step_s(demand, precision, shares),
    )


def _layers_apart(demand: Demand, precision: Precision, gpus: Sequence[Device], helpers: Sequence[Device]) -> Plan | None:
    """The plan in which each GPU has some of the layers, so that all of them have room for the same number of tokens; with a helper,
    which takes the experts that do not fit. None where they do not."""
    config, per_token = demand.entry.shape, cached_bytes_per_token(demand.entry, precision)
    experts, one = config.n_routed_experts or 0, expert_bytes(config, precision)
    plain, (first, last) = _layer_bytes(config, precision), _end_bytes(config, precision)
    working = working_bytes(config, demand.context_tokens)

    def weights(layers: range, kept: int) -> int:
        routed = kept * one * sum(layer >= config.first_k_dense_replace for layer in layers)
        ends = (first if layers.start == 0 else 0) + (last if layers.stop == len(plain) else 0)
        return sum(plain[layers.start : layers.stop]) + routed + ends

    def cut(kept: int, tokens: int) -> list[range] | None:
        """As many layers on the first GPU as it holds, and so on."""
        found = [range(0)]
        for device in gpus:
            room = device.free_bytes - RESERVED_BYTES[device.kind] - working
            start = stop = found[-1].stop
            while stop < len(plain):
                more = range(start, stop + 1)
                if weights(more, kept) + len(more) * tokens * per_token // len(plain) > room:
                    break
                stop += 1
            found.append(range(start, stop))
        return found[1:] if found[-1].stop == len(plain) and all(found[1:]) else None

    wanted = demand.batch * demand.context_tokens
    kept = _largest(-1, experts, lambda count: cut(count, wanted) is not None) if helpers else experts
    overflow = (experts - kept) * _mixtures(config) * one
    if kept < 0 or cut(kept, wanted) is None or (overflow and overflow > helpers[0].free_bytes - RESERVED_BYTES["cpu"]):
        return None
    tokens = _largest(wanted, demand.batch * config.max_position_embeddings, lambda count: cut(kept, count) is not None)
    shares = [
        Share(device=device, layers=layers, experts=range(kept), weight_bytes=weights(layers, kept))
        for device, layers in zip(gpus, cut(kept, tokens) or (), strict=True)
    ]
    if overflow:
        shares.append(Share(device=helpers[0], layers=range(0), experts=range(kept, experts), weight_bytes=overflow))
    step_s = _step_s(demand, precision, shares)
    return Plan(demand=demand, precision=precision, shares=tuple(shares), cache_bytes=tokens * per_token, step_s=step_s)


def _largest(least: int, most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, where all below one that does do too; `least`, if none above it does."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least


def _layer_bytes(config: ModelConfig, precision: Precision) -> list[int]:
    """Weights of each layer without its routed experts."""
    found = {group.name: group.bytes for group in groups(config, precision)}
    layers, mixtures = config.num_hidden_layers, _mixtures(config)
    alike = (found["attention"] + found["latents to heads"]) // layers + _norm_bytes(config, precision)
    dense = found["dense layers"] // max(layers - mixtures, 1)
    mixture = (found["routers"] + found["shared experts"]) // max(mixtures, 1)
    return [alike + (dense if layer < layers - mixtures else mixture) for layer in range(layers)]


def _end_bytes(config: ModelConfig, precision: Precision) -> tuple[int, int]:
    """Weights before the first layer, and behind the last."""
    found = {group.name: group.bytes for group in groups(config, precision)}
    return found["embeddings"], found["output"] + found["norms"] - config.num_hidden_layers * _norm_bytes(config, precision)


def _norm_bytes(config: ModelConfig, precision: Precision) -> int:
    """Of one layer."""
    plain = precision if precision.bits >= 16 else Precision.BFLOAT16
    return matrix_bytes(1, 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0), plain)


def _mixtures(config: ModelConfig) -> int:
    """Layers with routed experts."""
    return max(config.num_hidden_layers - config.first_k_dense_replace, 0)


def _counts(config: ModelConfig, devices: Sequence[Device], most: Sequence[int]) -> list[int] | None:
    """How many experts each device holds, at most `most`: by bandwidth, and whole routing groups where the gate has groups and that
    goes up. The CPU takes only what GPUs have no room for. None when all of them together have too little."""
    experts = config.n_routed_experts or 0
    grouped = config.topk_method == "group_limited_greedy" and not any(device.kind == "cpu" for device in devices)
    sizes = [experts // (config.n_group or 1), 1] if grouped else [1]
    for size in sizes:
        counts, left = [0] * len(devices), experts
        while left:
            fitting = [i for i in range(len(devices)) if counts[i] + size <= most[i]]
            if not fitting:
                break
            best = min(fitting, key=lambda i: (devices[i].kind == "cpu", (counts[i] + size) / devices[i].bytes_per_s))
            counts[best] += size
            left -= size
        if not left:
            return counts
    return None


def _step_s(demand: Demand, precision: Precision, shares: Sequence[Share]) -> float:
    config, one = demand.entry.shape, expert_bytes(demand.entry.shape, precision)
    plain, (_, last) = _layer_bytes(config, precision), _end_bytes(config, precision)
    context = demand.batch * demand.context_tokens * cached_bytes_per_token(demand.entry, precision)
    bearing, elsewhere = [share for share in shares if share.layers], [share for share in shares if not share.layers]
    taken = (len(bearing) - 1) * HOP_S
    for share in bearing:
        read = sum(plain[share.layers.start : share.layers.stop]) + len(share.layers) * context / len(plain)
        read += last if share.layers.stop == len(plain) else 0
        taken += read / share.device.bytes_per_s
        together = (share, *elsewhere)
        if mixtures := sum(layer >= config.first_k_dense_replace for layer in share.layers):
            speeds = tuple(other.device.bytes_per_s / one for other in together)  # experts a second
            counts = tuple(len(other.experts) for other in together)
            taken += mixtures * (_slowest_s(config, counts, speeds, demand.batch) + (2 * HOP_S if elsewhere else 0.0))
    return taken


def _slowest_s(config: ModelConfig, counts: tuple[int, ...], speeds: tuple[float, ...], batch: int) -> float:
    """How long the slowest device is expected to read the experts that one layer chooses, when all are equally likely.

    For one sequence the expectation over all ways in which its experts can fall on the devices; for several, which level each other
    out, the expected number of experts touched on each device.
    """
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    if batch > 1:
        touched = 1 - (1 - chosen / experts) ** batch
        return max(count * touched / speed for count, speed in zip(counts, speeds, strict=True))
    if config.topk_method != "group_limited_greedy":
        return _expected_s(counts, speeds, chosen)
    size, kept = experts // (config.n_group or 1), config.topk_group or 1
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    expected = []
    for group_choice in combinations(range(config.n_group or 1), kept):
        open_here = tuple(
            sum(max(0, min(end, (group + 1) * size) - max(end - count, group * size)) for group in group_choice)
            for end, count in zip(ends, counts, strict=True)
        )
        expected.append(_expected_s(open_here, speeds, chosen))
    return sum(expected) / len(expected)


@cache
def _expected_s(counts: tuple[int, ...], speeds: tuple[float, ...], chosen: int) -> float:
    """Expected time of the slowest device when `chosen` of sum(counts) experts are drawn (multivariate hypergeometric)."""
    total = 0.0
    for loads in _loads(counts, chosen):
        ways = 1
        for count, load in zip(counts, loads, strict=True):
            ways *= comb(count, load)
        total += ways * max(load / speed for load, speed in zip(loads, speeds, strict=True))
    return total / comb(sum(counts), chosen)


def _loads(counts: tuple[int, ...], chosen: int) -> Iterator[tuple[int, ...]]:
    """Every way in which so many chosen experts can lie on the devices."""
    if len(counts) == 1:
        if chosen <= counts[0]:
            yield (chosen,)
        return
    for here in range(min(counts[0], chosen) + 1):
        for others in _loads(counts[1:], chosen - here):
            yield (here, *others)


def _impossible(demand: Demand, devices: Sequence[Device]) -> Impossible:
    config, least = demand.entry.shape, _allowed(demand)[-1]
    needed = sum(group.bytes for group in groups(config, least)) + working_bytes(config, demand.context_tokens)
    needed += demand.batch * demand.context_tokens * cached_bytes_per_token(demand.entry, least)
    nearest = [
        (words, found)
        for words, changes in [*_smaller(demand, devices), *_with_memory(demand, devices)]
        if (found := next((made for changed, there in changes if (made := _found(changed, there)) is not None), None)) is not None
    ]
    free = sum(device.free_bytes for device in devices)
    return Impossible(demand=demand, needed_bytes=needed, free_bytes=free, nearest=tuple(nearest))


Changed = Iterator[tuple[Demand, Sequence[Device]]]


def _smaller(demand: Demand, devices: Sequence[Device]) -> Iterator[tuple[str, Changed]]:
    """What asks for less, in words, and the demands that come of it, the least change first."""
    if demand.precision is not None:
        below = [precision for precision in PREFERRED if precision.bits < demand.precision.bits]
        yield "with fewer bits a weight", ((replace(demand, precision=precision), devices) for precision in below)
    halves = [demand.context_tokens >> n for n in range(demand.context_tokens.bit_length()) if demand.context_tokens >> n >= 1024]
    shorter = [replace(demand, precision=None, context_tokens=tokens, batch=1) for tokens in halves]
    yield "with a shorter context", ((changed, devices) for changed in shorter[1:])
    below_it = [entry for entry in CATALOGUE if entry.parameters < demand.entry.parameters]
    alike = [entry for entry in below_it if (entry.infilling, entry.chat) == (demand.entry.infilling, demand.entry.chat)]
    if below_it:
        entry = (alike or below_it)[0]
        yield "with a smaller model", ((replace(changed, entry=entry), devices) for changed in shorter)


def _with_memory(demand: Demand, devices: Sequence[Device]) -> Iterator[tuple[str, Changed]]:
    """The least of the usual amounts of RAM with which there would be a plan."""
    gpus = [device for device in devices if device.kind == "gpu"]
    have = max((device.free_bytes for device in devices if device.kind == "cpu"), default=0)
    for size in USUAL_RAM_GB:
        cpu = imagined_cpu(size)
        if cpu.free_bytes > have and _found(demand, [*gpus, cpu]) is not None:
            yield f"with {size} GB of RAM", iter([(demand, [*gpus, cpu])])
            return


GPU_SPEEDS = ((8, 270e9), (12, 500e9), (16, 640e9), (24, 1000e9), (32, 1790e9), (48, 860e9), (80, 2000e9), (96, 1790e9), (141, 4800e9))
"""Bytes a second that cards of so many GB read at, by their makers' data sheets; where several are common, the lower."""
CPU_BYTES_PER_S = 60e9
"""Two channels of DDR5. Servers have more."""
USUAL_RAM_GB = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SYSTEM_BYTES = 2_000_000_000
"""Of the RAM of an imagined machine, what others use."""
DEVICE = re.compile(r"(?:(\d+)\s*x\s*)?(cpu:)?\s*(\d+(?:\.\d+)?)\s*GB(?:@(\d+))?", re.IGNORECASE)


def imagined_gpu(name: str, gigabytes: float, bytes_per_s: float | None = None) -> Device:
    speed = bytes_per_s or min(GPU_SPEEDS, key=lambda known: abs(known[0] - gigabytes))[1]
    return Device(name=name, kind="gpu", free_bytes=int(gigabytes * 1e9), bytes_per_s=speed)


def imagined_cpu(gigabytes: float, bytes_per_s: float | None = None) -> Device:
    free = max(int(gigabytes * 1e9) - SYSTEM_BYTES, 0)
    return Device(name="cpu", kind="cpu", free_bytes=free, bytes_per_s=bytes_per_s or CPU_BYTES_PER_S)


def parse_devices(text: str) -> tuple[Device, ...]:
    """`2x24GB` is two cards, `24GB+cpu:64GB` one and 64 GB of RAM, `2x24GB@936` two that read 936 GB/s. Raises RequestError."""
    found: list[Device] = []
    for part in re.split(r"[+,]", text):
        match = DEVICE.fullmatch(part.strip())
        if match is None:
            raise RequestError(f"{part.strip()!r} describes no device: write 24GB, 2x24GB, 2x24GB+cpu:64GB, or 24GB@936 for 936 GB/s.")
        count, is_cpu, size, speed = match.groups()
        bytes_per_s = float(speed) * 1e9 if speed else None
        if is_cpu:
            if count or any(device.kind == "cpu" for device in found):
                raise RequestError(f"{text!r} names the CPU's memory more than once: write cpu:64GB once.")
            found.append(imagined_cpu(float(size), bytes_per_s))
            continue
        for _ in range(int(count or 1)):
            name = f"gpu {sum(device.kind == 'gpu' for device in found)}"
            found.append(imagined_gpu(name, float(size), bytes_per_s))
    return tuple(found)


def in_words(made: Plan | Impossible) -> list[str]:
    """Sentences for a user."""
    return list(_plan_in_words(made) if isinstance(made, Plan) else _impossible_in_words(made))


def _plan_in_words(made: Plan) -> Iterator[str]:
    demand, config = made.demand, made.demand.entry.shape
    experts = config.n_routed_experts or 0
    yield f"{demand.entry.name} fits as {made.precision}: {gigabytes(made.weight_bytes)} of weights."
    layers = config.num_hidden_layers
    for share in made.shares:
        parts = []
        if len(made.shares) == 1:
            parts = ["everything"]
        elif len(share.layers) == layers:
            parts = ["everything but the routed experts, and the context"]
        elif share.layers:
            parts = [f"layers {share.layers.start} to {share.layers.stop - 1} of {layers}, with their context"]
        if len(share.experts) < experts:
            where = "in each of them" if 0 < len(share.layers) < layers else "in every layer"
            parts += [f"routed experts {share.experts.start} to {share.experts.stop - 1} of {experts} {where}"] if share.experts else []
        yield f"{share.device.name} ({gigabytes(share.device.free_bytes)} free): {'; '.join(parts)}, {gigabytes(share.weight_bytes)}."
    if sum(bool(share.layers) for share in made.shares) > 1:
        yield "The layers run one after the other, so several GPUs give room for more, not speed."
    limit = min(made.cache_tokens, config.max_position_embeddings) if demand.batch == 1 else made.cache_tokens
    yield (
        f"Room for {made.cache_tokens:,} tokens of context ({gigabytes(made.cache_bytes)}), {demand.batch * demand.context_tokens:,} were"
        f" asked for{'' if limit == made.cache_tokens else f'; the model takes {limit:,} at most'}."
    )
    yield (
        f"Decoding at best: {1000 * made.step_s:.1f} ms a step of {demand.batch} at {demand.context_tokens:,} tokens of context, which is"
        f" {made.tokens_per_s:,.0f} tokens/s. It is what reading the weights takes; expect about half."
    )
    if any(share.device.kind == "cpu" for share in made.shares[1:]):
        yield "Experts that did not fit on a GPU are computed on the CPU, which is what takes the time."
    if made.precision.bits < 16:
        but = ", attention's to int8" if made.precision is Precision.INT4 else ""
        plain = "Vocabulary, routers, norms and kv_b_proj stay in bfloat16."
        yield f"The other weights are quantized to {made.precision}{but}, while they are loaded. {plain}"


def _impossible_in_words(made: Impossible) -> Iterator[str]:
    demand = made.demand
    kind = demand.precision or PREFERRED[-1]
    yield (
        f"{demand.entry.name} does not fit: as {kind} with {demand.batch * demand.context_tokens:,} tokens of context it needs"
        f" {gigabytes(made.needed_bytes)}, and {gigabytes(made.free_bytes)} are free."
    )
    for change, nearest in made.nearest:
        places = ", ".join(share.device.name for share in nearest.shares)
        yield (
            f"It would fit {change}: {nearest.demand.entry.name} as {nearest.precision} on {places}, with"
            f" {nearest.demand.context_tokens:,} tokens of context, {nearest.tokens_per_s:,.0f} tokens/s at best."
        )
    if not made.nearest:
        yield "Nothing near it fits either: use the embedded 'starter', or an engine on another machine (docs/scaling.md)."
    else:
        yield "Or use an engine on another machine: docs/scaling.md."


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 50e6 else f"{size / 1e6:,.1f} MB"
