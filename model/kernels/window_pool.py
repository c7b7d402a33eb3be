"""Pooling of the windows that close in a forward without a state, on a CPU (window_pool.c).

The twin is in model/compressor.py: there slots are gathered, joined, masked and weighted one operation after
the other, each over all of them, and the backward adds every slot to its token again.

B rows, T tokens, E windows, S slots of each, C entry width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, even_parts, fixed_parts, library
from consilience.model.layout import Closing


def is_available(*tensors: Tensor) -> bool:
    """Whether windows of these go through the compiled kernel: fp32 on the CPU, not exact, a compiler."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and not exact.is_on() and not isinstance(library("window_pool"), str)


def pool(values: Tensor, gates: Tensor, ape: Tensor, closing: Closing) -> Tensor:
    """Entries [E, C] before their norm, of values and unbiased gates [B, T, series], ape [m, series].

    `closing.source` counts the tokens of values as they lie: no ring before them.
    """
    given = (values.contiguous(), gates.contiguous(), ape)
    return _Pool.apply(*given, closing.source.contiguous(), closing.is_present.contiguous())  # type: ignore[return-value]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, gates, ape, source, is_present):  # type: ignore[override]
        sizes = _sizes(ape, source)
        parts = even_parts(sizes[0], sizes[1] * sizes[3])
        pooled, work = values.new_empty(sizes[0], sizes[3]), _work(parts, sizes)
        given = (values, gates, ape, source, is_present)
        call("window_pool", "pool_forward", *sizes, parts, *given, pooled, work)
        ctx.save_for_backward(*given, pooled)
        return pooled

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        values, gates, ape, source, is_present, pooled = ctx.saved_tensors
        sizes = _sizes(ape, source)
        parts = fixed_parts(source.numel())
        d_values, d_gates = torch.zeros_like(values), torch.zeros_like(gates)
        d_ape = torch.zeros(parts, *ape.shape, dtype=torch.float64)
        given = (values, gates, ape, source, is_present, pooled, grad.contiguous(), d_values, d_gates, d_ape)
        call("window_pool", "pool_backward", *sizes, parts, *given, _work(parts, sizes))
        return d_values, d_gates, d_ape.sum(0).float(), None, None


def _sizes(ape: Tensor, source: Tensor) -> tuple[int, int, int, int, int]:
    """E, S, m, C, series."""
    (num_windows, slots), (ratio, series) = source.shape, ape.shape
    return num_windows, slots, ratio, series * ratio // slots, series


def _work(parts: int, sizes: tuple[int, ...]) -> Tensor:
    return torch.empty(parts, sizes[1] + 2, sizes[3])
