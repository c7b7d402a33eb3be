"""What every engine checks of a batch, and how a failure of one rank becomes an error on all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from consilience.conf.errors import EngineError
from consilience.model.ranks import Ranks

Told = tuple[int, int, str, str]
"""Micro-batch, rank, type and text of a failure."""


def check_denominators(denominators: Mapping[str, float], num_steps: int) -> None:
    """EngineError if one is not a positive number."""
    for name, value in denominators.items():
        if not (math.isfinite(value) and value > 0):
            raise EngineError(
                f"step {num_steps}: denominator {name} is {value}; it must be a positive count, "
                "a mini-batch without loss tokens must not reach the engine"
            )


def fail_together(ranks: Ranks, index: int, failure: Exception | None, num_steps: int) -> None:
    """Before ranks wait for each other's gradients: if one failed, all raise, the failing one its own error.

    index  this rank's micro-batch. The others raise an EngineError that names the first that failed.
    """
    raise_first(ranks, ranks.gather(told_of(ranks, index, failure)), failure, num_steps)


def told_of(ranks: Ranks, index: int, failure: Exception | None) -> Told | None:
    """What a rank tells the others of its failure in micro-batch `index`; None: there was none."""
    return None if failure is None else (index, ranks.rank, type(failure).__name__, str(failure))


def raise_first(ranks: Ranks, told: Iterable[Told | None], failure: Exception | None, num_steps: int) -> None:
    """Raise what failed first of what all ranks told: on the rank that failed `failure` itself."""
    failures = [each for each in told if each is not None]
    if not failures:
        return
    where, rank, kind, text = min(failures)
    if failure is not None and rank == ranks.rank:
        raise failure
    if kind == EngineError.__name__:
        raise EngineError(text)
    raise EngineError(f"step {num_steps}: rank {rank} failed in micro-batch {where} ({kind}: {text})")
