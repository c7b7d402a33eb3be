"""`RolloutStreams` over processes that each have a stream without an end (`continuous.py`). No Ray here.

A worker that dies, or says nothing for the pool's `stall_s` while it is listened to, is replaced as the pool
does it; the new one gets the current weights, then the jobs without a record, under leases of their own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import Stall
from consilience.rollout.dispatch import DROPPED, Dispatch, split_by_group
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, ask_to_pause, fence
from consilience.rollout.listening import Listener, Share, WorkerDied
from consilience.rollout.local_streams import keep
from consilience.rollout.phases import Durable
from consilience.rollout.publishing import Announced

if TYPE_CHECKING:
    from torch import Tensor


class StreamPool(Protocol):
    """Workers that can be told things while they sample (`ray_workers.RolloutPool` with is_continuous).

    max_restarts      deaths between two publications before it gives up
    most_redispatches how often a sample is given out again (`dispatch.py`)
    pause_s           what an interrupted call gives its workers to save their streams; 0: nothing
    """

    max_restarts: int
    most_redispatches: int
    pause_s: float

    @property
    def listener(self) -> Listener: ...

    @property
    def processes(self) -> Sequence[Any]:
        """What is in each slot now; another object once it was replaced."""
        ...

    def open(self, slot: int, recompute: bool) -> Any:
        """The stream of the slot's worker, which has none. WorkerDied; EngineError if it does not answer."""
        ...

    def post(self, slot: int, jobs: Sequence[RolloutJob], lease: Lease) -> None:
        """Send jobs; what becomes of them, the stream says."""
        ...

    def replace(self, slot: int) -> None:
        """A fresh process in the slot, with the current weights. EngineError where none lives."""
        ...

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None: ...

    def end(self, streams: Mapping[int, Any], more_s: float = 0.0) -> None:
        """Let streams come to an end, and hear none of them any more; raises nothing, in limited time.

        more_s  what they have beyond the usual
        """
        ...


class PooledStreams:
    """Takes the pool until it is closed. Use it as a context manager.

    recompute  running requests compute their state again when weights arrive; else they keep it
    """

    def __init__(self, pool: StreamPool, *, recompute: bool = False) -> None:
        self._pool, self._recompute = pool, recompute
        self._shares = [Share() for _ in pool.processes]
        self._dispatch = Dispatch([], len(self._shares), pool.most_redispatches)
        self._leases: list[list[Lease]] = [[] for _ in self._shares]
        self._served: list[Any] = [None for _ in self._shares]  # the process whose stream a slot has
        self._durable_of: dict[str, Durable] = {}
        self._num_deaths = 0  # since weights were published last, or samples were given up for them
        self._left_at = time.monotonic()  # when nobody listened any more
        self._attach()

    def __enter__(self) -> PooledStreams:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        more_s = 0.0
        if kind is not None and not issubclass(kind, Exception) and self._pool.pause_s:  # interrupted
            ask_to_pause(lease for leases in self._leases for lease in leases)
            more_s = self._pool.pause_s
        now = self._pool.processes
        streams = {s: share.stream for s, share in enumerate(self._shares) if self._served[s] is now[s]}
        self._pool.end(streams, more_s)

    def hand_over(self, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        """See `RolloutStreams.hand_over`. Groups stay together."""
        durable.fence()
        self._durable_of |= dict.fromkeys((job.uid for job in jobs), durable)
        for slot, share in enumerate(split_by_group(jobs, len(self._shares))):
            self._dispatch.add(slot, share)
            self._give(slot, share, durable)

    def hear(self) -> None:
        """See `RolloutStreams.hear`. EngineError: too many deaths since weights were published last."""
        now = time.monotonic()
        for share in self._shares:  # nobody listened meanwhile, so nobody was silent
            share.heard_at = min(now, share.heard_at + now - self._left_at)
        try:
            self._hear_one()
        finally:
            self._left_at = time.monotonic()
        self._attach()
        self._keep_dropped()

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutStreams.publish` and `StreamPool.publish`."""
        self._pool.publish(weights, announced, version)
        self._num_deaths = 0
        self._attach()

    def _hear_one(self) -> None:
        num_dropped, slot = self._dispatch.num_dropped, None
        batch: list | None = None
        death = ""
        while slot is None:
            slot, batch, death = self._pool.listener.hear(self._shares, self._dispatch)
        if batch is not None:
            new, stalls = self._dispatch.take(slot, batch)
            keep(new, self._durable_of)
            self._note(slot, stalls)
        elif not death:
            raise EngineError(f"the stream of rollout worker {slot} ended by itself")
        else:
            is_mended = self._dispatch.num_dropped > num_dropped  # who killed it is given up
            self._died(death, is_mended)
            self._pool.replace(slot)

    def _note(self, slot: int, stalls: Sequence[Stall]) -> None:
        """Stalls of a worker's threads; it is replaced with those that never came back."""
        for stall in stalls:
            self._pool.listener.note(replace(stall, actor=f"rollout worker {slot}"), self._dispatch, slot)
        if stalls:
            self._pool.replace(slot)

    def _died(self, death: str, is_mended: bool = False) -> None:
        self._num_deaths = 0 if is_mended else self._num_deaths + 1
        if self._num_deaths > self._pool.max_restarts:
            raise EngineError(f"a rollout worker died, {self._num_deaths} deaths in one step; last: {death}")

    def _attach(self) -> None:
        """A stream for every worker that has none, with the jobs that its slot had."""
        for slot, share in enumerate(self._shares):
            while self._pool.processes[slot] is not self._served[slot]:
                for lease in self._leases[slot]:  # the one before has no say from here on
                    if lease.folder.exists():
                        fence(lease.folder, [lease.epoch])
                self._leases[slot].clear()
                process = self._pool.processes[slot]
                try:
                    share.begin(self._pool.open(slot, self._recompute))
                except WorkerDied as death:
                    self._died(f"{death}, before it had a stream")
                    self._pool.replace(slot)
                    continue
                self._served[slot] = process
                self._give_pending(slot)

    def _give_pending(self, slot: int) -> None:
        pending = self._dispatch.next_jobs(slot)
        phases = {id(durable): durable for durable in (self._durable_of[job.uid] for job in pending)}
        for durable in phases.values():
            self._give(slot, [j for j in pending if self._durable_of[j.uid] is durable], durable)

    def _keep_dropped(self) -> None:
        """Records of samples that were given up, with their groups; the call never returns them."""
        for slot in range(len(self._shares)):
            self._dispatch.next_jobs(slot)
        dropped = [record for record in self._dispatch.records.values() if DROPPED in record.metadata]
        keep(dropped, self._durable_of)
        self._dispatch.records.clear()

    def _give(self, slot: int, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        if not jobs:
            return
        lease = durable.take_lease(f"worker {slot}")
        self._leases[slot] = [held for held in self._leases[slot] if held.folder.exists()] + [lease]
        self._pool.post(slot, jobs, lease)
