"""Attention over a sliding window and compressed entries with a sink logit per head; keys are values too.

p = softmax over (visible keys, sink) of q·k·scale; output = Σ p·k. The sink joins the denominator with
value 0 (report 2.3.3, equation 27). Queries are worked on in stretches whose logits fit a buffer of bounded
size, and the backward computes them anew, so memory is linear in the number of tokens.

B rows, T queries, H heads, C head width, W window, S window keys (offset + T), M entries, K picks of a query.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels import gpu_attention, range_attention
from consilience.model.kernels.attention_keys import (
    BUFFER,
    Keys,
    Stretch,
    num_columns_of,
    stretches,
    visible,
    visible_columns,
    window_keys,
)
from consilience.model.kernels.exact_attention import exact_attention
from consilience.model.recompute import named
from consilience.model.row_sums import add_rows_


def _entry_keys(keys: Keys, part: Stretch) -> Tensor:
    """[B, columns, C], or gathered [B · n, K, C]."""
    assert keys.entries is not None
    if not keys.gathers:
        return keys.entries[:, : part.columns]
    rows, columns, width = keys.entries.shape
    picks = keys.picks[:, part.start : part.stop].clamp(min=0)  # type: ignore[index]
    first = torch.arange(rows, device=picks.device)[:, None, None] * columns
    flat = keys.entries.reshape(-1, width).index_select(0, (picks + first).flatten())
    return flat.view(-1, picks.shape[2], width)


class _Views:
    """A buffer [B, n, H, span + columns + 1] seen as one batched product a kind of key."""

    def __init__(self, part: Stretch, rows: int, num_queries: int, heads: int, gathers: bool) -> None:
        groups = rows * part.blocks
        self.shapes = [(groups, num_queries // part.blocks * heads)]
        self.slices = [slice(0, part.span)]
        if part.columns:
            self.shapes.append((rows * num_queries, heads) if gathers else (rows, num_queries * heads))
            self.slices.append(slice(part.span, part.span + part.columns))

    def of(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer.view(*shape, buffer.shape[-1])[:, :, part] for shape, part in zip(self.shapes, self.slices)
        ]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _scaled(query: Tensor, scale: float) -> Tensor:
    return (_wide(query) * scale).contiguous()


def _probabilities(
    query: Tensor, keys: Keys, sink: Tensor, part: Stretch
) -> tuple[Tensor, _Views, list[Tensor]]:
    """p [B, n, H, span + columns + 1] of the stretch's scaled queries [B, n, H, C], fp32 or wider."""
    rows, num_queries, heads, width = query.shape
    views = _Views(part, rows, num_queries, heads, keys.gathers)
    each = [_wide(window_keys(keys, part))]
    if part.columns:
        each.append(_wide(_entry_keys(keys, part)))
    buffer = query.new_empty(rows, num_queries, heads, part.span + part.columns + 1)
    for view, key in zip(views.of(buffer), each):
        torch.bmm(query.view(*view.shape[:2], width), key.transpose(1, 2), out=view)
    bias = torch.zeros(rows, num_queries, buffer.shape[-1] - 1, dtype=buffer.dtype, device=buffer.device)
    bias.masked_fill_(~visible(keys, part), float("-inf"))
    buffer[..., :-1].add_(bias[:, :, None])
    buffer[..., -1] = sink.to(buffer.dtype)
    return torch.softmax(buffer, dim=-1, out=buffer), views, each


def _by_stretches(query: Tensor, keys: Keys, sink: Tensor, scale: float, buffer: int) -> Tensor:
    output = torch.empty_like(query)
    for part in stretches(keys, query.shape[1], query.shape[0], query.shape[2], buffer):
        here = slice(part.start, part.stop)
        scaled = _scaled(query[:, here], scale)
        p, views, each = _probabilities(scaled, keys, sink, part)
        result = torch.zeros_like(scaled)
        for view, key in zip(views.of(p), each):
            result.view(*view.shape[:2], -1).baddbmm_(view, key)
        output[:, here] = result
    return output


class _SinkAttention(torch.autograd.Function):
    """Explicit backward that computes each stretch's probabilities anew."""

    @staticmethod
    def forward(ctx, query, window, entries, picks, sink, scale, place, buffer):  # type: ignore[override]
        # Tensors reach `ctx` through save_for_backward alone, where checkpointing can see them.
        keys = replace(place, window=window, entries=entries, picks=picks)
        if exact.is_on():
            output = named("attention_output", exact_attention, query, keys, sink, scale)
        elif range_attention.is_available(query):
            output = named("attention_output", range_attention.forward, query, keys, sink, scale)
        else:
            output = named("attention_output", _by_stretches, query, keys, sink, scale, buffer)
        ctx.save_for_backward(query, window, entries, picks, sink, output)
        ctx.scale, ctx.place, ctx.buffer = scale, place, buffer
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        query, window, entries, picks, sink, output = ctx.saved_tensors
        keys = replace(ctx.place, window=window, entries=entries, picks=picks)
        if range_attention.is_available(query):
            found = range_attention.backward(query, keys, sink, ctx.scale, output, grad)
            return *found[:3], None, found[3], None, None, None
        d_query = torch.empty_like(query)
        d_window = torch.zeros(window.shape, dtype=_wide(window[:0]).dtype, device=window.device)
        d_entries = None if entries is None else torch.zeros_like(entries, dtype=d_window.dtype)
        d_sink = torch.zeros_like(sink)
        for part in stretches(keys, query.shape[1], query.shape[0], query.shape[2], ctx.buffer):
            here = slice(part.start, part.stop)
            scaled, upstream = _scaled(query[:, here], ctx.scale), _wide(grad[:, here]).contiguous()
            p, views, each = _probabilities(scaled, keys, sink, part)
            d_p = torch.empty_like(p)
            d_p[..., -1] = 0
            for view, key in zip(views.of(d_p), each):
                torch.bmm(upstream.view(*view.shape[:2], -1), key.transpose(1, 2), out=view)
            d_p.sub_((upstream * _wide(output[:, here])).sum(-1, keepdim=True)).mul_(p)
            d_scaled = torch.zeros_like(scaled)
            d_keys = []
            for d_view, view, key in zip(views.of(d_p), views.of(p), each):
                d_scaled.view(*view.shape[:2], -1).baddbmm_(d_view, key)
                d_key = torch.bmm(d_view.transpose(1, 2), scaled.view(*view.shape[:2], -1))
                d_keys.append(d_key.baddbmm_(view.transpose(1, 2), upstream.view(*view.shape[:2], -1)))
            d_query[:, here] = d_scaled.mul_(ctx.scale)
            d_sink += d_p[..., -1].sum((0, 1))
            _add_window(d_window, d_keys[0], part)
            if part.columns:
                assert d_entries is not None
                _add_entries(d_entries, d_keys[1], keys, part)
        d_entries = None if entries is None else d_entries.to(entries.dtype)  # type: ignore[union-attr]
        return d_query, d_window.to(window.dtype), d_entries, None, d_sink, None, None, None


def _add_window(d_window: Tensor, d_key: Tensor, part: Stretch) -> None:
    """Neighbouring blocks share a window of keys: each half of a block's gradient goes to its own place."""
    if part.blocks == 1:
        d_window[:, part.key : part.key + part.span] += d_key
        return
    rows, half = d_window.shape[0], part.span // 2
    earlier, own = d_key.view(rows, part.blocks, 2, half, -1).unbind(2)
    stop = part.key + part.blocks * half
    d_window[:, part.key : stop] += earlier.flatten(1, 2)
    d_window[:, part.key + half : stop + half] += own.flatten(1, 2)


def _add_entries(d_entries: Tensor, d_key: Tensor, keys: Keys, part: Stretch) -> None:
    if not keys.gathers:
        d_entries[:, : part.columns] += d_key
        return
    rows, columns, width = d_entries.shape
    picks = keys.picks[:, part.start : part.stop]  # type: ignore[index]
    first = torch.arange(rows, device=picks.device)[:, None, None] * columns
    # What was not picked has probability 0, hence gradient 0, and may land anywhere.
    where = (picks.clamp(min=0) + first).flatten()
    add_rows_(d_entries.view(-1, width), where, d_key.view(-1, width))


def _step(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """One query a row on the window ring: many small products, so every operand contiguous.

    A batched product into a slice of a wider buffer runs matrix by matrix on the CPU (measured at 256
    rows: 4 ms against 1.5).
    """
    rows, _, heads, width = query.shape
    assert keys.window is not None
    each, seen = [keys.window], [keys.layout.ring_seen]
    part = Stretch(0, 1, 1, 0, 0, num_columns_of(keys, 1))
    if part.columns:
        each.append(_entry_keys(keys, part))
        seen.append(keys.picks[:, 0] >= 0 if keys.gathers else visible_columns(keys, part)[:, 0])  # type: ignore[index]
    scaled = _scaled(query, scale).view(rows, heads, width)
    each = [_wide(key).contiguous() for key in each]
    sinks = sink.to(scaled.dtype).view(1, heads, 1).expand(rows, -1, -1)
    logits = torch.cat([*(torch.bmm(scaled, key.transpose(1, 2)) for key in each), sinks], dim=-1)
    bias = torch.zeros(rows, logits.shape[-1] - 1, dtype=logits.dtype, device=logits.device)
    bias.masked_fill_(~torch.cat(seen, dim=-1), float("-inf"))
    logits[..., :-1].add_(bias[:, None])
    weights = torch.softmax(logits, dim=-1)
    parts = weights.split([*(key.shape[1] for key in each), 1], dim=-1)[:-1]
    output = sum(torch.bmm(part.contiguous(), key) for part, key in zip(parts, each))
    return output.view(query.shape).to(query.dtype)  # type: ignore[union-attr]


def sink_attention(query: Tensor, keys: Keys, sink: Tensor, scale: float, buffer: int = BUFFER) -> Tensor:
    """Attention of query [B, T, H, C] on `keys`, sink [H] -> [B, T, H, C] in the query's dtype.

    Logits and softmax are fp32 for half-precision inputs. On a decode state's single step the window is
    its ring [B, ring, C]. `buffer` bounds the logits held at once, but never below those of W queries.
    """
    if keys.layout.is_step:
        step = exact_attention if exact.is_on() else _step
        return step(query, keys, sink, scale)
    if gpu_attention.is_available(query, keys, sink):
        return gpu_attention.sink_attention(query, keys, sink, scale)
    place = replace(keys, window=None, entries=None, picks=None)
    tensors = (query, keys.window, keys.entries, keys.picks, sink)
    return _SinkAttention.apply(*tensors, scale, place, buffer)  # type: ignore[return-value]


def entry_mass(query: Tensor, keys: Keys, sink: Tensor, scale: float, part: Stretch) -> Tensor:
    """Probability on each compressed entry of one stretch, summed over heads: [B, n, columns]."""
    scaled = _scaled(query[:, part.start : part.stop], scale)
    p, _, _ = _probabilities(scaled, keys, sink, part)
    return p[..., part.span : -1].sum(2)


def sink_attention_dense(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """The readable definition: every query against every key, masked. Same arguments and result."""
    layout = keys.layout
    rows, num_queries, heads, _ = query.shape
    assert keys.window is not None
    slot = torch.arange(keys.window.shape[1], device=query.device)
    own = layout.offset + torch.arange(num_queries, device=query.device)
    seen = (slot >= layout.oldest[:, :, None]) & (slot <= own[:, None])
    every = keys.window
    if keys.entries is not None and keys.windows is not None:
        part = Stretch(0, num_queries, 1, 0, 0, keys.entries.shape[1])
        seen = torch.cat((seen, visible_columns(keys, part)), dim=-1)
        every = torch.cat((keys.window, keys.entries), dim=1)
    logits = torch.einsum("bthc,bsc->bths", query, every) * scale
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    sinks = sink.to(query.dtype).view(1, 1, heads, 1).expand(rows, num_queries, heads, 1)
    weights = torch.softmax(torch.cat((logits, sinks), dim=-1), dim=-1)
    return torch.einsum("bths,bsc->bthc", weights[..., :-1], every)
