"""A phase scored in parts where the store cannot hold all of its states at once (post-training notes 7.2).

Membership of the mini-batches is drawn first. As many neighbouring ones as the budget holds are scored
together, trained on and freed, then the next. Parts follow from the samples and the budget alone: a killed
run cuts them as an undisturbed one does, and scores in the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from consilience.conf.errors import EngineError
from consilience.distill.samples import by_teacher, score_request
from consilience.model.ranks import Ranks
from consilience.rollout.records import RolloutRecord
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.scheduler import ScoreReport, ScoreRequest, TeacherScheduler
from consilience.training.stage_clock import StageClock

NOTHING = ScoreReport({}, (), 0, 0, 0)


def cut_parts(batches: Sequence[dict[str, int]], budget_bytes: int | None) -> list[int]:
    """Number of the first mini-batch of each part; the first part begins with 0.

    batches  key of a sample's states -> their bytes, of each mini-batch; equal samples share a key, and
             what an earlier part scored for a later one too takes room in between

    EngineError if one mini-batch alone is larger than the budget.
    """
    firsts: list[int] = [0]
    held: dict[str, int] = {}
    if budget_bytes is None:
        return firsts
    for number, own in enumerate(batches):
        if (num_bytes := sum(own.values())) > budget_bytes:
            raise EngineError(
                f"{num_bytes} bytes of hidden states of one mini-batch do not fit: the store may hold "
                f"{budget_bytes}; nothing was scored. Raise distill.store_bytes or distill.mini_batches, or "
                "sample fewer prompts a phase"
            )
        if sum((held | own).values()) > budget_bytes:
            firsts.append(number)
            coming = {key for batch in batches[number:] for key in batch}
            held = {key: size for key, size in held.items() if key in coming}
            held = held if sum((held | own).values()) <= budget_bytes else {}
        held = held | own
    return firsts


class PhaseScores:
    """Scores the mini-batches of a phase when their turn comes; called with a number, from 0 upwards.

    `report` is what was scored so far. Of several ranks all call it, and share the scoring out.
    """

    report = NOTHING

    def __init__(
        self,
        batches: Sequence[Sequence[RolloutRecord]],
        scheduler: TeacherScheduler,
        store: HiddenStore,
        ranks: Ranks,
        clock: StageClock | None = None,
    ) -> None:
        self._scheduler, self._ranks, self._clock = scheduler, ranks, clock
        self._requests = [[score_request(copy) for r in batch for copy in by_teacher(r)] for batch in batches]
        self._keys = [scheduler.keys(own) for own in self._requests]
        # A store that keeps what was used never has room again: all of the phase has to fit.
        budget = None if store.keeps else store.budget_bytes
        self._firsts = cut_parts([self._sizes(*own) for own in zip(self._requests, self._keys)], budget)

    @property
    def num_parts(self) -> int:
        return len(self._firsts)

    def __call__(self, number: int) -> ScoreReport:
        """The report, once the states of this mini-batch are stored and reserved."""
        if number in self._firsts:
            part = self._firsts.index(number)
            last = (*self._firsts[1:], len(self._requests))[part]
            with self._clock.phase("score") if self._clock else nullcontext():
                self._score(number, last)
        return self.report

    def _score(self, first: int, last: int) -> None:
        requests = [request for own in self._requests[first:last] for request in own]
        done = {key for own in self._keys[:last] for key in own.values()}
        later = [key for own in self._keys[last:] for key in own.values()]
        later.sort(key=lambda key: key not in done)  # of these, what this phase has scored is the last to go
        found = self._scheduler.score(requests, later, self._ranks)
        before = self.report
        self.report = replace(
            found,
            keys=before.keys | found.keys,
            loads=before.loads + found.loads,
            num_scored=before.num_scored + found.num_scored,
            num_reused=before.num_reused + found.num_reused,
            num_tokens=before.num_tokens + found.num_tokens,
            bad=before.bad | found.bad,
        )

    def _sizes(self, requests: Sequence[ScoreRequest], keys: Mapping[str, str]) -> dict[str, int]:
        size = lambda r: len(r.positions) * self._scheduler.digests(r.teacher).state_bytes
        return {keys[r.uid]: size(r) for r in requests}
