"""Whose update it is: the pull of each teacher and domain on the student, measured and, if asked, balanced.

    pull of a token   ‖∂L/∂h_t‖, of the loss by the student's last hidden state at that token
    share             Σ of the pulls of a teacher's (a domain's) tokens over the Σ of all

A weight w_e in the loss is not yet a share of the update: a teacher that the student is far from, or whose
samples are long, pulls harder. `distill.balance=update` turns w_e into that share (post-training notes 6.1
and 6.3 leave the choice open). The pull is linear in a token's weight, so a factor for each teacher does it;
it is known only after the backward pass, so what one mini-batch missed the next ones make up for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MEMORY = 0.9
"""Share of the past that a mini-batch leaves in the sums: the last ten or so count."""

MOST = 16.0
"""A teacher is never pulled on more than this times, or less than one over this times, its own weight."""


class UpdateBalance:
    """Factors for the weights of the next mini-batch's teachers; `state` and `restored` for a checkpoint.

    weights  w_e of every teacher: the shares to be reached, relative to each other
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._pulled = dict.fromkeys(weights, 0.0)  # what each has had, the older the less
        self._usual: dict[str, float] = {}  # what a mini-batch of each pulls at factor 1

    def factors(self, teachers: set[str]) -> dict[str, float]:
        """A factor for each teacher of the coming mini-batch: 1 where nothing was seen of one of them yet.

        What each has had and is to have lies as the weights do; the level is that at which the factors of
        all teachers, once their shares are reached, have a geometric mean of 1.
        """
        known = sorted(name for name, usual in self._usual.items() if usual > 0)
        if not teachers <= set(known):
            return dict.fromkeys(teachers, 1.0)
        share = shares({name: self._weights[name] for name in known})
        even = math.exp(sum(math.log(self._usual[n] / share[n]) for n in known) / len(known))
        past = {name: MEMORY * self._pulled[name] for name in known}
        total = sum(past.values()) + even * sum(share[name] for name in teachers)
        wanted = {name: share[name] * total - past[name] for name in teachers}
        return {n: min(MOST, max(1 / MOST, wanted[n] / self._usual[n])) for n in sorted(teachers)}

    def observe(self, pulls: Mapping[str, float], factors: Mapping[str, float]) -> None:
        """Σ of the token pulls of each teacher of a mini-batch that ran with these factors."""
        for name, pull in pulls.items():
            at_one = pull / factors[name]
            self._usual[name] = (1 - MEMORY) * at_one + MEMORY * self._usual.get(name, at_one)
        for name in self._pulled:
            self._pulled[name] = MEMORY * self._pulled[name] + pulls.get(name, 0.0)

    def state(self) -> dict[str, Any]:
        return {"pulled": dict(self._pulled), "usual": dict(self._usual)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Teachers that are no longer there are left out."""
        for name in self._pulled:
            self._pulled[name] = float(state["pulled"].get(name, 0.0))
        self._usual = {n: float(v) for n, v in state["usual"].items() if n in self._pulled}


def shares(amounts: Mapping[str, float]) -> dict[str, float]:
    """Each one's part of the sum; all 0 where the sum is."""
    total = sum(amounts.values())
    return {name: amount / total if total else 0.0 for name, amount in amounts.items()}
