"""Rows of a compiled kernel, parted among as many threads as PyTorch has.

The threads are PyTorch's own, OpenMP's: others would share the cores with those, which wait for their next
piece of work by spinning. A kernel runs without the interpreter's lock; rows that do not meet need no order.
Where parts add to something, each has its own sum and `fixed` cuts by the number of rows alone: then no bit
depends on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.model.kernels.compiled import Pointer, past

LEAST = 1 << 15  # numbers of a part: below, waking a thread (some 30 µs) costs more than it saves
FEWEST, MOST = 512, 8  # rows of a part that has sums of its own; parts
LANES = 16  # rows that some kernels take side by side
ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def even(num_rows: int, numbers_a_row: int) -> list[slice]:
    """A part a thread, none under LEAST numbers."""
    return _cut(num_rows, min(torch.get_num_threads(), num_rows * numbers_a_row // LEAST))


def fixed(num_rows: int) -> list[slice]:
    """At most MOST parts of at least FEWEST rows, whatever the threads are."""
    return _cut(num_rows, min(MOST, num_rows // FEWEST))


def number(rows: slice, parts: list[slice]) -> int:
    """Which of `fixed` parts this is."""
    return rows.start // max(parts[0].stop, 1)


def length(rows: slice) -> int:
    return rows.stop - rows.start


def at(tensor: Tensor | None, rows: slice) -> Pointer | None:
    """Where the rows of a contiguous tensor [R, ...] begin."""
    return None if tensor is None else past(tensor, rows.start * (tensor.numel() // max(len(tensor), 1)))


def _cut(num_rows: int, count: int) -> list[slice]:
    """About `count` parts of whole LANES, all alike but the last; one part for no rows."""
    size = -(-max(num_rows, 1) // max(count, 1) // LANES) * LANES
    return [slice(first, min(first + size, num_rows)) for first in range(0, max(num_rows, 1), size)]


def in_parts(work: Callable[[slice], None], parts: list[slice]) -> None:
    """`work` on every part, by threads at once; returns when all are done. An error of any comes out."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1 or _team() is None:
        for rows in parts:
            work(rows)
        return
    left, errors = iter(parts), []

    def go_on(_: int | None) -> None:
        try:
            for rows in left:
                work(rows)
        except BaseException as error:  # an interrupt too: the thread that called is to hear of it
            errors.append(error)

    _team()(ENTRY(go_on), None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _team() -> Any:
    """OpenMP's `GOMP_parallel` of the library that PyTorch itself was linked to, or None."""
    try:
        start = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes = [ENTRY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start
