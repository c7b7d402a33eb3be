"""What a reward function returned, as a verdict: finite named floats or a typed failure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from consilience.rollout.grading import Graded
from consilience.rollout.records import Outcome, OutcomeKind

MAX_PARTS = 64
MAX_NAME = 64
MAX_DETAIL = 500


def verdict_of(value: Any) -> Graded:
    """GRADED with the scalar and its parts, or FAILED saying what is wrong with `value`.

    A number r is the reward with parts {"reward": r}. Of a mapping, entry "reward" is the scalar, or
    the sum of the entries if there is none.
    """
    if isinstance(value, Real):
        value = {"reward": value}
    if not isinstance(value, Mapping):
        return failed(
            f"the reward function returned a {type(value).__name__}; a number or a dict of numbers is allowed"
        )
    if not 0 < len(value) <= MAX_PARTS:
        return failed(f"the reward function returned {len(value)} parts; 1 to {MAX_PARTS} are allowed")
    parts: dict[str, float] = {}
    for name, part in value.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            return failed(
                f"reward part {str(name)[:MAX_NAME]!r}: names are texts of at most {MAX_NAME} characters"
            )
        if not isinstance(part, Real):
            return failed(f"reward part {name!r} is a {type(part).__name__}; a number is needed")
        try:
            parts[name] = float(part)
        except OverflowError:
            parts[name] = math.inf
        if not math.isfinite(parts[name]):
            return failed(f"reward part {name!r} is {parts[name]}; a finite number is needed")
    reward = parts["reward"] if "reward" in parts else sum(parts.values())
    if not math.isfinite(reward):
        return failed(f"the sum of the reward parts is {reward}; name the scalar 'reward'")
    return Graded(reward, parts, Outcome(OutcomeKind.GRADED))


def tamper(detail: str) -> Graded:
    """The candidate worked on the judge instead of the task: reward 0, counted as an alarm."""
    return Graded(0.0, {"reward": 0.0}, Outcome(OutcomeKind.TAMPER, detail[:MAX_DETAIL]))


def failed(detail: str) -> Graded:
    """The reward function broke its contract: no reward, the sample is masked and counted."""
    return Graded(None, {}, Outcome(OutcomeKind.FAILED, detail[:MAX_DETAIL]))


def infra(detail: str) -> Graded:
    """The sandbox or the machinery failed, nobody's fault: no reward, the sample is masked."""
    return Graded(None, {}, Outcome(OutcomeKind.INFRA, detail[:MAX_DETAIL]))
