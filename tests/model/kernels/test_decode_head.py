"""Compiled logits and draws of few rows against their PyTorch twins."""

import math

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.kernels import decode_head
from consilience.model.kernels.compiled import library

torch.set_num_threads(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniforms(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_this_machine_runs_the_compiled_kernels_where_no_gradient_is_wanted():
    assert not isinstance(library("decode_head"), str), library("decode_head")
    x = draw(2, 3)
    assert not decode_head.is_available(x)
    with torch.no_grad():
        assert decode_head.is_available(x) and not decode_head.is_available(x.double())
        assert not decode_head.is_available(draw(decode_head.MOST_ROWS + 1, 3))
        with exact_mode():
            assert not decode_head.is_available(x)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 33, 70, 300])
@pytest.mark.parametrize(("width", "size"), [(64, 640), (37, 17), (5, 300), (16, 8)])
def test_logits_equal_the_twin_s_and_a_row_s_bits_do_not_depend_on_its_company(rows, width, size):
    hidden, weight = draw(rows, width), draw(size, width, seed=1)
    found = decode_head.logits(hidden, weight)
    # Up to 64 terms of size 1, their sum of size 8.
    torch.testing.assert_close(found, hidden @ weight.T, rtol=1e-5, atol=1e-5)
    for row in range(rows):
        assert torch.equal(decode_head.logits(hidden[row : row + 1], weight)[0], found[row])


def test_a_draw_worked_by_hand():
    """Probabilities 1/8, 1/2, 3/8: running sums 0.125, 0.625, 1."""
    logits = torch.tensor([0.125, 0.5, 0.375]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.12, 0.13, 0.62, 0.63], dtype=torch.float64)
    tokens, logprobs = decode_head.draw(logits, torch.ones(5), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprobs, logits[0][tokens])
    tokens, logprobs = decode_head.draw(logits[:1], torch.zeros(1), uniform[-1:])
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.5)]))


def test_rows_of_other_temperatures_do_not_matter():
    logits, uniform, heat = draw(40, 129), uniforms(40), (uniforms(40, seed=1).float() - 0.3).clamp(min=0)
    assert (heat == 0).any() and (heat > 0).any()
    tokens, logprobs = decode_head.draw(logits, heat, uniform)
    for row in range(40):
        one = slice(row, row + 1)
        alone = decode_head.draw(logits[one], heat[one], uniform[one])
        assert torch.equal(alone[0][0], tokens[row]) and torch.equal(alone[1][0], logprobs[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_says_so(bad, temperature):
    logits = draw(3, 100)
    logits[1, 70] = bad
    tokens, logprobs = decode_head.draw(logits, torch.full((3,), temperature), uniforms(3))
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert (tokens >= 0).all() and (tokens < 100).all()


def test_of_equal_logits_greed_takes_the_first_and_nothing_impossible_is_drawn():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert decode_head.draw(logits, torch.zeros(1), torch.zeros(1, dtype=torch.float64))[0].tolist() == [1]
    masked = torch.full((2, 130), float("-inf"))
    masked[:, 67] = 0.0
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = decode_head.draw(masked, torch.ones(2), uniform)
    assert tokens.tolist() == [67, 67] and logprobs.tolist() == [0.0, 0.0]
