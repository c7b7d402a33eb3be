"""The experts of a layer on a CPU, a few hundred rows at a time (experts.c); the twins are in model/moe.py.

Between the matrix products of one expert its rows stay in cache: gates, activations and expert outputs of
a whole batch are never made. For the backward gate and up are kept where nothing says which tensors are (and
the model is so wide that making them costs more than reading them); else it makes them anew, two products
beside a step's nine.

R tokens, D model width, E experts, K experts a token, I expert width, n rows of one expert.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library
from consilience.model.recompute import has_policy, named

ROWS = 512  # of one expert at a time
WIDE = 128  # of D: a number of gate is 2 D operations or 8 bytes written and read
MOST_PARTS = 4  # of an expert that takes every token: each has gradients of its own until they are summed


def is_available(*tensors: Tensor) -> bool:
    """Whether these can go through the compiled kernel: fp32 on the CPU, not exact, a compiler found, and a
    PyTorch that shows the product of its matrix library."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and not exact.is_on() and not isinstance(library("experts"), str) and _product() != 0


@cache
def _product() -> int:
    """Where sgemm of PyTorch's matrix library begins, 0 if it shows none; serial within OpenMP's threads."""
    found = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    function = None if found is None else getattr(ctypes.CDLL(str(found)), "sgemm_", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


class Expert(NamedTuple):
    """Matrices of an expert: gate w1 [I, D], down w2 [D, I], up w3 [I, D]; of several [E, …]."""

    w1: Tensor
    w2: Tensor
    w3: Tensor


class _Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert, tokens in order within each."""

    places: Tensor  # [R, K] of the choices among the pairs
    tokens: Tensor  # [R K]
    starts: list[int]  # [E + 1]

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> _Pairs:
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        starts = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
        return cls(places.view_as(experts), order // experts.shape[1], [0, *starts])

    def sorted(self, shares: Tensor) -> Tensor:
        """shares [R, K] of the pairs in their order."""
        return torch.empty_like(shares.flatten()).index_copy_(0, self.places.flatten(), shares.flatten())

    def sums(self, rows: Tensor) -> Tensor:
        return sums(rows, self.places)


def sums(rows: Tensor, places: Tensor) -> Tensor:
    """Each token's rows of the pairs' [R K, D], added in the order of its choices' places [R, K]: [R, D]."""
    found = rows.new_empty(len(places), rows.shape[1])
    call("experts", "experts_sum", *places.shape, rows.shape[1], places, rows, found)
    return found


def _pieces(starts: list[int]) -> list[tuple[int, int, int]]:
    """Expert, first pair and the one behind the last of at most ROWS pairs at a time."""
    return [
        (expert, first, min(first + ROWS, stop))
        for expert, (start, stop) in enumerate(itertools.pairwise(starts))
        for first in range(start, stop, ROWS)
    ]


def _parts(num_rows: int) -> list[tuple[int, int, int]]:
    """Rows of one expert in parts whose gradients are summed apart; the rows alone decide how many."""
    count = min(MOST_PARTS, max(1, num_rows // ROWS))
    edges = [part * num_rows // count for part in range(count + 1)]
    return [(0, first, stop) for first, stop in itertools.pairwise(edges)]


def _sizes(own: Expert, tasks: list[tuple[int, int, int]], limit: float) -> tuple[int | float | Tensor, ...]:
    """What both functions of the C file begin with."""
    inner, width = own.w1.shape[-2:]
    return _product(), len(tasks), width, inner, ROWS, limit, torch.tensor(tasks, dtype=torch.int64)


def _work(count: int, own: Expert) -> Tensor:
    """Memory for `count` buffers of a piece for each thread."""
    return torch.empty(torch.get_num_threads(), count, ROWS, max(own.w1.shape[-2:]))


def _forward(
    hidden: Tensor,
    shares: Tensor | None,
    experts: Tensor | None,
    limit: float,
    own: Expert,
    kept: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`kept` [pairs, I] each are filled with gate and up."""
    if shares is None or experts is None:
        output = torch.empty_like(hidden)
        sizes = _sizes(own, _pieces([0, len(hidden)]), limit)
        call("experts", "experts_forward", *sizes, None, hidden, None, *own, output, *kept, _work(3, own))
        return output
    pairs = _Pairs.of(experts, len(own.w1))
    made, sizes = (
        hidden.new_empty(experts.numel(), hidden.shape[1]),
        _sizes(own, _pieces(pairs.starts), limit),
    )
    given = (pairs.tokens, hidden, pairs.sorted(shares), *own)
    call("experts", "experts_forward", *sizes, *given, made, *kept, _work(3, own))
    return pairs.sums(made)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, shares, experts, limit, *weights):  # type: ignore[override]
        own, kept = Expert(*weights), (None, None)
        if hidden.shape[1] >= WIDE and not has_policy():
            count = len(hidden) if experts is None else experts.numel()
            kept = hidden.new_empty(count, own.w1.shape[-2]), hidden.new_empty(count, own.w1.shape[-2])
        ctx.save_for_backward(hidden, shares, experts, *weights, *kept)
        ctx.limit = limit
        return named("expert_activations", _forward, hidden, shares, experts, limit, own, kept)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        hidden, shares, experts, *weights, gates, ups = ctx.saved_tensors
        own, grad = Expert(*weights), grad.contiguous()
        wants_weights = any(ctx.needs_input_grad[4:])
        if experts is None:
            d_hidden, tasks = torch.empty_like(hidden), _parts(len(hidden))
            grads = [w.new_empty(len(tasks), *w.shape) if wants_weights else None for w in own]
            given = (None, hidden, None, *own, grad, gates, ups, *grads, None, d_hidden, _work(5, own))
            call("experts", "experts_backward", *_sizes(own, tasks, ctx.limit), *given)
            summed = (None if g is None else g.sum(0) if len(tasks) > 1 else g[0] for g in grads)
            return d_hidden, None, None, None, *summed
        pairs = _Pairs.of(experts, len(own.w1))
        tasks = [(e, *edges) for e, edges in enumerate(itertools.pairwise(pairs.starts))]
        grads = [torch.empty_like(w) if wants_weights else None for w in own]
        share, d_x = pairs.sorted(shares), hidden.new_empty(experts.numel(), hidden.shape[1])
        d_share = torch.empty_like(share)
        given = (pairs.tokens, hidden, share, *own, grad, gates, ups, *grads, d_share, d_x, _work(5, own))
        call("experts", "experts_backward", *_sizes(own, tasks, ctx.limit), *given)
        return pairs.sums(d_x), d_share[pairs.places], None, None, *grads


def routed_experts(hidden: Tensor, shares: Tensor, experts: Tensor, limit: float, own: Expert) -> Tensor:
    """Sum of a token's experts: hidden [R, D], shares [R, K] fp32, experts [R, K] int64 -> [R, D]."""
    return _run(hidden, shares, experts, limit, own)


def one_expert(hidden: Tensor, limit: float, own: Expert) -> Tensor:
    """An expert that takes every token: [R, D] -> [R, D]."""
    return _run(hidden, None, None, limit, own)


def _run(hidden: Tensor, shares: Tensor | None, experts: Tensor | None, limit: float, own: Expert) -> Tensor:
    given, own = (hidden.contiguous(), shares, experts, limit), Expert(*(w.contiguous() for w in own))
    return _Experts.apply(*given, *own) if torch.is_grad_enabled() else _forward(*given, own)  # type: ignore[return-value]
