"""The Triton norm and rotation against their twins in fp64, forward and backward; on a GPU, or interpreted.

Tolerances: a handful of fp32 roundings of numbers below 10, and of bf16 results a unit in the last place
(a GPU rounds to the nearest, the interpreter cuts).
"""

import pytest
import torch

from consilience.model.kernels import gpu_norm
from consilience.model.norm import plain_norm
from consilience.model.rope import rotate

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations_of(*shape):
    angle = 3 * draw(*shape, seed=5)
    return torch.polar(torch.ones_like(angle), angle)


def twin(x, weight, rotation, eps, is_inverse):
    y = x if eps is None else plain_norm(x, eps)
    y = y if weight is None else y * weight
    return y if rotation is None else rotate(y, rotation, is_inverse=is_inverse)


def compare(device, dtype, shape, pairs, has_norm, has_weight, is_inverse=False):
    """Largest relative errors of the output and the gradients."""
    x = draw(*shape).to(dtype)
    weight = (1 + 0.3 * draw(shape[-1], seed=1)).to(dtype) if has_weight else None
    rotation = rotations_of(*shape[:2], pairs) if pairs else None
    if rotation is not None and len(shape) == 4:
        rotation = rotation[:, :, None]
    eps, upstream = (1e-6 if has_norm else None), draw(*shape, seed=2).to(dtype)
    leaves = [t for t in (x, weight) if t is not None]
    ours = [t.to(device).requires_grad_() for t in leaves]
    exact = [t.double().requires_grad_() for t in leaves]
    place = None if rotation is None else rotation.to(device)
    sign = -1.0 if is_inverse else 1.0
    y = gpu_norm.norm_rotate(ours[0], ours[1] if has_weight else None, place, eps, sign)
    wanted = twin(exact[0], exact[1] if has_weight else None, rotation, eps, is_inverse)
    pairs_of = [(y, wanted)]
    pairs_of += zip(
        torch.autograd.grad(y, ours, upstream.to(device)),
        torch.autograd.grad(wanted, exact, upstream.double()),
    )
    assert all(a.dtype == dtype for a, _ in pairs_of)
    return [((a.double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs_of]


@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize(("width", "pairs"), [(8, 4), (20, 3), (24, 12), (64, 8), (33, 0), (3, 0)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_output_and_gradients_equal_the_twin(heads, width, pairs, has_weight, triton_device):
    shape = (2, 5, width) if heads is None else (2, 5, heads, width)
    assert max(compare(triton_device, torch.float32, shape, pairs, True, has_weight)) < 2e-6


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize(("width", "pairs"), [(8, 4), (20, 3)])
def test_a_rotation_alone_and_its_inverse_equal_the_twin(width, pairs, is_inverse, triton_device):
    shape = (2, 5, 3, width)
    assert max(compare(triton_device, torch.float32, shape, pairs, False, False, is_inverse)) < 1e-6
    x, rotation = draw(*shape).to(triton_device), rotations_of(2, 5, 1, pairs).to(triton_device)
    there = gpu_norm.norm_rotate(x, None, rotation, None, 1.0)
    back = gpu_norm.norm_rotate(there, None, rotation, None, -1.0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [512, 1100])
def test_bf16_rows_are_rounded_once(width, triton_device):
    """fp32 inside, and the weight's gradient is rounded after its sum."""
    assert max(compare(triton_device, torch.bfloat16, (2, 9, width), 32, True, True)) < 2**-7


def test_a_pair_worked_by_hand(triton_device):
    # mean of squares of (3, 4, 0, 5) is 12.5; turned by 90 degrees, (a, b) becomes (-b, a).
    x = torch.tensor([[[3.0, 4.0, 0.0, 5.0]]], device=triton_device)
    quarter = torch.tensor([[[1j]]], dtype=torch.complex64, device=triton_device)
    weight, s = torch.tensor([1.0, 2.0, 1.0, 1.0], device=triton_device), 12.5**-0.5
    found = gpu_norm.norm_rotate(x, weight, quarter, 0.0, 1.0)
    torch.testing.assert_close(found.cpu(), torch.tensor([[[3 * s, 8 * s, -5 * s, 0.0]]]))


def test_a_row_has_the_same_bits_in_any_company_and_gradients_repeat(triton_device, monkeypatch):
    from consilience.model.kernels import triton_norm

    monkeypatch.setattr(triton_norm, "BACKWARD", triton_norm.Launch(64, 16, programs=3))
    x, weight = draw(40, 1, 1, 24).to(triton_device).requires_grad_(), draw(24, seed=4).to(triton_device)
    rotation = rotations_of(40, 1, 1, 5).to(triton_device)
    weight.requires_grad_()
    together = gpu_norm.norm_rotate(x, weight, rotation, 1e-6, 1.0)
    for i in (0, 7, 39):
        alone = gpu_norm.norm_rotate(x[i : i + 1], weight, rotation[i : i + 1], 1e-6, 1.0)
        assert torch.equal(alone[0], together[i])
    upstream = draw(40, 1, 1, 24, seed=6).to(triton_device)
    first, again = (torch.autograd.grad(together, (x, weight), upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, weight)]
    wanted = twin(*exact, rotation.cpu(), 1e-6, False)
    for a, b in zip(first, torch.autograd.grad(wanted, exact, upstream.double().cpu())):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 512])
def test_rows_and_their_gradients_have_the_same_bits_alone_and_among_three_hundred(width, triton_device):
    """Of the weight's gradient this cannot be asked: it is a sum over the rows."""

    def run(first, last):
        own = x[first:last].clone().requires_grad_()
        y = gpu_norm.norm_rotate(own, weight, None, 1e-6, 1.0)
        return y, torch.autograd.grad(y, own, upstream[first:last])[0]

    x, upstream = (draw(300, width, seed=s).bfloat16().to(triton_device) for s in (0, 1))
    weight = (1 + 0.3 * draw(width, seed=2)).bfloat16().to(triton_device)
    whole = run(0, 300)
    for first, last in ((0, 1), (299, 300), (7, 9), (100, 133), (1, 300)):
        for part, all_rows in zip(run(first, last), whole):
            assert torch.equal(part, all_rows[first:last]), (first, last)


def test_a_row_that_begins_where_no_vector_does_has_the_same_bits(triton_device):
    x = draw(7, 66).to(triton_device)  # 264 bytes a row
    whole = gpu_norm.norm_rotate(x, None, None, 1e-6, 1.0)
    for i in range(7):
        assert torch.equal(gpu_norm.norm_rotate(x[i : i + 1], None, None, 1e-6, 1.0)[0], whole[i])


def test_exact_mode_runs_the_kernel_too(triton_device, monkeypatch):
    from consilience.model.exact import exact_mode

    monkeypatch.setattr(gpu_norm, "can_use_triton", lambda *_: True)
    with exact_mode():
        assert gpu_norm.is_available(draw(2, 8).to(triton_device), None)


def test_no_rows_give_no_rows(triton_device):
    x = torch.zeros(0, 4, 8, device=triton_device).requires_grad_()
    weight = torch.ones(8, device=triton_device).requires_grad_()
    y = gpu_norm.norm_rotate(x, weight, None, 1e-6, 1.0)
    assert y.shape == (0, 4, 8)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()
