"""The next token: greedy, limited, seeded."""

import torch

from model_host.generation import Sampling
from model_host.sampling import Sampler

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -5.0])


def drawn(sampling: Sampling, count: int = 200) -> set[int]:
    sampler = Sampler(sampling, ())
    return {sampler.choose(LOGITS) for _ in range(count)}


def test_greedy_takes_the_likeliest_of_those_allowed():
    assert Sampler(Sampling(), ()).choose(LOGITS) == 1
    assert Sampler(Sampling(), ()).choose(LOGITS, allowed=torch.tensor([0, 3, 4])) == 3


def test_top_k_and_top_p_leave_only_the_likeliest():
    assert drawn(Sampling(temperature=2.0, top_k=2)) == {1, 2}
    assert drawn(Sampling(temperature=1.0, top_p=0.6)) == {1}
    assert drawn(Sampling(temperature=5.0)) == {0, 1, 2, 3, 4}


def test_sampling_keeps_to_what_is_allowed():
    sampler = Sampler(Sampling(temperature=3.0, seed=4), ())
    assert {sampler.choose(LOGITS, allowed=torch.tensor([4, 0])) for _ in range(100)} == {0, 4}
