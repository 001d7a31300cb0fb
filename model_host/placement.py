"""What of a model lies on which device, and at which precision: a plan made of bytes and bandwidths alone, explained in words.

Owns: how a model is divided over devices, what a plan leaves for context, and the nearest plan when there is none. Knows nothing of torch:
devices are facts handed in, real or imagined.

Two ways to divide a model over GPUs. Either each is a rank, which has a portion of every layer (some heads, some experts) and a copy of
the context: all of them read at the same time, and wait for each other twice a layer. Or the layers are divided, each with its part of
the context: nothing is read at the same time, little is sent, and no device has to hold what every layer needs. In both, experts may lie
in the CPU's memory, where they are computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from model_host.catalogue import CATALOGUE, Entry, Precision
from model_host.config import ModelConfig, Portion
from model_host.devices import USUAL_RAM_GB, Device, Share, imagined_cpu
from model_host.footprint import (
    FOUR_BITS,
    GROUP_COLUMNS,
    cached_bytes_per_token,
    compiled_bytes,
    end_bytes,
    expert_bytes,
    groups,
    layer_bytes,
    mixtures,
    working_bytes,
)
from model_host.pace import step_s

RESERVED_BYTES = {"gpu": 1_200_000_000, "cpu": 1_000_000_000}
"""For libraries, kernels, captured graphs and what the allocator holds in reserve; in the host's own memory for Python and torch."""
PREFERRED = (Precision.BFLOAT16, Precision.INT8, Precision.INT4)
"""What "auto" tries, the best first."""
USUAL_CONTEXT_TOKENS = 16_384
LEAST_CONTEXT_TOKENS = 1024
"""A shorter one is offered to nobody."""
WORTH = 0.8
"""Further GPUs, and processes that wait for each other, are taken where they leave no more than this of a step's time."""


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


def plan(demand: Demand, devices: Sequence[Device]) -> Plan | Impossible:
    """The best plan: the highest precision that GPUs alone hold, over as few of them as hold it or as many as are worth it; where they do
    not, the highest that fits with the CPU's help."""
    found = _found(demand, devices)
    return found if found is not None else _impossible(demand, devices)


def _found(demand: Demand, devices: Sequence[Device]) -> Plan | None:
    gpus = [device for device in devices if device.kind == "gpu"]
    cpus = [device for device in devices if device.kind == "cpu"]
    if (alone := _over_gpus(demand, gpus, [])) is not None:
        return alone
    helped = _over_gpus(demand, gpus, cpus) if cpus else None
    on_cpu = next((made for precision in _allowed(demand) if cpus and (made := _together(demand, precision, cpus)) is not None), None)
    if helped is None or (on_cpu is not None and on_cpu.precision.bits >= helped.precision.bits and on_cpu.step_s < helped.step_s):
        return on_cpu
    return helped


def _over_gpus(demand: Demand, gpus: Sequence[Device], helpers: Sequence[Device]) -> Plan | None:
    config = demand.entry.shape
    most = max(config.num_hidden_layers, config.num_attention_heads)
    choices = [chosen for chosen in _choices(gpus) if len(chosen) <= most]
    for precision in _allowed(demand):
        best: Plan | None = None
        for _, alike in groupby(choices, len):
            orders = [order for chosen in alike for order in _orders(chosen)]
            apart = (_layers_apart(demand, precision, order, helpers) for order in orders if len(order) > 1)
            ranks = (_together(demand, precision, [*order, *helpers]) for order in orders)
            for ways in (apart, ranks):
                made = min((made for made in ways if made is not None), key=lambda made: (made.step_s, -made.cache_bytes), default=None)
                if made is not None and (best is None or made.step_s < WORTH * best.step_s):
                    best = made
        if best is not None:
            return best
    return None


def _choices(gpus: Sequence[Device]) -> list[tuple[Device, ...]]:
    """Which GPUs a plan may be over, few first: those with the most room, of all or of those that are at least so fast."""
    found = set()
    for speed in {device.bytes_per_s for device in gpus}:
        fast = sorted((device for device in gpus if device.bytes_per_s >= speed), key=lambda device: -device.free_bytes)
        found |= {tuple(fast[:count]) for count in range(1, len(fast) + 1)}
    return sorted(found, key=lambda chosen: (len(chosen), [(-device.free_bytes, device.name) for device in chosen]))


def _orders(gpus: Sequence[Device]) -> list[list[Device]]:
    """How GPUs may follow each other: where layers are divided the first ones get as many as they hold and the last has the output, of
    ranks the first has it."""
    alike: dict[tuple[tuple[int, float], ...], list[Device]] = {}
    for order in (list(gpus), sorted(gpus, key=lambda device: -device.bytes_per_s), list(reversed(gpus))):
        alike.setdefault(tuple((device.free_bytes, device.bytes_per_s) for device in order), order)
    return list(alike.values())


def _allowed(demand: Demand) -> tuple[Precision, ...]:
    return (demand.precision,) if demand.precision else PREFERRED


def _together(demand: Demand, precision: Precision, devices: Sequence[Device]) -> Plan | None:
    """The plan in which every GPU computes a portion of every layer, with the whole context on each, and the CPU experts that they have no
    room for; or in which the one device there is computes everything. None where they do not fit, or one would have nothing to do."""
    config, per_token = demand.entry.shape, cached_bytes_per_token(demand.entry, precision)
    bearing = [device for device in devices if device.kind == "gpu"] or devices[:1]
    divided = portions(config, bearing)
    if divided is None:
        return None
    rest = [_rest_bytes(config, precision, portion, is_first=not rank) for rank, portion in enumerate(divided)]
    per_expert = mixtures(config) * expert_bytes(config, precision)  # of all layers
    context = demand.batch * demand.context_tokens * per_token
    room = [device.free_bytes - RESERVED_BYTES[device.kind] for device in devices]
    for rank, portion in enumerate(divided):
        room[rank] -= rest[rank] + context + working_bytes(config.portion(portion), precision, demand.context_tokens)
    if bearing[0].kind == "cpu":
        room[0] -= compiled_bytes(config, precision)
    if min(room[: len(bearing)]) < 0:
        return None
    most = [max(left, 0) // per_expert if per_expert else 0 for left in room]
    counts = _counts(config, devices, most)
    if counts is None or (len(bearing) > 1 and mixtures(config) and not all(counts[: len(bearing)])):
        return None
    shares, start = [], 0
    for place, (device, count) in enumerate(zip(devices, counts, strict=True)):
        bears = place < len(bearing)
        if not count and not bears:
            continue
        shares.append(
            Share(
                device=device,
                layers=range(config.num_hidden_layers if bears else 0),
                experts=range(start, start + count),
                weight_bytes=count * per_expert + (rest[place] if bears else 0),
                portion=divided[place] if bears and len(bearing) > 1 else None,
            )
        )
        start += count
    left = min(free - count * per_expert for free, count in zip(room[: len(bearing)], counts, strict=False))
    return _plan(demand, precision, shares, context + left)


def portions(config: ModelConfig, devices: Sequence[Device]) -> list[Portion] | None:
    """What of every layer each device computes, by bandwidth; None where there are not enough heads."""
    speeds = [device.bytes_per_s for device in devices]
    inner = -(-config.intermediate_size // GROUP_COLUMNS)
    if min(config.num_attention_heads, inner) < len(devices):
        return None
    last = config.intermediate_size
    return [
        Portion(heads=heads, inner=range(min(units.start * GROUP_COLUMNS, last), min(units.stop * GROUP_COLUMNS, last)), shared=shared)
        for heads, units, shared in zip(
            _dealt(config.num_attention_heads, speeds, least=1),
            _dealt(inner, speeds, least=1),
            _dealt(config.n_shared_experts or 0, speeds, least=0),
            strict=True,
        )
    ]


def _dealt(count: int, speeds: Sequence[float], least: int) -> list[range]:
    """So many things to as many as there are speeds, in proportion to them, but at least so many to each."""
    dealt = [least] * len(speeds)
    for _ in range(count - sum(dealt)):
        dealt[min(range(len(speeds)), key=lambda place: (dealt[place] + 1) / speeds[place])] += 1
    stops = [sum(dealt[: place + 1]) for place in range(len(dealt))]
    return [range(stop - own, stop) for stop, own in zip(stops, dealt, strict=True)]


def _rest_bytes(config: ModelConfig, precision: Precision, portion: Portion, *, is_first: bool) -> int:
    """All that a rank has but routed experts; only the first has the output, which may be the embeddings as well."""
    found = {group.name: group.bytes for group in groups(config.portion(portion), precision)}
    rest = sum(found.values()) - found["routed experts"]
    if is_first:
        return rest
    first, last = end_bytes(config, precision)
    return rest - last + first - found["embeddings"]


def _plan(demand: Demand, precision: Precision, shares: Sequence[Share], cache_bytes: int) -> Plan:
    taken = step_s(demand.entry, precision, shares, demand.context_tokens, demand.batch)
    return Plan(demand=demand, precision=precision, shares=tuple(shares), cache_bytes=cache_bytes, step_s=taken)


def _layers_apart(demand: Demand, precision: Precision, gpus: Sequence[Device], helpers: Sequence[Device]) -> Plan | None:
    """The plan in which each GPU has some of the layers, so that all of them have room for the same number of tokens; with a helper,
    which takes the experts that do not fit. None where they do not."""
    config, per_token = demand.entry.shape, cached_bytes_per_token(demand.entry, precision)
    experts, one, layers = config.n_routed_experts or 0, expert_bytes(config, precision), config.num_hidden_layers
    first, last = end_bytes(config, precision)
    plain = [layer.all for layer in layer_bytes(config, precision)]
    plain[0], plain[-1] = plain[0] + first, plain[-1] + last
    working = working_bytes(config, precision, demand.context_tokens)

    def sizes(kept: int) -> list[int]:
        return [size + (kept * one if layer >= config.first_k_dense_replace else 0) for layer, size in enumerate(plain)]

    def cut(kept: int, tokens: int) -> list[range] | None:
        """As many layers on the first GPU as it holds, and so on; the last may have none."""
        needed = [size + tokens * per_token // layers for size in sizes(kept)]
        found, stop = [], 0
        for device in gpus:
            start, room = stop, device.free_bytes - RESERVED_BYTES[device.kind] - working
            while stop < layers and needed[stop] <= room:
                room -= needed[stop]
                stop += 1
            found.append(range(start, stop))
        return found if stop == layers else None

    wanted = demand.batch * demand.context_tokens
    kept = _largest(-1, experts, lambda count: cut(count, wanted) is not None) if helpers else experts
    overflow = (experts - kept) * mixtures(config) * one
    if kept < 0 or cut(kept, wanted) is None or (overflow and overflow > helpers[0].free_bytes - RESERVED_BYTES["cpu"]):
        return None
    tokens = _largest(wanted, demand.batch * config.max_position_embeddings, lambda count: cut(kept, count) is not None)
    divided = cut(kept, tokens) or []
    if not all(divided):
        return None
    shares = [
        Share(device=device, layers=own, experts=range(kept), weight_bytes=sum(sizes(kept)[own.start : own.stop]))
        for device, own in zip(gpus, divided, strict=True)
    ]
    if overflow:
        shares.append(Share(device=helpers[0], layers=range(0), experts=range(kept, experts), weight_bytes=overflow))
    return _plan(demand, precision, shares, tokens * per_token)


def _largest(least: int, most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, where all below one that does do too; `least`, if none above it does."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least


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
        gpus_are_busy = all(count or device.kind == "cpu" for count, device in zip(counts, devices, strict=True))
        if not left and (gpus_are_busy or size == 1):
            return counts
    return None


def _impossible(demand: Demand, devices: Sequence[Device]) -> Impossible:
    config, least = demand.entry.shape, _allowed(demand)[-1]
    needed = sum(group.bytes for group in groups(config, least)) + working_bytes(config, least, demand.context_tokens)
    needed += demand.batch * demand.context_tokens * cached_bytes_per_token(demand.entry, least)
    needed += min((RESERVED_BYTES[device.kind] for device in devices), default=0)
    free = sum(device.free_bytes for device in devices)
    nearest = (*_smaller(demand, devices), *_with_memory(demand, devices))
    return Impossible(demand=demand, needed_bytes=needed, free_bytes=free, nearest=nearest)


def _smaller(demand: Demand, devices: Sequence[Device]) -> Iterator[tuple[str, Plan]]:
    """What asks for less, in words, and its plan: of each thing that can be asked less of the least change, and several at once only where
    none is enough."""
    halves = [demand.context_tokens >> n for n in range(1, demand.context_tokens.bit_length())]
    shorter = [replace(demand, context_tokens=tokens) for tokens in halves if tokens >= LEAST_CONTEXT_TOKENS]
    fewer_bits = [replace(demand, precision=below) for below in PREFERRED if demand.precision and below.bits < demand.precision.bits]
    alone = [replace(demand, batch=1)] if demand.batch > 1 else []
    least = [replace(changed, precision=None, batch=1) for changed in (demand, *shorter)]
    found = [made for changes in (fewer_bits, alone, shorter) if (made := _first(changes, devices)) is not None]
    if not found and (demand.precision or demand.batch > 1) and (made := _first(least, devices)) is not None:
        found = [made]
    below_it = [entry for entry in CATALOGUE if entry.parameters < demand.entry.parameters]
    alike = [entry for entry in below_it if (entry.infilling, entry.chat) == (demand.entry.infilling, demand.entry.chat)]
    for entry in (alike or below_it)[:1]:
        if (made := _first([replace(changed, entry=entry) for changed in least], devices)) is not None:
            found.append(made)
    for made in found:
        yield _change_in_words(demand, made.demand), made


def _first(demands: Sequence[Demand], devices: Sequence[Device]) -> Plan | None:
    return next((made for demand in demands if (made := _found(demand, devices)) is not None), None)


def _change_in_words(wanted: Demand, found: Demand) -> str:
    if found.entry is not wanted.entry:
        return "with a smaller model"
    changes = {
        "fewer bits a weight": found.precision is not wanted.precision,
        "one sequence at a time": found.batch != wanted.batch,
        "a shorter context": found.context_tokens != wanted.context_tokens,
    }
    return f"with {' and '.join(words for words, there in changes.items() if there)}"


def _with_memory(demand: Demand, devices: Sequence[Device]) -> Iterator[tuple[str, Plan]]:
    """The least of the usual amounts of RAM with which there would be a plan."""
    gpus = [device for device in devices if device.kind == "gpu"]
    have = max((device.free_bytes for device in devices if device.kind == "cpu"), default=0)
    for size in USUAL_RAM_GB:
        cpu = imagined_cpu(size)
        if cpu.free_bytes > have and (made := _found(demand, [*gpus, cpu])) is not None:
            yield f"with {size} GB of RAM", made
            return


def in_words(made: Plan | Impossible) -> list[str]:
    """Sentences for a user."""
    return list(_plan_in_words(made) if isinstance(made, Plan) else _impossible_in_words(made))


def _plan_in_words(made: Plan) -> Iterator[str]:
    demand, config = made.demand, made.demand.entry.shape
    yield f"{demand.entry.name} fits as {made.precision}: {gigabytes(made.weight_bytes)} of weights."
    for share in made.shares:
        parts = "; ".join(_share_in_words(share, config)) if len(made.shares) > 1 else "everything"
        yield f"{share.device.name} ({gigabytes(share.device.free_bytes)} free): {parts}, {gigabytes(share.weight_bytes)}."
    if made.shares[0].portion is not None:
        yield "The GPUs compute every layer together, so several are faster than one; each keeps the whole context."
    elif sum(bool(share.layers) for share in made.shares) > 1:
        yield "The layers run one after the other, so several GPUs give room for more, not speed."
    limit = min(made.cache_tokens, config.max_position_embeddings) if demand.batch == 1 else made.cache_tokens
    yield (
        f"Room for {made.cache_tokens:,} tokens of context ({gigabytes(made.cache_bytes)}), {demand.batch * demand.context_tokens:,} were"
        f" asked for{'' if limit == made.cache_tokens else f'; the model takes {limit:,} at most'}."
    )
    step = "a token" if demand.batch == 1 else f"a step of {demand.batch} sequences, each"
    yield (
        f"Decoding at best: {1000 * made.step_s:,.1f} ms {step} at {demand.context_tokens:,} tokens of context, which is"
        f" {_per_second(made)}. It is what reading the weights and the context takes; expect about half."
    )
    if any(share.device.kind == "cpu" for share in made.shares[1:]):
        yield "Experts that did not fit on a GPU are computed on the CPU, which is what takes the time."
    if made.precision.bits < 16:
        but = ", attention's to int8" if made.precision in FOUR_BITS else ""
        yield (
            f"Weights are quantized to {made.precision}{but}, while they are loaded; embeddings, routers, norms and kv_b_proj keep 16 bits."
        )
    if made.precision is Precision.NF4:
        yield "bitsandbytes computes one matrix after the other, which takes several times as long as reading it: int4 is faster."


def _share_in_words(share: Share, config: ModelConfig) -> Iterator[str]:
    """What one of several devices has."""
    layers, experts = config.num_hidden_layers, config.n_routed_experts or 0
    if share.portion is not None:
        heads = _counted("head", share.portion.heads, config.num_attention_heads)
        yield f"a rank with {heads} in every layer, and the context"
    elif len(share.layers) == layers:
        yield "everything but the routed experts, and the context"
    elif share.layers:
        yield f"{_counted('layer', share.layers, layers)}, with their context"
    if share.experts and len(share.experts) < experts:
        where = "in each of them" if 0 < len(share.layers) < layers else "in every layer"
        yield f"{_counted('routed expert', share.experts, experts)} {where}"


def _counted(thing: str, some: range, of: int) -> str:
    if len(some) == 1:
        return f"{thing} {some.start} of {of}"
    return f"{thing}s {some.start} to {some.stop - 1} of {of}"


def _per_second(made: Plan) -> str:
    """Two digits at least, for plans of a token in some seconds."""
    return f"{made.tokens_per_s:,.{0 if made.tokens_per_s >= 10 else 1}f} tokens/s"


def _impossible_in_words(made: Impossible) -> Iterator[str]:
    demand = made.demand
    kind = demand.precision or PREFERRED[-1]
    context = f"{demand.context_tokens:,} tokens of context"
    if demand.batch > 1:
        context = f"{demand.batch} sequences of {context}"
    yield (
        f"{demand.entry.name} does not fit: as {kind} with {context} it needs {gigabytes(made.needed_bytes)}, and"
        f" {gigabytes(made.free_bytes)} are free."
    )
    if made.needed_bytes <= made.free_bytes:
        yield (
            "That would be enough on one device, but several cannot share it: each needs a part for itself, and has whole layers, or a copy"
            " of what every layer needs."
        )
    for change, nearest in made.nearest:
        places = ", ".join(share.device.name for share in nearest.shares)
        yield (
            f"It would fit {change}: {nearest.demand.entry.name} as {nearest.precision} on {places}, with"
            f" {nearest.demand.context_tokens:,} tokens of context, {_per_second(nearest)} at best."
        )
    if not made.nearest:
        yield "Nothing near it fits either: use the embedded 'starter', or an engine on another machine (docs/scaling.md)."
    else:
        yield "Or use an engine on another machine: docs/scaling.md."


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 50e6 or not size else f"{size / 1e6:,.1f} MB"
