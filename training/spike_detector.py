"""When a loss stands out from those before it.

The report switches anticipatory routing on "after a spike" and does not say what a spike is. This rule is
ours: robust against outliers in what it compares with, blind to a falling trend, and without a unit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution to its standard deviation
LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves is no reason to call a hundredth a spike


class SpikeDetector:
    """Compares each loss with the `window` losses before it.

    A spike is a loss above median + threshold · max(1.4826 · MAD, 0.01 · |median|), or one that is not
    finite. Nothing is one before the window is full. Spikes enter the window too: a median stands it.

    losses   the latest losses, for resume; JSON-plain
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = ()) -> None:
        self.window, self.threshold = window, threshold
        self.losses: deque[float] = deque(losses, maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` stands out; it belongs to the window from now on."""
        found = len(self.losses) == self.window and not loss <= self._highest()
        if math.isfinite(loss):
            self.losses.append(loss)
        return found

    def _highest(self) -> float:
        centre = median(self.losses)
        spread = TO_SIGMA * median(abs(loss - centre) for loss in self.losses)
        return centre + self.threshold * max(spread, LEAST_SPREAD * abs(centre))
