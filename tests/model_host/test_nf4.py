"""bitsandbytes' NF4 as a precision of the weights: what it loses, that it divides as the others do, and what is said without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_host import nf4, runner
from model_host.batch import Span, Step
from model_host.catalogue import LITE, Entry, Precision
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig
from model_host.divided import LayeredModel, SpreadModel
from model_host.engine import load_engine
from model_host.errors import CheckpointError
from model_host.generation import Fim, Request
from model_host.holders import load_spread
from model_host.latents import LatentPool
from model_host.nf4 import Nf4Stack
from model_host.pages import pages_for
from model_host.placement import Demand, Device, Plan, Share, groups, in_words, plan
from model_host.tokenizer import Tokenizer
from tests.model_host import twins
from tests.model_host.loaded import CARD, CPU, greedy, in_ranks, quiet, whole

REPOSITORY = Path(nf4.__file__).parent.parent


@pytest.fixture(scope="module")
def ids() -> tuple[int, ...]:
    return tuple(Tokenizer(STARTER).encode(Path(nf4.__file__).read_text("utf-8"))[:300])


def run(model: runner.StepModel, ids: tuple[int, ...]) -> Tensor:
    pages = pages_for(len(ids))
    latents = model.pool(pages) if isinstance(model, LayeredModel) else LatentPool(model.config, pages, model.latent_dtype, CPU)
    span = Span(tokens=len(ids), context=len(ids), pages=tuple(range(pages)))
    return model.forward(Step(ids=ids, spans=(span,), wanted=tuple(range(len(ids)))), latents)


def load(dtype: str) -> runner.StepModel:
    return runner.load(STARTER, device="cpu", dtype=dtype, threads=2, kernels="auto", progress=quiet)


def test_it_loses_as_much_as_the_format_must():
    stack = Nf4Stack(2, 300, 128, CPU)
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    stack.put(1, 0, weight)
    back = stack.times(1, torch.eye(128)).T
    assert 0.08 < float((back - weight).norm() / weight.norm()) < 0.1


def test_one_row_and_many_are_multiplied_alike_and_each_by_its_own_expert():
    stack = Nf4Stack(5, 24, 64, CPU)
    draw = torch.Generator().manual_seed(2)
    for expert in range(5):
        stack.put(expert, 0, torch.randn(10, 64, generator=draw))
        stack.put(expert, 10, torch.randn(14, 64, generator=draw))
    x, choices = torch.randn(40, 64, generator=draw), torch.arange(40) // 8
    together = stack.product(x, choices)
    for row in range(40):
        assert torch.allclose(stack.product(x[row : row + 1], choices[row : row + 1])[0], together[row], atol=1e-4)


def test_the_starter_loses_little_and_takes_what_the_plan_says(ids: tuple[int, ...]):
    full, small = load("float32"), load("nf4")
    assert isinstance(small, SpreadModel) and small.precision == "nf4"
    assert small.weight_bytes == sum(group.bytes for group in groups(small.config, Precision.NF4))
    wanted, actual = run(full, ids).log_softmax(-1), run(small, ids).log_softmax(-1)
    assert 0.001 < float((wanted.exp() * (wanted - actual)).sum(-1).mean()) < 0.08  # divergence in nats a token, of bfloat16 too


def test_ranks_and_layers_apart_say_what_the_whole_says():
    config = ModelConfig.read(STARTER)
    experts, layers = range(config.n_routed_experts or 0), range(config.num_hidden_layers)
    wanted, logits = greedy(whole(STARTER, "nf4"), new=4)
    ranks = in_ranks(STARTER, "nf4", 2)
    shares = [Share(device=CARD, layers=some, experts=experts, weight_bytes=0) for some in (layers[:3], layers[3:])]
    apart = load_spread(STARTER, shares, precision="nf4", dtype=torch.float32, threads=1, kernels="torch", progress=quiet)
    try:
        for divided in (ranks, apart):
            said, found = greedy(divided, new=4)
            assert said == wanted and torch.allclose(found, logits, atol=1e-3)
    finally:
        ranks.close()


async def test_the_engine_fills_a_hole_with_it():
    engine = load_engine(STARTER, device="cpu", dtype="nf4")
    prefix = "class Machine:\n" + "".join(f"    def step_{n}(self, value):\n        return value * {n}\n\n" for n in range(20))
    try:
        async with engine.submit(Request(prompt=Fim(prefix=prefix, suffix="\n", middle="    def st"), max_new_tokens=8)) as generation:
            said = "".join([piece async for piece in generation])
    finally:
        engine.close()
    assert said.startswith("ep_")


def test_only_whoever_asks_for_it_pays_for_importing_it():
    code = (
        "import sys; from pathlib import Path; from model_host import runner; from model_host.checkpoints import STARTER;"
        "runner.load(STARTER, device='cpu', dtype='int4', threads=1, kernels='torch', progress=lambda what, share: None);"
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_code_is_fetched_for_it_where_that_could_be(tmp_path: Path):
    """bitsandbytes takes kernels from the hub as soon as the package for that is installed."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*what, **how):\n    raise SystemExit('fetched')\n")
    code = (
        "import torch; from model_host.nf4 import Nf4Stack; stack = Nf4Stack(1, 8, 64, torch.device('cpu'));"
        "stack.put(0, 0, torch.randn(8, 64)); stack.product(torch.randn(1, 64), torch.zeros(1, dtype=torch.long))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_bitsandbytes_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'deepseek-lsp\[bitsandbytes\]', or choose int4"):
        load("nf4")


def test_a_model_with_rows_that_do_not_divide_is_told_to_take_int4(tmp_path: Path):
    config = twins.hub_config(Entry(name="twin", shape=LITE, context_tokens=1), moe_intermediate_size=40)
    folder = twins.write(tmp_path / "twin", config, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"rows of a multiple of 64 weights, and this model has some of \d+: choose int4"):
        runner.load(folder, device="cpu", dtype="nf4", threads=1, kernels="auto", progress=quiet)


def test_the_plan_never_chooses_it_by_itself_and_says_what_it_costs():
    entry = Entry(name="lite", shape=LITE, context_tokens=163_840)
    card = [Device(name="cuda:0", kind="gpu", free_bytes=24 * 10**9, bytes_per_s=1e12)]
    chosen, asked = plan(Demand(entry=entry), card), plan(Demand(entry=entry, precision=Precision.NF4), card)
    assert isinstance(chosen, Plan) and chosen.precision is not Precision.NF4
    assert isinstance(asked, Plan) and any("int4 is faster" in sentence for sentence in in_words(asked))
