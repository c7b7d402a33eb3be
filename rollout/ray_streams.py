"""`pooled_streams.StreamPool` over a pool of Ray workers; a friend of `RolloutPool`, whose means it uses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError

from consilience.conf.errors import EngineError
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease
from consilience.rollout.listening import Listener, WorkerDied
from consilience.rollout.pooled_streams import PooledStreams
from consilience.rollout.publishing import Announced
from consilience.rollout.ray_slots import DEATHS, get, last_line
from consilience.rollout.ray_workers import RolloutPool

if TYPE_CHECKING:
    from torch import Tensor

_END_S = 10.0
_POST = {"concurrency_group": "post"}


def ray_streams(pool: RolloutPool, *, recompute: bool = False) -> PooledStreams:
    """Takes the pool, which must be continuous, until it is closed. See `PooledStreams`."""
    return PooledStreams(_Continuous(pool), recompute=recompute)


class _Continuous:
    def __init__(self, pool: RolloutPool) -> None:
        self._pool, self._workers = pool, pool._workers
        self.max_restarts, self.most_redispatches = pool._max_restarts, pool._most_redispatches
        self.pause_s = pool.pause_s

    @property
    def listener(self) -> Listener:
        return self._pool._listener

    @property
    def processes(self) -> Sequence[Any]:
        return self._workers.actors

    def open(self, slot: int, recompute: bool) -> Any:
        """See `StreamPool.open`; a worker that does not answer is ended, noted, and dead."""
        actor, limit_s = self._workers.actors[slot], self._pool._publish_limit_s
        try:
            get(actor.open.remote(recompute), limit_s)
        except DEATHS as death:
            raise WorkerDied(last_line(death)) from None
        except GetTimeoutError:
            stall = self._workers.end_process(slot, "open", limit_s, limit_s)
            self._pool.stall_log.add(stall)
            raise WorkerDied(str(stall)) from None
        return actor.serve.options(num_returns="streaming").remote()

    def post(self, slot: int, jobs: Sequence[RolloutJob], lease: Lease) -> None:
        self._workers.actors[slot].hand_over.options(**_POST).remote(list(jobs), lease)

    def replace(self, slot: int) -> None:
        self._pool._replace(slot)

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        self._pool.publish(weights, announced, version)

    def end(self, streams: Mapping[int, Any], more_s: float = 0.0) -> None:
        """See `StreamPool.end`: all are told first, so the time is that of one."""
        told = [self._workers.actors[slot].end.options(**_POST).remote() for slot in streams]
        with suppress(Exception):  # a dead worker has ended too
            ray.wait(told, num_returns=len(told), timeout=_END_S)
        until = time.monotonic() + _END_S + more_s
        for slot, stream in streams.items():
            with suppress(WorkerDied, TimeoutError, EngineError):
                while time.monotonic() < until and self._workers.ready({slot: stream}, _END_S + more_s):
                    if self._workers.read(stream, _END_S) is None:
                        break
