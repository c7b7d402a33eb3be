"""Phases sampled ahead of the trainer: admitted by age, taken in order, never discarded.

    age of a token = steps the trainer has made since the weights that sampled it

Phase p is what step p trains on, whatever finishes first. Its jobs are handed to the workers once these have
the weights p − max_age, so no token is older than max_age when it is trained on. A slow answer is waited for
while the workers sample up to max_age later phases: taking what is ready first would train on short answers
earlier, dropping what is late would train on them more often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Durable, OpenPhase, Publisher, Sampler, sample_phase, stored_phase
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore


class RolloutStreams(Publisher, Protocol):
    """Workers that sample all the time (`ray_streams.ray_streams`, `local_streams.LocalStreams`).

    `publish` gives every worker new weights between two of its steps, and returns once all have them.
    """

    def hand_over(self, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        """Jobs to begin with the weights published last; their records go to `durable.keep`."""
        ...

    def hear(self) -> None:
        """Wait until a worker says something, and keep the records that it brings (in this thread)."""
        ...


class PhasesAhead:
    """Phases `start` to `num_steps` − 1 of a stage, at most `max_age` + 1 of them begun and not trained on.

    max_age  oldest token that a step may train on, in versions; 0: nothing is sampled ahead
    """

    def __init__(
        self,
        store: RolloutStore,
        streams: RolloutStreams,
        jobs_of: Callable[[int], list[RolloutJob]],
        *,
        start: int,
        num_steps: int,
        max_age: int,
    ) -> None:
        if max_age < 0:
            raise ValueError(f"max_age is {max_age}; 0 (nothing ahead) or more")
        self._store, self._streams, self._jobs_of = store, streams, jobs_of
        self._next, self._num_steps, self.max_age = start, num_steps, max_age
        self._open: dict[int, OpenPhase] = {}
        self._whole: dict[int, list[RolloutRecord]] = {}

    def admit(self, version: int) -> None:
        """The workers have weights `version`: hand over the phases that may be begun with them, in order."""
        while self._next < min(version + self.max_age + 1, self._num_steps):
            step, self._next = self._next, self._next + 1
            if (records := stored_phase(self._store, step)) is not None:
                self._whole[step] = records
                continue
            phase = self._open[step] = OpenPhase(self._store, step, self._jobs_of)
            if missing := phase.missing:
                self._streams.hand_over(missing, phase.durable)

    def take(self, step: int) -> list[RolloutRecord]:
        """The records of phase `step`, in job order; waits for them."""
        self._complete(step)
        return self._whole.pop(step)

    def complete_all(self) -> None:
        """Wait until nothing is being sampled."""
        for step in list(self._open):
            self._complete(step)

    def close(self) -> None:
        """Leave unfinished phases to the next attempt."""
        for phase in self._open.values():
            phase.close()

    def _complete(self, step: int) -> None:
        if step in self._open:
            while self._open[step].missing:
                self._streams.hear()
            self._whole[step] = self._open.pop(step).finish()


class PhasesInTurn:
    """The verbs of `PhasesAhead` where each phase is sampled when it is asked for."""

    max_age = 0

    def __init__(
        self, store: RolloutStore, sampler: Sampler, jobs_of: Callable[[int], list[RolloutJob]]
    ) -> None:
        self._store, self._sampler, self._jobs_of = store, sampler, jobs_of

    def admit(self, version: int) -> None:
        """Nothing is begun ahead."""

    def take(self, step: int) -> list[RolloutRecord]:
        """See `sample_phase`."""
        return sample_phase(self._store, step, self._sampler, self._jobs_of)

    def complete_all(self) -> None:
        """Nothing is being sampled."""

    def close(self) -> None:
        """Nothing is open."""


class PhasesElsewhere:
    """The verbs of `PhasesAhead` on a rank beside the first, which hears of the records from that one."""

    def admit(self, version: int) -> None:
        """The first rank admits."""

    def take(self, step: int) -> list[RolloutRecord]:
        """Not called: `Ranks.first` brings the records."""
        raise RuntimeError(f"phase {step} is taken by the first rank alone")

    def complete_all(self) -> None:
        """The first rank waits."""

    def close(self) -> None:
        """Nothing is open."""


def ages(records: Sequence[RolloutRecord], version: int) -> dict[int, int]:
    """Age in versions -> sampled tokens of that age, for a trainer whose weights are `version`."""
    counts: dict[int, int] = {}
    for record in records:
        for sampled_by, is_sampled in zip(record.weight_version, record.loss_mask):
            if is_sampled:
                counts[version - sampled_by] = counts.get(version - sampled_by, 0) + 1
    return dict(sorted(counts.items()))


def staleness(records: Sequence[RolloutRecord], version: int) -> dict[str, Any]:
    """Ages of the sampled tokens in versions, for weights `version`; tokens that each version sampled."""
    counts = ages(records, version)
    total = sum(counts.values())
    return {
        "age_max": float(max(counts, default=0)),
        "age_mean": sum(age * count for age, count in counts.items()) / total if total else 0.0,
        "tokens_by_version": {str(version - age): count for age, count in counts.items()},
    }
