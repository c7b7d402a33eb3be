"""Fake quantisation against the stored formats, bit for bit; its gradients; the Hadamard transform."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ConfigError
from consilience.model.exact import exact_mode
from consilience.model.number_formats import (
    decode_fp8,
    decode_mxfp4,
    encode_fp8,
    encode_mxfp4,
    mxfp4_to_fp8,
)
from consilience.model.quantization import (
    FP4,
    OFF,
    Quantization,
    fake_bf16,
    fake_fp4,
    fake_fp8,
    fake_fp8_tiles,
    fake_mxfp4,
    hadamard,
)

torch.set_num_threads(1)

# On a GPU machine every test below runs there.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAKES = {
    "mxfp4": fake_mxfp4,
    "fp4": fake_fp4,
    "fp8 of 128": lambda x: fake_fp8(x, 128),
    "fp8 of 64": lambda x: fake_fp8(x, 64),
    "bf16": fake_bf16,
}
each_fake = pytest.mark.parametrize("fake", FAKES.values(), ids=FAKES)


def same_bits(a, b):
    """Same type, shape and bits: unlike torch.equal, 0 is not -0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.cpu().view(integer), b.cpu().view(integer))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_fake_mxfp4_by_hand():
    weight = torch.tensor([[12.0, 1.0, -0.4, 0.5, 2.5, 5.0, 7.0, -9.9] + [0.0] * 24 + [0.3, -0.1]])
    # Scale 2: 6; .5; -.2 is nearer -0; ties .25, 1.25, 2.5 and 3.5 go to 0, 1, 2 and 4; -4.95 to -4.
    first = [12.0, 1.0, -0.0, 0.0, 2.0, 4.0, 8.0, -8.0] + [0.0] * 24
    # The last two are a block of their own: scale 2^-4, 4.8 and -1.6 sixteenths go to 4 and -1.5.
    expected = torch.tensor([[*first, 0.25, -0.09375]])
    assert same_bits(fake_mxfp4(weight.to(DEVICE)), expected)


def test_fake_fp8_by_hand():
    x = torch.tensor([[449.0, 1.0, 0.001, -33.0] + [0.0] * 60 + [15.5, -0.53]]).to(DEVICE)
    # Scale 2: 224.5 to 224, .5 kept, .0005 below half of 2^-9, -16.5 to -16. Then scale 2^-4: 248 is a
    # tie of 240 and 256, won by 256; -8.48 sixteenths lie between -8 and -9, nearer to -8.
    expected = torch.tensor([[448.0, 1.0, 0.0, -32.0] + [0.0] * 60 + [16.0, -0.5]])
    assert same_bits(fake_fp8(x, 64), expected)


floats = st.floats(width=32, min_value=-(2.0**105), max_value=2.0**105)
adversarial = st.lists(
    floats | st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126), 2.0**105, 6 * 2.0**-126]),
    min_size=2,
    max_size=150,
).map(lambda v: torch.tensor(v[: len(v) // 2 * 2], device=DEVICE).view(2, -1))


@settings(max_examples=200, deadline=None)
@given(adversarial.filter(lambda w: w.shape[1] % 2 == 0))
def test_the_trainer_sees_what_the_exporter_writes_on_any_weights(weight):
    packed, scale = encode_mxfp4(weight)
    assert same_bits(fake_mxfp4(weight), decode_mxfp4(packed, scale, torch.float32))
    narrow = weight.bfloat16()
    assert same_bits(fake_mxfp4(narrow), decode_mxfp4(*encode_mxfp4(narrow)))
    for tile in ((1, 64), (1, 128)):
        stored = encode_fp8(weight, tile)
        assert same_bits(fake_fp8(weight, tile[1]), decode_fp8(*stored, torch.float32, tile))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 140), st.integers(1, 90), st.integers(0, 10**6), st.integers(-90, 90), st.integers(0, 6)
)
def test_trainer_exporter_and_loader_agree_bit_for_bit_through_fp8_too(rows, pairs, seed, shift, spread):
    weight = draw(rows, 2 * pairs, seed=seed) * 2.0**shift
    weight *= 2.0 ** -torch.randint(0, spread + 1, (rows, 1), device=DEVICE).float()
    weight[rows // 2] = 0
    trained = fake_mxfp4(weight)
    packed, scale = encode_mxfp4(weight)
    through_fp8 = mxfp4_to_fp8(packed, scale)
    assert same_bits(trained, decode_mxfp4(packed, scale, torch.float32))
    assert same_bits(trained, decode_fp8(*through_fp8, torch.float32))
    # What the rollout loads in bfloat16, and what bfloat16 matrices are multiplied with.
    assert same_bits(trained.bfloat16(), decode_mxfp4(packed, scale))
    assert same_bits(trained.bfloat16(), decode_fp8(*through_fp8))


def test_every_weight_between_two_powers_of_two_agrees():
    step = torch.arange(2**23, 2**24, 61, dtype=torch.int32)  # 137,518 mantissas
    for top in (6.0, 4.0, 3.0):
        weight = (step[: len(step) // 62 * 62].float() / 2**23).view(-1, 31)
        block = torch.cat([torch.full((len(weight), 1), top), top * weight / 4], 1).to(DEVICE)
        assert same_bits(fake_mxfp4(block), decode_mxfp4(*encode_mxfp4(block), torch.float32))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("channels", [448, 16, 200, 130])
def test_fake_fp8_equals_torchs_own_type_block_by_block(width, channels):
    x = draw(5, 3, channels, seed=channels) * 2.0 ** draw(5, 3, 1, seed=1).mul(8).round()
    expected = []
    for block in x.cpu().split(width, -1):
        amax = block.abs().amax(-1, keepdim=True).clamp(min=1e-4).double()
        scale = 2.0 ** torch.ceil(torch.log2(amax / 448))
        expected.append(((block.double() / scale).float().to(torch.float8_e4m3fn).double() * scale).float())
    assert same_bits(fake_fp8(x, width), torch.cat(expected, -1))


@each_fake
def test_gradients_pass_unchanged_and_nothing_is_kept_for_them(fake):
    x = draw(3, 5, 200).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        y = fake(x)
    grad = draw(3, 5, 200, seed=1)
    (found,) = torch.autograd.grad(y, x, grad)
    assert same_bits(found, grad) and not kept and not torch.equal(x, y)


@each_fake
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_type_and_shape_stay_the_input_too_and_bfloat16_holds_the_result(fake, dtype):
    x = draw(2, 3, 72).to(dtype)
    before = x.clone()
    y = fake(x)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
    assert torch.equal(y.bfloat16().to(dtype), y)
    assert same_bits(fake(y), y)
    assert same_bits(fake(x.float()).to(dtype), y)


@each_fake
def test_rows_do_not_depend_on_their_batch_nor_on_memory_layout(fake):
    x = draw(7, 6, 136)
    y = fake(x)
    assert same_bits(fake(x[3:4, 2]), y[3:4, 2])
    assert same_bits(fake(x.transpose(0, 1)).transpose(0, 1).contiguous(), y)
    assert same_bits(fake(x[..., :128]), fake(x[..., :128].contiguous()))


@each_fake
def test_infinity_and_nan_are_not_hidden_and_stay_in_their_block(fake):
    x = draw(3, 256)
    y = fake(x)
    x[0, 3], x[1, 5], x[1, 40] = math.nan, math.inf, -math.inf
    found = fake(x)
    assert not found[~x.isfinite()].isfinite().any()
    assert same_bits(found[:, 128:], y[:, 128:]) and same_bits(found[2], y[2])


@settings(max_examples=200, deadline=None)
@given(adversarial)
def test_no_value_is_clipped_so_the_straight_gradient_is_that_of_the_clamp_as_well(weight):
    weight = torch.cat([weight, weight], 1)
    num = weight.shape[1]
    for fake, largest, width, (_, scale) in (
        (fake_fp4, 6, 32, encode_mxfp4(weight)),
        (lambda x: fake_fp8(x, 128), 448, 128, encode_fp8(weight, (1, 128))),
    ):
        top = largest * scale.double().repeat_interleave(width, 1)[:, :num]
        assert (weight.abs() <= top).all() and (fake(weight).abs() <= top).all()


def test_index_scores_are_cut_to_bfloat16():
    scores = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -math.inf, 3.0], device=DEVICE)
    assert fake_bf16(scores).tolist() == [1.0, 1.0 + 4 * 2**-8, -math.inf, 3.0]


def test_the_hadamard_transform_by_hand():
    half = 0.5**0.5
    assert hadamard(torch.tensor([3.0])).tolist() == [3.0]
    torch.testing.assert_close(hadamard(torch.tensor([1.0, 2.0])), torch.tensor([3 * half, -half]))
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 5.0])).tolist() == [5.5, -1.5, -2.5, 0.5]


@pytest.mark.parametrize("width", [1, 2, 4, 32, 128, 512])
def test_the_hadamard_transform_is_that_of_sylvesters_signs_orthogonal_and_its_own_inverse(width):
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)])
    matrix = hadamard(torch.eye(width, dtype=torch.float64, device=DEVICE)).cpu()
    assert torch.equal(matrix.sign(), signs.double()) and torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
    x = draw(9, width)
    exact = x.cpu().double() @ matrix
    # A float32 sum of n terms errs by at most n·2^-24 of the sum of their magnitudes.
    bound = (width + 2) * 2.0**-24 * x.abs().sum(-1, keepdim=True).cpu() * width**-0.5
    assert ((hadamard(x).cpu().double() - exact).abs() <= bound).all()


def test_the_hadamard_transform_leaves_products_of_queries_and_keys_alone():
    q, k = draw(6, 4, 128).double(), draw(5, 128, seed=1).double()
    rotated = torch.einsum("qhc,kc->qhk", hadamard(q), hadamard(k))
    torch.testing.assert_close(rotated, torch.einsum("qhc,kc->qhk", q, k), rtol=0, atol=1e-12)


def test_a_row_rotates_alike_alone_and_in_any_batch():
    x = draw(600, 128)
    with exact_mode(DEVICE.type == "cuda"):  # there the library picks its kernel by the number of rows
        together = hadamard(x)
        for num_rows in (1, 2, 3, 7, 64, 599):
            assert same_bits(hadamard(x[:num_rows]), together[:num_rows])
        assert same_bits(hadamard(x[5]), together[5])
        assert same_bits(hadamard(x.view(6, 100, 128)).view(600, 128), together)


def test_the_hadamard_transform_keeps_bfloat16_and_rounds_once():
    x = draw(50, 128).bfloat16()
    assert same_bits(hadamard(x), hadamard(x.float()).bfloat16())


def test_gradients_of_the_hadamard_transform_are_exact():
    x = draw(3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(hadamard, x)
    with torch.inference_mode():  # the cached matrix must not be tied to the mode it was made in
        hadamard(draw(2, 16).double())
    y = draw(2, 16).double().requires_grad_()
    hadamard(y).square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * y.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [0, 3, 24, 96])
def test_a_width_that_is_no_power_of_two_is_refused(width):
    with pytest.raises(ValueError, match=f"power of two, found {width}"):
        hadamard(torch.zeros(2, width))


def test_tiles_of_weights_round_as_stored_with_gradients_straight_through():
    for shape in ((3, 5), (128, 128), (200, 300)):
        weight = (draw(*shape) * 2.0 ** (draw(shape[1], seed=1) * 6).round()).requires_grad_()
        rounded = fake_fp8_tiles(weight)
        assert same_bits(rounded.detach(), decode_fp8(*encode_fp8(weight), torch.float32))
        assert same_bits(
            fake_fp8_tiles(weight.bfloat16()).detach(), decode_fp8(*encode_fp8(weight.bfloat16()))
        )
        (rounded * weight.detach()).sum().backward()
        assert torch.equal(weight.grad, weight.detach())


def test_presets_and_their_names():
    assert Quantization.from_name("off") == OFF == Quantization()
    assert not any(dataclasses.astuple(OFF))
    fp4 = Quantization.from_name("fp4")
    assert fp4 is FP4 and dataclasses.asdict(fp4) == {
        "experts": True,
        "indexer": True,
        "index_scores": True,
        "kv": True,
        "linears": False,
    }
    assert dataclasses.astuple(Quantization.from_name("fp8")) == (False, False, False, False, True)
    assert all(dataclasses.astuple(Quantization.from_name("fp4_fp8")))
    with pytest.raises(ConfigError, match="found quantization 'int8'; allowed: off, fp4, fp8, fp4_fp8"):
        Quantization.from_name("int8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        FP4.kv = False
