"""Partial interleaved RoPE with its inverse, and the two frequency tables (specification 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.config import ModelConfig
from consilience.model.kernels.norm_rotate import is_available, norm_rotate


def inverse_frequencies(
    config: ModelConfig, *, is_compressed: bool, device: torch.device | None = None
) -> Tensor:
    """Radians per token of each channel pair: [R/2] fp32.

    Sliding-only layers use theta^(-2i/R). Layers with compression use the long-context theta with
    YaRN: pairs that turn more than beta_fast times within the original length keep their
    frequency, those that turn less than beta_slow times are divided by the factor, a linear blend
    lies between. cos and sin are not scaled (attention factor 1).
    """
    width = config.qk_rope_head_dim
    theta = config.compress_rope_theta if is_compressed else config.rope_theta
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / theta**exponents
    if not is_compressed or config.rope_factor == 1.0:
        return frequencies

    def pair_turning(times: float) -> float:
        return width * math.log(config.rope_original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.rope_beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    blend = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - blend) + frequencies / config.rope_factor * blend


def rotations(position: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex rotations [..., R/2] for integer positions [...]; angles are fp32 products."""
    angles = (position.to(torch.float32)[..., None] * frequencies).reshape(-1, len(frequencies))
    unit = exact.by_tiles(lambda a: torch.polar(torch.ones_like(a), a), angles)
    return unit.view(*position.shape, len(frequencies))


def rotate(x: Tensor, rotation: Tensor, *, is_inverse: bool = False) -> Tensor:
    """Rotate the last R channels of x as interleaved pairs, or back.

    x [..., C]; rotation [..., R/2] broadcasts over x's leading axes. Computed in fp32 (fp64 stays),
    returned in x's dtype.
    """
    if is_available(x, rotation):
        return norm_rotate(x, None, rotation, None, is_inverse=is_inverse)
    rotation = rotation.conj() if is_inverse else rotation
    width = 2 * rotation.shape[-1]
    plain, turned = x[..., :-width], x[..., -width:]
    wide = turned if x.dtype == torch.float64 else turned.float()
    if wide.dtype == torch.float64:
        rotation = rotation.to(torch.complex128)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(_product(pairs, rotation)).flatten(-2).to(x.dtype)
    return torch.cat((plain, turned), dim=-1)


def _product(pairs: Tensor, rotation: Tensor) -> Tensor:
    """pairs · rotation. In exact mode from single operations: a fused one may round otherwise."""
    if not exact.is_on():
        return pairs * rotation
    a, b, c, d = pairs.real, pairs.imag, rotation.real, rotation.imag
    return torch.complex(a * c - b * d, a * d + b * c)
