"""Reward beside the KL in one step: a policy-gradient term with a weight and a denominator of its own.

    L   = L_KL − α/S Σ_i 1/|o_i| Σ_t min(r_t A_i, clip(r_t, 1 − ε, 1 + ε) A_i)
    A_i = R_i − mean(R of its group)
    r_t = π_θ(o_t) / π_old(o_t), π_old the sampler's own probability;  S episodes with an advantage

as GRPO states it (post-training notes 2.3), without its KL: the teachers' takes that place. Separate
denominators, so that neither term dilutes the other (notes 6.3). Episodes without a reward, and those of
groups whose rewards are all equal, have an advantage of 0 and leave S; they are distilled all the same.

Shapes: n sampled tokens of a micro-batch; N tokens of a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.distill.samples import by_teacher
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.ranks import Ranks
from consilience.rollout.records import RolloutRecord

OLD_LOGPROB, ADVANTAGE = "old_logprob", "advantage"


@dataclass(frozen=True)
class RewardSettings:
    """weight α, 0: the KL alone;  clip_epsilon ε;  temperature that the student was sampled at."""

    weight: float = 0.0
    clip_epsilon: float = 0.2
    temperature: float = 1.0


def advantages(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Episode -> A_i, of episodes in groups whose rewards differ. Streams of one episode count once."""
    groups: dict[str, dict[str, float]] = {}
    for r in records:
        if r.reward is not None and r.outcome.is_scored:
            groups.setdefault(r.group, {})[episode_of(r.uid)] = r.reward
    found: dict[str, float] = {}
    for rewards in groups.values():
        mean = sum(rewards.values()) / len(rewards)
        if max(rewards.values()) > min(rewards.values()):
            found |= {uid: reward - mean for uid, reward in rewards.items()}
    return found


def episode_of(uid: str) -> str:
    """The episode of a stream or of a teacher's copy ("<uid>@…")."""
    return uid.partition("@")[0]


class RewardTerm:
    """The term over the mini-batches of a phase; all its records are given at once, for their groups."""

    def __init__(self, records: Sequence[RolloutRecord], settings: RewardSettings) -> None:
        self._settings = settings
        self._advantage = advantages(records)
        self._rewards = {episode_of(r.uid): r.reward for r in records if r.reward is not None}
        self._length: Counter[str] = Counter()  # sampled tokens of an episode, all its streams
        for r in records:
            self._length[episode_of(r.uid)] += r.num_sampled
        self._scale = 0.0
        self._num_copies: dict[str, int] = {}
        self._sums = {"policy_loss": 0.0, "policy_clipped": 0.0, "policy_tokens": 0.0}

    def begin(self, records: Sequence[RolloutRecord]) -> None:
        """A mini-batch of these records, before any is copied for its teachers; S is that of the mini-batch.

        A stream is the part of its episode that its tokens are: streams of one may be in different ones.
        """
        episodes = [(episode_of(r.uid), r.num_sampled) for r in records]
        num = sum(size / self._length[uid] for uid, size in episodes if uid in self._advantage)
        self._scale = self._settings.weight / num if num else 0.0
        self._num_copies = {c.uid: len(own) for own in map(by_teacher, records) for c in own}

    def arrays(self, records: Sequence[RolloutRecord]) -> dict[str, list]:
        """What `loss` needs of each token of these copies of records, for their packing."""
        if not self._settings.weight:
            return {}
        per_token = []
        for r in records:
            uid, copies = episode_of(r.uid), self._num_copies[r.uid]
            share = self._scale / (copies * self._length[uid]) * self._advantage.get(uid, 0.0)
            per_token.append([share] * len(r.token_ids))
        return {OLD_LOGPROB: [r.logprobs for r in records], ADVANTAGE: per_token}

    def loss(self, hidden: Tensor, head: Tensor, target_ids: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """The term of a micro-batch: hidden [n, D] and head [V, D] with gradient, target_ids and arrays [n].

        A positive factor goes through min and clip, so `advantage` holds α A_i / (S |o_i|) at once.
        """
        if not self._settings.weight:
            return hidden.new_zeros(())
        logprob = linear_logprob(hidden, head, target_ids, temperature=self._settings.temperature).logprob
        A, eps = arrays[ADVANTAGE].to(logprob.dtype), self._settings.clip_epsilon
        ratio = (logprob - arrays[OLD_LOGPROB].to(logprob.dtype)).exp()
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A).sum()
        with torch.no_grad():
            is_clipped = torch.where(A >= 0, ratio > 1 + eps, ratio < 1 - eps) & (A != 0)
            self._sums["policy_loss"] += float(loss)
            self._sums["policy_clipped"] += float(is_clipped.sum())
            self._sums["policy_tokens"] += float((A != 0).sum())
        return loss

    def share(self, ranks: Ranks) -> None:
        """What other ranks added up, on every rank."""
        self._sums = ranks.sums(self._sums)

    def numbers(self) -> dict[str, float]:
        """reward_mean, policy_loss (sum over the mini-batches), policy_clip_share, no_advantage_share."""
        if not self._settings.weight:
            return {}
        rewards, num = [r for r in self._rewards.values() if r is not None], len(self._length)
        return {
            "reward_mean": sum(rewards) / len(rewards) if rewards else float("nan"),
            "policy_loss": self._sums["policy_loss"],
            "policy_clip_share": self._sums["policy_clipped"] / max(self._sums["policy_tokens"], 1.0),
            "no_advantage_share": 1 - len(self._advantage) / max(num, 1),
        }
