"""Quantisers in Triton against the plain ones, bit by bit."""

import itertools

import pytest
import torch

from consilience.model.number_formats import E2M1, E4M3, decode_fp8, encode_fp8
from consilience.model.quantization import fake_fp8_tiles, fake_mxfp4, hadamard, kv_values

torch.set_num_threads(1)
pytestmark = pytest.mark.triton


@pytest.fixture
def kernels(triton_device):
    from consilience.model.kernels import triton_quantize

    return triton_quantize


def twin_fake(x, width, minifloat, plain=None):
    """The plain quantiser, on the CPU."""
    from consilience.model.quantization import _StraightThrough

    return _StraightThrough.apply(x.cpu(), width, minifloat, plain)


def bits(x):
    kinds = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    return x.detach().cpu().contiguous().view(kinds[x.dtype])


def same_bits(found, expected):
    return found.dtype == expected.dtype and torch.equal(bits(found), bits(expected))


def every_bfloat16(limit=2.0**100):
    """All finite bfloat16 values below the limit, subnormal ones and both zeros among them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.float().abs() < limit]


def borders(minifloat):
    """float32 values where a rounding or a scale changes: codes, ties, neighbours, times powers of two."""
    codes = {
        E2M1: [0.5, 1, 1.5, 2, 3, 4, 6],
        E4M3: [m / 8 * 2.0**e for m in range(8, 16) for e in range(-9, 9)],
    }
    codes = sorted({c for c in codes[minifloat] if c <= minifloat.largest})
    ties = [(a + b) / 2 for a, b in itertools.pairwise([0.0, *codes])]
    points = torch.tensor([0.0, minifloat.smallest_amax, *codes, *ties])
    near = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(1e30))])
    scaled = torch.cat([near * 2.0**e for e in (-130, -60, -14, -1, 0, 1, 7, 60)])
    return torch.cat([scaled, -scaled])


def rows_of(values, width, seed=0):
    """values [n] shuffled into rows of `width`, the rest zeros."""
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(values[order], (0, -values.numel() % width)).view(-1, width)


def draw(*shape, seed=0, spread=12):
    """Normal values times powers of two from 2^-spread to 2^spread, a column each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * 2.0 ** torch.randint(
        -spread, spread + 1, shape[-1:], generator=g
    )


@pytest.mark.parametrize("minifloat", [E2M1, E4M3])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_every_bfloat16_value_and_all_borders_round_as_in_the_twin(kernels, minifloat, width, triton_device):
    ordered = every_bfloat16().sort().values  # neighbours share a block, so each is far from its zero once
    for x in (
        rows_of(every_bfloat16(), 256),
        torch.nn.functional.pad(ordered, (0, -len(ordered) % 256)).view(-1, 256),
        rows_of(borders(minifloat), 256),
        rows_of(borders(minifloat), 1).expand(-1, 4).reshape(-1, 4),
    ):
        found = kernels.fake_blocks(x.to(triton_device), width, minifloat)
        assert same_bits(found, twin_fake(x, width, minifloat))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 96), (7, 40), (2, 1), (130, 256), (0, 64)])
def test_any_shape_is_rounded_as_in_the_twin(kernels, dtype, shape, triton_device):
    x = draw(*shape).to(dtype)
    for width, minifloat in ((32, E2M1), (128, E4M3)):
        found = kernels.fake_blocks(x.to(triton_device), width, minifloat)
        assert same_bits(found, twin_fake(x, width, minifloat))


@pytest.mark.parametrize("width,rope", [(512, 64), (90, 10), (96, 96), (40, 10), (64, 0)])
def test_rope_channels_of_kv_stay_as_they_are(kernels, width, rope, triton_device):
    x = draw(9, width).bfloat16()
    found = kernels.fake_blocks(x.to(triton_device), 64, E4M3, width - rope)
    assert same_bits(found, kv_values(x, rope))
    assert torch.equal(found.cpu()[:, width - rope :], x[:, width - rope :])


def test_arguments_that_are_not_contiguous_are_taken_as_they_look(kernels, triton_device):
    x = draw(64, 96).bfloat16().t()
    assert same_bits(kernels.fake_blocks(x.to(triton_device), 32, E2M1), fake_mxfp4(x.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_with_their_block_and_leave_others_alone(kernels, bad, triton_device):
    x = draw(4, 256, spread=2)
    x[1, 40] = bad
    for width, minifloat in ((32, E2M1), (64, E4M3)):
        found = kernels.fake_blocks(x.to(triton_device), width, minifloat).cpu()
        is_bad = torch.zeros_like(x, dtype=torch.bool)
        is_bad[1, 40 // width * width : (40 // width + 1) * width] = True
        assert torch.equal(~found.isfinite(), is_bad)
        assert torch.equal(~found.isfinite(), ~twin_fake(x, width, minifloat).isfinite())


@pytest.mark.parametrize("width", [1, 2, 16, 64, 128])
def test_the_hadamard_transform_and_its_rounding_equal_the_twin(kernels, width, triton_device):
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(37, width, spread=6).to(dtype)
        assert same_bits(kernels.rotate_blocks(x.to(triton_device), None), hadamard(x))
        found = kernels.rotate_blocks(x.to(triton_device), E2M1)
        assert same_bits(found, twin_fake(hadamard(x), 32, E2M1))


def decoded(codes, scales):
    """codes [n, m] e4m3 times scales [m / 128, n]."""
    values = codes.cpu().float().unflatten(-1, (-1, 128))
    return (values * scales.cpu().t()[:, :, None]).flatten(-2)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 200])
def test_codes_of_rows_and_of_columns_are_those_of_the_format(kernels, num_rows, triton_device):
    x = draw(num_rows, 256, spread=3).bfloat16()
    x[0, :128] = 0
    x[-1, 7] = 448 * 2.0**-3
    codes, scales, turned, turned_scales = kernels.encode_rows(x.to(triton_device))
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -num_rows % 128))
    for (found, scale), values in (((codes, scales), padded), ((turned, turned_scales), padded.t())):
        expected, exponents = encode_fp8(values, tile=(1, 128))
        assert found.dtype == torch.float8_e4m3fn
        assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale.cpu().t(), exponents.float())
        rounded = decode_fp8(expected, exponents, torch.float32, (1, 128))
        assert torch.equal(decoded(found, scale), rounded)


@pytest.mark.parametrize("minifloat_values", ["every", "borders"])
def test_codes_of_every_value_are_those_of_the_format(kernels, minifloat_values, triton_device):
    x = rows_of(every_bfloat16().float() if minifloat_values == "every" else borders(E4M3), 128)
    codes, scales, _, _ = kernels.encode_rows(x.to(triton_device), has_turned=False)
    expected, exponents = encode_fp8(x, tile=(1, 128))
    assert torch.equal(codes.cpu().view(torch.uint8)[: len(x)], expected.view(torch.uint8))
    assert torch.equal(scales.cpu().t()[: len(x)], exponents.float())


def test_only_what_is_asked_for_is_made(kernels, triton_device):
    x = draw(5, 128).to(triton_device)
    both = kernels.encode_rows(x)
    for flags in ({"has_turned": False}, {"has_codes": False}):
        for one, other in zip(kernels.encode_rows(x, **flags), both):
            assert one is None or torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))
    assert kernels.encode_rows(x, has_turned=False)[2] is kernels.encode_rows(x, has_codes=False)[0] is None


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (128, 768)])
def test_codes_of_weights_are_those_of_the_release(kernels, shape, triton_device):
    weight = draw(*shape, spread=4)
    weight[:, :128] *= 2.0**-20  # below the least magnitude that scales are chosen for
    codes, scales, turned, turned_scales = kernels.encode_tiles(weight.to(triton_device))
    expected, exponents = encode_fp8(weight)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(turned.cpu().view(torch.uint8), expected.t().contiguous().view(torch.uint8))
    tall, broad = (n // 128 for n in shape)
    assert scales.shape == (tall, -(-broad // 4) * 4) and turned_scales.shape == (broad, -(-tall // 4) * 4)
    assert torch.equal(scales.cpu()[:, :broad], exponents.float())
    assert torch.equal(turned_scales.cpu()[:, :tall], exponents.float().t())
    assert not scales[:, broad:].any() and not turned_scales[:, tall:].any()


@pytest.mark.parametrize("shape", [(128, 128), (100, 300), (1, 5)])
def test_weights_round_in_tiles_as_in_the_twin(kernels, shape, triton_device):
    for dtype in (torch.float32, torch.bfloat16):
        weight = draw(*shape, spread=4).to(dtype)
        assert same_bits(kernels.fake_tiles(weight.to(triton_device)), fake_fp8_tiles(weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_has_no_finite_scale(kernels, bad, triton_device):
    x = draw(128, 256, spread=2)
    x[3, 130] = bad
    _, scales, _, turned_scales = kernels.encode_rows(x.to(triton_device))
    assert scales.isnan().nonzero().tolist() == [[1, 3]]
    assert turned_scales.isnan().nonzero().tolist() == [[0, 130]]
    _, scales, _, turned_scales = kernels.encode_tiles(x.to(triton_device))
    assert scales.isnan().nonzero().tolist() == [[0, 1]]
    assert turned_scales.isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("num_rows", [1, 128, 150])
def test_the_swiglu_to_codes_equals_the_swiglu_then_codes(kernels, num_rows, triton_device):
    from consilience.model.kernels import triton_moe, triton_swiglu_codes

    gate, up, grad = (draw(num_rows, 256, seed=s, spread=2).bfloat16().to(triton_device) for s in range(3))
    limit = 1.5  # many values on both sides
    same = lambda found, expected: all(
        torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)) for a, b in zip(found, expected)
    )
    active = triton_moe.swiglu_forward(gate, up, limit)
    assert same(triton_swiglu_codes.forward(gate, up, limit), kernels.encode_rows(active))
    d_gate, d_up, _, _ = triton_moe.swiglu_backward(grad, gate, up, limit)
    found = triton_swiglu_codes.backward(grad, gate, up, limit)
    assert same(found[0], kernels.encode_rows(d_gate)) and same(found[1], kernels.encode_rows(d_up))
    for flags in ({"has_codes": False}, {"has_turned": False}):
        part = triton_swiglu_codes.backward(grad, gate, up, limit, **flags)[1]
        kept = [(a, b) for a, b in zip(part, found[1]) if a is not None]
        assert len(kept) == 2 and same(*zip(*kept))
