"""The compiled SwiGLU against its PyTorch twin."""

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.kernels.compiled import library
from consilience.model.kernels.gated import FusedGated, is_available
from consilience.model.moe import gated

torch.set_num_threads(1)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("gated"), str), library("gated")
    x = torch.zeros(1)
    assert is_available(x) and not is_available(x.double())
    with exact_mode():
        assert not is_available(x)


def test_values_worked_by_hand_and_slopes_beyond_the_limits():
    """Limit 1: gate 0, 2 (as 1), 1; up -3 (as -1), 0.5, 1 (still sloped)."""
    gate = torch.tensor([0.0, 2.0, 1.0], requires_grad=True)
    up = torch.tensor([-3.0, 0.5, 1.0], requires_grad=True)
    one = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    y = FusedGated.apply(gate, up, 1.0)
    torch.testing.assert_close(y, torch.stack((torch.tensor(0.0), 0.5 * one, one)))
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(
        d_gate, torch.stack((torch.tensor(-0.5), torch.tensor(0.0), one + one * (1 - one)))
    )
    torch.testing.assert_close(d_up, torch.stack((torch.tensor(0.0), one, one)))


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 5), (3, 64), (33, 31)])
@pytest.mark.parametrize("size", [1.0, 20.0, 1e4])
def test_output_and_gradients_equal_the_twin_s_in_fp64(shape, size):
    g = torch.Generator().manual_seed(1)
    gate, up, upstream = (torch.randn(*shape, generator=g) * s for s in (size, size, 1.0))
    single = [x.clone().requires_grad_() for x in (gate, up)]
    double = [x.double().requires_grad_() for x in (gate, up)]
    found, wanted = FusedGated.apply(*single, 10.0), gated(*double, 10.0)
    # A few fp32 roundings of numbers up to limit²; e^x is good to 1e-7.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    ours = torch.autograd.grad(found, single, upstream, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(wanted, double, upstream.double())):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5)
    assert all(map(torch.equal, ours, torch.autograd.grad(found, single, upstream)))


def test_what_is_not_a_number_stays_one_and_alone():
    gate, up = torch.ones(40), torch.ones(40)
    gate[3] = up[20] = float("nan")
    y = FusedGated.apply(gate, up, 10.0)
    assert y.isnan().nonzero()[:, 0].tolist() == [3, 20]
