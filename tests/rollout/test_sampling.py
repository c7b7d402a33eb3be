"""Temperature, draws and verdicts: worked by hand, then summed over all random numbers there are."""

import math

import pytest
import torch

from consilience.model.kernels import decode_head
from consilience.rollout.sampling import accept, draw, sample, tempered

torch.set_num_threads(1)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_three_tokens_by_hand():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]]).repeat(3, 1)
    logprobs, p = tempered(logits, torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(p[0], rows(1 / 8, 2 / 8, 5 / 8), rtol=0, atol=1e-7)
    torch.testing.assert_close(p[1], rows(1 / 30, 4 / 30, 25 / 30), rtol=0, atol=1e-7)
    assert p[2].tolist() == [0.0, 0.0, 1.0]  # greedy, with the log-probability of temperature 1
    torch.testing.assert_close(logprobs[2], logprobs[0], rtol=0, atol=0)
    assert logprobs.dtype == torch.float32 and p.dtype == torch.float64
    p = p[0].expand(5, -1)
    assert draw(p, rows(0.0, 0.1249, 0.126, 0.374, 0.376)).tolist() == [0, 0, 1, 1, 2]


def test_of_equal_logits_greedy_takes_the_first():
    _, p = tempered(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.0]))
    assert p.tolist() == [[0.0, 1.0, 0.0]]


def test_tokens_without_probability_are_never_drawn_and_rows_need_not_sum_to_one():
    p = rows([0.0, 3.0, 0.0, 1.0, 0.0]).expand(1000, -1)
    found = draw(p, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert found.bincount(minlength=5).tolist() == [0, 750, 0, 250, 0]


def test_a_verdict_by_hand():
    """p = (.5, .3, .2), q = (.2, .5, .3): draft 0 always stands, draft 1 at 3/5; only token 0 has a rest."""
    p, q = rows(0.5, 0.3, 0.2).expand(4, -1), rows(0.2, 0.5, 0.3).expand(4, -1)
    draft = torch.tensor([0, 1, 1, 2])
    uniform = rows([0.999, 0.5], [0.599, 0.5], [0.601, 0.999], [0.9, 0.0])
    token, is_accepted = accept(p, q, draft, uniform)
    assert token.tolist() == [0, 1, 0, 0] and is_accepted.tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_follow_p_whatever_q_is(seed):
    """The share of every token over a fine grid of all three random numbers."""
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(2, 6, generator=g, dtype=torch.float64) ** 3).unbind(0)
    p[2], q[4] = 0.0, 0.0
    num = 60
    grid = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    points = torch.cartesian_prod(grid, grid, grid)
    many = len(points)
    draft = draw(q.expand(many, -1), points[:, 0])
    token, is_accepted = accept(p.expand(many, -1), q.expand(many, -1), draft, points[:, 1:])
    share = token.bincount(minlength=6) / many
    # Every border between two tokens falls into a cell of width 1/60 on one of the three axes.
    torch.testing.assert_close(share.double(), p / p.sum(), rtol=0, atol=3 / num)
    overlap = torch.minimum(p / p.sum(), q / q.sum()).sum()
    assert abs(is_accepted.double().mean() - overlap) < 3 / num
    assert not (token == 2).any()


def test_a_q_that_is_not_finite_leaves_the_token_to_p():
    p, q = rows([0.25, 0.0, 0.75], [0.25, 0.0, 0.75]), rows([float("nan")] * 3, [0.0, 0.0, 0.0])
    token, is_accepted = accept(p, q, torch.tensor([1, 2]), rows([0.0, 0.2], [0.0, 0.3]))
    assert token.tolist() == [0, 2] and not is_accepted.any()


def test_equal_distributions_accept_every_draft_and_greedy_ones_only_the_best_token():
    p = torch.rand(500, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draft = draw(p, uniform[:, 0])
    token, is_accepted = accept(p, 7 * p, draft, uniform)
    assert torch.equal(token, draft) and is_accepted.all()
    best, guess = p.argmax(-1), torch.arange(500) % 9
    one_hot = torch.nn.functional.one_hot
    token, is_accepted = accept(one_hot(best, 9).double(), one_hot(guess, 9).double(), guess, uniform)
    assert torch.equal(token, best) and torch.equal(is_accepted, guess == best)


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_compiled_draws_and_their_log_probabilities_equal_the_twin_s(size, temperature):
    rows = 100
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, size, generator=generator)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    heat = torch.full((rows,), temperature)
    assert not decode_head.is_available(logits)  # where gradients are wanted
    wanted, twins = sample(logits, heat, uniform)
    with torch.no_grad():
        assert decode_head.is_available(logits)
        tokens, logprobs = sample(logits, heat, uniform)
    # A running sum of fp32 exponentials is off by about 1e-7, and no draw is likely to lie so near a border.
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, twins, rtol=1e-5, atol=2e-6)
