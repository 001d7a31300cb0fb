"""How long a decode step takes at best: the bytes that it reads over the bandwidth they are read at, and what devices wait for each
other.

Owns: the expected load of the slowest device, when several read experts or heads at the same time. Pure arithmetic, no torch.
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from math import comb

from model_host.catalogue import Entry, Precision
from model_host.config import ModelConfig
from model_host.devices import Share
from model_host.footprint import cached_bytes_per_token, end_bytes, expert_bytes, layer_bytes

HOP_S = 25e-6
"""From one device to another or back, or a sum over ranks; launch and wait included. Two H100s with NVLink take 15 to 20 for a sum; few
cards have that."""


def step_s(entry: Entry, precision: Precision, shares: Sequence[Share], context_tokens: int, batch: int) -> float:
    """A decode step of `batch` sequences with so many tokens of context each, on the devices of the shares."""
    config = entry.shape
    context = batch * context_tokens * cached_bytes_per_token(entry, precision) / config.num_hidden_layers  # of a layer
    bearing, elsewhere = [share for share in shares if share.layers], [share for share in shares if not share.layers]
    _, last = end_bytes(config, precision)
    if bearing[0].portion is not None:
        taken = last / bearing[0].device.bytes_per_s + 2 * HOP_S * config.num_hidden_layers
        return taken + _layers_s(config, precision, bearing, elsewhere, context, batch)
    taken = (len(bearing) - 1) * HOP_S
    for share in bearing:
        taken += last / share.device.bytes_per_s if share.layers.stop == config.num_hidden_layers else 0
        taken += _layers_s(config, precision, [share], elsewhere, context, batch)
    return taken


def _layers_s(
    config: ModelConfig, precision: Precision, ranks: Sequence[Share], elsewhere: Sequence[Share], context: float, batch: int
) -> float:
    """The layers of the ranks, which compute them together; each waits for the slowest after attention, and after the experts."""
    every = [layer_bytes(config if share.portion is None else config.portion(share.portion), precision) for share in ranks]
    speeds = [share.device.bytes_per_s for share in ranks]
    one = expert_bytes(config, precision)
    together = (*ranks, *elsewhere)
    counts = tuple(len(share.experts) for share in together)
    experts_per_s = tuple(share.device.bytes_per_s / one if one else 1.0 for share in together)
    taken, known = 0.0, dict[tuple[float, ...], float]()
    for layer in ranks[0].layers:
        taken += max((own[layer].attention + context) / speed for own, speed in zip(every, speeds, strict=True))
        before = tuple(own[layer].mixture / speed for own, speed in zip(every, speeds, strict=True))
        if layer < config.first_k_dense_replace:
            taken += max(before)
            continue
        if before not in known:
            known[before] = slowest_s(config, counts, experts_per_s, batch, (*before, *[0.0] * len(elsewhere)))
        taken += known[before] + (2 * HOP_S if elsewhere else 0.0)
    return taken


def slowest_s(config: ModelConfig, counts: tuple[int, ...], speeds: tuple[float, ...], batch: int, before: tuple[float, ...]) -> float:
    """How long the slowest device is expected to read the experts that one layer chooses, when all are equally likely, and what it reads
    `before` them.

    For one sequence the expectation over all ways in which its experts can fall on the devices; for several, which level each other
    out, the expected number of experts touched on each device.
    """
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    if batch > 1:
        touched = 1 - (1 - chosen / experts) ** batch
        return max(first + count * touched / speed for first, count, speed in zip(before, counts, speeds, strict=True))
    if config.topk_method != "group_limited_greedy":
        return _expected_s(counts, speeds, before, chosen)
    size, kept = experts // (config.n_group or 1), config.topk_group or 1
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    expected = []
    for group_choice in combinations(range(config.n_group or 1), kept):
        open_here = tuple(
            sum(max(0, min(end, (group + 1) * size) - max(end - count, group * size)) for group in group_choice)
            for end, count in zip(ends, counts, strict=True)
        )
        expected.append(_expected_s(open_here, speeds, before, chosen))
    return sum(expected) / len(expected)


@cache
def _expected_s(counts: tuple[int, ...], speeds: tuple[float, ...], before: tuple[float, ...], chosen: int) -> float:
    """Expected time of the slowest device when `chosen` of sum(counts) experts are drawn (multivariate hypergeometric): for every time at
    which one may end, the chance that all have ended then and had not at the one before."""
    devices = [
        [(first + load / speed, comb(count, load)) for load in range(min(count, chosen) + 1)]
        for first, count, speed in zip(before, counts, speeds, strict=True)
    ]
    expected, earlier, every = 0.0, 0, comb(sum(counts), chosen)
    for end in sorted({end for loads in devices for end, _ in loads}):
        ways = [1, *[0] * chosen]  # to lay so many experts on the devices so far, none of which ends later
        for loads in devices:
            here = [count for its_end, count in loads if its_end <= end]
            ways = [sum(ways[n - load] * count for load, count in enumerate(here[: n + 1])) for n in range(chosen + 1)]
        expected += end * (ways[chosen] - earlier) / every
        earlier = ways[chosen]
    return expected
