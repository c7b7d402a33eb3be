"""How far several ranks ended from one process, by what ran and on how many: a table after the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Cell:
    """What the tests of one row found with one number of ranks.

    difference  the largest, relative to the tensor's largest value; None: none was measured as a number
    """

    seconds: float = 0.0
    num_tests: int = 0
    num_failed: int = 0
    difference: float | None = None

    def text(self) -> str:
        word = "ok" if self.difference is None else f"{self.difference:.1e}" if self.difference else "equal"
        word = f"{self.num_failed} of {self.num_tests} failed" if self.num_failed else word
        return f"{word}, {self.seconds:.0f} s"


ROWS: dict[tuple[str, str], dict[int, Cell]] = {}
_row: tuple[str, str] | None = None
_own: dict[int, Cell] = {}
_size = 1


def begin(stage: str, engine: str) -> None:
    """What follows is found for this row of the table, until `end`."""
    global _row, _size
    _row, _size = (stage, engine), 1
    _own.clear()


def end(*, is_failed: bool) -> None:
    """Add what one test has found to its row."""
    global _row
    if _row is not None:
        for size, own in _own.items():
            cell = ROWS.setdefault(_row, {}).setdefault(size, Cell())
            cell.seconds += own.seconds
            cell.num_tests += 1
            cell.num_failed += is_failed
            if own.difference is not None:
                cell.difference = max(cell.difference or 0.0, own.difference)
    _row = None


def ran(size: int, seconds: float) -> None:
    """The running test had so many ranks for so long; what it keeps next was found with them."""
    global _size
    _size = size
    _own.setdefault(size, Cell()).seconds += seconds


@contextmanager
def on(size: int) -> Iterator[None]:
    """Around what starts its ranks in another way than `on_ranks`."""
    began = time.perf_counter()
    yield
    ran(size, time.perf_counter() - began)


def note(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Keep how far gradients and weights are off; what was logged is held in other units, by its test."""
    for name in ("gradients", "weights"):
        if name in expected:
            keep(off(found[name], expected[name]))


def keep(difference: float) -> None:
    """This is a relative difference that the running test allows; 0 where it compares bits."""
    cell = _own.setdefault(_size, Cell())
    cell.difference = max(cell.difference or 0.0, float(difference))


def off(found: object, expected: object) -> float:
    """Of arrays and numbers in dicts and lists: the largest |found - expected| over the largest |expected| of
    that array, or of what stands beside it where that is more."""
    pairs = list(_pairs(found, expected))
    top = max((np.abs(e).max(initial=0) for _, e in pairs if e.ndim), default=0.0)
    least = max(0.1 * top, 1e-6)
    found_off = (float(np.abs(f - e).max(initial=0) / np.abs(e).max(initial=least)) for f, e in pairs)
    return max(found_off, default=0.0)


def _pairs(found, expected):
    if isinstance(expected, Mapping):
        for name in expected:
            yield from _pairs(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected):
            yield from _pairs(one, other)
    elif isinstance(expected, torch.Tensor):
        yield tuple(np.asarray(each.detach().double()) for each in (found, expected))
    elif isinstance(expected, np.ndarray | float) and not np.isnan(expected).any():
        yield np.asarray(found), np.asarray(expected)


def lines() -> list[str]:
    """The table, a column for each number of ranks."""
    sizes = sorted({size for row in ROWS.values() for size in row})
    if not sizes:
        return []
    named = [f"{size} rank" + "s" * (size > 1) for size in sizes]
    table = [("what", "engine", *named), ("---",) * (2 + len(sizes))]
    for (stage, engine), row in sorted(ROWS.items()):
        table.append((stage, engine, *(row[size].text() if size in row else "" for size in sizes)))
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
