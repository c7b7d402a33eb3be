"""What the micro-batches of a phase add up to, whoever ran them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from consilience.distill.reward_term import RewardTerm
from consilience.distill.token_watch import TokenWatch
from consilience.model.ranks import Ranks


@dataclass
class Tally:
    """What a phase adds up: sums by teacher, and by sample its mean KL, its loss and its pull."""

    watch: TokenWatch
    reward: RewardTerm
    by_teacher: dict[str, dict[str, float]] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    pull: dict[str, float] = field(default_factory=dict)
    max_kl: float = 0.0
    token_kl: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _own: dict[str, dict[str, float]] = field(default_factory=dict)

    def see(self, teacher: str, kl: Tensor) -> None:
        """The KL [n] of one micro-batch's loss tokens under a teacher."""
        values = kl.detach().float().cpu().numpy()
        self.max_kl = float(np.maximum(self.max_kl, values.max(initial=0.0)))  # not a number stays one
        self.token_kl.setdefault(teacher, []).append(values)

    def add(self, teacher: str, sums: dict[str, float]) -> None:
        mine = self.by_teacher.setdefault(teacher, {})
        for name, value in sums.items():
            earlier = mine.get(name, 0.0)
            mine[name] = max(earlier, value) if name.startswith("max_") else earlier + value

    def note(self, name: str, uid: str, value: float) -> None:
        """Add to a sample's "kl", "loss" or "pull"; ranks that cut rows each have a part of it."""
        mine = self._own.setdefault(name, {})
        mine[uid] = mine.get(uid, 0.0) + value

    def pop_max_kl(self, ranks: Ranks) -> float:
        """The largest KL of a token, on any rank, since this was last asked."""
        found, self.max_kl = float(np.max(ranks.gather(self.max_kl))), 0.0
        return found

    def share(self, ranks: Ranks) -> None:
        """What was noted since this was last called, by all ranks, on every rank."""
        for found in ranks.gather(self._own):
            for name, by_uid in found.items():
                mine: dict[str, float] = getattr(self, name)
                for uid, value in by_uid.items():
                    mine[uid] = mine.get(uid, 0.0) + value
        self._own = {}

    def kl_tail(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """kl_p99 and kl_max of the tokens of all ranks, by teacher."""
        found: dict[str, list[np.ndarray]] = {}
        for own in ranks.gather(self.token_kl):
            for teacher, parts in own.items():
                found.setdefault(teacher, []).extend(parts)
        values = {teacher: np.concatenate(parts) for teacher, parts in found.items()}
        values = {teacher: kl for teacher, kl in values.items() if kl.size}
        return {
            "kl_p99": {teacher: float(np.quantile(kl, 0.99)) for teacher, kl in values.items()},
            "kl_max": {teacher: float(kl.max()) for teacher, kl in values.items()},
        }

    def mean(self, name: str) -> dict[str, float]:
        """A sum by teacher over its loss tokens."""
        return {teacher: part[name] / part["tokens"] for teacher, part in self.by_teacher.items()}
