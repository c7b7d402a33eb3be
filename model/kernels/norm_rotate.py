"""RMS norm and rotation in one pass: norm_rotate.c on a CPU, triton_norm.py on a GPU.

The twins are model/norm.py and model/rope.py.

Composed from PyTorch's operations the two are about 15 small ones a call, and at the demo's size the number
of operations is the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.kernels import gpu_norm
from consilience.model.kernels.compiled import call, fixed_parts, library


def is_available(x: Tensor, rotation: Tensor | None = None) -> bool:
    """Whether a kernel takes these: a rotation a token; on the CPU fp32 and a compiler found.

    rotation [..., R/2] has the leading axes of x, or 1 in place of the last of them (the heads).
    """
    if rotation is not None:
        axes, own = tuple(rotation.shape[:-1]), tuple(x.shape[:-1])
        if axes != own and (len(axes) < 2 or axes != (*own[:-1], 1)):
            return False
    if x.device.type != "cpu":
        return gpu_norm.is_available(x, rotation)
    return x.dtype == torch.float32 and not isinstance(library("norm_rotate"), str)


def _forward(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float | None, sign: float
) -> tuple[Tensor, Tensor | None]:
    """The result and the scales [...] of the norm."""
    y = torch.empty_like(x)
    scale = None if eps is None else x.new_empty(x.shape[:-1])
    turn = None if rotation is None else torch.view_as_real(rotation)
    numbers = (*_sizes(x, rotation), float(eps or 0.0), sign)
    call("norm_rotate", "norm_rotate_forward", *numbers, x, weight, turn, y, scale)
    return y, scale


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rotation, eps, sign):  # type: ignore[override]
        x = x.contiguous()
        y, scale = _forward(x, weight, rotation, eps, sign)
        is_turn = weight is None and scale is None
        ctx.save_for_backward(None if is_turn else x, weight, rotation, scale)
        ctx.sizes, ctx.sign = _sizes(x, rotation), sign
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, rotation, scale = ctx.saved_tensors
        d_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        sums = (fixed_parts(ctx.sizes[0]), d_x.shape[-1])
        d_weight = None if weight is None else torch.zeros(sums, dtype=torch.float64)
        turn = None if rotation is None else torch.view_as_real(rotation)
        tensors = (x, weight, turn, scale, grad.contiguous(), d_x, d_weight)
        call("norm_rotate", "norm_rotate_backward", *ctx.sizes, ctx.sign, *tensors)
        return d_x, None if d_weight is None else d_weight.sum(0).float(), None, None, None


def _sizes(x: Tensor, rotation: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens, heads, channels, pairs. Without a rotation every row is a token of one head."""
    width = x.shape[-1]
    if rotation is None:
        return x.numel() // max(width, 1), 1, width, 0
    tokens = rotation.shape[:-1].numel()
    return tokens, x.shape[:-1].numel() // max(tokens, 1), width, rotation.shape[-1]


def norm_rotate(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float | None, *, is_inverse: bool = False
) -> Tensor:
    """RMS norm of x [..., C] (none where eps is None) times weight [C], then its last channels turned.

    rotation [..., R/2] complex64 as `is_available` says.
    """
    sign = -1.0 if is_inverse else 1.0
    if x.device.type != "cpu":
        return gpu_norm.norm_rotate(x, weight, rotation, eps, sign)
    rotation = None if rotation is None else rotation.resolve_conj().contiguous()
    if not torch.is_grad_enabled():
        return _forward(x.contiguous(), weight, rotation, eps, sign)[0]
    return _NormRotate.apply(x, weight, rotation, eps, sign)  # type: ignore[return-value]
