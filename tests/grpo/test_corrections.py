"""Corrections of a sampler that disagrees: two samples by hand, what stays when, the same in fp64 numpy."""

import math

import numpy as np
import pytest
import torch

from consilience.grpo.corrections import (
    Corrections,
    geometric_mask,
    masked_importance,
    sequence_mask,
    sequence_truncated,
    truncated_importance,
)

torch.set_num_threads(1)

# Sample 7: ratios 2, 1/4 and 4, product 2, geometric mean 2^(1/3) = 1.26; sample 3: ratio 3.
LOG = torch.tensor([2.0, 0.25, 4.0, 3.0], dtype=torch.float64).log()
SAMPLE = torch.tensor([7, 7, 7, 3])


def test_each_correction_by_hand():
    cases = {
        "truncated": (truncated_importance(LOG, 2.5), [2, 0.25, 2.5, 2.5]),
        "masked": (masked_importance(LOG, (0.5, 3.5)), [2, 0, 0, 3]),
        "sequence truncated": (sequence_truncated(LOG, SAMPLE, 2.5), [2, 2, 2, 2.5]),
        "product in bounds": (sequence_mask(LOG, SAMPLE, (1.5, 2.5)), [1, 1, 1, 0]),
        "product": (sequence_mask(LOG, SAMPLE, (2.5, 3.5)), [0, 0, 0, 1]),
        "geometric in bounds": (geometric_mask(LOG, SAMPLE, (1.2, 1.3)), [1, 1, 1, 0]),
        "geometric": (geometric_mask(LOG, SAMPLE, (1.3, 3.5)), [0, 0, 0, 1]),
    }
    for name, (found, expected) in cases.items():
        assert found.tolist() == pytest.approx(expected, abs=1e-12), name


def test_a_weight_and_masks_are_multiplied():
    both = Corrections(token_truncate=2.5, geometric_mask=(1.2, 1.3))
    assert both.weights(LOG, SAMPLE).tolist() == pytest.approx([2, 0.25, 2.5, 0])
    assert not Corrections().is_on and both.is_on
    assert Corrections().weights(LOG, SAMPLE).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "corrections",
    [
        Corrections(token_truncate=2.0),
        Corrections(token_mask=(0.5, 5.0)),
        Corrections(sequence_truncate=2.0),
        Corrections(sequence_mask=(0.5, 5.0), geometric_mask=(0.999, 1.002)),
    ],
)
def test_where_sampler_and_trainer_agree_every_correction_is_one(corrections):
    assert corrections.weights(torch.zeros(4), SAMPLE).tolist() == [1, 1, 1, 1]


def test_weights_are_constants_to_the_gradient():
    log_ratio = LOG.clone().requires_grad_()
    every = Corrections(2.0, (0.1, 9.0), 3.0, (0.1, 9.0), (0.1, 9.0))
    assert not every.weights(log_ratio, SAMPLE).requires_grad


def test_the_product_drops_long_samples_of_the_same_kind_and_the_geometric_mean_does_not():
    """Ratio 1.01 a token: 1.01^10 = 1.1 and 1.01^200 = 7.3."""
    for length, is_kept in ((10, 1.0), (200, 0.0)):
        log_ratio = torch.full((length,), math.log(1.01), dtype=torch.float64)
        sample = torch.zeros(length, dtype=torch.long)
        assert sequence_mask(log_ratio, sample, (0.5, 5.0)).unique().tolist() == [is_kept]
        assert geometric_mask(log_ratio, sample, (0.5, 5.0)).unique().tolist() == [1.0]


def test_random_samples_against_their_definition():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    sample = np.repeat(rng.permutation(40), lengths)
    d = 0.5 * rng.standard_normal(lengths.sum())
    products = {i: np.exp(d[sample == i].sum()) for i in range(40)}
    means = {i: np.exp(d[sample == i].mean()) for i in range(40)}
    expected = [min(products[i], 1.7) * (0.4 <= products[i] <= 3) * (0.8 <= means[i] <= 1.3) for i in sample]
    found = Corrections(sequence_truncate=1.7, sequence_mask=(0.4, 3), geometric_mask=(0.8, 1.3))
    weights = found.weights(torch.from_numpy(d), torch.from_numpy(sample))
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    assert 0 < (weights == 0).sum() < len(d)


def test_a_sampler_that_is_off_is_corrected_to_the_trainers_own_expectation():
    """Σ_v μ(v) w(v) f(v) = Σ_v π(v) f(v): exactly without a cap, from below with one and f ≥ 0."""
    rng = np.random.default_rng(1)
    mu, pi = (torch.from_numpy(rng.dirichlet(np.ones(50))) for _ in range(2))
    values = torch.from_numpy(rng.random(50))
    log_ratio = pi.log() - mu.log()
    exact = float((pi * values).sum())
    assert float((mu * truncated_importance(log_ratio, 1e9) * values).sum()) == pytest.approx(exact)
    assert float((mu * truncated_importance(log_ratio, 2.0) * values).sum()) < exact
