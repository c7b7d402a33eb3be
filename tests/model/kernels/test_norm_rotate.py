"""The compiled norm and rotation against their PyTorch twins, forward and backward."""

import pytest
import torch

from consilience.model.kernels.compiled import library
from consilience.model.kernels.norm_rotate import is_available, norm_rotate
from consilience.model.norm import plain_norm

torch.set_num_threads(1)


def twin(x, weight, rotation, eps, is_inverse=False):
    y = x if eps is None else plain_norm(x, eps)
    y = y if weight is None else y * weight
    if rotation is None:
        return y
    turn = rotation.conj() if is_inverse else rotation
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(y[..., -width:].unflatten(-1, (-1, 2)).clone())
    return torch.cat((y[..., :-width], torch.view_as_real(pairs * turn).flatten(-2)), dim=-1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations_of(rows, tokens, pairs):
    angle = draw(rows, tokens, pairs, seed=5)
    return torch.polar(torch.ones_like(angle), angle)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("norm_rotate"), str), library("norm_rotate")
    assert is_available(torch.zeros(2, 3)) and not is_available(torch.zeros(2, 3, dtype=torch.float64))


def test_a_pair_worked_by_hand():
    # mean of squares of (3, 4, 0, 5) is 12.5; turned by 90 degrees, (a, b) becomes (-b, a).
    x, quarter = torch.tensor([[[3.0, 4.0, 0.0, 5.0]]]), torch.tensor([[[1j]]], dtype=torch.complex64)
    s = 12.5**-0.5
    found = norm_rotate(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), quarter, 0.0)
    torch.testing.assert_close(found, torch.tensor([[[3 * s, 8 * s, -5 * s, 0.0]]]))
    back = norm_rotate(x, None, quarter, None, is_inverse=True)
    torch.testing.assert_close(back, torch.tensor([[[3.0, 4.0, 5.0, 0.0]]]))


@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize(("width", "pairs"), [(8, 4), (20, 3), (33, 8), (64, 8), (1, 0)])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("is_inverse", [False, True])
def test_output_and_gradients_equal_the_twin(heads, width, pairs, has_norm, is_inverse):
    shape = (2, 5, width) if heads is None else (2, 5, heads, width)
    x = draw(*shape).requires_grad_()
    weight = (1 + 0.3 * draw(width, seed=1)).requires_grad_() if has_norm else None
    rotation = rotations_of(2, 5, pairs) if pairs else None
    if rotation is not None and heads is not None:
        rotation = rotation[:, :, None]
    eps, leaves = (1e-6 if has_norm else None), [x] if weight is None else [x, weight]
    upstream = draw(*shape, seed=2)
    found, wanted = (f(x, weight, rotation, eps, is_inverse=is_inverse) for f in (norm_rotate, twin))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # a few fp32 roundings
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_company():
    x, rotation, weight = draw(64, 1, 3, 23), rotations_of(64, 1, 5)[:, :, None], draw(23, seed=4)
    together = norm_rotate(x, weight, rotation, 1e-6)
    for i in (0, 7, 63):
        assert torch.equal(norm_rotate(x[i : i + 1], weight, rotation[i : i + 1], 1e-6)[0], together[i])
