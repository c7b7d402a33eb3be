"""Fake quantisation: values rounded as the released model stores them, gradients passed on unchanged.

FP4 quantisation-aware training (report 5.2.1; specification 12.4, 5.2, 7) in the arithmetic of
`number_formats.py`: what a weight trains with is, to the bit, what an exporter writes and a loader reads.

Straight through: the gradient of every `fake_…` is the identity. None clips, because a block's scale is
rounded up: amax / scale ≤ 6 (or 448), and rounding never leaves the largest code. So no value lies where
a clamp would have a slope of 0. Rounding is in float32; what comes back has the dtype that went in and
fits bfloat16 exactly. Magnitudes stay below 2^106. Infinity and NaN come out as infinity or NaN, with
their block, for the loss to stop at: nothing here waits for the device to look.

A GPU runs kernels/triton_quantize.py instead, exact mode too: the results are the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilience.conf.errors import ConfigError
from consilience.model.kernels.choice import can_use_triton
from consilience.model.number_formats import (
    E2M1,
    E4M3,
    FP4_BLOCK,
    FP8_TILE,
    MiniFloat,
    blocks,
    choose_scale,
    round_to,
    tiles,
    untile,
)


@dataclass(frozen=True)
class Quantization:
    """Which parts compute with quantised values.

    experts        routed experts' weights in MXFP4
    indexer        the indexer's queries and keys, rotated by Hadamard, in FP4 blocks of 32
    index_scores   index scores cut to bfloat16 before top-k
    kv             window and compressed KV entries, all but their rope channels, in FP8 blocks of 64
    linears        dense projections in FP8: inputs 1×128, weights 128×128; their products too, forward and
                   backward (`kernels/fp8_linear.py`; report 3.4, specification 7, 12.4)
    """

    experts: bool = False
    indexer: bool = False
    index_scores: bool = False
    kv: bool = False
    linears: bool = False

    @classmethod
    def from_name(cls, name: str) -> Quantization:
        """A preset: "off", "fp4", "fp8" (dense projections alone) or "fp4_fp8"; ConfigError for another."""
        if name not in PRESETS:
            raise ConfigError(f"found quantization {name!r}; allowed: {', '.join(PRESETS)}")
        return PRESETS[name]


KV_BLOCK, GEMM_BLOCK = 64, FP8_TILE[1]


def mark_passing(weight: Tensor) -> None:
    """Say of a weight that its values come and go past autograd's version counters, as gathered ones do: what
    is made of it under no gradient is then never kept."""
    weight.is_passing = True  # type: ignore[attr-defined]


def is_passing(weight: Tensor) -> bool:
    return getattr(weight, "is_passing", False)


OFF = Quantization()
FP4 = Quantization(experts=True, indexer=True, index_scores=True, kv=True)
FP8 = Quantization(linears=True)
FP4_FP8 = replace(FP4, linears=True)
PRESETS = {"off": OFF, "fp4": FP4, "fp8": FP8, "fp4_fp8": FP4_FP8}


def fake_mxfp4(weight: Tensor) -> Tensor:
    """Expert weights [..., in] as MXFP4 holds them: decode_mxfp4(encode_mxfp4(weight)), bit for bit."""
    return _StraightThrough.apply(weight, FP4_BLOCK, E2M1)  # type: ignore[return-value]


def fake_fp4(x: Tensor) -> Tensor:
    """Activations [..., C] in e2m1, a scale for 32 neighbours: rotated index queries and keys."""
    return _StraightThrough.apply(x, FP4_BLOCK, E2M1)  # type: ignore[return-value]


def fake_fp8(x: Tensor, width: int) -> Tensor:
    """Activations [..., C] in e4m3, a scale for `width` neighbours: 128 for GEMM inputs, 64 for KV.

    KV's rope channels stay as they are: pass the others alone. The last block ends with C.
    """
    return _StraightThrough.apply(x, width, E4M3)  # type: ignore[return-value]


def fake_fp8_tiles(weight: Tensor) -> Tensor:
    """A projection's weight [out, in] as FP8 of 128×128 tiles holds it."""
    return _TilesStraightThrough.apply(weight)  # type: ignore[return-value]


def kv_values(x: Tensor, num_rope: int) -> Tensor:
    """KV entries [..., C] as the released model stores them: FP8 in blocks of 64, rope channels apart."""
    return _StraightThrough.apply(x, KV_BLOCK, E4M3, x.shape[-1] - num_rope)  # type: ignore[return-value]


def index_values(x: Tensor) -> Tensor:
    """Index queries or keys [..., C]: rotated by Hadamard, then FP4."""
    if not can_use_triton(x):
        return fake_fp4(hadamard(x))
    _check_width(x)
    return _Hadamard.apply(x, E2M1)  # type: ignore[return-value]


def fake_bf16(x: Tensor) -> Tensor:
    """x cut to bfloat16, in its own dtype: index scores before top-k."""
    return _CutToBfloat16.apply(x)  # type: ignore[return-value]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, width: int, minifloat: MiniFloat, plain: int | None = None) -> Tensor:
        if can_use_triton(x) and not width & (width - 1):
            from consilience.model.kernels import triton_quantize

            return triton_quantize.fake_blocks(x, width, minifloat, plain)
        plain = x.shape[-1] if plain is None else plain
        if not plain:
            return x.clone()
        grouped = blocks(x[..., :plain].float(), min(width, plain))
        scale = choose_scale(grouped.abs().amax(-1, keepdim=True), minifloat)
        rounded = round_to(grouped, scale, minifloat).flatten(-2)[..., :plain].to(x.dtype)
        return rounded if plain == x.shape[-1] else torch.cat((rounded, x[..., plain:]), dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None, None, None


class _TilesStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        if can_use_triton(weight):
            from consilience.model.kernels import triton_quantize

            return triton_quantize.fake_tiles(weight)
        grouped = tiles(weight.float(), FP8_TILE)
        scale = choose_scale(grouped.abs().amax((-3, -1), keepdim=True), E4M3)
        return untile(round_to(grouped, scale, E4M3), weight).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad


class _CutToBfloat16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad


def hadamard(x: Tensor) -> Tensor:
    """The normalised Walsh-Hadamard transform of the last axis: orthogonal, symmetric, its own inverse.

    Applied to index queries and to index keys, it leaves q·k alone and spreads outliers before
    `fake_fp4`. Sums and differences of neighbours, in float32 (float64 for float64), scaled once after
    the last: an order that no library chooses, so a row's bits depend on the row alone, anywhere.
    ValueError unless the last axis is a power of two.
    """
    _check_width(x)
    return _Hadamard.apply(x, None)  # type: ignore[return-value]


def _check_width(x: Tensor) -> None:
    width = x.shape[-1]
    if width & (width - 1) or not width:
        raise ValueError(f"the Hadamard transform needs a width that is a power of two, found {width}")


class _Hadamard(torch.autograd.Function):
    """With a format (on a GPU) rounded to it in the same pass, straight through."""

    @staticmethod
    def forward(ctx, x: Tensor, minifloat: MiniFloat | None) -> Tensor:
        return _transform(x, minifloat)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return hadamard(grad), None


def _transform(x: Tensor, minifloat: MiniFloat | None) -> Tensor:
    if can_use_triton(x):
        from consilience.model.kernels import triton_quantize

        return triton_quantize.rotate_blocks(x, minifloat)
    width = x.shape[-1]
    rows = x.reshape(-1, width).to(torch.promote_types(x.dtype, torch.float32))
    for _ in range(width.bit_length() - 1):
        even, odd = rows[:, 0::2], rows[:, 1::2]
        rows = torch.cat((even + odd, even - odd), dim=1)
    return (rows * width**-0.5).view(x.shape).to(x.dtype)
