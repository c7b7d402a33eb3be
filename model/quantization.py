"""Fake quantisation: values rounded as the released model stores them, gradients passed on unchanged.

FP4 quantisation-aware training (report 5.2.1; specification 12.4, 5.2, 7) in the arithmetic of
`number_formats.py`: what a weight trains with is, to the bit, what an exporter writes and a loader reads.

Straight through: the gradient of every `fake_…` is the identity. None clips, because a block's scale is
rounded up: amax / scale ≤ 6 (or 448), and rounding never leaves the largest code. So no value lies where
a clamp would have a slope of 0. Rounding is in float32; what comes back has the dtype that went in and
fits bfloat16 exactly. Magnitudes stay below 2^106. Infinity and NaN come out as infinity or NaN, with
their block, for the loss to stop at: nothing here waits for the device to look.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from consilience.conf.errors import ConfigError
from consilience.model import exact
from consilience.model.number_formats import E2M1, E4M3, FP4_BLOCK, MiniFloat, blocks, choose_scale, round_to


@dataclass(frozen=True)
class Quantization:
    """Which parts compute with quantised values.

    experts        routed experts' weights in MXFP4
    indexer        the indexer's queries and keys, rotated by Hadamard, in FP4 blocks of 32
    index_scores   index scores cut to bfloat16 before top-k
    kv             window and compressed KV entries, all but their rope channels, in FP8 blocks of 64
    """

    experts: bool = False
    indexer: bool = False
    index_scores: bool = False
    kv: bool = False

    @classmethod
    def from_name(cls, name: str) -> Quantization:
        """The preset "off" or "fp4"; ConfigError for another name."""
        if name not in PRESETS:
            raise ConfigError(f"found quantization {name!r}; allowed: {', '.join(PRESETS)}")
        return PRESETS[name]


KV_BLOCK = 64
OFF = Quantization()
FP4 = Quantization(experts=True, indexer=True, index_scores=True, kv=True)
PRESETS = {"off": OFF, "fp4": FP4}


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


def kv_values(x: Tensor, num_rope: int) -> Tensor:
    """KV entries [..., C] as the released model stores them: FP8 in blocks of 64, rope channels apart."""
    plain = x.shape[-1] - num_rope
    return torch.cat((fake_fp8(x[..., :plain], KV_BLOCK), x[..., plain:]), dim=-1) if plain else x


def index_values(x: Tensor) -> Tensor:
    """Index queries or keys [..., C]: rotated by Hadamard, then FP4."""
    return fake_fp4(hadamard(x))


def fake_bf16(x: Tensor) -> Tensor:
    """x cut to bfloat16, in its own dtype: index scores before top-k."""
    return _CutToBfloat16.apply(x)  # type: ignore[return-value]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, width: int, minifloat: MiniFloat) -> Tensor:
        grouped = blocks(x.float(), min(width, x.shape[-1]))
        scale = choose_scale(grouped.abs().amax(-1, keepdim=True), minifloat)
        return round_to(grouped, scale, minifloat).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None, None


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
    `fake_fp4`. One product with a matrix of ±1 in float32 (float64 for float64), scaled once after it.
    ValueError unless the last axis is a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1) or not width:
        raise ValueError(f"the Hadamard transform needs a width that is a power of two, found {width}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, width).to(wide)
    # A lone row would go through a matrix-vector product, which sums in another order than a batch does.
    lone, signs = rows.shape[0] == 1, _signs(width, wide, x.device)
    rows = rows.expand(2, -1) if lone else rows
    product = exact.linear(rows, signs) if exact.is_on() else rows @ signs
    return (product[: 1 if lone else None] * width**-0.5).view(x.shape).to(x.dtype)


@cache
def _signs(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of ±1 [width, width]: entry (i, j) is -1 to the number of common one bits."""
    with torch.inference_mode(False):
        signs = torch.ones(1, 1, dtype=dtype, device=device)
        while signs.shape[0] < width:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return signs
