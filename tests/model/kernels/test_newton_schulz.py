"""The hybrid Newton–Schulz iteration against an fp64 SVD; its Triton products: test_triton_symmetric.py."""

import pytest
import torch

from consilience.model.kernels.newton_schulz import COEFFICIENTS, newton_schulz

torch.set_num_threads(1)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def iterate_singular_values(x):
    """What the ten steps do to a singular value: the matrix iteration is this scalar one on each."""
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 64), (64, 16), (1, 9), (24, 32)])
def test_the_iteration_is_the_svd_with_its_singular_values_mapped(n, m):
    g = draw(1, n, m, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    mapped = iterate_singular_values(s / torch.linalg.vector_norm(g))
    expected = u @ torch.diag_embed(mapped) @ vh
    torch.testing.assert_close(newton_schulz(g), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(16, 64), (64, 16), (32, 48)])
def test_the_result_is_near_the_orthogonal_factor(n, m):
    g = draw(1, n, m, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    found = newton_schulz(g.float()).double()
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.05
    assert (found - u @ vh).abs().max() < 0.05


def test_a_zero_matrix_stays_zero_and_a_tiny_one_does_not():
    assert not newton_schulz(torch.zeros(1, 3, 5)).any()
    g = draw(1, 3, 5)
    torch.testing.assert_close(newton_schulz(g * 1e-12), newton_schulz(g), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [-110, -100, -64, 64, 100])
def test_matrices_whose_squares_leave_fp32_are_orthogonalised_as_others_are(power, dtype):
    g = draw(2, 6, 10, dtype=dtype)
    scaled = g * 2.0**power
    found = newton_schulz(scaled)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, newton_schulz(g), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_subnormal_and_zero_matrices_stay_finite_among_ordinary_ones():
    g = draw(1, 6, 10)
    found = newton_schulz(torch.cat([g, g * 1e-40, g * 0]))
    assert torch.isfinite(found).all()
    assert torch.equal(found[:1], newton_schulz(g)) and not found[2].any()
