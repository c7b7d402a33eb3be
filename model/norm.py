"""RMSNorm, computed in fp32 with one cast at the end (report 4.2; specification section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.kernels.norm_rotate import is_available, norm_rotate
from consilience.model.rope import rotate


class _Rms(torch.autograd.Function):
    """Explicit backward: half the memory passes of the composed one."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, scale = ctx.saved_tensors
        # y = x s: dx = s (dy - y mean(dy y))
        inner = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, inner, value=-1).mul_(scale), None


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """The definition: x / sqrt(mean(x²) + eps) over the last axis, in fp32 (fp64 stays)."""
    wide = x if x.dtype == torch.float64 else x.float()
    if not exact.is_on():
        return _Rms.apply(wide, eps)  # type: ignore[return-value]
    rows = exact.by_tiles(lambda rows: _Rms.apply(rows, eps), wide.reshape(-1, x.shape[-1]))
    return rows.view(x.shape)


def rms(x: Tensor, eps: float, rotation: Tensor | None = None) -> Tensor:
    """`plain_norm` in x's dtype; then, given a rotation, `rotate` by it."""
    if is_available(x, rotation):
        return norm_rotate(x, None, rotation, eps)
    normed = plain_norm(x, eps).to(x.dtype)
    return normed if rotation is None else rotate(normed, rotation)


class RMSNorm(nn.Module):
    """`rms` times a learned weight [width], initialised to 1."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """[..., width] -> [..., width] in x's dtype; then, given a rotation, `rotate` by it."""
        if is_available(x, rotation) and self.weight.dtype == x.dtype:
            return norm_rotate(x, self.weight, rotation, self.eps)
        wide = plain_norm(x, self.eps)
        normed = (wide * self.weight.to(wide.dtype)).to(x.dtype)
        return normed if rotation is None else rotate(normed, rotation)
