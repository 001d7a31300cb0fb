"""Plans over a table of machines for every checkpoint: what fits lies somewhere, once, and what does not is told with what would."""

from dataclasses import replace
from itertools import combinations, pairwise, permutations, product
from math import inf
from random import Random
from time import perf_counter

import pytest

from model_host import pace, placement
from model_host.catalogue import CATALOGUE, LARGE, LITE, Entry, Precision
from model_host.devices import Device, Share, parse_devices
from model_host.errors import RequestError
from model_host.footprint import (
    cached_bytes_per_token,
    end_bytes,
    expert_bytes,
    groups,
    layer_bytes,
    matrix_bytes,
    mixtures,
    working_bytes,
)
from model_host.placement import Demand, Impossible, Plan, in_words, plan

MACHINES = ("8GB", "16GB", "24GB", "2x24GB", "4x48GB", "8x80GB", "141GB", "cpu:16GB", "cpu:64GB", "cpu:256GB", "24GB+cpu:256GB")
SMALL, BIG = (next(entry for entry in CATALOGUE if entry.shape is shape) for shape in (LITE, LARGE))
EXPECTED: dict[str, tuple[str | None, str | None]] = {  # at 16,384 tokens of context: the 16B, the 236B
    "8GB": (None, None),
    "16GB": ("int4", None),
    "24GB": ("int8", None),
    "2x24GB": ("bfloat16", None),
    "4x48GB": ("bfloat16", "int4"),
    "8x80GB": ("bfloat16", "bfloat16"),
    "141GB": ("bfloat16", "int4"),
    "cpu:16GB": ("int4", None),
    "cpu:64GB": ("bfloat16", None),
    "cpu:256GB": ("bfloat16", "int8"),
    "24GB+cpu:256GB": ("int8", "int8"),
}


def made(entry: Entry, machine: str, **changes: object) -> Plan:
    found = plan(replace(Demand(entry=entry), **changes), parse_devices(machine))
    assert isinstance(found, Plan), in_words(found)
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name.partition("-")[2])
def test_every_release_is_planned_on_every_machine_or_the_nearest_plan_is_told(entry: Entry, machine: str):
    devices = parse_devices(machine)
    found = plan(Demand(entry=entry), devices)
    wanted = EXPECTED[machine][entry.shape is LARGE]
    assert (found.precision if isinstance(found, Plan) else None) == wanted
    if isinstance(found, Plan):
        check(found)
        return
    assert found.needed_bytes > 0 and found.nearest, "there is always something smaller or more memory"
    for words, nearest in found.nearest:
        check(nearest)
        assert f"It would fit {words}: " in " ".join(in_words(found))
    assert "does not fit: as int4 with 16,384 tokens" in in_words(found)[0]


def check(found: Plan) -> None:
    """Every layer and each of its experts lies in one place, nothing is over its device's memory, and the context that was asked for
    fits."""
    if found.shares[0].portion is not None:
        check_ranks(found)
        return
    config = found.demand.entry.shape
    every_layer, experts = list(range(config.num_hidden_layers)), list(range(config.n_routed_experts or 0))
    assert [layer for share in found.shares for layer in share.layers] == every_layer
    elsewhere = [share for share in found.shares if not share.layers]
    for own in (share for share in found.shares if share.layers):
        assert [expert for share in (own, *elsewhere) for expert in share.experts] == experts
    assert sum(group.bytes for group in groups(config, found.precision)) == found.weight_bytes
    for share in found.shares:
        used = share.weight_bytes + found.cache_bytes * len(share.layers) // len(every_layer)
        assert used + placement.RESERVED_BYTES[share.device.kind] <= share.device.free_bytes
    assert found.cache_tokens >= found.demand.context_tokens * found.demand.batch
    assert 0 < found.step_s < inf and found.tokens_per_s > 0.5
    assert len(elsewhere) == len(found.shares) - 1 or all(share.device.kind == "cpu" for share in elsewhere)


def check_ranks(found: Plan) -> None:
    """Every head, expert and column lies in one place, and every rank has room for the whole context."""
    config = found.demand.entry.shape
    ranks, cpu = [share for share in found.shares if share.portion], [share for share in found.shares if not share.portion]
    portions = [share.portion for share in ranks if share.portion]
    assert [head for portion in portions for head in portion.heads] == list(range(config.num_attention_heads))
    assert [column for portion in portions for column in portion.inner] == list(range(config.intermediate_size))
    assert [shared for portion in portions for shared in portion.shared] == list(range(config.n_shared_experts or 0))
    assert [expert for share in found.shares for expert in share.experts] == list(range(config.n_routed_experts or 0))
    assert all(portion.heads and portion.inner for portion in portions) and all(share.experts for share in ranks)
    assert all(len(share.layers) == config.num_hidden_layers for share in ranks)
    assert len(cpu) <= 1 and all(share.device.kind == "cpu" and not share.layers for share in cpu)
    for share in found.shares:
        used = share.weight_bytes + (found.cache_bytes if share.portion else 0)
        assert used + placement.RESERVED_BYTES[share.device.kind] <= share.device.free_bytes
    assert found.weight_bytes > sum(group.bytes for group in groups(config, found.precision)), "embeddings and more are on every rank"
    assert found.cache_tokens >= found.demand.context_tokens * found.demand.batch
    words = " ".join(in_words(found))
    assert "a rank with heads 0 to " in words and "The GPUs compute every layer together" in words
    assert 0 < found.step_s < inf


def test_the_bytes_of_the_groups_are_those_of_the_catalogue():
    for entry in (SMALL, BIG):
        for precision in (Precision.FLOAT32, Precision.BFLOAT16):
            assert sum(group.bytes for group in groups(entry.shape, precision)) == entry.weight_bytes(precision)
        routed = groups(entry.shape, Precision.BFLOAT16)[-1]
        assert routed.bytes / entry.weight_bytes(Precision.BFLOAT16) == pytest.approx(0.916 if entry is SMALL else 0.945, abs=0.001)
        read = sum(group.read_bytes for group in groups(entry.shape, Precision.BFLOAT16))
        assert read / 2 == pytest.approx(entry.active_parameters, rel=0.001)


def test_the_236b_as_int4_fits_one_card_of_141_gb_with_32k_of_context_and_no_smaller_one():
    found = made(BIG, "141GB", context_tokens=32_768)
    assert found.precision is Precision.INT4 and len(found.shares) == 1
    assert 132e9 < found.weight_bytes < 133e9 and found.cache_tokens > 32_768
    assert isinstance(plan(Demand(entry=BIG), parse_devices("96GB")), Impossible)


def test_quantized_rows_take_their_scales_and_padding_with_them():
    assert matrix_bytes(10, 128, Precision.BFLOAT16) == 2560
    assert matrix_bytes(10, 128, Precision.INT8) == 10 * (128 + 2)
    assert matrix_bytes(10, 128, Precision.INT4) == 10 * (64 + 2 * 2)
    assert matrix_bytes(1, 65, Precision.INT4) == 33 + 2 * 2
    assert Precision.INT4.bits == 8 * matrix_bytes(1, 6400, Precision.INT4) / 6400


def test_whole_routing_groups_stay_on_one_gpu_where_the_cards_allow():
    found = made(BIG, "4x80GB@500")
    assert len(found.shares) == 4
    assert all(share.experts.start % 20 == 0 == share.experts.stop % 20 for share in found.shares)


def test_uneven_cards_hold_what_they_can():
    found = made(SMALL, "24GB+16GB")
    assert found.precision is Precision.BFLOAT16
    layers = {share.device.name: len(share.layers) for share in found.shares}
    assert layers["gpu 0"] > layers["gpu 1"] > 0
    check(found)
    of_many = made(BIG, "13GB@9000+17GB@9000+14x13GB@9000")
    check(of_many)
    layers = {share.device.name: len(share.layers) for share in of_many.shares}
    assert layers.pop("gpu 1") > max(layers.values()), "the largest card has the most layers"


def test_layers_are_divided_where_what_every_layer_needs_is_too_much_for_one_card():
    found = made(BIG, "12x17GB@9000")  # so fast that sums are what takes time
    check(found)
    assert found.precision is Precision.INT4 and sum(bool(share.layers) for share in found.shares) == len(found.shares) > 8
    words = " ".join(in_words(found))
    assert "gpu 0 (17.0 GB free): layers 0 to " in words and "with their context" in words
    assert "The layers run one after the other, so several GPUs give room for more, not speed." in words
    assert isinstance(plan(Demand(entry=BIG), parse_devices("8x16GB")), Impossible), "128 GB are too little"


def test_layers_are_divided_and_their_experts_lie_in_the_cpus_memory_where_even_that_is_too_little():
    found = made(BIG, "4x17GB@9000+cpu:128GB")
    check(found)
    *gpus, cpu = found.shares
    assert len(gpus) == 4 and all(share.layers and share.experts == gpus[0].experts for share in gpus)
    assert not cpu.layers and cpu.device.kind == "cpu" and cpu.experts.start == gpus[0].experts.stop > 0
    assert f"routed experts 0 to {gpus[0].experts.stop - 1} of 160 in each of them" in " ".join(in_words(found))


def test_divided_layers_leave_every_card_room_for_the_same_context():
    short, long = made(SMALL, "2x16GB", context_tokens=4096), made(SMALL, "2x16GB", context_tokens=131_072)
    assert all(len(share.layers) < 27 for share in long.shares)
    for found in (short, long):
        check(found)
        assert found.cache_tokens == 163_840, "as much as the model takes"


def test_dividing_layers_is_no_faster_than_one_card_that_holds_them():
    assert len(made(SMALL, "2x80GB").shares) == 1
    whole, halves = made(SMALL, "48GB@1000"), made(SMALL, "2x24GB@1000")
    assert len(halves.shares) == 2 and halves.shares[1].layers
    assert halves.step_s == pytest.approx(whole.step_s + pace.HOP_S)


def test_one_gpu_is_taken_where_one_is_enough_and_several_where_they_read_faster():
    assert len(made(SMALL, "8x80GB").shares) == 1, "hops cost more than the 16B's experts"
    slow = made(SMALL, "4x48GB@100")
    assert len(slow.shares) > 1
    assert slow.step_s < made(SMALL, "48GB@100").step_s


def test_every_gpu_computes_a_portion_of_every_layer_where_that_is_worth_the_sums():
    many, whole = made(BIG, "8x80GB"), made(BIG, "600GB@2000")
    check(many)
    assert many.precision is whole.precision is Precision.BFLOAT16
    assert len(many.shares) > 5 and many.step_s < 0.55 * whole.step_s


def test_of_uneven_cards_the_faster_has_more_heads_and_experts():
    found = made(SMALL, "24GB@400+24GB@200")
    check(found)
    fast, slow = found.shares
    assert fast.portion and slow.portion and len(fast.portion.heads) == 11 and len(slow.portion.heads) == 5
    assert len(fast.experts) > len(slow.experts) and len(fast.portion.inner) > len(slow.portion.inner)


def test_experts_for_which_ranks_have_no_room_lie_beside_the_first():
    found = made(BIG, "4x16GB@200+cpu:128GB@400")
    check(found)
    *ranks, cpu = found.shares
    assert len(ranks) > 1 and all(share.portion for share in ranks) and cpu.portion is None and cpu.experts.stop == 160


def test_what_gpus_have_no_room_for_lies_in_the_cpus_memory():
    found = made(BIG, "24GB+cpu:256GB")
    gpu, cpu = found.shares
    assert gpu.layers and cpu.device.kind == "cpu" and len(cpu.experts) > len(gpu.experts) > 0
    assert found.step_s < made(BIG, "cpu:256GB").step_s
    assert any("computed on the CPU" in words for words in in_words(found))


def test_a_gpu_too_small_for_anything_is_left_out():
    tiny = Device(name="gpu 0", kind="gpu", free_bytes=100_000_000, bytes_per_s=1e12)
    found = plan(Demand(entry=SMALL), [tiny, *parse_devices("cpu:64GB")])
    assert isinstance(found, Plan) and [share.device.kind for share in found.shares] == ["cpu"]


def test_a_wanted_precision_is_kept_and_told_when_it_does_not_fit():
    assert made(SMALL, "24GB", precision=Precision.INT4).precision is Precision.INT4
    refused = plan(Demand(entry=SMALL, precision=Precision.BFLOAT16), parse_devices("24GB"))
    assert isinstance(refused, Impossible)
    change, nearest = refused.nearest[0]
    assert change == "with fewer bits a weight" and nearest.precision is Precision.INT8


def test_a_long_context_and_many_sequences_take_their_room():
    assert made(SMALL, "24GB").precision is Precision.INT8
    assert made(SMALL, "24GB", context_tokens=131_072, batch=2).precision is Precision.INT4
    refused = plan(Demand(entry=BIG, context_tokens=163_840), parse_devices("141GB"))
    assert isinstance(refused, Impossible)
    shorter = dict(refused.nearest)["with a shorter context"]
    assert shorter.demand.context_tokens == 20_480


def test_the_slowest_device_is_waited_for():
    halves, whole = pace.slowest_s(LITE, (32, 32), (1.0, 1.0), 1, (0, 0)), pace.slowest_s(LITE, (64,), (1.0,), 1, (0,))
    assert whole == 6 and halves == pytest.approx(3.9, abs=0.05), "of 6 experts on 2 devices, 3.9 lie on the fuller one"
    assert pace.slowest_s(LITE, (32, 32), (1.0, 1.0), 64, (0, 0)) == pytest.approx(32, rel=0.01), "a large batch touches all"
    groups_apart = pace.slowest_s(LARGE, (80, 80), (1.0, 1.0), 1, (0, 0))
    assert 3.9 < groups_apart < 6, "groups make it more uneven"


SHALLOW = LITE.model_copy(
    update={
        "num_hidden_layers": 5, "n_routed_experts": 8, "num_experts_per_tok": 2, "hidden_size": 1024, "moe_intermediate_size": 512,
        "intermediate_size": 2048, "num_attention_heads": 4, "vocab_size": 8192, "max_position_embeddings": 20_000,
    }
)  # fmt: skip
"""Of which every way to divide it can be tried."""
OF_SHALLOW = Demand(entry=Entry(name="shallow", shape=SHALLOW, context_tokens=1), precision=Precision.BFLOAT16, context_tokens=4096)
SHALLOW_BYTES = sum(group.bytes for group in groups(SHALLOW, Precision.BFLOAT16))


def drawn_machine(draw: Random) -> list[Device]:
    """Up to three cards, each with room for such a share of the model, and at times the CPU's memory."""
    devices = [
        Device(
            name=f"gpu {place}",
            kind="gpu",
            free_bytes=placement.RESERVED_BYTES["gpu"] + int(SHALLOW_BYTES * draw.choice((0.4, 0.6, 0.8, 1.1, 1.5, 2))),
            bytes_per_s=draw.choice((1e9, 1.5e9, 2e9, 3e9)),
        )
        for place in range(draw.randint(1, 3))
    ]
    if draw.random() < 0.5:
        free = placement.RESERVED_BYTES["cpu"] + int(SHALLOW_BYTES * draw.choice((0.5, 2)))
        devices.append(Device(name="cpu", kind="cpu", free_bytes=free, bytes_per_s=draw.choice((0.3e9, 0.6e9))))
    return devices


def fastest_s(devices: list[Device], *, helped: bool) -> float:
    """The least time of a step over all ways to divide the shallow model: as ranks in any order, or in layers, cut anywhere."""
    layers, experts, context = SHALLOW.num_hidden_layers, SHALLOW.n_routed_experts or 0, OF_SHALLOW.context_tokens
    one, (first, last) = expert_bytes(SHALLOW, Precision.BFLOAT16), end_bytes(SHALLOW, Precision.BFLOAT16)
    plain = [layer.all for layer in layer_bytes(SHALLOW, Precision.BFLOAT16)]
    plain[0], plain[-1] = plain[0] + first, plain[-1] + last
    latents = context * cached_bytes_per_token(OF_SHALLOW.entry, Precision.BFLOAT16) // layers
    beside = working_bytes(SHALLOW, Precision.BFLOAT16, context) + placement.RESERVED_BYTES["gpu"]
    gpus, cpus = ([device for device in devices if device.kind == kind] for kind in ("gpu", "cpu"))
    least = inf
    for order in (order for count in range(1, len(gpus) + 1) for order in permutations(gpus, count)):
        if (ranks := placement._together(OF_SHALLOW, Precision.BFLOAT16, [*order, *(cpus if helped else [])])) is not None:
            least = min(least, ranks.step_s)
        for cuts, kept in product(combinations(range(1, layers), len(order) - 1), range(experts) if helped else (experts,)):
            shares = [
                Share(
                    device=device,
                    layers=range(a, b),
                    experts=range(kept),
                    weight_bytes=sum(plain[a:b]) + kept * one * sum(layer >= SHALLOW.first_k_dense_replace for layer in range(a, b)),
                )
                for device, (a, b) in zip(order, pairwise((0, *cuts, layers)), strict=True)
            ]
            if helped:
                routed = (experts - kept) * mixtures(SHALLOW) * one
                shares.append(Share(device=cpus[0], layers=range(0), experts=range(kept, experts), weight_bytes=routed))
            if all(
                share.weight_bytes + (latents * len(share.layers) + beside if share.layers else placement.RESERVED_BYTES["cpu"])
                <= share.device.free_bytes
                for share in shares
            ):
                least = min(least, pace.step_s(OF_SHALLOW.entry, Precision.BFLOAT16, shares, context, 1))
    return least


def test_no_way_to_divide_a_model_is_much_faster_than_the_plan():
    draw = Random(3)
    for _ in range(60):
        devices = drawn_machine(draw)
        found, least = plan(OF_SHALLOW, devices), fastest_s(devices, helped=False)
        if least == inf and any(device.kind == "cpu" for device in devices):
            least = fastest_s(devices, helped=True)
        if least == inf:
            assert isinstance(found, Impossible) or found.shares[0].device.kind == "cpu", devices
            continue
        assert isinstance(found, Plan), devices
        check(found)
        assert found.step_s < least / placement.WORTH**1.5, (devices, in_words(found))


def test_more_memory_and_faster_cards_never_give_a_worse_plan():
    draw = Random(4)
    for _ in range(80):
        devices = drawn_machine(draw)
        place = draw.randrange(len(devices))
        better = replace(
            devices[place], free_bytes=devices[place].free_bytes + SHALLOW_BYTES // 2, bytes_per_s=2 * devices[place].bytes_per_s
        )
        before, after = plan(OF_SHALLOW, devices), plan(OF_SHALLOW, [*devices[:place], better, *devices[place + 1 :]])
        if isinstance(before, Plan):
            assert isinstance(after, Plan), (devices, place)
            assert after.step_s < before.step_s / placement.WORTH, (devices, place)


def test_of_two_cards_that_both_hold_a_model_the_faster_is_taken():
    found = made(SMALL, "32GB@400+24GB@900", precision=Precision.INT4)
    assert [share.device.name for share in found.shares] == ["gpu 1"]


def test_a_slow_gpu_is_left_out_where_the_cpu_alone_is_faster():
    found, alone = made(BIG, "24GB@10+cpu:256GB@400"), made(BIG, "cpu:256GB@400")
    assert [share.device.kind for share in found.shares] == ["cpu"] and found.step_s == alone.step_s


def test_layers_are_divided_with_the_cpus_help_however_few_experts_the_gpus_keep():
    """With half of them one card would have had room for all layers, which was taken for there being no way to divide them."""
    found = made(BIG, "80GB@9000+40GB@9000+cpu:64GB")
    check(found)
    *gpus, _ = found.shares
    assert len(gpus) == 2 and all(share.layers and share.portion is None for share in gpus) and len(gpus[0].experts) > 120


def test_embeddings_that_are_the_output_too_are_counted_on_both_cards_that_have_them():
    tied = Entry(name="tied", shape=LITE.model_copy(update={"tie_word_embeddings": True}), context_tokens=1)
    whole, halves = made(tied, "48GB@1000"), made(tied, "2x24GB@1000")
    assert halves.weight_bytes - whole.weight_bytes == LITE.vocab_size * LITE.hidden_size * 2


def test_a_plan_for_dozens_of_cards_takes_no_longer_than_one_waits():
    started = perf_counter()
    plan(Demand(entry=BIG), parse_devices("32x24GB"))
    assert perf_counter() - started < 20, "1.4 s; with every way counted in which experts can fall on them, 150"


def test_what_comes_nearest_is_named_by_what_differs():
    def nearest(machine: str, **changes: object) -> dict[str, Plan]:
        found = plan(replace(Demand(entry=SMALL), **changes), parse_devices(machine))
        assert isinstance(found, Impossible), in_words(found)
        return dict(found.nearest)

    of_precision = nearest("24GB", precision=Precision.BFLOAT16)
    assert "with fewer bits a weight" in of_precision and "with a shorter context" not in of_precision, "bfloat16 fits at no context"
    of_batch = nearest("12GB", precision=Precision.INT4, batch=8)
    assert of_batch["with one sequence at a time"].demand.context_tokens == 16_384
    assert of_batch["with a shorter context"].demand.batch == 8
    of_all = nearest("12GB", precision=Precision.INT8, context_tokens=131_072)
    assert of_all["with fewer bits a weight and a shorter context"].precision is Precision.INT4


def test_the_words_are_grammatical_and_true_for_the_smallest_numbers_too():
    words = " ".join(in_words(made(SMALL, "130GB@10", context_tokens=1024)))
    assert "2.0 tokens/s" in words
    assert "a step of 4 sequences, each at 16,384 tokens of context" in " ".join(in_words(made(SMALL, "48GB", batch=4)))
    many = " ".join(in_words(made(SMALL, "27x4GB@9000")))
    assert "layer 26 of 27" in many or " to 26 of 27" in many
    assert "26 to 26" not in many
    refused = in_words(plan(Demand(entry=BIG), parse_devices("30x6GB")))
    assert "needs 1" in refused[0] and refused[1].startswith("That would be enough on one device")


@pytest.mark.parametrize("text", ["0x24GB", "33x4GB", "20x4GB+20x8GB", "24GB@0"])
def test_machines_that_are_none_are_refused_with_an_example(text: str):
    with pytest.raises(RequestError, match=r"1 to 32 GPUs, written as 2x24GB|how many GB/s"):
        parse_devices(text)


@pytest.mark.parametrize("text", ["", "24", "2x", "24GB+", "GB", "cpu:1GB+cpu:2GB", "-3GB", "2x cpu:4GB"])
def test_devices_that_cannot_be_understood_are_refused_with_an_example(text: str):
    with pytest.raises(RequestError, match=r"2x24GB\+cpu:64GB|write cpu:64GB once"):
        parse_devices(text)


def test_devices_are_described_in_a_line():
    gpus = parse_devices("2 x 24gb@936, cpu:64GB")
    assert [(device.name, device.kind) for device in gpus] == [("gpu 0", "gpu"), ("gpu 1", "gpu"), ("cpu", "cpu")]
    assert gpus[0].bytes_per_s == 936e9 and gpus[0].free_bytes == 24_000_000_000
    assert parse_devices("141GB")[0].bytes_per_s == 4800e9 > parse_devices("80GB")[0].bytes_per_s
