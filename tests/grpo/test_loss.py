"""The GRPO objective: three tokens by hand, invariants, and the formula again in fp64 autograd."""

import math

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.grpo.loss import combine, grpo_loss, shares

torch.set_num_threads(1)
log = math.log


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_three_tokens_worked_by_hand():
    """Sample 0 (A = 2): ratios 1.5 (clipped to 1.2) and 0.5; sample 1 (A = −1): ratio 1.1; β = 0."""
    logprob = t64(log(1.5), log(0.5), log(1.1)).requires_grad_()
    old = t64(0, 0, 0)
    out = grpo_loss(logprob, old, old, t64(2, 2, -1), torch.tensor([0, 0, 1]), 2, kl_beta=0.0)
    assert out.loss.item() == pytest.approx(-((1.2 * 2 + 0.5 * 2) / 2 + 1.1 * -1) / 2)
    out.loss.backward()
    # The clipped token has no gradient; the others have −r·A / |o| / S.
    assert logprob.grad.tolist() == pytest.approx([0, -0.5 * 2 / 2 / 2, 1.1 / 2])
    assert out.sums["clipped"] == 1 and out.sums["samples"] == 2 and out.sums["masked_samples"] == 0
    assert out.sums["max_abs_log_ratio"] == pytest.approx(log(2))


def test_the_reference_term_by_hand():
    """π_θ 0.5, π_old 0.25, π_ref 0.125: r = 2, ρ = 1/4, KL = 2 (1/4 + log 4 − 1); its gradient r log 4."""
    logprob = t64(log(0.5)).requires_grad_()
    out = grpo_loss(logprob, t64(log(0.25)), t64(log(0.125)), t64(0), torch.tensor([3]), 1, kl_beta=0.5)
    assert out.loss.item() == pytest.approx(0.5 * 2 * (0.25 + log(4) - 1))
    out.loss.backward()
    assert logprob.grad.item() == pytest.approx(0.5 * 2 * log(4))


def test_the_mask_takes_a_bad_sample_that_drifted_out_of_the_surrogate_but_not_out_of_the_kl():
    logprob = t64(-1.0, -1.2, -1.0).requires_grad_()
    old, ref = t64(-0.5, -0.9, -0.5), t64(-1.1, -1.1, -1.1)
    sample = torch.tensor([0, 0, 1])
    # Mean drift: 0.4 in sample 0, 0.5 in sample 1; only sample 0 has a negative advantage.
    out = grpo_loss(logprob, old, ref, t64(-1, -1, 1), sample, 2, mask_delta=0.3)
    only_kl = grpo_loss(logprob, old, ref, t64(0, 0, 1), sample, 2, mask_delta=0.3)
    assert out.loss.item() == pytest.approx(only_kl.loss.item())
    assert out.sums["masked_samples"] == 1 and out.sums["masked_tokens"] == 2
    kept = grpo_loss(logprob, old, ref, t64(-1, -1, 1), sample, 2, mask_delta=0.41)
    assert kept.sums["masked_samples"] == 0 and kept.loss.item() != pytest.approx(out.loss.item())


def test_samples_of_one_episode_with_their_shares_are_one_sample_with_all_its_tokens():
    logprob = t64(log(1.1), log(0.9), log(1.05), log(0.95), log(1.0))
    old, ref, share = t64(0, 0, 0, 0, 0), t64(-0.1, 0, 0.1, 0, 0), t64(2 / 3, 2 / 3, 1 / 3, 1, 1)
    A = t64(1, 1, 1, -1, -1)
    split = grpo_loss(logprob, old, ref, A, torch.tensor([0, 0, 1, 2, 2]), 2, share=share)
    whole = grpo_loss(logprob, old, ref, A, torch.tensor([0, 0, 0, 2, 2]), 2)
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)


def batch(num_samples=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (num_samples,), generator=g)
    sample = torch.repeat_interleave(torch.arange(num_samples), lengths)
    n = int(lengths.sum())
    logprob = -torch.rand(n, generator=g, dtype=torch.float64) * 2
    old = logprob + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    ref = logprob + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    advantage = torch.randn(num_samples, generator=g, dtype=torch.float64)[sample]
    return logprob.requires_grad_(), old, ref, advantage, sample


def literal(logprob, old, ref, advantage, sample, S, eps=0.2, beta=1e-3, delta=0.1):
    """The equations of the notes, sample by sample."""
    total = t64(0.0).sum()
    for i in sample.unique():
        at = sample == i
        r, rho, A = (logprob[at] - old[at]).exp(), (ref[at] - logprob[at]).exp(), advantage[at]
        is_masked = bool(A[0] < 0 and (old[at] - logprob[at]).mean() > delta)
        s = torch.min(r * A, r.clamp(1 - eps, 1 + eps) * A) * (0.0 if is_masked else 1.0)
        total = total + (s - beta * r * (rho - rho.log() - 1)).sum() / at.sum()
    return -total / S


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5])
def test_value_and_gradient_equal_the_literal_formula(seed, beta):
    given = batch(seed=seed)
    ours = grpo_loss(*given, 6, kl_beta=beta).loss
    oracle = literal(*given, 6, beta=beta)
    assert ours.item() == pytest.approx(oracle.item(), abs=1e-13)
    found, expected = (torch.autograd.grad(x, given[0])[0] for x in (ours, oracle))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_splitting_a_batch_between_samples_leaves_gradient_and_sums(cut):
    given = batch()
    whole = grpo_loss(*given, 6)
    at = given[4] < cut
    parts = [grpo_loss(*(x[chosen] for x in given), 6) for chosen in (at, ~at)]
    grad = torch.autograd.grad(whole.loss, given[0])[0]
    split = torch.autograd.grad(parts[0].loss + parts[1].loss, given[0])[0]
    torch.testing.assert_close(split, grad, rtol=0, atol=1e-15)
    assert combine(parts[0].sums, parts[1].sums) == pytest.approx(whole.sums)


def test_sample_numbers_and_order_of_tokens_do_not_matter():
    given = batch()
    order = torch.randperm(len(given[0]), generator=torch.Generator().manual_seed(1))
    mixed = [x[order] for x in given]
    mixed[4] = 100 - 3 * mixed[4]
    assert grpo_loss(*mixed, 6).loss.item() == pytest.approx(grpo_loss(*given, 6).loss.item(), abs=1e-14)


def test_on_policy_the_gradient_is_the_policy_gradient_and_nothing_is_clipped_or_masked():
    logprob, _, _, advantage, sample = batch()
    out = grpo_loss(logprob, logprob.detach(), logprob.detach(), advantage, sample, 6)
    length = torch.bincount(sample)[sample]
    torch.testing.assert_close(torch.autograd.grad(out.loss, logprob)[0], -advantage / length / 6)
    figures = shares(out.sums)
    assert set(figures.values()) == {0.0}


def test_shares_are_means_over_tokens_and_over_samples():
    sums = {
        "tokens": 8,
        "samples": 2,
        "clipped": 2,
        "abs_log_ratio": 4,
        "kl": 1,
        "masked_tokens": 3,
        "masked_samples": 1,
    }
    assert shares(sums | {"max_abs_log_ratio": 0.9}) == {
        "clip_share": 0.25,
        "mean_abs_log_ratio": 0.5,
        "max_abs_log_ratio": 0.9,
        "mean_kl": 0.125,
        "masked_share": 0.5,
    }


def test_no_tokens_give_loss_zero_that_can_run_backward():
    empty = torch.zeros(0, requires_grad=True)
    out = grpo_loss(empty, empty, empty, empty, torch.zeros(0, dtype=torch.long), 4)
    out.loss.backward()
    assert out.loss.item() == 0 and shares(out.sums)["clip_share"] == 0


@pytest.mark.parametrize(
    ("which", "name"), [(1, "sampler log-probs"), (2, "reference log-probs"), (3, "advantages")]
)
def test_values_that_are_missing_are_an_error_not_a_zero(which, name):
    given = list(batch())
    given[which] = given[which].clone()
    given[which][2] = math.nan
    with pytest.raises(EngineError, match=f"1 of {len(given[0])} {name} are not finite"):
        grpo_loss(*given, 6)


def test_shapes_and_a_divisor_of_zero_are_refused():
    given = list(batch())
    with pytest.raises(ValueError, match="num_samples is 0"):
        grpo_loss(*given, 0)
    given[1] = given[1][:-1]
    with pytest.raises(ValueError, match="all five must be"):
        grpo_loss(*given, 6)
