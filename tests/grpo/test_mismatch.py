"""The sampler's mismatch: three tokens by hand, and that both estimators estimate the divergence."""

import math

import pytest
import torch

from consilience.grpo.loss import combine
from consilience.grpo.mismatch import mismatch_report, mismatch_sums

torch.set_num_threads(1)


def test_three_tokens_by_hand_in_one_part_or_two():
    """Ratios 2, 1/4 and 1 with bounds 0.5 to 5: one is out."""
    d = torch.tensor([2.0, 0.25, 1.0], dtype=torch.float64).log()
    report = mismatch_report(mismatch_sums(d))
    log2 = math.log(2)
    assert report == pytest.approx(
        {
            "sampler_kl_k1": (-log2 + 2 * log2) / 3,
            "sampler_kl_k3": (2 - 1 - log2 + 0.25 - 1 + 2 * log2) / 3,
            "sampler_gap_max": 2 * log2,
            "sampler_out_of_bounds": 1 / 3,
        }
    )
    assert mismatch_report(combine(mismatch_sums(d[:1]), mismatch_sums(d[1:]))) == pytest.approx(report)
    assert mismatch_report(mismatch_sums(d, (0.1, 1.5)))["sampler_out_of_bounds"] == pytest.approx(1 / 3)


def test_equal_probabilities_give_exact_zeros_and_nothing_gives_nothing():
    assert set(mismatch_report(mismatch_sums(torch.zeros(5))).values()) == {0.0}
    assert mismatch_report(mismatch_sums(torch.zeros(0))) == {} == mismatch_report({})


def test_both_estimators_have_the_divergence_as_their_mean():
    """Over all of a small vocabulary instead of samples: Σ μ k1 = Σ μ k3 = KL(μ ‖ π)."""
    g = torch.Generator().manual_seed(0)
    mu, pi = (torch.rand(20, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    expected = float((mu.exp() * (mu - pi)).sum())
    for name in ("sampler_kl_k1", "sampler_kl_k3"):
        each = [mismatch_report(mismatch_sums(d[None]))[name] for d in pi - mu]
        assert float((mu.exp() * torch.tensor(each)).sum()) == pytest.approx(expected)
        assert name == "sampler_kl_k1" or min(each) >= 0


def test_shares_of_a_replayed_routing():
    sums = {"routing_differing": 3.0, "routing_compared": 12.0, "routing_pairs": 16.0}
    assert mismatch_report(sums) == {"routing_differs": 0.25, "routing_replayed": 0.75}
    none = {"routing_differing": 0.0, "routing_compared": 0.0, "routing_pairs": 16.0}
    assert mismatch_report(none) == {"routing_differs": 0.0, "routing_replayed": 0.0}
