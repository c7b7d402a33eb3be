"""Quantisers in Triton, to the bit what `quantization.py` and `number_formats.py` define.

Every kernel reads its values once and writes each result once. A block's largest magnitude and its scale are
found on the bits of the values, as integers: that takes NaN and infinity along (they lie above all others).
Codes are values times the scale's inverse, exact for a power of two, then the hardware's own rounding to
e4m3, which is the formats' (nearest, ties to even). A block that holds NaN or infinity gets a NaN scale.

The tensor cores want both factors of an FP8 product with the summed axis last. So a matrix that is summed
over its rows in the backward (activations, gradients, weights) leaves here transposed too, from the same
read: what a GEMM's own transpose would cost is the store of one byte a value.

Floor: bytes. bf16 in and out 4 B a value, 4,096 × 4,096 in 22 µs at 3 TB/s; codes and transposed codes the
same.

R rows, C columns, W width of a block.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from consilience.model.number_formats import E2M1, E4M3, FP4_BLOCK, MiniFloat

# Values of a tile, warps, and for `index` rows of a tile; `bench/quantization_gpu.py --sweep` tries others.
FAKE = {"values": 4096, "num_warps": 4}
INDEX = {"values": 2048, "num_warps": 4}
CODES = {"num_warps": 8, "maxnreg": 128}  # two programs an SM
TURNED = {"WIDE": 64, "num_warps": 4, "maxnreg": 128}  # four programs an SM
SIDE = 128  # of a tile of weights, and of a block of a GEMM's input


def _numbers(minifloat: MiniFloat) -> tuple[int, int, int, int, float]:
    """Carry, exponent and least bits of `choose_scale`; log2 of the smallest normal, lift of `round_to`."""
    fraction, exponent = math.frexp(minifloat.largest)
    carry = 2**23 - 1 - int((2 * fraction - 1) * 2**23)
    (least,) = struct.unpack("i", struct.pack("f", minifloat.smallest_amax))
    lowest = math.frexp(minifloat.smallest_normal)[1] - 1
    return carry, exponent - 1, least, lowest, 1.5 * 2.0 ** (23 - minifloat.mantissa_bits)


NUMBERS = {E4M3: _numbers(E4M3), E2M1: _numbers(E2M1)}


@triton.jit
def _magnitude(v):
    """|v| as the bits of a float32: NaN and infinity are the largest."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_bits(amax, FORMAT: tl.constexpr):
    """`choose_scale` from and to bits."""
    least: tl.constexpr = FORMAT[2]
    return (((tl.maximum(amax, least) + FORMAT[0]) >> 23) - FORMAT[1]) << 23


@triton.jit
def _rounded(v, scale, FORMAT: tl.constexpr):
    """`round_to`, scale as bits that broadcast against v."""
    bits = v.to(tl.int32, bitcast=True)
    binade = tl.maximum(bits & 0x7F800000, scale + FORMAT[3] * 8388608).to(tl.float32, bitcast=True)
    lifted = binade * FORMAT[4]
    nearest = ((v + lifted) - lifted).to(tl.int32, bitcast=True)
    return ((nearest & 0x7FFFFFFF) | (bits & (-2147483647 - 1))).to(tl.float32, bitcast=True)


@triton.jit
def _fake(
    x, y, num_blocks, blocks_a_row, width, plain, W: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Blocks of W along rows of `width`; columns from `plain` on pass as they are."""
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if IS_WHOLE:
        at = block[:, None] * W + tl.arange(0, W)[None, :]
        here = (block < num_blocks)[:, None]
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        scale = _scale_bits(tl.max(_magnitude(v), 1), FORMAT)[:, None]
        tl.store(y + at, _rounded(v, scale, FORMAT).to(y.dtype.element_ty), mask=here)
    else:
        row = block // blocks_a_row
        column = ((block - row * blocks_a_row) * W)[:, None] + tl.arange(0, W)[None, :]
        at = row[:, None] * width + column
        here = (block < num_blocks)[:, None] & (column < width)
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        scale = _scale_bits(tl.max(tl.where(column < plain, _magnitude(v), 0), 1), FORMAT)[:, None]
        v = tl.where(column < plain, _rounded(v, scale, FORMAT), v)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=here)


def fake_blocks(x: Tensor, width: int, minifloat: MiniFloat, plain: int | None = None) -> Tensor:
    """x [..., C] rounded in blocks of `width` (a power of two) channels; those from `plain` on are kept."""
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    plain = channels if plain is None else plain
    if not x.numel():
        return y
    blocks_a_row = triton.cdiv(channels, width)
    num_blocks = x.numel() // channels * blocks_a_row
    height = max(1, FAKE["values"] // width)
    _fake[triton.cdiv(num_blocks, height),](
        x, y, num_blocks, blocks_a_row, channels, plain, W=width, BLOCK=height, FORMAT=NUMBERS[minifloat],
        IS_WHOLE=channels % width == 0 and plain == channels, num_warps=FAKE["num_warps"],
    )  # fmt: skip
    return y


# ---- index queries and keys ---------------------------------------------------------------------


@triton.jit
def _rotate_blocks(
    x, y, num_rows, WIDTH: tl.constexpr, LOG: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    W: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The Hadamard transform of rows, then (W > 0) rounding in blocks of W."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    here = (row < num_rows)[:, None]
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    for _ in tl.static_range(LOG):
        even, odd = tl.split(tl.reshape(v, [BLOCK, WIDTH // 2, 2]))
        v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [BLOCK, WIDTH])
    v = (v * SCALE).to(y.dtype.element_ty)
    if W > 0:
        grouped = tl.reshape(v.to(tl.float32), [BLOCK, WIDTH // W, W])
        scale = _scale_bits(tl.max(_magnitude(grouped), 2), FORMAT)[:, :, None]
        v = tl.reshape(_rounded(grouped, scale, FORMAT), [BLOCK, WIDTH]).to(y.dtype.element_ty)
    tl.store(y + at, v, mask=here)


def rotate_blocks(x: Tensor, minifloat: MiniFloat | None) -> Tensor:
    """`hadamard` of x [..., C], C a power of two; with a format then `fake_fp4` in blocks of 32."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    num_rows = x.numel() // width
    if not num_rows:
        return y
    height = max(1, INDEX["values"] // width)
    _rotate_blocks[triton.cdiv(num_rows, height),](
        x, y, num_rows, WIDTH=width, LOG=width.bit_length() - 1, SCALE=width**-0.5, BLOCK=height,
        W=0 if minifloat is None else min(FP4_BLOCK, width), FORMAT=NUMBERS[minifloat or E2M1],
        num_warps=INDEX["num_warps"],
    )  # fmt: skip
    return y


# ---- codes for FP8 products ---------------------------------------------------------------------


@triton.jit
def _inverse(scale, amax):
    """Scale and its inverse as float32 from bits; NaN for a block that is not finite."""
    is_finite = amax < 0x7F800000
    inverse = (0x7F000000 - scale).to(tl.float32, bitcast=True)
    return tl.where(is_finite, scale.to(tl.float32, bitcast=True), float("nan")), inverse


@triton.jit
def _turned_codes(v, scale, inverse, FORMAT: tl.constexpr):
    """Codes transposed, made from bits: times 2^-120 a value has its code's exponent and mantissa.

    The hardware's pairs of codes may not be taken apart here: ptxas 12.8 reads a register that was never
    written where halves of `cvt.e4m3x2` go into words of other codes.
    """
    bits = (_rounded(v, scale, FORMAT) * inverse * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    code = ((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)
    return tl.trans(code.to(tl.uint8)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def write_codes(
    v, codes, scales, turned, turned_scales, r, c, num_columns, padded_rows,
    FORMAT: tl.constexpr, HAS_TURNED: tl.constexpr,
):  # fmt: skip
    """A 128 × 128 tile v, fp32, of this program: codes in blocks along rows and, turned, along columns.

    r, c its rows and columns; program axes 1 and 0 count tiles down and across.
    """
    size = _magnitude(v)
    amax = tl.max(size, 1)
    scale, inverse = _inverse(_scale_bits(amax, FORMAT), amax)
    q = (v * inverse[:, None]).to(tl.float8e4nv)
    tl.store(codes + r[:, None] * num_columns + c[None, :], q)
    tl.store(scales + tl.program_id(0) * padded_rows + r, scale)
    if HAS_TURNED:
        amax = tl.max(size, 0)
        bits = _scale_bits(amax, FORMAT)
        scale, inverse = _inverse(bits, amax)
        q = _turned_codes(v, bits[None, :], inverse[None, :], FORMAT)
        tl.store(turned + c[:, None] * padded_rows + r[None, :], q)
        tl.store(turned_scales + tl.program_id(1) * num_columns + c, scale)


@triton.jit
def _largest(v, AXIS: tl.constexpr):
    """Bits of the largest magnitudes along an axis, as of float32; bfloat16 is not made wider for that."""
    if v.dtype == tl.bfloat16:
        amax = tl.max((v.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32), AXIS) << 16
    else:
        amax = tl.max(_magnitude(v.to(tl.float32)), AXIS)
    return amax


@triton.jit
def columns_of(HALF: tl.constexpr, SIDE: tl.constexpr):
    """Columns of a half of this program's tile."""
    return tl.program_id(0).to(tl.int64) * SIDE + HALF * (SIDE // 2) + tl.arange(0, SIDE // 2)


@triton.jit
def write_codes_by_halves(
    left, right, codes, scales, turned, turned_scales, num_columns, padded_rows,
    FORMAT: tl.constexpr, HAS_CODES: tl.constexpr, HAS_TURNED: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """`write_codes` of a tile in two halves of its columns, which stay as narrow as they come until they are
    coded, one after the other: for a kernel that holds more than one tile."""
    r = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    if HAS_CODES:
        amax = tl.maximum(_largest(left, 1), _largest(right, 1))
        scale, inverse = _inverse(_scale_bits(amax, FORMAT), amax)
        tl.store(scales + tl.program_id(0) * padded_rows + r, scale)
    for half in tl.static_range(2):
        narrow = right if half else left
        v, c = narrow.to(tl.float32), columns_of(half, SIDE)
        if HAS_CODES:
            tl.store(codes + r[:, None] * num_columns + c[None, :], (v * inverse[:, None]).to(tl.float8e4nv))
        if HAS_TURNED:
            top = _largest(narrow, 0)
            bits = _scale_bits(top, FORMAT)
            turned_scale, turned_inverse = _inverse(bits, top)
            q = _turned_codes(v, bits[None, :], turned_inverse[None, :], FORMAT)
            tl.store(turned + c[:, None] * padded_rows + r[None, :], q)
            tl.store(turned_scales + tl.program_id(1) * num_columns + c, turned_scale)


# A single row would be a constant, its tile's other rows zeros at compile time, and ptxas 12.8 converts these
# into a register with a half that was never written.
@triton.jit(do_not_specialize=["num_rows"])
def _codes(
    x, codes, scales, turned, turned_scales, num_rows, num_columns, padded_rows,
    FORMAT: tl.constexpr, HAS_TURNED: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    at, here = r[:, None] * num_columns + c[None, :], (r < num_rows)[:, None]
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    write_codes(v, codes, scales, turned, turned_scales, r, c, num_columns, padded_rows, FORMAT, HAS_TURNED)


@triton.jit(do_not_specialize=["num_rows"])
def _turned(
    x, turned, turned_scales, num_rows, num_columns, padded_rows,
    FORMAT: tl.constexpr, SIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Turned codes alone, from tiles of 128 rows × WIDE columns: a scale belongs to 128 rows of a column."""
    r = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    v = tl.load(x + r[:, None] * num_columns + c[None, :], mask=(r < num_rows)[:, None], other=0.0).to(
        tl.float32
    )
    amax = tl.max(_magnitude(v), 0)
    bits = _scale_bits(amax, FORMAT)
    scale, inverse = _inverse(bits, amax)
    tl.store(
        turned + c[:, None] * padded_rows + r[None, :],
        _turned_codes(v, bits[None, :], inverse[None, :], FORMAT),
    )
    tl.store(turned_scales + tl.program_id(1) * num_columns + c, scale)


@triton.jit
def _tile_codes(
    x, codes, scales, turned, turned_scales, num_rows, num_columns, stride, turned_stride,
    FORMAT: tl.constexpr, IS_FAKE: tl.constexpr, HAS_TURNED: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """One 128 × 128 tile with one scale: codes and turned codes, or (IS_FAKE) rounded values."""
    r = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    at = r[:, None] * num_columns + c[None, :]
    here = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(_magnitude(v), 1), 0)
    bits = _scale_bits(amax, FORMAT)
    if IS_FAKE:
        tl.store(codes + at, _rounded(v, bits, FORMAT).to(codes.dtype.element_ty), mask=here)
    else:
        scale, inverse = _inverse(bits, amax)
        q = (v * inverse).to(tl.float8e4nv)
        tl.store(codes + at, q)
        tl.store(scales + tl.program_id(1) * stride + tl.program_id(0), scale)
        if HAS_TURNED:
            q = _turned_codes(v, bits, inverse, FORMAT)
            tl.store(turned + c[:, None] * num_rows + r[None, :], q)
            tl.store(turned_scales + tl.program_id(0) * turned_stride + tl.program_id(1), scale)


Codes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def room_for_codes(x: Tensor, *, has_codes: bool = True, has_turned: bool = True) -> Codes:
    """Codes, scales, turned codes and turned scales of x [R, C] as `encode_rows` gives them, not filled."""
    num_rows, width = x.shape
    padded, e4m3 = triton.cdiv(num_rows, SIDE) * SIDE, torch.float8_e4m3fn
    codes = scales = turned = turned_scales = None
    if has_codes:
        codes = x.new_empty(padded, width, dtype=e4m3)
        scales = x.new_empty(width // SIDE, padded, dtype=torch.float32)
    if has_turned:
        turned = x.new_empty(width, padded, dtype=e4m3)
        turned_scales = x.new_empty(padded // SIDE, width, dtype=torch.float32)
    return codes, scales, turned, turned_scales


def encode_rows(x: Tensor, *, has_codes: bool = True, has_turned: bool = True) -> Codes:
    """x [R, C], C a multiple of 128 -> codes [P, C], scales [C / 128, P], turned codes [C, P], turned scales
    [P / 128, C]; e4m3 and fp32. P is R up to a multiple of 128; rows past R are zeros.

    Codes have a scale for 128 columns of a row; turned codes, of the same values, for 128 rows of a column.
    """
    num_rows, width = x.shape
    x, made = x.contiguous(), room_for_codes(x, has_codes=has_codes, has_turned=has_turned)
    tall = triton.cdiv(num_rows, SIDE)
    if num_rows and has_codes:
        _codes[width // SIDE, tall](
            x, *made, num_rows, width, tall * SIDE,
            FORMAT=NUMBERS[E4M3], HAS_TURNED=has_turned, SIDE=SIDE, **CODES,
        )  # fmt: skip
    elif num_rows and has_turned:
        _turned[width // TURNED["WIDE"], tall](
            x, *made[2:], num_rows, width, tall * SIDE, FORMAT=NUMBERS[E4M3], SIDE=SIDE, **TURNED
        )
    return made


def encode_tiles(
    weight: Tensor, *, has_turned: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """weight [O, I], both multiples of 128 -> codes [O, I], scales [O / 128, L(I)], turned codes [I, O] and
    their scales [I / 128, L(O)]. One scale for 128 × 128; L(n) is n / 128 up to a multiple of 4, as cuBLAS
    reads them; what lies between is 0."""
    weight, e4m3 = weight.contiguous(), torch.float8_e4m3fn
    tall, broad = weight.shape[0] // SIDE, weight.shape[1] // SIDE
    stride, turned_stride = (triton.cdiv(n, 4) * 4 for n in (broad, tall))
    codes = torch.empty_like(weight, dtype=e4m3)
    scales = weight.new_zeros(tall, stride, dtype=torch.float32)
    turned = turned_scales = None
    if has_turned:
        turned = weight.new_empty(weight.shape[1], weight.shape[0], dtype=e4m3)
        turned_scales = weight.new_zeros(broad, turned_stride, dtype=torch.float32)
    _tile_codes[broad, tall](
        weight, codes, scales, turned, turned_scales, *weight.shape, stride, turned_stride,
        FORMAT=NUMBERS[E4M3], IS_FAKE=False, HAS_TURNED=has_turned, SIDE=SIDE, **CODES,
    )  # fmt: skip
    return codes, scales, turned, turned_scales


def fake_tiles(weight: Tensor) -> Tensor:
    """weight [O, I] as FP8 of 128 × 128 tiles holds it, in its type."""
    weight = weight.contiguous()
    y = torch.empty_like(weight)
    grid = (triton.cdiv(weight.shape[1], SIDE), triton.cdiv(weight.shape[0], SIDE))
    if weight.numel():
        _tile_codes[grid](
            weight, y, None, None, None, *weight.shape, 0, 0,
            FORMAT=NUMBERS[E4M3], IS_FAKE=True, HAS_TURNED=False, SIDE=SIDE, **CODES,
        )  # fmt: skip
    return y
