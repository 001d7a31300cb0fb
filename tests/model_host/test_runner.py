"""The runner refuses a step that its model could only answer with others' memory."""

import re

import pytest
import torch

from model_host.batch import Span, Step
from model_host.checkpoints import STARTER
from model_host.native.library import available_levels
from model_host.runner import Kernels, Runner, load


@pytest.fixture(scope="module", params=["torch", *(["auto"] if available_levels() else [])])
def runner(request: pytest.FixtureRequest) -> Runner:
    kernels: Kernels = request.param
    return Runner(load(STARTER, device="cpu", dtype="float32", threads=1, kernels=kernels, progress=lambda what, share: None), 1)


def step(*pages: int, tokens: int = 1, context: int = 1, ids: tuple[int, ...] = (5,), wanted: tuple[int, ...] = (0,)) -> Step:
    return Step(ids=ids, spans=(Span(tokens=tokens, context=context, pages=pages),), wanted=wanted)


def test_a_step_within_its_bounds_runs(runner: Runner):
    assert runner.run(step(runner.pages - 1)).shape == (1, runner.model.config.vocab_size)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (step(1_000_000), "names a page that is not one of 64"),
        (step(64), "names a page that is not one of 64"),
        (step(-1), "names a page that is not one of 64"),
        (step(0, context=17), "has too few pages"),
        (step(), "has too few pages"),
        (step(0, tokens=2), "1 ids for spans of other lengths"),
        (step(0, ids=(1_000_000,)), "an id that is not one of 8192"),
        (step(0, ids=(-1,)), "an id that is not one of 8192"),
        (step(0, wanted=(1,)), "logits wanted of (1,), with 1 tokens"),
    ],
)
def test_a_step_outside_its_bounds_is_refused_before_it_runs(runner: Runner, wrong: Step, said: str):
    before = runner._latents.c_kv.clone()
    with pytest.raises(AssertionError, match=re.escape(said)):
        runner.run(wrong)
    assert torch.equal(runner._latents.c_kv.nan_to_num(), before.nan_to_num())
