"""Context parallelism: rows of samples cut into one piece a rank (report 3.4.3; specification section 8).

Inside of `context_parallel(ranks)` every rank gives a forward the same whole rows, and the model takes its
own piece of them: embedding, norms, hyper-connections, experts and the head see no other token. Attention
alone looks across borders, in two stages:

1. Every rank sends the newest of its uncompressed entries to the ranks behind it: the window's keys, and the
   raw projections of compression windows that end there. A window becomes an entry on the one rank where it
   ends. Pieces may be shorter than what is sent: then it comes from several ranks.
2. The compressed entries, and the indexer's keys, of all ranks are gathered on each. Only they, m times fewer
   than the tokens, are held of the whole rows.

Backwards the same way: gradients of gathered entries go to the rank that made them and are summed there in
the order of the ranks, in fp32 or wider. All ranks run the same layers in the same order; each must go
backward from a loss that hangs on its streams, also where its piece has no loss position. Losses are sums, so
those of the ranks, and the gradients of the parameters, which all ranks hold, add up to one rank's.

B rows, T tokens of the rows, n tokens of this rank, X channels, E entries that this rank makes, M of all of a
row, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.conf.errors import EngineError
from consilience.model.layout import sample_numbers
from consilience.model.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from consilience.model.layout import Windows

UNITS = (128, 64, 32, 16, 8, 4, 2)  # tokens that pieces are multiples of, the first that is fine enough
FINENESS = 8  # units a piece, at least: no piece is more than an eighth longer than the mean

_context: ContextVar[tuple[Ranks, tuple[int, ...] | None]] = ContextVar("context", default=(ALONE, None))


@contextmanager
def context_parallel(ranks: Ranks, borders: Sequence[int] | None = None) -> Iterator[None]:
    """Within it, forwards over packed rows are this rank's part of one forward of all `ranks`.

    borders  R + 1 tokens, rising from 0 to T, where rows are cut; None: as `borders_of` says. Forwards on a
             decode state are not touched, and one rank is a forward as ever.
    """
    token = _context.set((ranks, None if borders is None else tuple(borders)))
    try:
        yield
    finally:
        _context.reset(token)


def context_ranks() -> Ranks:
    """The ranks that a forward's rows are cut for here; one without `context_parallel`."""
    return _context.get()[0]


def borders_of(num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    """Where rows of T tokens are cut for R ranks: R + 1 borders, pieces of nearly one length.

    EngineError where there is no token for every rank.
    """
    if num_tokens < num_ranks:
        raise EngineError(
            f"rows of {num_tokens} tokens cannot be cut for {num_ranks} context ranks; pack longer rows or "
            f"set engine.context_ranks to {max(num_tokens, 1)} at most"
        )
    unit = next((u for u in UNITS if num_tokens >= u * FINENESS * num_ranks), 1)
    return (*(num_tokens // unit * rank // num_ranks * unit for rank in range(num_ranks)), num_tokens)


def own_tokens(num_tokens: int) -> slice:
    """Which of the T tokens of rows are this rank's here; all without `context_parallel`. EngineError where
    its borders do not fit."""
    ranks, borders = _context.get()
    start, stop = _borders(num_tokens, ranks, borders)[ranks.rank :][:2]
    return slice(start, stop)


def piece_of_rows(position: Tensor, is_valid: Tensor) -> Piece | None:
    """This rank's piece of rows with position, is_valid [B, T]; None outside of a context.

    EngineError where `borders` do not fit the rows.
    """
    ranks, borders = _context.get()
    if ranks.size == 1:
        return None
    return Piece(ranks, _borders(position.shape[1], ranks, borders), position, is_valid)


def _borders(num_tokens: int, ranks: Ranks, borders: tuple[int, ...] | None) -> tuple[int, ...]:
    if ranks.size == 1:
        return (0, num_tokens)
    if borders is None:
        return borders_of(num_tokens, ranks.size)
    is_rising = all(start < stop for start, stop in pairwise(borders))
    if len(borders) != ranks.size + 1 or not is_rising or (borders[0], borders[-1]) != (0, num_tokens):
        raise EngineError(
            f"context borders {list(borders)} do not cut rows of {num_tokens} tokens for {ranks.size} ranks; "
            f"give {ranks.size + 1} tokens, rising from 0 to {num_tokens}"
        )
    return borders


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens start … stop - 1 of every row, which are this rank's; position, is_valid [B, T] of all."""

    ranks: Ranks
    borders: tuple[int, ...]
    position: Tensor
    is_valid: Tensor

    @property
    def start(self) -> int:
        return self.borders[self.ranks.rank]

    @property
    def stop(self) -> int:
        return self.borders[self.ranks.rank + 1]

    def cut(self, x: Tensor) -> Tensor:
        """x [B, T, …] -> [B, n, …]."""
        if x.shape[1] != self.borders[-1]:
            raise ValueError(
                f"found {x.shape[1]} tokens a row, the rows that were cut have {self.borders[-1]}; give the "
                "whole rows, every rank takes its own piece"
            )
        return x[:, self.start : self.stop]

    def cut_tokens(self, x: Tensor) -> Tensor:
        """x [B · T, …] -> [B · n, …]."""
        return self.cut(x.unflatten(0, self.position.shape)).flatten(0, 1)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """x [B · n, K] of this rank -> [B · T, K] of all; no gradient."""
        lengths = [stop - start for start, stop in pairwise(self.borders)]
        rows = self.position.shape[0]
        padded = x.new_zeros(rows, max(lengths), x.shape[1])
        padded[:, : self.stop - self.start] = x.view(rows, -1, x.shape[1])
        found = self.ranks.stack(padded)
        return torch.cat([each[:, :n] for each, n in zip(found, lengths)], dim=1).flatten(0, 1)

    @cached_property
    def sample(self) -> Tensor:
        """[B, T] number of the sample of each token, over all rows and ranks; -1 for padding."""
        return sample_numbers(self.position, self.is_valid)

    @cached_property
    def num_samples(self) -> int:
        return int(self.sample.max()) + 1

    def tail(self, reach: int) -> int:
        """Tokens before the piece that attention needs if it looks back by `reach`."""
        return min(reach, self.start)

    def with_tail(self, reach: int, *own: Tensor) -> tuple[Tensor, ...]:
        """own [B, n, X] each, of one type, with the `tail(reach)` tokens before them: [B, tail + n, X]."""
        return _WithTail.apply(self, reach, *own)  # type: ignore[return-value]

    def gather(self, entries: Tensor, windows: Windows) -> Tensor:
        """entries [E, X] that close here, as `windows.closing` has them -> those of all ranks [B, M, X]."""
        places = windows.places
        if not windows.num_columns:
            return entries.view(self.position.shape[0], 0, entries.shape[1])
        shape = (self.position.shape[0], windows.num_columns, entries.shape[1])
        return _Gather.apply(entries, self.ranks, places.counts, places.target, shape)  # type: ignore[return-value]

    def overlaps(self, reach: int) -> dict[tuple[int, int], tuple[int, int]]:
        """(from, to) -> tokens first … last - 1 of the rank `from` that the rank `to` looks back at."""
        found, borders = {}, self.borders
        for to in range(1, self.ranks.size):
            for source in range(to):
                first = max(borders[to] - reach, borders[source])
                if first < borders[source + 1]:
                    found[source, to] = (first, borders[source + 1])
        return found


def _exchanged(ranks: Ranks, given: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]) -> list[Any]:
    """Tensors given[r] go to rank r; back come those that rank r gave, of shapes[r]. All of one type."""
    flat = torch.cat([x.reshape(-1) for each in given for x in each])
    sizes = [[int(torch.Size(shape).numel()) for shape in each] for each in shapes]
    found = flat.new_empty(sum(map(sum, sizes)))
    given_sizes = [sum(x.numel() for x in each) for each in given]
    ranks.start_exchange(found, flat, [sum(each) for each in sizes], given_sizes)()
    parts = iter(found.split([size for each in sizes for size in each]))
    return [[next(parts).view(shape) for shape in each] for each in shapes]


class _WithTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Piece, reach: int, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.piece, ctx.reach = piece, reach
        spans, me, start = piece.overlaps(reach), piece.ranks.rank, piece.start
        given: list[list[Tensor]] = []
        shapes: list[list[tuple[int, ...]]] = []
        for rank in range(piece.ranks.size):
            first, last = spans.get((me, rank), (start, start))
            given.append([x[:, first - start : last - start] for x in own])
            first, last = spans.get((rank, me), (0, 0))
            shapes.append([(x.shape[0], last - first, *x.shape[2:]) for x in own])
        found = _exchanged(piece.ranks, given, shapes)
        return tuple(torch.cat([*(each[i] for each in found), x], dim=1) for i, x in enumerate(own))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        piece: Piece = ctx.piece
        spans, me, start = piece.overlaps(ctx.reach), piece.ranks.rank, piece.start
        tail = piece.tail(ctx.reach)
        given: list[list[Tensor]] = []
        shapes: list[list[tuple[int, ...]]] = []
        for rank in range(piece.ranks.size):
            first, last = (token - start + tail for token in spans.get((rank, me), (start, start)))
            given.append([x[:, first:last] for x in grads])
            first, last = spans.get((me, rank), (0, 0))
            shapes.append([(x.shape[0], last - first, *x.shape[2:]) for x in grads])
        found = _exchanged(piece.ranks, given, shapes)
        sums = []
        for i, grad in enumerate(grads):
            own = grad[:, tail:]
            total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
            for each in found:  # what others look back at ends with the piece
                part = each[i]
                total[:, total.shape[1] - part.shape[1] :] += part
            sums.append(total.to(grad.dtype))
        return None, None, *sums


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entries: Tensor, ranks: Ranks, counts: list[int], target: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.ranks, ctx.counts, ctx.target = ranks, counts, target
        most, width = max(counts), shape[2]
        padded = entries.new_zeros(most, width)
        padded[: len(entries)] = entries
        every = torch.cat([each[:count] for each, count in zip(ranks.stack(padded), counts)])
        return entries.new_zeros(shape).view(-1, width).index_copy_(0, target, every).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ranks, counts = ctx.ranks, ctx.counts
        width, own = grad.shape[2], counts[ranks.rank]
        given = [[x] for x in grad.reshape(-1, width).index_select(0, ctx.target).split(counts)]
        found = _exchanged(ranks, given, [[(own, width)]] * ranks.size)
        total = torch.zeros(
            own, width, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device
        )
        for (part,) in found:
            total += part
        return total.to(grad.dtype), None, None, None, None
