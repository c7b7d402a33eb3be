"""Workers that sleep between two phases, so that a trainer on the same device has their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Durable, Sampler
from consilience.rollout.publishing import Announced
from consilience.rollout.records import RolloutRecord

if TYPE_CHECKING:
    from torch import Tensor


class SleepyPool(Sampler, Protocol):
    """A `Sampler` whose workers can sleep (`ray_workers.RolloutPool`)."""

    def sleep(self, level: int = 1) -> None: ...

    def wake(self) -> None: ...


class SleepingSampler:
    """A `Sampler` over a pool that sleeps at `level` from the end of a phase to the next publication.

    Errors are the pool's. A phase begins awake, whoever asks for it.
    """

    def __init__(self, pool: SleepyPool, level: int) -> None:
        self.pool, self.level = pool, level
        self._is_asleep = False

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        self._wake()
        self.pool.publish(weights, announced, version)

    def generate(
        self, jobs: Sequence[RolloutJob], on_progress: Any = None, *, durable: Durable | None = None
    ) -> list[RolloutRecord]:
        self._wake()
        records = self.pool.generate(jobs, on_progress, durable=durable)
        self.pool.sleep(self.level)
        self._is_asleep = True
        return records

    def _wake(self) -> None:
        if self._is_asleep:
            self.pool.wake()
            self._is_asleep = False
