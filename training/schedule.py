"""Learning-rate schedules as plain functions of the step (V4 specification, section 12.1)."""

from __future__ import annotations

import math

from consilience.conf.errors import ConfigError


def warmup_constant_cosine(
    step: int, *, num_steps: int, warmup_steps: int = 0, decay_steps: int = 0, final_scale: float = 0.1
) -> float:
    """Factor on the peak learning rate at `step` (0 = first update): ramp, plateau, cosine tail.

    warm-up   (step + 1) / warmup_steps, so the first update is not lost
    plateau   1
    tail      the last `decay_steps` updates fall along a half cosine; the very last one has
              `final_scale` (V4 goes to a tenth), and so has anything after it
    decay_steps 0 is "warm-up, then constant". ConfigError when the parts do not fit.
    """
    if min(warmup_steps, decay_steps, step) < 0 or num_steps < 1 or warmup_steps + decay_steps > num_steps:
        raise ConfigError(
            f"schedule: warm-up {warmup_steps} and decay {decay_steps} do not fit into {num_steps} steps "
            f"(step {step}); each must be 0 or more and their sum at most the number of steps"
        )
    if not 0.0 <= final_scale <= 1.0:
        raise ConfigError(f"schedule: final_scale {final_scale} must lie between 0 and 1")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    into_tail = step - (num_steps - decay_steps) + 1
    if decay_steps == 0 or into_tail <= 0:
        return 1.0
    progress = min(1.0, into_tail / decay_steps)
    return final_scale + (1.0 - final_scale) * 0.5 * (1.0 + math.cos(math.pi * progress))
