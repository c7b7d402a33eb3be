"""The compiled rows of log-probabilities against the plain twin in fp64; threads; a case by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from consilience.model.exact import exact_mode
from consilience.model.kernels.compiled import library
from consilience.model.kernels.linear_logprob import linear_logprob, linear_logprob_dense
from consilience.model.kernels.logprob_rows import is_available

torch.set_num_threads(1)


def _run(function, n: int, V: int, dtype: torch.dtype, **settings) -> tuple[torch.Tensor, ...]:
    """logprob, entropy, gradients of hidden and head."""
    generator = torch.Generator().manual_seed(n + V)
    hidden, head = (torch.randn(size, 12, generator=generator).to(dtype).requires_grad_() for size in (n, V))
    targets = torch.randint(V, (n,), generator=generator)
    upstream = torch.randn(2, n, generator=generator).to(dtype)
    found = function(hidden, head, targets, **settings)
    grads = torch.autograd.grad(found, (hidden, head), tuple(upstream))
    return (*(x.detach() for x in found), *grads)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("logprob_rows"), str), library("logprob_rows")
    x = torch.zeros(1)
    assert is_available(x) and is_available(x, x.bfloat16()) and not is_available(x, x.double())
    with exact_mode():
        assert not is_available(x)


def test_odds_of_three_to_one_worked_by_hand():
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[math.log(3.0)], [0.0]])
    found = linear_logprob(hidden, head, torch.tensor([1]))
    assert_close(found.logprob, torch.tensor([math.log(0.25)]))
    assert_close(found.entropy, torch.tensor([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    ("n", "V", "temperature"), [(1, 1, 1.0), (5, 7, 0.5), (40, 100, 1.0), (9, 1030, 2.0)]
)
def test_values_and_gradients_equal_the_twin_s_in_fp64(n, V, temperature, keep_bytes):
    exact = _run(linear_logprob_dense, n, V, torch.float64, temperature=temperature)
    settings = {"temperature": temperature, "chunk_tokens": 16, "keep_bytes": keep_bytes}
    for found, expected in zip(_run(linear_logprob, n, V, torch.float32, **settings), exact, strict=True):
        # Logits of up to 20 have errors of 20 * 2^-24, and so has what is e to their power.
        assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_threads_and_what_is_kept_change_no_bit():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, targets = (
                torch.randn(300, 700, generator=torch.Generator().manual_seed(1)),
                torch.arange(300),
            )
            hidden, head = (
                logits.requires_grad_(),
                torch.eye(700),
            )  # a product of which no thread changes a bit
            for keep_bytes in (0, 1 << 30):
                made = linear_logprob(hidden, head, targets, keep_bytes=keep_bytes)
                found.append((*made, *torch.autograd.grad(made, hidden, (torch.ones(300), -torch.ones(300)))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
