"""RMSNorm by hand, against torch's, and its explicit gradient."""

import torch

from consilience.model.norm import RMSNorm, rms

torch.set_num_threads(1)


def test_two_values_by_hand():
    # mean of squares (9 + 16) / 2 = 12.5
    out = rms(torch.tensor([3.0, 4.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([3.0, 4.0]) / 12.5**0.5)
    assert torch.equal(rms(torch.zeros(3), 1e-6), torch.zeros(3))


def test_gradcheck_with_and_without_a_weight():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    # A large eps, so that a backward which forgets it fails.
    assert torch.autograd.gradcheck(lambda t: rms(t, 0.3), (x,))
    norm = RMSNorm(5, 0.3).double()
    assert torch.autograd.gradcheck(
        lambda t, w: torch.func.functional_call(norm, {"weight": w}, (t,)), (x, norm.weight)
    )


def test_values_equal_torch():
    x, norm = torch.randn(7, 16), RMSNorm(16, 1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6))


def test_bf16_is_computed_in_fp32_and_rounded_once():
    x, norm = torch.randn(64, 32).bfloat16(), RMSNorm(32, 1e-6, torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    wide = torch.nn.functional.rms_norm(x.double(), (32,), norm.weight.double(), 1e-6)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    # One rounding to 8 significant bits is at most 2^-8 relative; two would reach past it.
    assert ((out.double() - wide).abs() <= wide.abs() * 2**-7.99).all()


def test_the_input_is_left_as_it_was():
    x = torch.randn(4, 8)
    before = x.clone()
    rms(x, 1e-6), RMSNorm(8, 1e-6)(x)
    assert torch.equal(x, before)
