"""Finished episodes on their way to a verdict: a batch for each free grading thread, a verdict an episode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from consilience.conf.errors import EngineError
from consilience.rollout.boxes import Box
from consilience.rollout.episode import Episode
from consilience.rollout.errands import Errands
from consilience.rollout.grading import Graded, GradeItem, Grader
from consilience.rollout.records import Outcome, OutcomeKind
from consilience.rollout.watched_threads import Task

if TYPE_CHECKING:
    from consilience.rollout.worker import RolloutWorker

STAGE = "grade"


class GradingQueue:
    """Hands a batch to each grading thread that is free.

    boxes      job uid -> the box that its episode leased; read when the episode's batch leaves
    on_graded  gets each episode with its verdict, in the stream's thread; none of a thread that was late
    """

    def __init__(
        self,
        worker: RolloutWorker,
        errands: Errands,
        boxes: Mapping[str, Box],
        on_graded: Callable[[Episode, Graded], None],
    ) -> None:
        self._worker, self._errands, self._boxes, self._on_graded = worker, errands, boxes, on_graded
        self._waiting: list[Episode] = []
        self._away: set[str] = set()  # the first job uid of each batch that a thread has

    def add(self, episode: Episode) -> None:
        """Put an episode that has ended at the end of the queue."""
        self._waiting.append(episode)

    @property
    def can_send(self) -> bool:
        """An episode waits and a thread is free."""
        return bool(self._waiting) and len(self._away) < self._worker.num_grade_threads

    def send(self) -> None:
        """Give batches to threads while there are both."""
        worker = self._worker
        while worker.grader is not None and self.can_send:
            size = worker.grade_batch
            batch, self._waiting = self._waiting[:size], self._waiting[size:]
            items = [episode.grade_item(self._boxes.get(episode.job.uid)) for episode in batch]
            uids = [episode.job.uid for episode in batch]
            self._away.add(uids[0])
            limit_s = worker.limits.grade_s + len(batch) * worker.limits.grade_sample_s
            work = partial(self._grade, worker.grader, batch, items)
            self._errands.send(worker.grade_threads, STAGE, limit_s, work, uids)

    def give_up(self, task: Task) -> None:
        """Its thread is late: count it as free, and don't hear what it still says."""
        self._away.discard(task.uids[0])

    def _grade(self, grader: Grader, batch: list[Episode], items: list[GradeItem]) -> Callable[[], None]:
        """(grading thread) One verdict an episode, whatever the grader does."""
        try:
            verdicts = grader.grade(items)
            if len(verdicts) != len(items):
                raise EngineError(f"grader gave {len(verdicts)} verdicts for {len(items)} episodes")
        except Exception as error:
            outcome = Outcome(OutcomeKind.INFRA, f"grader: {type(error).__name__}: {error}")
            verdicts = [Graded(None, {}, outcome)] * len(items)
        checked = [_checked(verdict) for verdict in verdicts]

        def graded() -> None:
            first = batch[0].job.uid
            if first not in self._away:
                return
            self._away.remove(first)
            for episode, verdict in zip(batch, checked):
                self._on_graded(episode, verdict)

        return graded


def _checked(verdict: Graded) -> Graded:
    """A scored verdict needs a finite reward; anything else is a failure, not a zero."""
    if not verdict.outcome.is_scored:
        return verdict
    if verdict.reward is None or not math.isfinite(verdict.reward):
        outcome = Outcome(OutcomeKind.FAILED, f"reward is {verdict.reward}, must be a finite number")
        return Graded(None, {}, outcome, verdict.isolation, verdict.sandbox_ids)
    return verdict
