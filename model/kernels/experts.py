"""The experts of a layer on a CPU, a few hundred rows at a time (experts.c); the twins are in model/moe.py.

Between the matrix products of one expert its rows stay in cache: gates, activations and expert outputs of
a whole batch are never made. The backward makes gate and up anew, two products beside a step's nine.

R tokens, D model width, E experts, K experts a token, I expert width, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library
from consilience.model.recompute import named

ROWS = 512  # of one expert at a time


def is_available(*tensors: Tensor) -> bool:
    """Whether these can go through the compiled kernel: fp32 on the CPU, not exact, a compiler found."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and not exact.is_on() and not isinstance(library("experts"), str)


class Expert(NamedTuple):
    """Matrices of an expert: gate w1 [I, D], down w2 [D, I], up w3 [I, D]; of several [E, …]."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def of(self, index: int) -> Expert:
        return Expert(self.w1[index], self.w2[index], self.w3[index])


class _Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert, tokens in order within each."""

    order: Tensor  # [R K] of the flattened choices
    tokens: Tensor  # [R K]
    counts: list[int]  # [E]

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Experts and where their pairs lie, at most ROWS at a time."""
        start = 0
        for expert, count in enumerate(self.counts):
            yield from ((expert, here) for here in _cut(start, start + count))
            start += count


def _cut(start: int, stop: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS, stop)) for first in range(start, stop, ROWS))


def _sorted_pairs(experts: Tensor, num_experts: int) -> _Pairs:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return _Pairs(order, order // experts.shape[1], counts)


class _Buffers:
    """Memory for a piece: `of(i, n, width)` is the i-th buffer as [n, width], with anything in it."""

    def __init__(self, count: int, own: Expert) -> None:
        self.memory = torch.empty(count, ROWS * max(own.w1.shape[-2:]))

    def of(self, index: int, num_rows: int, width: int) -> Tensor:
        return self.memory[index, : num_rows * width].view(num_rows, width)

    def gathered(self, index: int, source: Tensor, rows: Tensor) -> Tensor:
        """source [R, D] at rows [n], in the i-th buffer."""
        target = self.of(index, len(rows), source.shape[1])
        call("experts", "experts_gather", *target.shape, rows, source, target)
        return target


def _scatter(rows: Tensor, source: Tensor, target: Tensor) -> None:
    """target [R, D] at rows [n] += source [n, D], row by row in order."""
    call("experts", "experts_scatter", *source.shape, rows, source, target)


def _inner(x: Tensor, own: Expert, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """Gate and up [n, I] of x [n, D], in buffers 0 and 1."""
    shape = (len(x), len(own.w1))
    gate = torch.mm(x, own.w1.t(), out=buffers.of(0, *shape))
    return gate, torch.mm(x, own.w3.t(), out=buffers.of(1, *shape))


def _apply(
    x: Tensor, own: Expert, limit: float, share: Tensor | None, buffers: _Buffers, out: Tensor
) -> Tensor:
    """out [n, D] = one expert of x [n, D], times share [n] where there is one."""
    gate, up = _inner(x, own, buffers)
    call("experts", "experts_activate", *gate.shape, limit, gate, up, share, gate)
    return torch.mm(gate, own.w2.t(), out=out)


def _forward(
    hidden: Tensor, shares: Tensor | None, experts: Tensor | None, limit: float, own: Expert
) -> Tensor:
    buffers = _Buffers(4, own)
    if shares is None or experts is None:
        output = torch.empty_like(hidden)
        for here in _cut(0, len(hidden)):
            _apply(hidden[here], own, limit, None, buffers, output[here])
        return output
    pairs = _sorted_pairs(experts, len(own.w1))
    share, output = shares.flatten().index_select(0, pairs.order), torch.zeros_like(hidden)
    for e, here in pairs.pieces():
        tokens = pairs.tokens[here]
        x, out = buffers.gathered(2, hidden, tokens), buffers.of(3, len(tokens), hidden.shape[1])
        _scatter(tokens, _apply(x, own.of(e), limit, share[here], buffers, out), output)
    return output


class _Backward(NamedTuple):
    """What the pieces of a backward share."""

    limit: float
    buffers: _Buffers
    wants_weights: bool

    def apply(
        self,
        x: Tensor,
        grad: Tensor,
        own: Expert,
        grads: Expert,
        share: tuple[Tensor, Tensor] | tuple[None, None],
        d_x: Tensor,
    ) -> Tensor:
        """d_x [n, D] of one expert from grad [n, D]; adds to `grads`. share: the router's, its gradient."""
        gate, up = _inner(x, own, self.buffers)
        active = torch.mm(grad, own.w2, out=self.buffers.of(2, *gate.shape))
        given = (share[0], gate, up, active, share[1])
        call("experts", "experts_activate_backward", *gate.shape, self.limit, *given)
        if self.wants_weights:
            grads.w2.addmm_(grad.t(), active)
            grads.w1.addmm_(gate.t(), x)
            grads.w3.addmm_(up.t(), x)
        return torch.mm(gate, own.w1, out=d_x).addmm_(up, own.w3)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, shares, experts, limit, *weights):  # type: ignore[override]
        ctx.save_for_backward(hidden, shares, experts, *weights)
        ctx.limit = limit
        return named("expert_activations", _forward, hidden, shares, experts, limit, Expert(*weights))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        hidden, shares, experts, *weights = ctx.saved_tensors
        own, grad = Expert(*weights), grad.contiguous()
        grads, buffers = Expert(*map(torch.zeros_like, own)), _Buffers(6, own)
        work = _Backward(ctx.limit, buffers, any(ctx.needs_input_grad[4:]))
        if experts is None:
            d_hidden = torch.empty_like(hidden)
            for here in _cut(0, len(hidden)):
                work.apply(hidden[here], grad[here], own, grads, (None, None), d_hidden[here])
            return d_hidden, None, None, None, *grads
        pairs = _sorted_pairs(experts, len(own.w1))
        share, d_hidden = shares.flatten().index_select(0, pairs.order), torch.zeros_like(hidden)
        d_share, d_shares = torch.empty_like(share), torch.empty_like(share)
        for e, here in pairs.pieces():
            tokens = pairs.tokens[here]
            x, g = buffers.gathered(3, hidden, tokens), buffers.gathered(4, grad, tokens)
            d_x, each = buffers.of(5, *x.shape), (share[here], d_share[here])
            _scatter(tokens, work.apply(x, g, own.of(e), grads.of(e), each, d_x), d_hidden)
        d_shares[pairs.order] = d_share
        return d_hidden, d_shares.view_as(shares), None, None, *grads


def routed_experts(hidden: Tensor, shares: Tensor, experts: Tensor, limit: float, own: Expert) -> Tensor:
    """Sum of a token's experts: hidden [R, D], shares [R, K] fp32, experts [R, K] int64 -> [R, D]."""
    return _run(hidden, shares, experts, limit, own)


def one_expert(hidden: Tensor, limit: float, own: Expert) -> Tensor:
    """An expert that takes every token: [R, D] -> [R, D]."""
    return _run(hidden, None, None, limit, own)


def _run(hidden: Tensor, shares: Tensor | None, experts: Tensor | None, limit: float, own: Expert) -> Tensor:
    given = (hidden.contiguous(), shares, experts, limit)
    return _Experts.apply(*given, *own) if torch.is_grad_enabled() else _forward(*given, own)  # type: ignore[return-value]
