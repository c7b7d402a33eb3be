"""Global gradient norms: whether a step can be taken, and by how much it is shortened."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from consilience.conf.errors import EngineError


def checked_norm(norms: Mapping[str, float], num_steps: int) -> float:
    """Global norm from those of single gradients, by name. EngineError unless all are finite, or none is."""
    if not norms:
        raise EngineError(f"step {num_steps}: no gradient to apply; call forward_backward first")
    total = _total(norms.values())
    if not math.isfinite(total):
        worst = [name for name, norm in norms.items() if not math.isfinite(norm)]
        raise EngineError(
            f"step {num_steps}: the gradient of {worst[0] if worst else 'the model'} is not finite "
            f"({len(worst)} of {len(norms)} tensors); no parameter was changed. Lower the learning rate "
            "or resume from the last checkpoint"
        )
    return total


def clip_factors(norms: Mapping[str, float], largest: float) -> dict[str, float]:
    """Name -> factor below 1, of the gradients that are clipped; `largest` 0: none is.

    Prediction blocks have a norm of their own: a loss that only they learn from must not shorten the
    trunk's step.
    """
    factors: dict[str, float] = {}
    for is_ahead in (True, False):
        names = [name for name in norms if name.startswith("mtp.") is is_ahead]
        own = _total(norms[name] for name in names)
        if largest and own > largest:
            factors |= dict.fromkeys(names, largest / own)
    return factors


def _total(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms))
