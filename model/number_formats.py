"""FP8 (e4m3) and MXFP4 (e2m1) with power-of-two scales, exact to the bit (specification 11.2, 12.4, 7).

One library for the trainer (`quantization.py`), the exporter and whoever loads a checkpoint.

A value is code · scale. FP8 has one scale a tile: 128×128 for weights, 1×128 for GEMM inputs, 1×64 for
the KV cache. MXFP4 has one for 32 neighbours of a row. A block or tile that would reach past the edge
ends there, with a scale of its own. A chosen scale is the smallest power of two that brings the block's
largest magnitude (at least 1e-4 in FP8, 6·2^-126 in MXFP4) down to 448 or 6, so nothing is ever clipped;
it is found from the bits of the magnitude, where floating-point logarithms err next to powers of two.

e4m3 has 4 significant bits and e2m1 has 2, so bfloat16, with 8 and the exponents of float32, holds every
decoded value: with the scales chosen here always, with given ones from 2^-124 to 2^119 (e4m3) and from
2^-127 to 2^125 (e2m1). float32 takes FP8 scales from 2^-127. Larger products overflow to infinity.

Leading dimensions (experts) are free: [..., out, in]. Every function leaves its arguments alone and
raises ValueError for a wrong shape or type, and for values or scales that are not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

FP4_BLOCK = 32
FP8_TILE = (128, 128)
MXFP4_SCALES = (torch.float8_e8m0fnu,)
# Experts of the released Base checkpoints are said to carry float32 scales.
FP8_SCALES = (torch.float8_e8m0fnu, torch.float32)
# 6 · 2^6 ≤ 448: an FP8 tile scale of max / 2^6 leaves e2m1 the normal numbers from 2^-6, 2^11 below the max.
HEADROOM_LOG2, MAX_SPREAD_LOG2 = 6, 11


@dataclass(frozen=True)
class MiniFloat:
    """A small floating-point format, and the least magnitude that its scales are chosen for."""

    largest: float
    smallest_normal: float
    mantissa_bits: int
    smallest_amax: float


E4M3 = MiniFloat(largest=448.0, smallest_normal=2.0**-6, mantissa_bits=3, smallest_amax=1e-4)
E2M1 = MiniFloat(largest=6.0, smallest_normal=1.0, mantissa_bits=1, smallest_amax=6 * 2.0**-126)


def choose_scale(amax: Tensor, minifloat: MiniFloat) -> Tensor:
    """2^ceil(log2(max(amax, smallest) / largest)): amax float32, at least 0 -> float32, same shape.

    With amax = m·2^e and largest = n·2^f (m, n in [1, 2)) the exponent is e - f, and one more if m > n:
    adding 2^23 - 1 minus n's mantissa carries into the exponent bits of amax exactly then.
    """
    fraction, exponent = math.frexp(minifloat.largest)
    carry = 2**23 - 1 - int((2 * fraction - 1) * 2**23)
    bits = amax.clamp(min=minifloat.smallest_amax).view(torch.int32) + carry
    return ((bits >> 23) - (exponent - 1)).bitwise_left_shift_(23).view(torch.float32)


def round_to(values: Tensor, scale: Tensor | float, minifloat: MiniFloat) -> Tensor:
    """values float32, below 2^106, to the nearest code · scale: ties to even, -0 kept, nothing clipped.

    A power-of-two `scale` broadcasts against `values`. Codes between p and 2p are step = p·2^-bits apart,
    those below the smallest normal number as if they were above it. Adding 1.5·2^23·step puts the sum
    where float32 itself has that step, so its own rounding does the work, once.
    """
    binade = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    binade.clamp_(min=scale * minifloat.smallest_normal)  # type: ignore[arg-type]  # a tensor will do
    lift = 1.5 * 2.0 ** (23 - minifloat.mantissa_bits)
    return torch.add(values, binade, alpha=lift).sub_(binade, alpha=lift).copysign_(values)


def blocks(values: Tensor, width: int) -> Tensor:
    """[..., C] -> [..., ceil(C / width), width], zeros after the end of a ragged last block."""
    missing = -values.shape[-1] % width
    return (functional.pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, width))


def encode_fp8(
    weight: Tensor, tile: tuple[int, int] = FP8_TILE, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[..., out, in] floating -> (float8_e4m3fn, same shape; float8_e8m0fnu, one a tile).

    scale [..., ceil(out / tile[0]), ceil(in / tile[1])], e8m0 or float32, is used as it is, and
    returned, where given: what `decode_fp8` made of a file becomes the file's bytes again, from
    bfloat16 too. Values too large for a given scale saturate at ±448. A last axis in blocks of 64 is
    `tile=(1, 64)`.
    """
    values = tiles(weight.detach().float(), tile)
    amax = _finite_amax(values, (-3, -1), E4M3)
    if scale is None:
        used = choose_scale(amax, E4M3)
        scale = _to_e8m0(used[..., 0, :, 0])
    else:
        used = _to_float(scale, amax[..., 0, :, 0].shape, FP8_SCALES)[..., :, None, :, None]
    scaled = (values / used).clamp_(-E4M3.largest, E4M3.largest)
    return untile(scaled, weight).to(torch.float8_e4m3fn), scale


def decode_fp8(
    weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, tile: tuple[int, int] = FP8_TILE
) -> Tensor:
    """float8_e4m3fn [..., out, in] times its tile's scale, e8m0 or float32 -> [..., out, in] of dtype.

    The product is taken in float32 and rounded to dtype once. A NaN code stays NaN.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"FP8 weights are float8_e4m3fn, found {weight.dtype}")
    values = tiles(_look_up(_e4m3_values(weight.device), weight), tile)
    used = _to_float(scale, (*values.shape[:-4], values.shape[-4], values.shape[-2]), FP8_SCALES)
    return untile(values * used[..., :, None, :, None], weight).to(dtype)


def encode_mxfp4(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[..., out, in] floating -> (int8 [..., out, in/2], float8_e8m0fnu [..., out, ceil(in/32)]).

    Low nibble = even input; bit 3 the sign, bits 0-2 the place in {0, .5, 1, 1.5, 2, 3, 4, 6}; nearest,
    ties to even. A given scale (e8m0) is used as it is, and returned; values beyond ±6 of it saturate.
    Also ValueError for an odd number of inputs.
    """
    if weight.shape[-1] % 2:
        raise ValueError(
            f"MXFP4 packs two inputs a byte: their number must be even, found {weight.shape[-1]}"
        )
    values = blocks(weight.detach().float(), FP4_BLOCK)
    amax = _finite_amax(values, -1, E2M1)
    if scale is None:
        used = choose_scale(amax, E2M1)
        scale = _to_e8m0(used[..., 0])
    else:
        used = _to_float(scale, amax.shape[:-1], MXFP4_SCALES)[..., None]
    codes = _e2m1_codes((values / used).clamp_(-E2M1.largest, E2M1.largest))
    pairs = codes.flatten(-2)[..., : weight.shape[-1]].unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, scale


def decode_mxfp4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """int8 [..., out, in/2], float8_e8m0fnu [..., out, ceil(in/32)] -> [..., out, in] of dtype."""
    if packed.dtype != torch.int8:
        raise ValueError(f"MXFP4 weights are int8, two codes a byte; found {packed.dtype}")
    values = blocks(_look_up(_e2m1_pairs(packed.device), packed).view(torch.float32), FP4_BLOCK)
    used = _to_float(scale, values.shape[:-1], MXFP4_SCALES)
    return (values * used[..., None]).flatten(-2)[..., : 2 * packed.shape[-1]].to(dtype)


def mxfp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 as FP8 of 128×128 tiles, losslessly: both decode to the same bits (specification 11.2).

    The tile's scale is max / 2^6. Blocks whose scale is up to 2^11 below max stay normal e4m3 numbers;
    ValueError beyond. (Subnormals would carry exact values to 2^14; the released converters stop at
    2^11 too.) Blocks of zeros fit any scale and do not count, their chosen scale being 2^-126.
    """
    values = decode_mxfp4(packed, scale, torch.float32)
    exponents = scale.view(torch.uint8).int()
    has_values = blocks(values, FP4_BLOCK).any(-1)
    tile = (FP8_TILE[0], FP8_TILE[1] // FP4_BLOCK)
    largest = tiles(exponents, tile).amax((-3, -1))
    below = largest[..., :, None, :, None] - tiles(exponents, tile)
    spread = (below * tiles(has_values.int(), tile)).amax((-3, -1))
    if (spread > MAX_SPREAD_LOG2).any():
        where = (spread > MAX_SPREAD_LOG2).nonzero()[0].tolist()
        raise ValueError(
            f"scales of the {FP8_TILE[0]}×{FP8_TILE[1]} tile {where} span 2^{int(spread[tuple(where)])}; FP8 "
            f"holds MXFP4 without loss up to 2^{MAX_SPREAD_LOG2}. Keep these weights in MXFP4 or bfloat16"
        )
    smaller = (largest - HEADROOM_LOG2).clamp(min=0).to(torch.uint8).view(torch.float8_e8m0fnu)
    return encode_fp8(values, scale=smaller)


def is_exact_fp8(weight: Tensor, scale: Tensor, tile: tuple[int, int] = FP8_TILE) -> bool:
    """Whether FP8 with these scales holds every value of weight [..., out, in], read back in its type."""
    return torch.equal(decode_fp8(*encode_fp8(weight, tile, scale), weight.dtype, tile), weight)


def is_exact_mxfp4(weight: Tensor, scale: Tensor) -> bool:
    """Whether MXFP4 with these scales holds every value of weight [..., out, in]."""
    return torch.equal(decode_mxfp4(*encode_mxfp4(weight, scale), weight.dtype), weight)


def _e2m1_codes(scaled: Tensor) -> Tensor:
    """float32 within ±6 -> int8 codes 0 to 15."""
    halves = (round_to(scaled, 1.0, E2M1).abs_() * 2).to(torch.int8)  # 0, 1, 2, 3, 4, 6, 8 or 12
    # Steps of 1, 2 and 4 halves: the place is the least of three lines.
    place = torch.minimum(halves, torch.minimum((halves >> 1) + 2, (halves >> 2) + 4))
    return place | (scaled.view(torch.int32) >> 28).to(torch.int8) & 8


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table [256] at codes of one byte: on a CPU four times as fast as torch's own cast from float8."""
    return table.index_select(0, codes.contiguous().view(torch.uint8).flatten().int()).view(codes.shape)


@cache
def _e4m3_values(device: torch.device) -> Tensor:
    """The value of each byte, float32 [256]."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two float32 values of each byte, low nibble first, as one int64: [256], one look-up a byte."""
    with torch.inference_mode(False):
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        values = torch.cat([positive, -positive])
        high, low = torch.meshgrid(values, values, indexing="ij")
        return torch.stack([low, high], -1).view(torch.int64).flatten().to(device)


def tiles(values: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., R, C] -> [..., ceil(R/h), h, ceil(C/w), w], zeros past the edges."""
    down, across = (-size % side for size, side in zip(values.shape[-2:], tile))
    padded = functional.pad(values, (0, across, 0, down)) if down or across else values
    return padded.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0]))


def untile(tiles: Tensor, like: Tensor) -> Tensor:
    """The inverse of `tiles`, to the shape of `like`."""
    return tiles.flatten(-2).flatten(-3, -2)[..., : like.shape[-2], : like.shape[-1]]


def _finite_amax(values: Tensor, dims: int | tuple[int, int], minifloat: MiniFloat) -> Tensor:
    """Largest magnitudes over dims, kept as ones; ValueError for one that no float32 decodes to."""
    amax = values.abs().amax(dims, keepdim=True)
    limit = math.frexp(minifloat.largest)[0] * 2.0**128
    if not (amax <= limit).all():
        raise ValueError(f"values to encode are finite and at most {limit:.4g}, found {float(amax.max())}")
    return amax


def _to_e8m0(scale: Tensor) -> Tensor:
    """float32 powers of two from 2^-126 -> float8_e8m0fnu."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_float(scale: Tensor, shape: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> Tensor:
    """A stored scale as float32, once its type, shape and values are those of a scale."""
    if scale.dtype not in allowed:
        raise ValueError(f"scales are {' or '.join(map(str, allowed))}, found {scale.dtype}")
    if scale.shape != torch.Size(shape):
        raise ValueError(f"these weights have scales {list(shape)}, found {list(scale.shape)}")
    wide = scale.float()
    is_scale = (wide > 0) & (wide < math.inf)
    if not is_scale.all():
        raise ValueError(f"scales are positive and finite, found {float(wide[~is_scale][0])}")
    return wide
