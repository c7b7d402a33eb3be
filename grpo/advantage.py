"""Group advantages: reward minus the mean of the group, nothing divided (V3.2; post-training notes 2.3).

    A_i = R_i − mean(R of the scored samples of the same group)

A sample without a score (infrastructure loss, reward function failed) is masked: it takes no part in the
mean and gets no gradient. A group whose scored samples all have one reward teaches nothing: it is dropped
and counted, and leaves the divisor of the loss.

Shapes: S samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from consilience.conf.errors import RewardError

ROUNDING = 1e-12
"""Rewards closer than this, relative to their size, are the same reward reached by another sum."""


@dataclass(frozen=True)
class Advantages:
    """What each sample is worth, and what was left out.

    Example: groups a a a b b, rewards 1 0 None 1 1 → advantage 0.5 −0.5 0 0 0, is_kept 1 1 0 0 0:
    one group kept, one without signal, one sample masked.

    advantage              [S] float64, 0 where the sample is not kept
    is_kept                [S] bool: trained on
    is_masked              [S] bool: had no reward
    num_groups             groups seen
    num_without_signal     groups dropped because all scored rewards are equal (or only one is left)
    num_without_score      groups dropped because no sample of theirs has a reward
    """

    advantage: np.ndarray
    is_kept: np.ndarray
    is_masked: np.ndarray
    num_groups: int
    num_without_signal: int
    num_without_score: int

    @property
    def num_kept(self) -> int:
        """Samples trained on: the divisor of the GRPO loss."""
        return int(self.is_kept.sum())

    @property
    def num_masked(self) -> int:
        return int(self.is_masked.sum())


def group_advantages(rewards: Sequence[float | None], groups: Sequence[Hashable]) -> Advantages:
    """Mean-only advantages. `rewards` [S], None where the sample is masked; `groups` [S] group of each.

    Samples of a group need not be neighbours. RewardError on a reward that is not finite (a reward
    function's NaN is a typed failure and arrives here as None); ValueError on lengths that differ.
    """
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards for {len(groups)} groups; each sample needs both")
    values = np.array([math.nan if r is None else float(r) for r in rewards], dtype=np.float64)
    is_masked = np.array([r is None for r in rewards], dtype=bool)
    bad = np.flatnonzero(~is_masked & ~np.isfinite(values))
    if bad.size:
        raise RewardError(
            f"reward of sample {bad[0]} is {values[bad[0]]}; a reward is finite, or None where there is none"
        )
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)

    advantage = np.zeros(len(values))
    is_kept = np.zeros(len(values), dtype=bool)
    num_without_signal = num_without_score = 0
    for everyone in members.values():
        scored = np.array([i for i in everyone if not is_masked[i]], dtype=np.int64)
        if scored.size == 0:
            num_without_score += 1
        elif not has_signal(values[scored]):
            num_without_signal += 1
        else:
            advantage[scored] = values[scored] - values[scored].mean()
            is_kept[scored] = True
    return Advantages(advantage, is_kept, is_masked, len(members), num_without_signal, num_without_score)


def has_signal(rewards: np.ndarray) -> bool:
    """Whether a group's scored rewards [≥ 1] differ by more than rounding."""
    spread = float(rewards.max() - rewards.min())
    return spread > ROUNDING * max(1.0, float(np.abs(rewards).max()))
