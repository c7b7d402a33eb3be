"""Gradients of one batch: each rank runs its own micro-batches, what they report is everybody's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from consilience.conf.errors import EngineError
from consilience.model.context_parallel import context_parallel
from consilience.model.exact import exact_mode
from consilience.model.ranks import ALONE, Ranks
from consilience.training.engine_checks import check_denominators, raise_first, told_of
from consilience.training.fill_up import blank

LossFn = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]
LARGEST = "max_"  # reports whose name begins so are maxima, all others are sums


def accumulate(
    loss_fn: LossFn,
    model: nn.Module,
    batch: Any,
    denominators: Mapping[str, float],
    *,
    ranks: Ranks,
    num_steps: int,
    is_exact: bool = False,
    backward: Callable[[Tensor, bool], Any] = lambda loss, is_last: loss.backward(),
    is_in_step: bool = False,
) -> dict[str, float]:
    """Run this rank's part of the batch, backwards too; see `TrainEngine.forward_backward`.

    backward    what to do with each loss, and whether it is this rank's last of the batch
    is_in_step  every rank runs the same number of forwards, and backwards even from a loss that is not
                finite: they wait for each other in each. Whoever has too few runs one without loss

    Every rank gets the same report and, where any of them fails, an error: EngineError names the first
    micro-batch that failed. Where ranks wait for each other within a forward, what one raises there it raises
    alone: it cannot join the others to tell them. Gradients lie where `backward` left them, those of other
    ranks are not in them.
    """
    check_denominators(denominators, num_steps)
    micro_batches = list(batch) if isinstance(batch, list | tuple) else [batch]
    context = ranks.context or ALONE
    own = ranks.part(range(len(micro_batches)))
    num_blank = -(-len(micro_batches) // ranks.num_parts) - len(own) if is_in_step else 0
    found: dict[str, float] = {"loss": 0.0}
    failed: tuple[int, Exception] | None = None
    index: int | None = 0
    is_together = is_in_step or context.size > 1
    try:
        for number, index in enumerate([*own, *[None] * num_blank], 1):
            micro_batch = blank(micro_batches[0]) if index is None else micro_batches[index]
            with ranks.in_step() if is_together else nullcontext():
                with exact_mode(is_exact), context_parallel(context):
                    loss, reported = loss_fn(model, micro_batch)
                value = float(loss.detach())
                if not math.isfinite(value) and failed is None:
                    failed = (index or 0, _not_finite(num_steps, index, value))
                    if not is_together:  # else others wait for this backward
                        break
                if loss.requires_grad:
                    backward(loss, number == len(own) + num_blank)
            if index is not None:
                add_report(found, {"loss": value, **reported})
    except Exception as error:
        if is_together:
            raise
        failed = (index or 0, error)
    reports = _shared(ranks, found, failed, num_steps)
    total: dict[str, float] = {}
    for report in reports:
        add_report(total, report)
    return {name: value / denominators.get(name, 1.0) for name, value in total.items()}


def _not_finite(num_steps: int, index: int | None, value: float) -> EngineError:
    return EngineError(
        f"step {num_steps}: the loss of micro-batch {index} is {value}; no parameter "
        "was changed. Lower the learning rate or resume from the last checkpoint"
    )


def add_report(total: dict[str, float], report: Mapping[str, float]) -> None:
    """Add one report to a total in place: sums, and maxima where the name says so."""
    for name, value in report.items():
        value = float(value)
        if name not in total:
            total[name] = value
        else:
            total[name] = max(total[name], value) if name.startswith(LARGEST) else total[name] + value


def _shared(
    ranks: Ranks, found: Mapping[str, float], failed: tuple[int, Exception] | None, num_steps: int
) -> Sequence[Mapping[str, float]]:
    """Every rank's report, in the order of the ranks. If one failed, all raise."""
    index, failure = failed or (0, None)
    answers = ranks.gather((dict(found), told_of(ranks, index, failure)))
    raise_first(ranks, [told for _, told in answers], failure, num_steps)
    return [report for report, _ in answers]
