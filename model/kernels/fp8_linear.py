"""Dense projections with all three products in FP8, fp32 sums (report 3.4; specification 7, 12.4).

y = x Wᵀ with x in blocks of 1 × 128 (a row's neighbouring channels) and W in tiles of 128 × 128. Backward the
gradient of y is rounded twice: along channels for dx = dy W, with the same codes of W, and along tokens, as x
is, for dW = dyᵀ x. Rounding is straight through. Weights stay the masters they are; dW has their type.

DeepSeek-V3 makes x's blocks along tokens from its codes; here they come from x itself in the pass that makes
the codes: one rounding fewer. Kept for the backward are codes only, a byte a value.

On Hopper products are cuBLAS', by block scales that it applies to fp32 sums of 128 terms; on other GPUs
those of triton_scaled_mm.py, which does the same. The twin multiplies the rounded values, which bf16 holds
exactly: it serves the CPU, exact mode, other types and widths that are no multiples of 128.

R rows, P rows up to a multiple of 128, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from consilience.model import exact
from consilience.model.kernels.choice import uses_triton
from consilience.model.quantization import GEMM_BLOCK, fake_fp8, fake_fp8_tiles, is_passing

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fp8_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x [..., I] times each weight [O, I] transposed: [..., O] in x's type. x is rounded once for all."""
    rows = x.reshape(-1, x.shape[-1])
    made = by_kernels(rows, *weights) if is_available(rows, *weights) else _Twin.apply(rows, *weights)
    return tuple(out.view(*x.shape[:-1], -1) for out in made)  # type: ignore[union-attr]


def by_kernels(rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """rows [R, I], weights [O, I] that `is_available` takes -> [R, O] each, in rows' type."""
    if not torch.is_grad_enabled():
        return _forward(rows, weights, False, False)[0]
    return _OnGpu.apply(rows, *weights)  # type: ignore[return-value]


def is_available(rows: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take rows [R, I] and weights [O, I]: a GPU with FP8, bf16 rows, whole tiles."""
    is_whole = all(size % GEMM_BLOCK == 0 for weight in weights for size in weight.shape)
    fits = is_whole and rows.dtype == torch.bfloat16 and rows.shape[0] > 0
    return fits and uses_triton(rows, *weights) and torch.cuda.get_device_capability(rows.device) >= (8, 9)


def stored_tiles(weight: Tensor) -> Tensor:
    """A weight [O, I] whose products stay in the model's type: as FP8 of 128 × 128 tiles holds it."""
    return fake_fp8_tiles(weight) if torch.is_grad_enabled() else _keep(weight, "values", fake_fp8_tiles)


def _keep(weight: Tensor, kind: str, make: Callable[[Tensor], Any]) -> Any:
    """make(weight), once until autograd's version counter shows a change of the weight.

    Optimizers that write past that counter come after a forward with gradients, which forgets what was kept.
    Of a weight marked as passing nothing is kept.
    """
    if is_passing(weight):
        return make(weight.detach())
    now = (weight._version, weight.data_ptr())
    kept = _kept.get(weight)
    if kept is None or kept[0] != now:
        kept = _kept[weight] = (now, {})
    if kind not in kept[1]:
        kept[1][kind] = make(weight.detach())
    return kept[1][kind]


# ---- the twin -----------------------------------------------------------------------------------


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, *weights)
        rounded = fake_fp8(rows, GEMM_BLOCK)
        return tuple(exact.linear(rounded, fake_fp8_tiles(weight)) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        d_rows, d_weights = None, []
        for grad, weight, is_needed in zip(grads, weights, ctx.needs_input_grad[1:]):
            if ctx.needs_input_grad[0]:
                d = fake_fp8(grad, GEMM_BLOCK) @ fake_fp8_tiles(weight)
                d_rows = d if d_rows is None else d_rows + d
            d_weights.append(_along_tokens(grad) @ _along_tokens(rows).t() if is_needed else None)
        return d_rows, *d_weights


def _along_tokens(rows: Tensor) -> Tensor:
    """rows [R, C] rounded in blocks of 128 rows: [C, R]."""
    return fake_fp8(rows.t().contiguous(), GEMM_BLOCK)


# ---- on a GPU -----------------------------------------------------------------------------------


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        needs_rows, *needs_weights = ctx.needs_input_grad
        made, kept = _forward(rows, weights, needs_rows, any(needs_weights))
        ctx.save_for_backward(*kept)
        ctx.dtypes = tuple(weight.dtype for weight in weights)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from consilience.model.kernels.triton_quantize import encode_rows

        turned_rows, *turned_weights = zip(ctx.saved_tensors[::2], ctx.saved_tensors[1::2])
        needs_rows, *needs_weights = ctx.needs_input_grad
        d_rows, d_weights = None, []
        for grad, weight, is_needed, dtype in zip(grads, turned_weights, needs_weights, ctx.dtypes):
            flags = {"has_codes": needs_rows, "has_turned": is_needed}
            codes, scales, turned, turned_scales = encode_rows(grad, **flags)
            if needs_rows:
                d = product((codes, scales), weight, grad.dtype, is_tiled=True)[: grad.shape[0]]
                d_rows = d if d_rows is None else d_rows + d
            d = product((turned, turned_scales), turned_rows, dtype) if is_needed else None
            d_weights.append(d)
        return d_rows, *d_weights


def _forward(
    rows: Tensor, weights: tuple[Tensor, ...], needs_rows: bool, needs_weights: bool
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The products, and turned codes and scales of rows and of each weight, None where not needed."""
    from consilience.model.kernels.triton_quantize import encode_rows

    keeps = not (needs_rows or needs_weights)
    codes, scales, *kept = encode_rows(rows, has_turned=needs_weights)
    made = []
    for weight in weights:
        encoded = weight_codes(weight, keeps=keeps, has_turned=needs_rows)
        made.append(product((codes, scales), encoded[:2], rows.dtype, is_tiled=True)[: rows.shape[0]])
        kept += encoded[2:]
    return tuple(made), kept


def weight_codes(weight: Tensor, *, keeps: bool, has_turned: bool) -> Any:
    """`encode_tiles` of a weight; `keeps` (no gradient is wanted): made once until the weight changes."""
    from consilience.model.kernels.triton_quantize import encode_tiles

    if keeps:
        return _keep(weight, "codes", lambda w: encode_tiles(w, has_turned=False))
    _kept.pop(weight, None)
    return encode_tiles(weight, has_turned=has_turned)


def product(a: Any, b: Any, dtype: torch.dtype, *, is_tiled: bool = False) -> Tensor:
    """a [M, K] times b [N, K] transposed: [M, N] in dtype.

    Each is a pair of codes and scales as `triton_quantize.encode_rows` makes them; b, if `is_tiled`, as
    `encode_tiles`.
    """
    codes, scales, other, other_scales = *a, *b
    if not codes.is_cuda or torch.cuda.get_device_capability(codes.device) != (9, 0):
        from consilience.model.kernels.triton_scaled_mm import scaled_mm

        return scaled_mm(codes, scales, other, other_scales, dtype, is_tiled=is_tiled)
    kinds = functional.ScalingType
    kind = kinds.BlockWise128x128 if is_tiled else kinds.BlockWise1x128
    given = (codes, other.t(), scales.t(), kinds.BlockWise1x128, other_scales.t(), kind)
    return functional.scaled_mm(*given, output_dtype=dtype)
