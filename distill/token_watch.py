"""What the tokens of a phase tell: the KL by place in the sample, and who would end where.

The end of text is looked at where the student ended, and at a few places spread evenly over each sample. They
follow from the sample alone, so it does not matter how micro-batches and rows are cut.

Shapes: n loss tokens, S samples, V vocabulary, D student width, Dt teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilience.distill.samples import Span
from consilience.model.ranks import Ranks

NUM_PARTS = 10
NUM_ELSEWHERE = 8
"""Places of a sample at most, ends among them left out, at which the end of text is looked at."""
CHUNK_ROWS = 64
"""Rows of logits held at once."""


class TokenWatch:
    """Sums over the micro-batches of a phase.

    eos  token id; None: ends are not looked at
    """

    def __init__(self, eos: int | None = None) -> None:
        self._eos = eos
        self._kl, self._num = np.zeros(NUM_PARTS), np.zeros(NUM_PARTS)
        self._eos_sums: dict[str, np.ndarray] = {}  # place -> (student's p, teacher's, places)

    @torch.no_grad()
    def observe(
        self,
        kl: Tensor,
        spans: Sequence[Span],
        target_ids: Tensor,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
    ) -> None:
        """One micro-batch: kl [n], `spans` of samples one behind the other, target_ids [n] sampled.

        student, teacher  hidden states [n, D] and [n, Dt], heads [V, D] and [V, Dt]
        """
        part = np.concatenate([np.arange(first, stop) * NUM_PARTS // n for first, stop, n in spans])
        self._kl += np.bincount(part, kl.double().cpu().numpy(), NUM_PARTS)
        self._num += np.bincount(part, minlength=NUM_PARTS)
        if self._eos is None:
            return
        is_end = target_ids == self._eos
        on_grid = [np.arange(first, stop) % -(-n // NUM_ELSEWHERE) == 0 for first, stop, n in spans]
        is_elsewhere = torch.from_numpy(np.concatenate(on_grid)).to(is_end.device) & ~is_end
        for place, chosen in (("at_end", is_end), ("elsewhere", is_elsewhere)):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                p, q = (_probability(h[rows], head, self._eos) for h, head in (student, teacher))
                sums = self._eos_sums.setdefault(place, np.zeros(3))
                sums += (float(p.sum()), float(q.sum()), len(rows))

    def share(self, ranks: Ranks) -> None:
        """What other ranks saw, on every rank."""
        found = ranks.gather((self._kl, self._num, self._eos_sums))
        self._kl = np.sum([kl for kl, _, _ in found], axis=0)
        self._num = np.sum([num for _, num, _ in found], axis=0)
        self._eos_sums = {}
        for _, _, sums in found:
            for place, own in sums.items():
                self._eos_sums[place] = self._eos_sums.get(place, np.zeros(3)) + own

    def numbers(self) -> dict[str, float]:
        """kl_tenth_1 … kl_tenth_10 (nats a token), late_ratio (last three over first three tenths).

        With an eos, for the places "at_end" and "elsewhere" that there were: student_eos_…, teacher_eos_…
        (mean probability of ending there), and eos_gap_…: how much likelier the end is to the student where
        it ended, to the teacher where the student went on.
        """
        mean = self._kl / np.maximum(self._num, 1)
        found = {f"kl_tenth_{i + 1}": float(value) for i, value in enumerate(mean) if self._num[i]}
        first, last = (self._kl[at].sum() / max(self._num[at].sum(), 1) for at in (slice(3), slice(-3, None)))
        # Below this nobody could tell either from rounding.
        found["late_ratio"] = float(last / first) if min(first, last) > 1e-6 else 0.0
        for place, (p, q, num) in self._eos_sums.items():
            gap = (p - q) / num if place == "at_end" else (q - p) / num
            found |= {f"student_eos_{place}": p / num, f"teacher_eos_{place}": q / num}
            found[f"eos_gap_{place}"] = gap
        return found


def _probability(hidden: Tensor, head: Tensor, token: int) -> Tensor:
    """[n] probability of one token after each of these states."""
    head = head.float()
    return torch.cat([(rows @ head.T).softmax(1)[:, token] for rows in hidden.float().split(CHUNK_ROWS)])
