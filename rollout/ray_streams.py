"""`RolloutStreams` over a pool of Ray workers: each has one stream that never ends (`continuous.py`).

A worker that dies, or says nothing for the pool's `stall_s` while it is listened to, is replaced as the pool
does it; the new one gets the current weights, then the jobs without a record, under leases of their own. A
friend of `RolloutPool`: it waits and replaces with the pool's own means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from consilience.conf.errors import EngineError
from consilience.rollout.dispatch import DROPPED, Dispatch, split_by_group
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, ask_to_pause, fence
from consilience.rollout.local_streams import keep
from consilience.rollout.phases import Durable
from consilience.rollout.publishing import Announced
from consilience.rollout.ray_slots import name_of
from consilience.rollout.ray_workers import RolloutPool, _Share

if TYPE_CHECKING:
    from torch import Tensor

_END_TIMEOUT_S = 10.0


class RayStreams:
    """Takes the pool until it is closed; the pool must be continuous. Use it as a context manager.

    recompute  running requests compute their state again when weights arrive; else they keep it
    """

    def __init__(self, pool: RolloutPool, *, recompute: bool = False) -> None:
        self._pool, self._recompute = pool, recompute
        self._slots = [_Share() for _ in pool._workers.actors]
        self._dispatch = Dispatch([], len(pool._workers.actors), pool._most_redispatches)
        self._leases: list[list[Lease]] = [[] for _ in pool._workers.actors]
        self._served: list[Any] = [None] * len(pool._workers.actors)  # the actor whose stream a slot has
        self._durable_of: dict[str, Durable] = {}
        self._num_deaths = 0  # since weights were published last
        self._attach()

    def __enter__(self) -> RayStreams:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        limit_s = _END_TIMEOUT_S
        if kind is not None and not issubclass(kind, Exception) and self._pool.pause_s:  # interrupted
            ask_to_pause(lease for leases in self._leases for lease in leases)
            limit_s += self._pool.pause_s
        for actor, share in zip(self._served, self._slots):
            with suppress(Exception):  # a dead worker has ended too
                ray.get(actor.end.options(concurrency_group="post").remote(), timeout=_END_TIMEOUT_S)
                while ray.wait([share.stream], timeout=limit_s)[0]:
                    ray.get(next(share.stream), timeout=_END_TIMEOUT_S)

    def hand_over(self, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        """See `RolloutStreams.hand_over`. Groups stay together."""
        durable.fence()
        self._durable_of |= dict.fromkeys((job.uid for job in jobs), durable)
        for slot, share in enumerate(split_by_group(jobs, len(self._slots))):
            self._dispatch.add(slot, share)
            self._give(slot, share, durable)

    def hear(self) -> None:
        """See `RolloutStreams.hear`. EngineError: too many deaths since weights were published last."""
        for share in self._slots:
            share.heard_at = time.monotonic()  # nobody listened before, so nobody was silent
        slot = None
        while slot is None:
            slot, batch, death = self._pool._hear(self._slots, self._dispatch)
        if batch is not None:
            new, stalls = self._dispatch.take(slot, batch)
            keep(new, self._durable_of)
            for stall in stalls:
                self._pool._note(replace(stall, actor=name_of(slot)), self._dispatch, slot)
            if stalls:  # with the threads that never came back
                self._pool._replace(slot)
        elif death:
            self._num_deaths += 1
            if self._num_deaths > self._pool._max_restarts:
                raise EngineError(
                    f"a rollout worker died, {self._num_deaths} deaths in one step; last: {death}"
                )
            self._pool._replace(slot)
        else:
            raise EngineError(f"the stream of rollout worker {slot} ended by itself")
        self._attach()
        self._keep_dropped()

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutStreams.publish` and `RolloutPool.publish`."""
        self._pool.publish(weights, announced, version)
        self._num_deaths = 0
        self._attach()

    def _attach(self) -> None:
        """A stream for every worker that has none, with the jobs that its slot had."""
        for slot, actor in enumerate(self._pool._workers.actors):
            if actor is self._served[slot]:
                continue
            for lease in self._leases[slot]:  # the one before has no say from here on
                if lease.folder.exists():
                    fence(lease.folder, [lease.epoch])
            self._leases[slot].clear()
            try:
                self._pool._workers.answer(slot, "open", actor.open.remote(self._recompute))
            except RayActorError as death:
                raise EngineError(f"rollout worker {slot} died before it had a stream: {death}") from None
            self._slots[slot].stream = actor.serve.options(num_returns="streaming").remote()
            self._served[slot] = actor
            pending = self._dispatch.next_jobs(slot)
            phases = {id(durable): durable for durable in (self._durable_of[job.uid] for job in pending)}
            for durable in phases.values():
                self._give(slot, [j for j in pending if self._durable_of[j.uid] is durable], durable)

    def _keep_dropped(self) -> None:
        """Records of samples that were given up, with their groups; the call never returns them."""
        for slot in range(len(self._slots)):
            self._dispatch.next_jobs(slot)
        dropped = [record for record in self._dispatch.records.values() if DROPPED in record.metadata]
        keep(dropped, self._durable_of)
        self._dispatch.records.clear()

    def _give(self, slot: int, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        if not jobs:
            return
        lease = durable.take_lease(f"worker {slot}")
        self._leases[slot] = [held for held in self._leases[slot] if held.folder.exists()] + [lease]
        self._served[slot].hand_over.options(concurrency_group="post").remote(list(jobs), lease)
