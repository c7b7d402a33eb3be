"""Work on some tokens after others, where all at once would not fit: only what goes in and out is held.

A layer's queries, or the rows of its experts, are many times its input. `in_pieces` runs such work on one
range of tokens after another, keeps its arguments, and in the backward runs each piece again. Gradients of
what all pieces read are summed in fp32 in the order of the pieces: deterministic, and equal to those of the
undivided work up to that rounding. Work that fits at once is not divided and costs nothing more.

T tokens, n tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.recompute import named, unnamed

WHOLE_BYTES = 2 << 30  # up to so many bytes of its largest tensor, work is not divided
PIECE_BYTES = 1 << 30  # of a piece's, where it is
MULTIPLE = 128  # tokens that a piece is a multiple of


def piece_of(num_tokens: int, token_bytes: int) -> int:
    """Tokens n of a piece of work whose largest tensor takes `token_bytes` a token; T if it fits at once."""
    if num_tokens * token_bytes <= WHOLE_BYTES:
        return num_tokens
    count = -(-num_tokens * token_bytes // PIECE_BYTES)
    return min(num_tokens, -(-num_tokens // (count * MULTIPLE)) * MULTIPLE)


@dataclass(frozen=True)
class Work:
    """run(start, *rows of tokens start … start + n - 1, *shared) -> (rows, *scalars).

    The result's rows stand one below the other, its scalars are summed; it must be made anew and be the same
    on every run. `axis` is that of the tokens, in arguments and result; `parameters` are the leaves that
    `run` reads beside its arguments; `name` is the result's in `recompute.NAMES`.
    """

    run: Callable[..., tuple[Tensor, ...]]
    axis: int
    piece: int
    name: str
    parameters: tuple[Tensor, ...] = ()


def in_pieces(
    work: Work, rows: tuple[Tensor | None, ...], shared: tuple[Tensor | None, ...] = ()
) -> tuple[Tensor, ...]:
    """`work` on all T tokens of `rows`, piece by piece; differentiable in rows, shared and parameters."""
    first = next(x for x in rows if x is not None)
    if work.piece >= first.shape[work.axis]:
        return work.run(0, *rows, *shared)
    return _ByPieces.apply(work, len(rows), *rows, *shared, *work.parameters)  # type: ignore[return-value]


class _ByPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, num_rows: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        num_given = len(tensors) - len(work.parameters)
        given = tensors[:num_given]
        # Parameters are read where they are: what hangs on them, as a main gradient, must stay on them.
        ctx.save_for_backward(*given)
        ctx.work, ctx.num_rows = work, num_rows
        ctx.settings = unnamed()
        ctx.set_materialize_grads(False)
        made = named(work.name, ctx.settings.copy().run, _forward, work, given[:num_rows], given[num_rows:])
        return made if isinstance(made, tuple) else (made,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        sums = _Gradients(ctx.work, given, ctx.num_rows, ctx.needs_input_grad[2:])
        for start, stop in _ranges(ctx.work, given):
            ctx.settings.copy().run(sums.add, start, stop, upstream)
        return None, None, *sums.result()


def _ranges(work: Work, rows: tuple[Tensor | None, ...]) -> Iterator[tuple[int, int]]:
    num_tokens = next(x.shape[work.axis] for x in rows if x is not None)
    for start in range(0, num_tokens, work.piece):
        yield start, min(start + work.piece, num_tokens)


def _part(x: Tensor | None, axis: int, start: int, stop: int) -> Tensor | None:
    return None if x is None else x.narrow(axis, start, stop - start)


def _forward(work: Work, rows: tuple[Tensor | None, ...], shared: tuple[Tensor | None, ...]) -> Any:
    whole: Tensor | None = None
    totals: list[Tensor] = []
    num_tokens = next(x.shape[work.axis] for x in rows if x is not None)
    for start, stop in _ranges(work, rows):
        made, *scalars = work.run(start, *(_part(x, work.axis, start, stop) for x in rows), *shared)
        if whole is None:
            whole = made.new_empty(*made.shape[: work.axis], num_tokens, *made.shape[work.axis + 1 :])
        whole.narrow(work.axis, start, stop - start).copy_(made)
        totals = [a + b for a, b in zip(totals, scalars)] if totals else list(scalars)
        del made
    return (whole, *totals)


class _Gradients:
    """Gradients of rows, shared tensors and parameters, in this order, as far as they are `wanted`."""

    def __init__(
        self, work: Work, given: tuple[Tensor | None, ...], num_rows: int, wanted: tuple[bool, ...]
    ) -> None:
        self.work, self.num_rows = work, num_rows
        self.every = (*given, *work.parameters)
        self.num_given = len(given)
        self.wanted = [i for i, is_wanted in enumerate(wanted) if is_wanted]
        self.found: list[Tensor | None] = [None] * len(self.every)
        # Shared tensors are the same leaves in every piece.
        self.leaves = [
            x.detach().requires_grad_() if x is not None and wanted[i] and num_rows <= i < len(given) else x
            for i, x in enumerate(self.every)
        ]

    def add(self, start: int, stop: int, upstream: tuple[Tensor | None, ...]) -> None:
        """The piece start … stop - 1, run again and differentiated."""
        axis, leaves = self.work.axis, list(self.leaves)
        for i in range(self.num_rows):
            part = _part(leaves[i], axis, start, stop)
            leaves[i] = part.detach().requires_grad_() if part is not None and i in self.wanted else part
        with torch.enable_grad():
            made = self.work.run(start, *leaves[: self.num_given])
        above = (_part(upstream[0], axis, start, stop), *upstream[1:])
        pairs = [(x, g) for x, g in zip(made, above) if g is not None and x.requires_grad]
        del made
        if not pairs:
            return
        outputs, above = zip(*pairs)
        del pairs
        inputs = [leaves[i] for i in self.wanted]
        grads = list(torch.autograd.grad(outputs, inputs, above, allow_unused=True))  # type: ignore[arg-type]
        del outputs, above
        for number, i in enumerate(self.wanted):
            grad, grads[number] = grads[number], None  # type: ignore[call-overload]
            if grad is not None:
                self._take(i, grad, start, stop)

    def _take(self, i: int, grad: Tensor, start: int, stop: int) -> None:
        total, like = self.found[i], self.every[i]
        assert like is not None
        if i < self.num_rows:
            total = torch.zeros_like(like, memory_format=torch.contiguous_format) if total is None else total
            total.narrow(self.work.axis, start, stop - start).copy_(grad)
        elif total is None:
            total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        else:
            total.add_(grad)
        self.found[i] = total

    def result(self) -> list[Tensor | None]:
        """Gradients in the types of what they belong to."""
        return [
            None if total is None else total.to(like.dtype)  # type: ignore[union-attr]
            for total, like in zip(self.found, self.every)
        ]
