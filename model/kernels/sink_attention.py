"""Attention over several key sets with one sink logit per head; keys are the values too.

B rows, T queries, H heads, C head width, S keys of a part. A part is (keys [B, blocks, S, C],
bias [B, T, S]): each block of T/blocks consecutive queries attends to its own S keys. The window is
one part (one block per W queries), the compressed entries of the row another (one block).
"""

from __future__ import annotations

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def sink_attention_dense(query: Tensor, parts: list[Part], sink: Tensor, scale: float) -> Tensor:
    """The readable definition. query [B, T, H, C], sink [H] -> [B, T, H, C].

    p = softmax over (all parts' keys, sink) of q·k·scale + bias; output = Σ p·k. The sink joins
    the denominator with value 0 (report 2.3.3, equation 27).
    """
    num_rows, num_tokens, num_heads, _ = query.shape
    logits, values = [], []
    for keys, bias in parts:
        each = keys.repeat_interleave(num_tokens // keys.shape[1], dim=1)
        logits.append(torch.einsum("bthc,btsc->bths", query, each) * scale + bias[:, :, None])
        values.append(each)
    sinks = sink.to(query.dtype).view(1, 1, num_heads, 1).expand(num_rows, num_tokens, num_heads, 1)
    weights = torch.softmax(torch.cat((*logits, sinks), dim=-1), dim=-1)
    return torch.einsum("bths,btsc->bthc", weights[..., :-1], torch.cat(values, dim=2))


def _slices(buffer: Tensor, keys: list[Tensor]) -> list[Tensor]:
    """Per part, the view [B·blocks, T/blocks·H, S] of a [B, T, H, ΣS + 1] buffer."""
    num_rows = buffer.shape[0]
    views, start = [], 0
    for part in keys:
        blocks, size = part.shape[1], part.shape[2]
        views.append(buffer.view(num_rows * blocks, -1, buffer.shape[-1])[:, :, start : start + size])
        start += size
    return views


class _SinkAttention(torch.autograd.Function):
    """One logits buffer, softmax in place, explicit backward: no copies between the parts."""

    @staticmethod
    def forward(ctx, query: Tensor, bias: Tensor, sink: Tensor, scale: float, *keys: Tensor):
        num_rows, num_tokens, num_heads, width = query.shape
        total = bias.shape[-1] + 1
        scaled = query * scale
        buffer = query.new_empty(num_rows, num_tokens, num_heads, total)
        flat = [k.flatten(0, 1) for k in keys]
        for view, key, part in zip(_slices(buffer, list(keys)), flat, keys):
            rows = scaled.view(num_rows * part.shape[1], -1, width)
            torch.bmm(rows, key.transpose(1, 2), out=view)
        buffer[..., :-1].add_(bias[:, :, None])
        buffer[..., -1] = sink.to(buffer.dtype)
        is_narrow = buffer.dtype in (torch.bfloat16, torch.float16)
        if is_narrow:
            weights = torch.softmax(buffer, dim=-1, dtype=torch.float32).to(buffer.dtype)
        else:
            weights = torch.softmax(buffer, dim=-1, out=buffer)
        output = torch.zeros_like(scaled)
        for view, key, part in zip(_slices(weights, list(keys)), flat, keys):
            output.view(num_rows * part.shape[1], -1, width).baddbmm_(view, key)
        ctx.save_for_backward(scaled, weights, output, *keys)
        ctx.scale = scale
        ctx.mark_non_differentiable(weights)
        return output, weights

    @staticmethod
    def backward(ctx, grad: Tensor, _):  # type: ignore[override]
        scaled, weights, output, *keys = ctx.saved_tensors
        num_rows, _, _, width = scaled.shape
        grad = grad.contiguous()
        d_logits = torch.empty_like(weights)
        d_logits[..., -1] = 0
        flat = [k.flatten(0, 1) for k in keys]
        for view, key, part in zip(_slices(d_logits, keys), flat, keys):
            rows = grad.view(num_rows * part.shape[1], -1, width)
            torch.bmm(rows, key.transpose(1, 2), out=view)
        d_logits.sub_((grad * output).sum(-1, keepdim=True)).mul_(weights)
        d_query = torch.zeros_like(scaled)
        d_keys = []
        for d_view, view, key, part in zip(_slices(d_logits, keys), _slices(weights, keys), flat, keys):
            shape = (num_rows * part.shape[1], -1, width)
            d_query.view(shape).baddbmm_(d_view, key)
            d_key = torch.bmm(d_view.transpose(1, 2), scaled.view(shape))
            d_keys.append(d_key.baddbmm_(view.transpose(1, 2), grad.view(shape)).view_as(part))
        d_sink = d_logits[..., -1].sum((0, 1))
        return d_query.mul_(ctx.scale), None, d_sink, None, *d_keys


def _decode(
    query: Tensor, bias: Tensor, sink: Tensor, scale: float, keys: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same for one query a row, without a gradient: many small products, so every operand contiguous.

    A batched product into a slice of a wider buffer runs matrix by matrix on the CPU (measured at 256
    rows: 4 ms against 1.5).
    """
    num_rows, _, num_heads, width = query.shape
    flat = [k.flatten(0, 1) for k in keys]
    rows = (query * scale).view(num_rows, num_heads, width)
    sinks = sink.to(query.dtype).view(1, num_heads, 1).expand(num_rows, -1, -1)
    logits = torch.cat([*(torch.bmm(rows, key.transpose(1, 2)) for key in flat), sinks], dim=-1)
    logits[..., :-1].add_(bias)
    wide = torch.float32 if logits.dtype in (torch.bfloat16, torch.float16) else logits.dtype
    weights = torch.softmax(logits, dim=-1, dtype=wide).to(query.dtype)
    parts = weights.split([*(k.shape[1] for k in flat), 1], dim=-1)[:-1]
    output = sum(torch.bmm(part.contiguous(), key) for part, key in zip(parts, flat))
    return output.view_as(query), weights[:, None]  # type: ignore[union-attr]


def sink_attention(
    query: Tensor, parts: list[Part], sink: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """`sink_attention_dense` with one logits buffer and an explicit backward.

    Returns output [B, T, H, C] and, detached, each part's probabilities [B, T, H, S]. Softmax is
    fp32 for half-precision inputs.
    """
    bias = torch.cat([bias for _, bias in parts], dim=-1).to(query.dtype)
    keys = [k.contiguous() for k, _ in parts]
    if query.shape[1] == 1 and not torch.is_grad_enabled():
        output, weights = _decode(query.contiguous(), bias, sink, scale, keys)
    else:
        arguments = (query.contiguous(), bias, sink.to(query.dtype), scale, *keys)
        output, weights = _SinkAttention.apply(*arguments)  # type: ignore[misc]
    sizes = [k.shape[2] for k in keys]
    return output, list(weights.split([*sizes, 1], dim=-1))[:-1]
