"""How far several ranks ended from one process, by test: what `make test-ranks` prints at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

ROWS: dict[str, dict[str, float]] = {}
QUANTITIES = ("gradients", "weights", "rows")


def note(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Keep how far each of QUANTITIES is off, under the running test's name."""
    for name in QUANTITIES:
        if name in expected:
            keep(name, off(found[name], expected[name]))


def keep(name: str, difference: float) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    own = ROWS.setdefault(test, {})
    own[name] = max(own.get(name, 0.0), difference)


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
    elif isinstance(expected, np.ndarray | float) and not np.isnan(expected).any():
        yield np.asarray(found), np.asarray(expected)


def lines() -> list[str]:
    if not ROWS:
        return []
    head = ["| test | " + " | ".join(QUANTITIES) + " |", "|---" * (1 + len(QUANTITIES)) + "|"]
    cells = lambda row: [f"{row[name]:.1e}" if name in row else "" for name in QUANTITIES]
    return head + [f"| {test} | {' | '.join(cells(row))} |" for test, row in sorted(ROWS.items())]
