"""FP8 and MXFP4: by hand, over every byte and scale, against float64, torch's types and transformers."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.model.number_formats import (
    E2M1,
    E4M3,
    choose_scale,
    decode_fp8,
    decode_mxfp4,
    encode_fp8,
    encode_mxfp4,
    is_exact_fp8,
    is_exact_mxfp4,
    mxfp4_to_fp8,
    round_to,
)

torch.set_num_threads(1)

# On a GPU machine every test below runs there.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_VALUES = MAGNITUDES + [-m for m in MAGNITUDES]
BYTES = torch.arange(256, dtype=torch.uint8, device=DEVICE)
IS_NUMBER = (BYTES & 0x7F) != 0x7F  # e4m3 has two NaN codes and no infinity
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def same_bits(a, b):
    """Same type, shape and bits: unlike torch.equal, 0 is not -0 and NaN is NaN (a GPU's has other bits)."""
    integer, a, b = INTEGERS[a.element_size()], a.cpu(), b.cpu()
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(*(torch.where(x.isnan(), 0, x.view(integer)) for x in (a, b)))


def e8m0(exponents):
    """Scales 2^exponent."""
    return (torch.as_tensor(exponents, device=DEVICE) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def row(values):
    return torch.tensor([values], device=DEVICE)


def test_the_scale_is_the_least_power_of_two_that_brings_amax_to_the_largest_code():
    for minifloat, exponents in (
        (E4M3, {448.0: 0, 448.0 + 2**-15: 1, 224.0: -1, 1.0: -8, 1e-4: -22, 0.0: -22, 1.75 * 2.0**127: 119}),
        (E2M1, {6.0: 0, 6.0 + 2**-21: 1, 4.0: 0, 3.0: -1, 1.0: -2, 2.0**-149: -126, 0.0: -126, 3e38: 126}),
    ):
        scales = choose_scale(torch.tensor(list(exponents), device=DEVICE), minifloat)
        assert scales.tolist() == [2.0**exponent for exponent in exponents.values()]


def test_a_row_of_mxfp4_by_hand():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]  # halfway between neighbours: the even code wins
    values = [6.0, -0.0, *ties, *(-t for t in ties), -0.2, 0.26, 5.1, -5.9] + [0.0] * 12
    packed, scale = encode_mxfp4(row(values))
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    expected = [6.0, -0.0, *even, *(-e for e in even), -0.0, 0.5, 6.0, -6.0] + [0.0] * 12
    assert same_bits(decode_mxfp4(packed, scale, torch.float32), row(expected))
    assert same_bits(scale, e8m0([[0]]))
    assert packed.dtype == torch.int8 and packed.shape == (1, 16) and packed.is_contiguous()
    # Low nibble = even input: 6 is code 7 and -0 code 8; 0.25 -> 0 and 0.75 -> 1.0, code 2.
    assert packed[0, :2].view(torch.uint8).tolist() == [0x87, 0x20]


def test_a_tile_of_fp8_by_hand():
    weight = torch.zeros(130, 3, device=DEVICE)
    weight[0] = torch.tensor([448.0, -1.0, 17.0])  # 17 lies halfway between 16 and 18: the even code is 16
    weight[129] = torch.tensor([900.0, 0.0, -3.0])  # the two rows past 128 are a tile of their own
    codes, scale = encode_fp8(weight)
    assert same_bits(scale, e8m0([[0], [2]]))
    assert codes.shape == (130, 3) and codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
    assert codes[0].float().tolist() == [448.0, -1.0, 16.0]
    assert codes[129].float().tolist() == [224.0, 0.0, -0.75]  # 900 / 4 = 225, steps of 16
    assert decode_fp8(codes, scale)[129].tolist() == [896.0, 0.0, -3.0]


@pytest.mark.parametrize("minifloat", [E4M3, E2M1])
def test_scales_meet_their_definition_at_every_exponent_and_around_every_border(minifloat):
    border = torch.tensor(minifloat.largest).view(torch.int32) & 0x7FFFFF
    mantissas = torch.cat([torch.tensor([0, 1, 2, 2**23 - 1]), border + torch.arange(-2, 3)]).int()
    amax = ((torch.arange(255, dtype=torch.int32)[:, None] << 23) + mantissas).view(torch.float32)
    scale = choose_scale(amax.to(DEVICE), minifloat).cpu().double()
    assert (scale.log2().frac() == 0).all()
    clamped = amax.clamp(min=minifloat.smallest_amax).double()  # products in float64 are exact here
    assert (clamped <= minifloat.largest * scale).all() and (clamped > minifloat.largest * scale / 2).all()


@settings(max_examples=60, deadline=None)
@given(finite.map(abs), st.sampled_from([E4M3, E2M1]))
def test_scales_meet_their_definition_in_exact_arithmetic(amax, minifloat):
    scale = Fraction(choose_scale(torch.tensor([amax]), minifloat).item())
    clamped = max(Fraction(amax), Fraction(torch.tensor(minifloat.smallest_amax).item()))
    largest = Fraction(minifloat.largest)
    assert largest * scale / 2 < clamped <= largest * scale
    assert 1 in (scale.numerator, scale.denominator) and math.log2(scale).is_integer()


@pytest.mark.parametrize("minifloat", [E4M3, E2M1])
def test_scales_equal_those_of_the_released_kernels_for_every_bfloat16(minifloat):
    """There: amax · fl(1 / largest) in float32, exponent up by one where a mantissa bit is left."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    bits = (amax.clamp(min=minifloat.smallest_amax) * torch.tensor(1 / minifloat.largest)).view(torch.int32)
    released = (((bits >> 23) + (bits & 0x7FFFFF != 0)) << 23).int().view(torch.float32)
    assert same_bits(choose_scale(amax.to(DEVICE), minifloat), released)


def around(points):
    """float32 points with both neighbours of each, of both signs."""
    points = torch.as_tensor(points, dtype=torch.float32)
    both = torch.cat([points, points.nextafter(torch.tensor(math.inf)), points.nextafter(torch.tensor(0.0))])
    return torch.cat([both, -both]).to(DEVICE)


def nearest(values, codes):
    """The nearest of ascending codes (place = bits of the code), ties to the even place, in float64."""
    distance = (values.abs().double()[:, None] - codes.double()).abs()
    is_odd = torch.arange(len(codes), device=DEVICE) % 2
    rank = torch.where(distance == distance.amin(1, keepdim=True), is_odd, 2)
    return codes[rank.argmin(1)].copysign(values)


@pytest.mark.parametrize(
    ("minifloat", "codes"),
    [(E2M1, torch.tensor(MAGNITUDES)), (E4M3, BYTES[:127].view(torch.float8_e4m3fn).float())],
)
def test_rounding_goes_to_the_nearest_code_and_at_midpoints_to_the_even_one(minifloat, codes):
    codes = codes.to(DEVICE)
    middles = (codes[1:] + codes[:-1]) / 2
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * minifloat.largest
    values = torch.cat([around(codes.cpu()), around(middles.cpu()), drawn.to(DEVICE)])
    values = values[values.abs() <= minifloat.largest]
    expected = nearest(values, codes)
    assert same_bits(round_to(values, 1.0, minifloat), expected)
    for exponent in (-22, -7, 31, 97):  # at every scale the same, exactly
        scale = 2.0**exponent
        assert same_bits(round_to(values * scale, scale, minifloat), expected * scale)


def test_rounding_to_e4m3_equals_torch_for_every_bfloat16_in_range():
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.abs() <= 448]
    assert same_bits(round_to(values.to(DEVICE), 1.0, E4M3), values.to(torch.float8_e4m3fn).float())


def test_every_fp8_byte_with_every_scale_decodes_exactly_and_comes_back():
    for exponent in range(-127, 128):
        codes, scale = BYTES.view(torch.float8_e4m3fn)[None], e8m0([[exponent]])
        exact = codes.cpu().double() * 2.0**exponent
        wide = decode_fp8(codes, scale, torch.float32, (1, 256))
        narrow = decode_fp8(codes, scale, tile=(1, 256))
        assert same_bits(wide, exact.float())
        is_held = (wide.cpu().double() == exact) | exact.isnan()
        assert is_held.all() == (exponent <= 119)
        is_held = (narrow.cpu().double() == exact) | exact.isnan()
        assert is_held.all() == (-124 <= exponent <= 119)
        if exponent <= 119:
            numbers = codes[:, IS_NUMBER]
            again, kept = encode_fp8(wide[:, IS_NUMBER], (1, 256), scale)
            assert same_bits(again, numbers) and kept is scale


def test_every_mxfp4_byte_with_every_scale_decodes_exactly_and_comes_back():
    packed = BYTES.view(torch.int8).view(16, 16)
    low, high = BYTES.cpu() & 15, BYTES.cpu() >> 4
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[torch.stack([low, high], -1).long()].view(16, 32)
    for exponent in range(-127, 128):
        scale = e8m0([[exponent]] * 16)
        wide, narrow = decode_mxfp4(packed, scale, torch.float32), decode_mxfp4(packed, scale)
        exact = values * 2.0**exponent
        assert same_bits(wide, exact.float())
        for decoded in (wide, narrow):
            assert torch.equal(decoded.cpu().double(), exact) == (exponent <= 125)
        if exponent <= 125:
            again, kept = encode_mxfp4(narrow, scale)
            assert same_bits(again, packed) and kept is scale


def test_decoding_agrees_with_transformers_bit_for_bit():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    decode = Fp8Dequantize(None)._dequantize_one
    g = torch.Generator().manual_seed(3)
    packed = torch.randint(-128, 128, (256, 64), dtype=torch.int8, generator=g)
    fine = torch.randint(0, 252, (256, 4), dtype=torch.uint8, generator=g).view(torch.float8_e8m0fnu)
    codes = torch.randint(0, 127, (256, 384), dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
    coarse = torch.randint(0, 246, (2, 3), dtype=torch.uint8, generator=g).view(torch.float8_e8m0fnu)
    for dtype in (torch.float32, torch.bfloat16):
        assert same_bits(decode_mxfp4(packed, fine, dtype), decode(packed, fine, dtype))
        assert same_bits(decode_fp8(codes, coarse, dtype), decode(codes, coarse, dtype))
        assert same_bits(decode_fp8(codes, coarse.float(), dtype), decode(codes, coarse.float(), dtype))


rows = st.lists(finite, min_size=2, max_size=40).map(lambda v: v[: len(v) // 2 * 2])


@settings(max_examples=60, deadline=None)
@given(rows)
def test_coded_values_are_their_own_code_whatever_scale_is_used_then(values):
    weight = row(values).clamp(-6 * 2.0**125, 6 * 2.0**125)
    for encode, decode, is_exact in (
        (encode_mxfp4, decode_mxfp4, is_exact_mxfp4),
        (encode_fp8, decode_fp8, is_exact_fp8),
    ):
        codes, scale = encode(weight)
        held = decode(codes, scale)
        assert held.dtype == torch.bfloat16 and same_bits(held.float(), decode(codes, scale, torch.float32))
        assert is_exact(held, scale)
        assert same_bits(encode(held, scale=scale)[0], codes)
        assert same_bits(decode(*encode(held)), held)  # its own scale may be smaller: still the same values


def test_doubling_weights_moves_scales_alone():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(200, 160, generator=g).to(DEVICE)
    for encode in (encode_fp8, encode_mxfp4):
        codes, scale = encode(weight)
        doubled, larger = encode(8 * weight)
        assert same_bits(codes, doubled)
        assert torch.equal(larger.view(torch.uint8), scale.view(torch.uint8) + 3)


@pytest.mark.parametrize("tile", [(128, 128), (1, 128), (1, 64)])
def test_ragged_edges_are_tiles_of_their_own(tile):
    g = torch.Generator().manual_seed(2)
    weight = (torch.randn(130, 200, generator=g) * torch.rand(130, 200, generator=g).exp()).to(DEVICE)
    weight[129, 199] = 50
    codes, scale = encode_fp8(weight, tile)
    assert scale.shape == (-(-130 // tile[0]), -(-200 // tile[1]))
    for i, top in enumerate(range(0, 130, tile[0])):
        for j, left in enumerate(range(0, 200, tile[1])):
            part = slice(top, top + tile[0]), slice(left, left + tile[1])
            alone, its_scale = encode_fp8(weight[part], tile)
            assert same_bits(codes[part].contiguous(), alone) and its_scale.item() == scale[i, j].item()
            held = decode_fp8(codes, scale, tile=tile)[part]
            assert same_bits(held, decode_fp8(alone, its_scale, tile=tile))


def test_a_ragged_row_of_mxfp4_ends_in_a_block_of_its_own():
    weight = torch.linspace(-3, 9, 2 * 40, device=DEVICE).view(2, 40)
    packed, scale = encode_mxfp4(weight)
    assert packed.shape == (2, 20) and scale.shape == (2, 2)
    assert same_bits(decode_mxfp4(packed, scale)[:, 32:], decode_mxfp4(*encode_mxfp4(weight[:, 32:])))


def test_stacked_experts_are_coded_one_by_one():
    weight = torch.randn(3, 130, 160, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for encode, decode in ((encode_fp8, decode_fp8), (encode_mxfp4, decode_mxfp4)):
        codes, scale = encode(weight)
        for e in range(3):
            alone = encode(weight[e])
            assert same_bits(codes[e], alone[0]) and same_bits(scale[e], alone[1])
        assert same_bits(decode(codes, scale)[1], decode(*encode(weight[1])))


def test_float32_scales_that_are_no_powers_of_two_give_back_every_byte_even_through_bfloat16():
    numbers = BYTES[IS_NUMBER].view(torch.float8_e4m3fn)[None]
    for value in (1.0, 0.0173, 3e-5, 7 / 3, 1.9999999):
        scale = row([value])
        for dtype in (torch.float32, torch.bfloat16):
            decoded = decode_fp8(numbers, scale, dtype, (1, 254))
            again, kept = encode_fp8(decoded, (1, 254), scale)
            assert same_bits(again, numbers) and kept is scale
            assert is_exact_fp8(decoded, scale, (1, 254))


def test_values_beyond_a_given_scale_saturate_and_are_not_exact():
    weight = row([7.0, -1e30, 0.5, -6.0])
    packed, _ = encode_mxfp4(weight, e8m0([[0]]))
    assert decode_mxfp4(packed, e8m0([[0]])).tolist() == [[6.0, -6.0, 0.5, -6.0]]
    codes, _ = encode_fp8(100 * weight, scale=e8m0([[0]]))
    assert codes.float().tolist() == [[448.0, -448.0, 48.0, -448.0]]  # 50 ties with even 48
    assert not is_exact_mxfp4(weight, e8m0([[0]])) and not is_exact_fp8(weight, e8m0([[0]]))
    assert is_exact_mxfp4(weight[:, 2:], e8m0([[0]])) and is_exact_fp8(weight[:, 2:], e8m0([[0]]))


def every_code_at(exponents):
    """MXFP4 [128, 128] with all 16 codes in each block, and scales 2^exponents [128, 4]."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(128, 8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return packed, e8m0(exponents)


def test_mxfp4_becomes_fp8_without_loss_for_every_code_spread_and_scale():
    spread = torch.arange(128 * 4, device=DEVICE).view(128, 4) % 12  # 0 to 11, every one in the tile
    for largest in range(-127, 126):
        exponents = (largest - spread).clamp(min=-127)
        packed, scale = every_code_at(exponents)
        codes, coarse = mxfp4_to_fp8(packed, scale)
        assert same_bits(coarse, e8m0([[max(largest - 6, -127)]]))
        for dtype in (torch.float32, torch.bfloat16):
            assert same_bits(decode_fp8(codes, coarse, dtype), decode_mxfp4(packed, scale, dtype))


def test_a_spread_of_2_to_the_12_is_refused_and_the_tile_named():
    exponents = torch.zeros(256, 8, dtype=torch.int32)
    exponents[200, 3] = -11
    weight = torch.ones(256, 256, device=DEVICE)
    packed, _ = encode_mxfp4(weight)
    codes, scale = mxfp4_to_fp8(packed, e8m0(exponents))
    assert same_bits(decode_fp8(codes, scale), decode_mxfp4(packed, e8m0(exponents)))
    exponents[200, 3] = -12
    with pytest.raises(ValueError, match=r"128×128 tile \[1, 0\] span 2\^12.*up to 2\^11"):
        mxfp4_to_fp8(packed, e8m0(exponents))


def test_blocks_of_zeros_fit_any_tile():
    weight = torch.ones(128, 128, device=DEVICE)
    weight[5, 32:64] = 0
    weight[6, :32] = -0.0
    packed, scale = encode_mxfp4(weight)
    assert scale.view(torch.uint8).min() == 1 and scale.view(torch.uint8).max() == 125
    assert same_bits(decode_fp8(*mxfp4_to_fp8(packed, scale)), decode_mxfp4(packed, scale))
    zeros = encode_mxfp4(torch.zeros(3, 64, device=DEVICE))
    assert not decode_fp8(*mxfp4_to_fp8(*zeros)).any()


def test_the_limit_2_to_the_11_keeps_e4m3_normal_and_subnormals_would_reach_2_to_the_14():
    values = torch.tensor(MAGNITUDES[1:])
    for spread in range(20):
        shifted = values * 2.0 ** (6 - spread)
        is_held = torch.equal(shifted.to(torch.float8_e4m3fn).float(), shifted)
        assert is_held == (spread <= 14)
        assert bool((shifted >= 2.0**-6).all()) == (spread <= 11)


def test_values_that_no_code_could_give_back_are_refused():
    for encode, decode, largest in (
        (encode_fp8, decode_fp8, 1.75 * 2.0**127),
        (encode_mxfp4, decode_mxfp4, 1.5 * 2.0**127),
    ):
        weight = torch.full((3, 64), -largest, device=DEVICE)
        codes, scale = encode(weight)
        assert same_bits(decode(codes, scale, torch.float32), weight)
        for bad in (math.nan, math.inf, -math.inf, 1.01 * largest):
            weight[2, 40] = bad
            for given_scale in (None, scale):
                with pytest.raises(ValueError, match="values to encode are finite and at most"):
                    encode(weight, scale=given_scale)


def test_wrong_scales_are_refused():
    weight = torch.ones(4, 64, device=DEVICE)
    packed, codes = encode_mxfp4(weight)[0], encode_fp8(weight, (1, 32))[0]
    mxfp4 = (lambda s: encode_mxfp4(weight, s), lambda s: decode_mxfp4(packed, s))
    fp8 = (lambda s: encode_fp8(weight, (1, 32), s), lambda s: decode_fp8(codes, s, tile=(1, 32)))
    ones = torch.ones(4, 2)
    nan = torch.full((4, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for calls, scale, found in (
        (mxfp4, ones, "scales are torch.float8_e8m0fnu, found torch.float32"),
        (mxfp4 + fp8, ones.byte(), "found torch.uint8"),  # e8m0 read as bytes
        (mxfp4 + fp8, ones.T.to(torch.float8_e8m0fnu), r"have scales \[4, 2\], found \[2, 4\]"),
        (mxfp4 + fp8, nan, "scales are positive and finite, found nan"),
        (fp8, 0 * ones, "found 0.0"),
        (fp8, -2 * ones, "found -2.0"),
        (fp8, math.inf * ones, "found inf"),
    ):
        for call in calls:
            with pytest.raises(ValueError, match=found):
                call(scale.to(DEVICE))


def test_codes_of_the_wrong_type_and_odd_widths_are_refused():
    scale = e8m0([[0]])
    with pytest.raises(ValueError, match=r"FP8 weights are float8_e4m3fn, found torch.int8"):
        decode_fp8(torch.zeros(1, 16, dtype=torch.int8, device=DEVICE), scale)
    with pytest.raises(ValueError, match=r"MXFP4 weights are int8.*found torch.float8_e4m3fn"):
        decode_mxfp4(torch.zeros(1, 16, device=DEVICE).to(torch.float8_e4m3fn), scale)
    with pytest.raises(ValueError, match="must be even, found 33"):
        encode_mxfp4(torch.zeros(1, 33, device=DEVICE))


def test_arguments_stay_as_they_were_and_parameters_need_no_detaching():
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    before = weight.detach().clone()
    for encode, decode in ((encode_fp8, decode_fp8), (encode_mxfp4, decode_mxfp4)):
        codes, scale = encode(weight)
        kept = codes.view(torch.uint8).clone(), scale.view(torch.uint8).clone()
        assert not decode(codes, scale).requires_grad
        assert torch.equal(codes.view(torch.uint8), kept[0]) and torch.equal(scale.view(torch.uint8), kept[1])
    assert torch.equal(weight, before)
