"""Rows gathered and rows added up, in the same order on every run and device.

On a GPU index_add_, and with it the backward of index_select, adds by atomics: rows that meet in one place
are summed as they happen to arrive. index_put_ with `accumulate` sorts the places first and adds the rows of
each in their order. On a CPU both go row by row, and index_add_ is much the faster.

M rows of the source or target, N places.
"""

from __future__ import annotations

from torch import Tensor


def take_rows(source: Tensor, place: Tensor) -> Tensor:
    """source [M, …], place [N] int64 -> [N, …], the rows there; its backward is `add_rows_`."""
    return source[place] if source.is_cuda else source.index_select(0, place)


def add_rows_(target: Tensor, place: Tensor, rows: Tensor) -> Tensor:
    """target[place[n]] += rows[n], in place: target [M, …], place [N] int64, rows [N, …] -> target."""
    if target.is_cuda:
        return target.index_put_((place,), rows, accumulate=True)
    return target.index_add_(0, place, rows)
