"""Each Triton kernel against its plain torch form, and small steps over static buffers against the plain model. On a GPU the
kernels run compiled and captured; without one under Triton's interpreter, with the same sizes."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_host.batch import Span, Step
from model_host.checkpoints import destinations_in, of_layers
from model_host.config import ModelConfig
from model_host.experts import Spread, TorchExperts, sinks
from model_host.gpu import plain
from model_host.gpu.model import MAX_ROWS, GpuModel
from model_host.holders import empty_dense
from model_host.latents import LatentPool, Layout
from model_host.models.deepseek_v2 import Model
from model_host.pages import PAGE_TOKENS, pages_for
from model_host.quantized import Bits, Packed, PackedLinear, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
"""Where the plain forms run as well: they ask for numbers that lie on the device, which no captured graph may."""
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 1024,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ODD = {
    "hidden_size": 52,
    "moe_intermediate_size": 20,
    "kv_lora_rank": 42,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 19,
    "num_attention_heads": 19,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0, "q_lora_rank": 24}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are so small that threads would only wait for each other, long so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed: it is built for Linux only")
    from model_host.gpu import kernels

    if DEVICE.type == "cpu":
        teach_the_interpreter_numpy()
    return kernels


def teach_the_interpreter_numpy() -> None:
    """Triton 3.6's interpreter turns arrays of one number into integers in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual.float(), wanted.float(), atol=1e-4, rtol=1e-4)


def off(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of what is wanted."""
    return float((actual.float() - wanted.float()).abs().max() / wanted.float().std())


@pytest.mark.parametrize("rows", [1, 3])
def test_linear(kernels: ModuleType, rows: int):
    x, weight = drawn(rows, 50), drawn(37, 50, seed=1)
    tuning = kernels.Tuning(linear_rows=MAX_ROWS, linear=kernels.Tile(4, 16, 4))
    close(kernels.linear(x, weight, tuning), plain.linear(x, weight))


@pytest.mark.parametrize("weighed", [False, True])
def test_add_norm(kernels: ModuleType, weighed: bool):
    x, parts, weight = drawn(5, 50), drawn(5, 3, 50, seed=1), drawn(50, seed=2)
    shares = drawn(5, 3, seed=3) if weighed else None
    for actual, wanted in zip(*(form.add_norm(x, parts, shares, weight, 1e-6) for form in (kernels, plain)), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(("heads", "rank", "nope", "rope", "v"), [(4, 32, 16, 8, 16), (3, 150, 14, 6, 19)])
def test_latent_queries(kernels: ModuleType, heads: int, rank: int, nope: int, rope: int, v: int):
    rows = 7
    projected, angles = drawn(rows, heads * (nope + rope) + rank + rope), drawn(rows, rope // 2, seed=1)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=-1)
    slots = torch.tensor([40, 3, 77, 12, 5, 64, 0], dtype=torch.int32, device=DEVICE)
    norm, kv_b = drawn(rank, seed=2), drawn(heads, nope + v, rank, seed=3)
    results = []
    for form in (kernels, plain):
        c_kv, k_pe = torch.zeros(80, rank, device=DEVICE), torch.zeros(80, rope, device=DEVICE)
        results.append((*form.latent_queries(projected, rotation, slots, norm, 1e-6, kv_b, c_kv, k_pe), c_kv, k_pe))
    for actual, wanted in zip(*results, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 32, 8), (19, 42, 6)])
@pytest.mark.parametrize("programs", [8, 64])
def test_attention_over_scattered_pages(kernels: ModuleType, heads: int, rank: int, rope: int, programs: int):
    """Contexts of one token, of whole pages, one more and one less; rows that share a sequence; tables with rubbish at their end."""
    contexts = torch.tensor([1, 16, 17, 31, 200, 198, 199], dtype=torch.int32, device=DEVICE)
    owners = torch.tensor([0, 1, 2, 3, 4, 4, 4], dtype=torch.int32, device=DEVICE)
    pool_pages = 40
    order = torch.randperm(pool_pages, generator=torch.Generator().manual_seed(4)).to(DEVICE).int()
    tables = torch.full((5, 20), -(2**30), dtype=torch.int32, device=DEVICE)
    at = 0
    for number, longest in enumerate((1, 16, 17, 31, 200)):
        tables[number, : pages_for(longest)] = order[at : at + pages_for(longest)]
        at += pages_for(longest)
    c_kv, k_pe = drawn(pool_pages * PAGE_TOKENS, rank), drawn(pool_pages * PAGE_TOKENS, rope, seed=1)
    q_latent, q_pe = drawn(7, heads, rank, seed=2), drawn(7, heads, rope, seed=3)
    given = (q_latent, q_pe, c_kv, k_pe, tables, owners, contexts, 0.3)
    close(kernels.attend(*given, tuning=kernels.Tuning(programs=programs)), plain.attend(*given))


@pytest.mark.parametrize(("heads", "rank", "nope", "v"), [(4, 32, 16, 16), (3, 150, 14, 35)])
def test_values(kernels: ModuleType, heads: int, rank: int, nope: int, v: int):
    mixed, kv_b = drawn(5, heads, rank), drawn(heads, nope + v, rank, seed=1)
    close(kernels.values(mixed, kv_b, nope), plain.values(mixed, kv_b, nope))


@pytest.mark.parametrize("always", [0, 2])
def test_route(kernels: ModuleType, always: int):
    x, weight = drawn(5, 50), drawn(11, 50, seed=1)
    shares, ids = kernels.route(x, weight, 3, 2.0, always)
    wanted_shares, wanted_ids = plain.route(x, weight, 3, 2.0, always)
    close(shares, wanted_shares)
    assert torch.equal(ids, wanted_ids)


def test_route_within_the_best_groups(kernels: ModuleType):
    x, weight = drawn(5, 50), drawn(12, 50, seed=1)
    shares, ids = kernels.route(x, weight, 3, 2.0, 1, 4, 2)
    wanted_shares, wanted_ids = plain.route(x, weight, 3, 2.0, 1, 4, 2)
    close(shares, wanted_shares)
    assert torch.equal(ids, wanted_ids)


def test_an_expert_is_chosen_once_even_when_all_others_have_no_share(kernels: ModuleType):
    x = torch.full((1, 16), 100.0, device=DEVICE)
    weight = torch.linspace(-1, 1, 11, device=DEVICE)[:, None].expand(11, 16).contiguous()
    _, ids = kernels.route(x, weight, 6, 1.0, 0)
    assert ids[0, 0] == 10
    assert len(set(ids[0].tolist())) == 6


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("rows", "few_rows"), [(1, 2), (3, 16), (3, 0), (16, 0)])
@pytest.mark.parametrize(("hidden", "inner"), [(32, 16), (50, 21)])
def test_experts(kernels: ModuleType, rows: int, few_rows: int, shared: int, hidden: int, inner: int):
    number, chosen = 9, 3
    x, gate_up, down = drawn(rows, hidden), drawn(number, 2 * inner, hidden, seed=1), drawn(number, hidden, inner, seed=2)
    ids = torch.rand(rows, number, generator=torch.Generator().manual_seed(5)).topk(chosen).indices.int().to(DEVICE)
    seen = None
    if shared:
        seen = drawn(shared * inner, hidden, seed=3), drawn(shared * inner, hidden, seed=4), drawn(hidden, shared * inner, seed=5)
    tile = kernels.Tile(16, 16, 4, 2)
    tuning = kernels.Tuning(few_rows=few_rows, few_up=tile, few_down=tile, many_up=tile, many_down=tile)
    wanted = plain.experts(x, ids, gate_up, down, seen)
    torch.testing.assert_close(kernels.experts(x, ids, gate_up, down, seen, tuning), wanted, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("few_rows", [16, 0])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_experts_that_are_elsewhere_make_nothing_here(kernels: ModuleType, bits: Bits | None, few_rows: int):
    hidden, inner, held = 64, 32, range(3, 8)
    matrices = (lambda *shape, seed: packed(bits, *shape, seed=seed)) if bits else drawn
    gate_up, down = matrices(len(held), 2 * inner, hidden, seed=1), matrices(len(held), hidden, inner, seed=2)
    seen = matrices(inner, hidden, seed=3), matrices(inner, hidden, seed=4), matrices(hidden, inner, seed=5)
    x, ids = drawn(3, hidden), torch.tensor([[0, 3, 8], [7, 2, 5], [1, 0, 8]], dtype=torch.int32, device=DEVICE)
    tile = kernels.Tile(16, 64, 4, 2)
    tuning = kernels.Tuning(
        few_rows=few_rows, packed_rows=few_rows, few_up=tile, few_down=tile, many_up=tile, many_down=tile,
        few8=tile, few4=tile, many8=tile, many4=tile,
    )  # fmt: skip
    made = kernels.experts(x, ids, gate_up, down, seen, tuning, first=held.start)
    wanted = plain.experts(x, ids, gate_up, down, seen, first=held.start)
    torch.testing.assert_close(made, wanted.float(), atol=1e-2, rtol=1e-4)
    assert not made[:, :3][(ids < held.start) | (ids >= held.stop)].any() and made[0, 1].any() and made[2, 3].any()


def packed(bits: Bits, *shape: int, seed: int) -> Packed:
    """Random matrices [..., rows, columns] in fewer bits."""
    codes, scales = pack(drawn(*shape, seed=seed).flatten(0, -2), bits)
    return Packed(codes.unflatten(0, shape[:-1]), scales.unflatten(0, shape[:-1]), shape[-1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "packed_rows"), [(3, 0), (3, MAX_ROWS)])
@pytest.mark.parametrize("columns", [256, 150, 31])
def test_linear_of_packed_weights(kernels: ModuleType, bits: Bits, rows: int, packed_rows: int, columns: int):
    x, weight = drawn(rows, columns), packed(bits, 37, columns, seed=1)
    tile = kernels.Tile(16, 128, 4, 2)
    tuning = kernels.Tuning(packed_rows=packed_rows, few8=tile, few4=tile, many8=tile, many4=tile)
    close(kernels.linear(x, weight, tuning), plain.linear(x, weight))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("rows", "packed_rows"), [(3, 16), (3, 0)])
@pytest.mark.parametrize(("hidden", "inner"), [(128, 64), (50, 21)])
def test_experts_of_packed_weights(kernels: ModuleType, bits: Bits, rows: int, packed_rows: int, shared: int, hidden: int, inner: int):
    number, chosen = 9, 3
    x, gate_up, down = drawn(rows, hidden), packed(bits, number, 2 * inner, hidden, seed=1), packed(bits, number, hidden, inner, seed=2)
    ids = torch.rand(rows, number, generator=torch.Generator().manual_seed(5)).topk(chosen).indices.int().to(DEVICE)
    seen = None
    if shared:
        wide = shared * inner
        seen = packed(bits, wide, hidden, seed=3), packed(bits, wide, hidden, seed=4), packed(bits, hidden, wide, seed=5)
    tile = kernels.Tile(16, 64, 4, 2)
    tuning = kernels.Tuning(packed_rows=packed_rows, few8=tile, few4=tile, many8=tile, many4=tile)
    wanted = plain.experts(x, ids, gate_up, down, seen)
    assert off(kernels.experts(x, ids, gate_up, down, seen, tuning), wanted) < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_in_bfloat16(kernels: ModuleType, bits: Bits):
    x, weight = drawn(2, 192).bfloat16(), packed(bits, 40, 192, seed=1)
    assert off(kernels.linear(x, weight), plain.linear(x.float(), weight)) < 0.03
    gate_up, down = packed(bits, 5, 64, 192, seed=2), packed(bits, 5, 192, 32, seed=3)
    ids = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32, device=DEVICE)
    assert off(kernels.experts(x, ids, gate_up, down, None), plain.experts(x.float(), ids, gate_up, down, None)) < 0.03
    if DEVICE.type == "cuda":  # Triton's interpreter multiplies the bits of bfloat16 matrices as integers
        many = kernels.Tuning(packed_rows=0)
        assert off(kernels.linear(x, weight, many), plain.linear(x.float(), weight)) < 0.03
        assert off(kernels.experts(x, ids, gate_up, down, None, many), plain.experts(x.float(), ids, gate_up, down, None)) < 0.03


def test_bfloat16(kernels: ModuleType):
    """What is summed is summed in float32; only results are rounded."""
    x, gate_up, down = drawn(4, 64).bfloat16(), drawn(5, 64, 64, seed=1, scale=0.1).bfloat16(), drawn(5, 64, 32, seed=2).bfloat16()
    ids = torch.tensor([[0, 2], [2, 4], [4, 1], [0, 1]], dtype=torch.int32, device=DEVICE)
    few = kernels.Tuning(few_rows=MAX_ROWS, linear_rows=MAX_ROWS)
    wanted = plain.experts(x.float(), ids, gate_up.float(), down.float(), None)
    assert off(kernels.experts(x, ids, gate_up, down, None, few), wanted) < 0.03
    assert off(kernels.linear(x, down[0].T.contiguous(), few)[:, :1], plain.linear(x.float(), down[0].float().T)[:, :1]) < 0.03
    total, normed = kernels.add_norm(x, gate_up[0, :4].unsqueeze(1), None, x[0], 1e-6)
    wanted_total, wanted_normed = plain.add_norm(x, gate_up[0, :4].unsqueeze(1), None, x[0], 1e-6)
    assert off(total, wanted_total) < 0.03
    assert off(normed, wanted_normed) < 0.06  # Triton's interpreter rounds towards zero
    close(kernels.route(x, gate_up[0, :9], 3, 1.0, 1)[0], plain.route(x, gate_up[0, :9], 3, 1.0, 1)[0])


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter multiplies the bits of bfloat16 matrices as integers")
def test_bfloat16_on_tensor_cores(kernels: ModuleType):
    x, gate_up, down = drawn(4, 64).bfloat16(), drawn(5, 64, 64, seed=1, scale=0.1).bfloat16(), drawn(5, 64, 32, seed=2).bfloat16()
    ids = torch.tensor([[0, 2], [2, 4], [4, 1], [0, 1]], dtype=torch.int32, device=DEVICE)
    wanted = plain.experts(x.float(), ids, gate_up.float(), down.float(), None)
    assert off(kernels.experts(x, ids, gate_up, down, None, kernels.Tuning(few_rows=0)), wanted) < 0.03
    keys, k_pe, q, q_pe = (drawn(*shape, seed=i).bfloat16() for i, shape in enumerate([(64, 32), (64, 16), (1, 4, 32), (1, 4, 16)]))
    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32, device=DEVICE)
    owner, context = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.tensor([60], dtype=torch.int32, device=DEVICE)
    wanted = plain.attend(q.float(), q_pe.float(), keys.float(), k_pe.float(), table, owner, context, 0.2)
    assert off(kernels.attend(q, q_pe, keys, k_pe, table, owner, context, 0.2), wanted) < 0.03


def model(device: torch.device = DEVICE, **changes: Any) -> Model:
    torch.manual_seed(0)
    built = Model(ModelConfig.model_validate(SIZES | {"model_type": "deepseek_v2"} | changes)).to(device).eval()
    for name, parameter in built.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return built


def pool(config: ModelConfig, device: torch.device) -> LatentPool:
    """A pool whose memory holds what nobody may read."""
    latents = LatentPool(config, 60, torch.float32, device)
    latents.c_kv.fill_(float("nan"))
    latents.k_pe.fill_(float("nan"))
    return latents


TEXTS = [torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (100, 33, 50)]
PAGES = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()


def steps() -> list[Step]:
    """Three texts in scattered pages: long prefills, steps of one, two and three sequences, of one and of several tokens each,
    one that leaves, and a text that is cut back and goes on otherwise."""
    pages = (PAGES[:7], PAGES[7:10], PAGES[10:14])
    plan: list[dict[int, tuple[int, int]]] = [
        {0: (0, 60), 1: (0, 20)},
        {2: (0, 5)},
        {0: (60, 61), 1: (20, 21), 2: (5, 6)},
        {0: (61, 65), 1: (21, 22), 2: (6, 9)},
        {0: (65, 69), 2: (9, 17)},
        {2: (17, 18)},
        {0: (69, 70), 2: (18, 19)},
        {0: (66, 67)},
    ]
    made = []
    for part in plan:
        ids = [id for text, (a, b) in part.items() for id in TEXTS[text][a:b]]
        spans = tuple(Span(tokens=b - a, context=b, pages=tuple(pages[text][: pages_for(b)])) for text, (a, b) in part.items())
        made.append(Step(ids=tuple(ids), spans=spans, wanted=tuple(range(len(ids)))))
    return made


def same_logits(built: Model, operations: Any) -> None:
    ours, reference = pool(built.config, built.device), pool(built.config, built.device)
    gpu = GpuModel(built, operations)
    for step in steps():
        with torch.inference_mode():
            wanted = built(Layout.of(step, built.device, 16), reference)
        torch.testing.assert_close(gpu.forward(step, ours), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, ODD, GROUPED, {"n_shared_experts": None}], ids=["usual", "odd", "groups", "no shared experts"])
def test_steps_over_static_buffers_give_what_the_plain_model_gives(changes: dict[str, Any]):
    same_logits(model(CPU, **changes), plain)


def some_layers(built: Model, layers: range) -> Model:
    config = built.config
    part = Model(config.of(layers), begins=layers.start == 0, ends=layers.stop == config.num_hidden_layers).to(built.device)
    named = of_layers(((f"model.{name}", weight) for name, weight in built.state_dict().items()), layers)
    weights = {name.removeprefix("model."): weight for name, weight in named}
    part.load_state_dict({name: weights[name] for name in part.state_dict()})
    return part.eval()


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["usual", "groups"])
@pytest.mark.parametrize("parts", [(range(1), range(1, 3)), (range(1), range(1, 2), range(2, 3))], ids=["two", "three"])
def test_steps_of_layers_apart_give_what_the_plain_model_gives(changes: dict[str, Any], parts: tuple[range, ...]):
    built = model(CPU, **changes)
    apart = [GpuModel(some_layers(built, layers), plain) for layers in parts]
    pools, reference = [pool(part.config, CPU) for part in apart], pool(built.config, CPU)
    for step in steps():
        with torch.inference_mode():
            wanted = built(Layout.of(step, CPU, 16), reference)
        x: Tensor | None = None
        for part, latents in zip(apart, pools, strict=True):
            x = part.forward(step, latents, x)
        torch.testing.assert_close(x, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["usual", "groups"])
def test_steps_of_kernels_give_what_the_plain_model_gives(kernels: ModuleType, changes: dict[str, Any]):
    few_parts = partial(kernels.attend, tuning=kernels.Tuning(programs=8))
    same_logits(model(**changes, num_hidden_layers=2), SimpleNamespace(**vars(kernels) | {"attend": few_parts}))


def packed_model(bits: Bits, device: torch.device = DEVICE, **changes: Any) -> Model:
    """With experts and linear layers as a loaded model in fewer bits has them."""
    plainly = model(device, **changes)
    config, how = plainly.config, {"precision": f"int{bits}", "dtype": torch.float32, "device": device}
    held = TorchExperts(config, range(config.n_routed_experts or 0), **how)
    built = empty_dense(config, Spread([held]), **how)
    experts, places = dict(sinks(held, config)), dict(destinations_in(built))
    linear = {f"model.{name}.weight": module for name, module in built.named_modules() if isinstance(module, PackedLinear)}
    for name, weight in destinations_in(plainly):
        if name in experts:
            held.put(*experts[name], weight)
        elif name in linear:
            linear[name].put(weight)
        else:
            places[name].data.copy_(weight)
    return built.eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, ODD, GROUPED, {"n_shared_experts": None}], ids=["usual", "odd", "groups", "no shared experts"])
def test_steps_of_packed_weights_give_what_the_plain_model_gives(bits: Bits, changes: dict[str, Any]):
    same_logits(packed_model(bits, CPU, **changes), plain)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["usual", "groups"])
def test_steps_of_kernels_over_packed_weights_give_what_the_plain_model_gives(kernels: ModuleType, bits: Bits, changes: dict[str, Any]):
    few_parts = partial(kernels.attend, tuning=kernels.Tuning(programs=8))
    same_logits(packed_model(bits, **changes, num_hidden_layers=2), SimpleNamespace(**vars(kernels) | {"attend": few_parts}))


def spread_model(plainly: Model, precision: str, device: torch.device, cuts: tuple[int, ...]) -> tuple[Model, Spread]:
    """The same weights with the experts in holders, the first of which is on the device, the others in the CPU's memory."""
    config, how = plainly.config, {"precision": precision, "dtype": torch.float32}
    holders = [TorchExperts(config, range(a, b), device=CPU if number else device, **how) for number, (a, b) in enumerate(pairwise(cuts))]
    spread = Spread(holders)
    built = empty_dense(config, spread, device=device, **how)
    places = dict(destinations_in(built)) | {
        f"model.{name}.weight": module for name, module in built.named_modules() if isinstance(module, PackedLinear)
    }
    experts = {name: (held, where) for held in holders for name, where in sinks(held, config)}
    for name, weight in destinations_in(plainly):
        if name in experts:
            held, where = experts[name]
            held.put(*where, weight)
        elif isinstance(place := places[name], PackedLinear):
            place.put(weight)
        else:
            place.data.copy_(weight)
    return built.eval(), spread


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, GROUPED, {"n_shared_experts": None}], ids=["usual", "groups", "no shared experts"])
@pytest.mark.parametrize("cuts", [(0, 5, 8), (0, 1, 4, 8)], ids=["two holders", "three holders"])
def test_steps_with_experts_in_the_cpus_memory_give_what_the_plain_model_gives(
    precision: str, changes: dict[str, Any], cuts: tuple[int, ...]
):
    plainly = model(DEVICE, **changes)
    whole, _ = spread_model(plainly, precision, DEVICE, (0, 8))
    built, spread = spread_model(plainly, precision, DEVICE, cuts)
    gpu = GpuModel(built, plain if DEVICE == CPU else None, spread=spread)
    ours, reference = pool(built.config, DEVICE), pool(built.config, DEVICE)
    layer, fast, slow = 2, *spread.here[:2]
    for number, step in enumerate(steps()):
        with torch.inference_mode():
            wanted = whole(Layout.of(step, DEVICE, 16), reference)
        torch.testing.assert_close(gpu.forward(step, ours), wanted, atol=1e-3, rtol=1e-3)
        if number % 2:  # an expert of each goes to the other, and back again
            pair = (fast.held.start, slow.held.start) if number % 4 == 1 else (slow.held.start, fast.held.start)
            fast.replace(layer, *pair, expert_of(plainly, layer, pair[1]))
            slow.replace(layer, *reversed(pair), expert_of(plainly, layer, pair[0]))


def expert_of(built: Model, layer: int, expert: int) -> dict[str, Tensor]:
    named = dict(destinations_in(built))
    kinds = ("gate_proj", "up_proj", "down_proj")
    return {kind: named[f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"] for kind in kinds}


def test_what_the_gate_chose_is_noted_also_where_the_cpu_helps():
    built, spread = spread_model(model(DEVICE), "float32", DEVICE, (0, 5, 8))
    noted: list[int] = []
    spread.note = lambda layer, experts: noted.append(layer)
    gpu = GpuModel(built, plain if DEVICE == CPU else None, spread=spread)
    gpu.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), pool(built.config, DEVICE))
    assert set(noted) == {1, 2}


@pytest.mark.parametrize("wanted", [(), (2,), (3, 0), (1, 1)])
def test_only_wanted_rows_are_given(wanted: tuple[int, ...]):
    built = model(CPU)
    span = Span(tokens=4, context=4, pages=(5,))
    every = GpuModel(built, plain).forward(Step(ids=(1, 2, 3, 4), spans=(span,), wanted=(0, 1, 2, 3)), pool(built.config, CPU))
    some = GpuModel(built, plain).forward(Step(ids=(1, 2, 3, 4), spans=(span,), wanted=wanted), pool(built.config, CPU))
    torch.testing.assert_close(some, every[list(wanted)])


def test_logits_stay_what_they_are_when_the_next_step_runs():
    built = model(CPU)
    latents = pool(built.config, CPU)
    gpu = GpuModel(built, plain)
    first = gpu.forward(Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(0,)),), wanted=(0,)), latents)
    kept = first.clone()
    gpu.forward(Step(ids=(2,), spans=(Span(tokens=1, context=2, pages=(0,)),), wanted=(0,)), latents)
    assert torch.equal(first, kept)


def test_a_new_pool_gets_new_buffers():
    built = model(CPU)
    gpu = GpuModel(built, plain)
    step = Step(ids=(1,), spans=(Span(tokens=1, context=1, pages=(3,)),), wanted=(0,))
    a, b = pool(built.config, CPU), pool(built.config, CPU)
    assert torch.equal(gpu.forward(step, a), gpu.forward(step, b))
    assert not b.c_kv[:, 3 * PAGE_TOKENS].isnan().any()
