"""A compressor on a GPU behind autograd: projections, pooling, norm and rotation (triton_compressor.py).

The projections' operands of 16 bits are multiplied as they are and summed in fp32: the same numbers as with
operands widened to fp32, at the tensor cores' rate. Their gradients are rounded to the operands' type before
the products back, as those of any projection.

B rows, T tokens, R = B·T, D model width, M entry columns, E entries, S slots, C entry width, series = 2 C
(CSA) or C.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.kernels import head_products
from consilience.model.kernels.choice import uses_triton
from consilience.model.recompute import named

if TYPE_CHECKING:
    from consilience.model.kernels.triton_compressor import Entries
    from consilience.model.layout import Closing

MAX_SLOTS = 512


@dataclass(frozen=True)
class Weights:
    """wkv, wgate [series, D]; ape [m, series] fp32; norm [C] and its eps."""

    wkv: Tensor
    wgate: Tensor
    ape: Tensor
    norm: Tensor
    eps: float


def is_available(hidden: Tensor, weights: Weights, closing: Closing) -> bool:
    """Whether the kernels serve this call: on a GPU, an even width, windows within a program's reach."""
    fits = weights.norm.shape[0] % 2 == 0 and closing.source.shape[1] <= MAX_SLOTS
    return fits and uses_triton(hidden, weights.wkv, weights.norm)


def runs_without_gradient(*tensors: Tensor) -> bool:
    """Whether `project` and `pool_biased` serve these: on a GPU, no gradient asked for."""
    return not torch.is_grad_enabled() and uses_triton(*tensors)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., D] times weight [series, D] transposed: [..., series] fp32."""
    rows = hidden.flatten(0, -2)
    out = rows.new_empty(rows.shape[0], weight.shape[0], dtype=torch.float32)
    return head_products.project(rows, weight, out).unflatten(0, hidden.shape[:-1])


def entries_of(closing: Closing, ratio: int, rotation: Tensor, num_columns: int) -> Entries:
    """What kernels read of a `closing` without a state; rotation [B, T, P] complex64 of the tokens."""
    from consilience.model.kernels.triton_compressor import Entries

    return Entries(
        source=closing.source.contiguous(),
        present=closing.is_present.contiguous().view(torch.uint8),
        target=closing.row * num_columns + closing.column,
        rotation=torch.view_as_real(rotation.resolve_conj()).flatten(0, 1).contiguous(),
        # An entry turns as its window's first token.
        turn=closing.source[:, closing.source.shape[1] - ratio].contiguous(),
    )


def finish(
    values: Tensor, gates: Tensor, ape: Tensor, norm: Tensor, eps: float, place: Entries, out: Tensor
) -> Tensor | None:
    """Fill `out` [*, C] from values and gates [R, series], which have the same strides.

    Returns the pooled values [E, C] if the norm followed in a pass of its own.
    """
    from consilience.model.kernels import triton_compressor, triton_norm

    width = out.shape[-1]
    if triton_compressor.is_fused(place.source.shape[1], width):
        triton_compressor.pool(values, gates, ape, norm, place, eps, out)
        return None
    pooled = values.new_empty(place.source.shape[0], width)
    triton_compressor.pool(values, gates, ape, norm, _straight(place), eps, pooled)
    turns = place.rotation.index_select(0, place.turn)
    entries = triton_norm.forward(pooled, norm, turns, eps, 1.0)
    out.view(-1, width).index_copy_(0, place.target, entries.to(out.dtype))
    return pooled


def pooled_gradient(
    projected: Tensor,
    pooled: Tensor | None,
    weights: Weights,
    place: Entries,
    d_out: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `finish`: of projected [R, 2 series] in `dtype`, of ape and of the norm's weight in fp32.

    d_out [B · M, C].
    """
    from consilience.model.kernels import triton_compressor, triton_norm

    series, d_norm = weights.ape.shape[1], None
    if pooled is not None:
        turns = place.rotation.index_select(0, place.turn)
        d_out = d_out.index_select(0, place.target)
        d_out, d_norm = triton_norm.backward(pooled, weights.norm, turns, weights.eps, 1.0, d_out)
        place = _straight(place)
    d = torch.zeros(projected.shape, dtype=dtype, device=projected.device)
    d_ape, d_weight = triton_compressor.pool_backward(
        *(projected[:, :series], projected[:, series:], weights.ape, weights.norm, place, weights.eps),
        *(d_out.contiguous(), d[:, :series], d[:, series:]),
    )
    d_norm = d_weight if d_norm is None else d_norm
    assert d_norm is not None
    return d, d_ape, d_norm


def _straight(place: Entries) -> Entries:
    """The same entries one below the other."""
    return replace(place, target=torch.arange(place.source.shape[0], device=place.source.device))


class _GpuCompressor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, wkv, wgate, ape, norm, eps, place, shape):  # type: ignore[override]
        projected = named("attention_inner", project, hidden, torch.cat((wkv, wgate)))
        rows, columns = shape
        is_full = place.source.shape[0] == rows * columns
        make = hidden.new_empty if is_full else hidden.new_zeros
        out = make((rows, columns, norm.shape[0]))
        series = ape.shape[1]
        pooled = finish(projected[:, :series], projected[:, series:], ape, norm, eps, place, out)
        ctx.save_for_backward(hidden, wkv, wgate, ape, norm, projected, pooled)
        ctx.eps, ctx.place = eps, place
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        hidden, wkv, wgate, ape, norm, projected, pooled = ctx.saved_tensors
        weights, series = Weights(wkv, wgate, ape, norm, ctx.eps), ape.shape[1]
        d_out = grad.reshape(-1, grad.shape[-1])
        d, d_ape, d_norm = pooled_gradient(projected, pooled, weights, ctx.place, d_out, hidden.dtype)
        d_joined = torch.mm(d.t(), hidden).to(wkv.dtype)
        d_hidden = torch.mm(d, torch.cat((wkv, wgate)).to(d.dtype)) if ctx.needs_input_grad[0] else None
        return d_hidden, d_joined[:series], d_joined[series:], d_ape, d_norm.to(norm.dtype), None, None, None


def compress(
    hidden: Tensor, weights: Weights, closing: Closing, rotation: Tensor, num_columns: int
) -> Tensor:
    """hidden [B, T, D] of packed rows -> entries [B, M, C] in its dtype, normed and turned.

    closing of a layout without a state; rotation [B, T, P] complex64 of the tokens. Deterministic.
    """
    place = entries_of(closing, weights.ape.shape[0], rotation, num_columns)
    tensors = (weights.wkv, weights.wgate, weights.ape, weights.norm, weights.eps)
    shape = (hidden.shape[0], num_columns)
    return _GpuCompressor.apply(hidden.flatten(0, 1).contiguous(), *tensors, place, shape)  # type: ignore[return-value]


def pool_biased(
    values: Tensor,
    gates: Tensor,
    norm: tuple[Tensor, float],
    closing: Closing,
    ratio: int,
    rotation: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Finished entries [E, C] in `dtype` of a chunk on a state; no gradient.

    values, gates [B, ring + T, series] fp32, gates with ape added; norm = (weight [C], eps); rotation
    [E, P] complex64 of the entries.
    """
    from consilience.model.kernels.triton_compressor import Entries

    weight, eps = norm
    every = torch.arange(closing.row.shape[0], device=values.device)
    place = Entries(
        source=closing.source.contiguous(),
        present=closing.is_present.contiguous().view(torch.uint8),
        target=every,
        rotation=torch.view_as_real(rotation.resolve_conj()).contiguous(),
        turn=every,
    )
    out = values.new_empty(every.shape[0], weight.shape[0], dtype=dtype)
    no_bias = values.new_zeros(ratio, values.shape[-1])
    flat_values, flat_gates = (x.contiguous().flatten(0, 1) for x in (values, gates))
    finish(flat_values, flat_gates, no_bias, weight, eps, place, out)
    return out
