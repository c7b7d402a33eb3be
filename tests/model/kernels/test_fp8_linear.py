"""FP8 projections: what the twin multiplies, and the kernels against it."""

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.kernels import fp8_linear
from consilience.model.kernels.fp8_linear import by_kernels, fp8_linears, is_available, stored_tiles
from consilience.model.number_formats import decode_fp8, encode_fp8
from consilience.model.quantization import mark_passing

torch.set_num_threads(1)


def draw(*shape, seed=0, dtype=torch.float32):
    """Normal values, columns from 2^-3 to 2^3."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 2.0 ** torch.randint(-3, 4, shape[-1:], generator=g)).to(dtype)


def stored(x, tile=(1, 128)):
    """x as the format stores it, by encoding and decoding, fp64."""
    return decode_fp8(*encode_fp8(x.detach().float(), tile), torch.float32, tile).double()


def expected_of(x, weight, grad):
    """Output and both gradients of one projection in fp64 from stored values."""
    tiles, turned = stored(weight, (128, 128)), lambda m: stored(m.t().contiguous())
    return stored(x) @ tiles.t(), stored(grad) @ tiles, turned(grad) @ turned(x).t()


def test_a_product_by_hand():
    x = torch.tensor([[448.0, 17.0, 0.7]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, -448.0]], requires_grad=True)
    # Scales are 1: 17 lies between 16 and 18, the tie goes to the even 16; 0.7 to 0.6875.
    (y,) = fp8_linears(x, weight)
    assert y.tolist() == [[448 + 2 * 16 - 448 * 0.6875]]
    y.backward(torch.tensor([[3.3]]))
    # 3.3 = 422.4 · 2^-7 goes to 416 · 2^-7 = 3.25. Along tokens each value of x is alone in its block: 17 is
    # 272 · 2^-4, between 256 and 288, and 0.7 is 358.4 · 2^-9, nearest to 352.
    assert x.grad.tolist() == [[3.25, 6.5, -3.25 * 448]]
    assert weight.grad.tolist() == [[3.25 * 448, 3.25 * 16, 3.25 * 0.6875]]


@pytest.mark.parametrize("shape", [(5, 40, 24), (200, 136, 130), (1, 128, 256)])
def test_the_twin_multiplies_what_the_format_stores(shape):
    rows, inner, out = shape
    x, weights = (
        draw(rows, inner).requires_grad_(),
        [draw(out, inner, seed=s).requires_grad_() for s in (1, 2)],
    )
    grads = [draw(rows, out, seed=s) for s in (3, 4)]
    made = fp8_linears(x, *weights)
    torch.autograd.backward(made, grads)
    each = [expected_of(x, w, g) for w, g in zip(weights, grads)]
    # fp32 sums of up to 200 terms: 200 · 2^-24 of the largest partial sum, itself near the result's norm.
    close = lambda a, b: (a.double() - b).norm() <= 2e-5 * b.norm()
    assert close(x.grad, each[0][1] + each[1][1])
    for y, w, (out_, _, d_weight) in zip(made, weights, each):
        assert close(y.detach(), out_) and close(w.grad, d_weight)


def test_rounding_costs_what_three_bits_of_mantissa_cost():
    x, weight, grad = (
        draw(256, 256).requires_grad_(),
        draw(256, 256, seed=1).requires_grad_(),
        draw(256, 256, seed=2),
    )
    (y,) = fp8_linears(x, weight)
    y.backward(grad)
    exact = (x @ weight.t(), grad @ weight, grad.t() @ x)
    exact = [truth.detach() for truth in exact]
    for found, truth in zip((y, x.grad, weight.grad), exact):
        # A rounding to 4 bits errs by 2^-4 at most, by 2.6 % in the mean square; two of them by 3.7 %.
        assert 0.025 < float((found.detach() - truth).norm() / truth.norm()) < 0.05


def test_leading_axes_are_free_and_no_gradient_is_made_that_nobody_wants():
    x, weight = draw(2, 3, 128), draw(64, 128, seed=1).requires_grad_()
    (y,) = fp8_linears(x, weight)
    assert y.shape == (2, 3, 64) and torch.equal(y.view(6, 64), fp8_linears(x.view(6, 128), weight)[0])
    y.sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen = weight.detach()
    (d_x,) = torch.autograd.grad(fp8_linears(x.requires_grad_(), frozen)[0].sum(), x)
    assert d_x.shape == x.shape


def test_a_row_in_exact_mode_does_not_depend_on_its_company():
    x, weight = draw(70, 96), draw(40, 96, seed=1)
    with exact_mode():
        (together,) = fp8_linears(x, weight)
        for rows in (slice(0, 1), slice(5, 38)):
            assert torch.equal(fp8_linears(x[rows], weight)[0], together[rows])


def test_the_cpu_keeps_the_twin():
    x = draw(128, 128, dtype=torch.bfloat16)
    assert not is_available(x, x)
    if torch.cuda.is_available():
        assert is_available(x.cuda(), x.cuda())
        assert not is_available(x.cuda()[:, :64].contiguous(), x.cuda()[:, :64].contiguous())
        assert not is_available(x.cuda().float(), x.cuda())


def test_rounded_weights_are_kept_until_the_weight_changes():
    weight = torch.nn.Parameter(draw(130, 40))
    with torch.no_grad():
        first = stored_tiles(weight)
        assert stored_tiles(weight) is first
        weight.mul_(3)
        assert torch.equal(stored_tiles(weight).double(), stored(weight, (128, 128)))
    assert stored_tiles(weight).requires_grad


def test_of_a_weight_that_passes_nothing_is_kept():
    """Its values change where no version counter shows it, and at the same address."""
    weight = torch.nn.Parameter(draw(130, 40))
    mark_passing(weight)
    with torch.no_grad():
        stored_tiles(weight)
        version = weight._version
        weight.data.mul_(3)
        assert weight._version == version
        assert torch.equal(stored_tiles(weight).double(), stored(weight, (128, 128)))


# ---- kernels ------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 130, 256])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_kernels_make_the_twin_s_products(rows, needs, triton_device):
    x = draw(rows, 256, dtype=torch.bfloat16).to(triton_device).requires_grad_(needs[0])
    weights = [draw(n, 256, seed=n, dtype=torch.bfloat16).to(triton_device) for n in (128, 384)]
    grads = [draw(rows, n, seed=n + 1, dtype=torch.bfloat16).to(triton_device) for n in (128, 384)]
    for w in weights:
        w.requires_grad_(needs[1])
    made = by_kernels(x, *weights)
    torch.autograd.backward(made, grads)
    each = [expected_of(x.cpu(), w.cpu(), g.cpu()) for w, g in zip(weights, grads)]
    # One rounding to bf16, 2^-9, or two and a sum of such; fp32 sums below that.
    close = lambda a, b: (a.detach().cpu().double() - b).norm() <= 2**-8 * b.norm()
    for y, w, (out, _, d_weight) in zip(made, weights, each):
        assert y.dtype == torch.bfloat16 and close(y, out)
        assert close(w.grad, d_weight) if needs[1] else w.grad is None
    assert close(x.grad, each[0][1] + each[1][1]) if needs[0] else x.grad is None


def of_sums(device):
    """Error of a product's sums, relative to its norm.

    Hopper's tensor cores align 32 products of FP8 codes and the sum so far to the largest of them and cut off
    what lies 13 bits below. Of normal values, variance s, the largest is about 4 s: 33 errors of up to
    2^-13 · 4 s in each of 4 steps, beside a sum of 128 products of norm 11.3 s, are 2.3 · 2^-13. Triton's
    interpreter sums in fp32.
    """
    return 2**-11 if device == "cuda" else 2**-20


@pytest.mark.triton
def test_masters_in_fp32_get_gradients_that_were_not_rounded(triton_device):
    x, weight = (
        draw(128, 128, dtype=torch.bfloat16),
        draw(128, 128, seed=1).to(triton_device).requires_grad_(),
    )
    grad = draw(128, 128, seed=2, dtype=torch.bfloat16)
    by_kernels(x.to(triton_device), weight)[0].backward(grad.to(triton_device))
    truth = expected_of(x, weight.cpu(), grad)[2]
    assert weight.grad.dtype == torch.float32
    assert (weight.grad.cpu().double() - truth).norm() <= of_sums(triton_device) * truth.norm()


@pytest.mark.triton
def test_without_gradients_codes_are_kept_until_the_weight_changes(triton_device):
    x = draw(3, 128, dtype=torch.bfloat16).to(triton_device)
    weight = torch.nn.Parameter(draw(128, 128, seed=1, dtype=torch.bfloat16).to(triton_device))
    expected = by_kernels(x, weight)[0].detach()
    with torch.no_grad():
        assert torch.equal(by_kernels(x, weight)[0], expected)
        kept = fp8_linear._kept[weight][1]["codes"]
        by_kernels(x, weight)
        assert fp8_linear._kept[weight][1]["codes"] is kept
        weight.neg_()
        assert torch.equal(by_kernels(x, weight)[0], -expected)
    by_kernels(x, weight)
    assert weight not in fp8_linear._kept


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(128, 128, 128), (256, 384, 640), (384, 128, 1024)])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_the_product_in_triton_is_that_of_the_decoded_values(shape, is_tiled, triton_device):
    from consilience.model.kernels import triton_quantize, triton_scaled_mm

    num_rows, num_columns, depth = shape
    a, b = draw(num_rows, depth), draw(num_columns, depth, seed=1)
    left = triton_quantize.encode_rows(a.to(triton_device))[:2]
    right = (triton_quantize.encode_tiles if is_tiled else triton_quantize.encode_rows)(b.to(triton_device))[
        :2
    ]
    truth = stored(a) @ stored(b, (128, 128) if is_tiled else (1, 128)).t()
    found = triton_scaled_mm.scaled_mm(*left, *right, torch.float32, is_tiled=is_tiled).cpu()
    again = triton_scaled_mm.scaled_mm(*left, *right, torch.float32, is_tiled=is_tiled).cpu()
    limit = of_sums(triton_device)
    assert (found.double() - truth).norm() <= limit * truth.norm()
    assert torch.equal(found, again)
    if triton_device == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            of_cublas = fp8_linear.product(left, right, dtype, is_tiled=is_tiled).cpu()
            rounding = 2**-9 * (dtype != torch.float32)
            assert (of_cublas.double() - truth).norm() <= (limit + rounding) * truth.norm()
