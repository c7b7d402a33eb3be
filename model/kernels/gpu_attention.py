"""Attention's Triton kernels behind autograd; the twin is sink_attention.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.attention_problem import problem_of
from consilience.model.kernels.choice import uses_triton
from consilience.model.recompute import named


def is_available(query: Tensor, keys: Keys, sink: Tensor) -> bool:
    """Whether the kernels serve this call: on a GPU, C a power of two from 16 to 512, one dtype for all."""
    if not uses_triton(query, keys.window, keys.entries, sink):
        return False
    dtypes = {x.dtype for x in (query, keys.window, keys.entries) if x is not None}
    width = query.shape[3]
    return len(dtypes) == 1 and 16 <= width <= 512 and width & (width - 1) == 0 and query.numel() > 0


def _forward(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from consilience.model.kernels import triton_attention

    problem = problem_of(query, keys, sink, scale)
    if attention_problem.HAND_PLACED:
        from consilience.model.kernels import triton_attention_gluon, triton_attention_parts_gluon

        if triton_attention_parts_gluon.is_available(problem):
            return triton_attention_gluon.forward(problem)
    return triton_attention.forward(problem)


class _GpuAttention(torch.autograd.Function):
    """Saves the output and the softmax' denominators; the backward computes the logits anew."""

    @staticmethod
    def forward(ctx, query, window, entries, picks, sink, scale, place):  # type: ignore[override]
        # Tensors reach `ctx` through save_for_backward alone, where checkpointing can see them.
        keys = replace(place, window=window, entries=entries, picks=picks)
        output, denominator = named("attention_output", _forward, query, keys, sink, scale)
        ctx.save_for_backward(query, window, entries, picks, sink, output, denominator)
        ctx.scale, ctx.place = scale, place
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from consilience.model.kernels import triton_attention_backward

        query, window, entries, picks, sink, output, denominator = ctx.saved_tensors
        keys = replace(ctx.place, window=window, entries=entries, picks=picks)
        problem = problem_of(query, keys, sink, ctx.scale)
        given = (problem, output, denominator, grad.contiguous())
        found = triton_attention_backward.backward(*given)
        return *found[:3], None, found[3], None, None


def sink_attention(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """`sink_attention.sink_attention` of packed rows and chunks by the Triton kernels.

    bf16 (or fp16) products with fp32 accumulation; probabilities and dS are rounded to the query's dtype
    before the products that take them. Deterministic; memory is linear in T.
    """
    place = replace(keys, window=None, entries=None, picks=None)
    tensors = (query, keys.window, keys.entries, keys.picks, sink)
    return _GpuAttention.apply(*tensors, scale, place)  # type: ignore[return-value]
