"""Rollout workers as Ray actors. An actor is a mailbox: one-line methods over a plain RolloutWorker.

    jobs ─ split by group ─► actor 0 ─► batches of finished records ─┐
                        └──► actor 1 ─► …                            ├─► records in job order
    weights ─ shared memory, object store or broadcast ─► every actor (each tensor's digest checked there)

An actor that dies, or that says nothing for `stall_s`, is replaced: its lease is fenced, the new one gets the
current weights first, then exactly those jobs whose records had not arrived, which go on from the token log.
So is one whose threads stalled, once its stream is over. What a sample is allowed, `dispatch.py` says.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import GetTimeoutError

from consilience.conf.errors import ConfigError, ConsilienceError, EngineError
from consilience.rollout.deadlines import Stall, StallLog
from consilience.rollout.dispatch import Dispatch, split_by_group
from consilience.rollout.engine import EngineState
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, ask_to_pause
from consilience.rollout.listening import Listener, Share, WorkerDied
from consilience.rollout.phases import Durable
from consilience.rollout.proof import Evidence
from consilience.rollout.publishing import Announced, Publication, announce, verify
from consilience.rollout.ray_cluster import RayCluster, ray_cluster, start_ray, stop_ray
from consilience.rollout.ray_placement import Seat
from consilience.rollout.ray_slots import DEATHS, SilentWorker, WorkerSlots, get, last_line, name_of
from consilience.rollout.ray_transport import Shipment, choose_transport
from consilience.rollout.records import RolloutRecord
from consilience.rollout.weight_broadcast import BroadcastBroken

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RayCluster", "RolloutPool", "ray_cluster", "split_by_group", "start_ray", "stop_ray"]

Progress = Callable[[int, int, int], None]
_LEAST_S = 1.0  # what a worker has for its answer where the others took all the time


class RolloutPool:
    """`num_workers` processes, each with the RolloutWorker that `factory(**kwargs)` builds in it.

    factory       "import.path:function", imported in the actor from the driver's own tree
    num_threads   cores of one worker (its CPU share in Ray and its OMP threads)
    max_restarts  dead workers that one call replaces before it gives up
    start_timeout_s  how long a worker may wait for its cores and its build; EngineError after that
    stall_s       silence after which a worker counts as dead; it is noted in `stalls`, asked for its stacks
                  and killed. A worker speaks every few seconds, between two steps
    publish_limit_s  how long a worker may take over new weights or a question, before the same happens
    pause_s       how long an interrupted call waits for its workers to save their streams; 0: not at all
    most_redispatches  how often a sample is given out again (`dispatch.py`)
    is_continuous workers can be told things while they sample (`ray_streams.py`)
    transport     how weights reach the workers, see `ray_transport.choose_transport`
    python        interpreter of the workers, see `ray_cluster.worker_runtime`
    stalls        where stalls are noted; their stacks go to a folder beside its file
    seats         a reserved place for each worker, its successors too; empty: where Ray finds `num_threads`
                  cores and `num_gpus` GPUs
    ConfigError on a factory that cannot be named or loaded; whatever the factory raises arrives typed.
    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        num_workers: int,
        factory: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_threads: int = 1,
        max_restarts: int = 3,
        start_timeout_s: float = 300.0,
        stall_s: float = 900.0,
        publish_limit_s: float = 600.0,
        pause_s: float = 8.0,
        most_redispatches: int = 2,
        is_continuous: bool = False,
        transport: str = "auto",
        python: str | None = None,
        stalls: StallLog | None = None,
        seats: Sequence[Seat] = (),
        num_gpus: float = 0.0,
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}, at least 1")
        self.stall_log = stalls if stalls is not None else StallLog()
        self._max_restarts, self._most_redispatches = max_restarts, most_redispatches
        self._publish_limit_s, self.pause_s = publish_limit_s, pause_s
        self._post = {"concurrency_group": "post"} if is_continuous else {}
        self._current: tuple[Shipment, Publication] | None = None
        self._workers = WorkerSlots(  # a wrong name is found here, before any process starts
            factory,
            kwargs or {},
            num_threads=num_threads,
            max_restarts=max_restarts,
            start_timeout_s=start_timeout_s,
            answer_limit_s=publish_limit_s,
            is_continuous=is_continuous,
            python=python,
            stalls=self.stall_log,
            seats=seats,
            num_gpus=num_gpus,
        )
        self._listener = Listener(self._workers, self.stall_log, stall_s)
        try:
            self._workers.start(num_workers)
            hosts = [place.host for place in self._workers.places]
            limited = lambda answer: get(answer, publish_limit_s)
            self._transport = choose_transport(transport, self._workers.actors, hosts, limited, self._post)
        except BaseException as error:
            self.close()
            if isinstance(error, DEATHS):
                raise EngineError(f"a rollout worker died at its start: {last_line(error)}") from None
            if isinstance(error, GetTimeoutError):
                raise EngineError(
                    f"a rollout worker started and gave no answer for {publish_limit_s:g} s"
                ) from None
            raise

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, by slot."""
        return [place.pid for place in self._workers.places]

    @property
    def nodes(self) -> list[str]:
        """Ray's ids of the machines that the workers are on, by slot."""
        return [place.node for place in self._workers.places]

    @property
    def num_replaced(self) -> int:
        """Workers that were replaced so far."""
        return self._workers.num_replaced

    @property
    def stalls(self) -> list[Stall]:
        """What was over its limit so far."""
        return self.stall_log.stalls

    def generate(
        self,
        jobs: Sequence[RolloutJob],
        on_progress: Progress | None = None,
        *,
        durable: Durable | None = None,
    ) -> list[RolloutRecord]:
        """One record per job, in job order, whatever worker made it and however often one died.

        `on_progress(num_done, num_jobs, num_sampled_tokens)` is called as records arrive. With `durable`,
        jobs that an earlier worker began go on from its log, and records are handed to `keep` as they arrive.
        The record of a dropped sample says so in its metadata and is not handed to `keep`: a call that is
        made again tries it again.
        EngineError when jobs share a uid, workers die more than `max_restarts` times, or all were dropped.
        """
        dispatch = Dispatch(jobs, len(self._workers.actors), self._most_redispatches)
        if durable is not None:
            durable.fence()
        shares = [Share() for _ in self._workers.actors]
        for slot in range(len(shares)):
            self._begin(slot, shares[slot], dispatch, durable)
        try:
            return self._listen(shares, dispatch, durable, on_progress)
        except BaseException as error:
            if durable is not None and not isinstance(error, Exception):
                self._pause(shares, dispatch, durable)
            raise

    def _listen(
        self,
        shares: Sequence[Share],
        dispatch: Dispatch,
        durable: Durable | None,
        on_progress: Progress | None,
    ) -> list[RolloutRecord]:
        """Take what the workers say until every job has its record."""
        num_deaths = num_sampled = 0
        num_jobs = len(dispatch.records) + sum(map(len, dispatch.pending))
        while any(share.stream is not None for share in shares):
            num_dropped = dispatch.num_dropped
            slot, batch, death = self._listener.hear(shares, dispatch)
            if slot is None:
                continue
            share = shares[slot]
            new, stalls = dispatch.take(slot, batch or ())
            if new and durable is not None:
                durable.keep(new)
            for stall in stalls:
                share.has_stalled = True
                self._listener.note(replace(stall, actor=name_of(slot)), dispatch, slot)
            num_sampled += sum(record.num_sampled for record in new)
            if death:
                num_deaths = 0 if dispatch.num_dropped > num_dropped else num_deaths + 1
                if num_deaths > self._max_restarts:
                    raise EngineError(
                        f"a rollout worker died, {num_deaths} deaths in one call; last: {death}"
                    )
                self._replace(slot, share.lease)
            elif batch is None and share.has_stalled:  # with the threads that never came back
                self._replace(slot, share.lease)
            if batch is None:  # the stream is over, because all is done or because its worker died
                self._begin(slot, share, dispatch, durable)
            elif new and on_progress is not None:
                on_progress(len(dispatch.records), num_jobs, num_sampled)
        return dispatch.in_order()

    def _pause(self, shares: Sequence[Share], dispatch: Dispatch, durable: Durable) -> None:
        """The call was interrupted: its workers save their streams, records that are final are kept."""
        if not self.pause_s:
            return
        ask_to_pause(share.lease for share in shares if share.stream is not None and share.lease is not None)
        until = time.monotonic() + self.pause_s + _LEAST_S
        streams = {slot: share.stream for slot, share in enumerate(shares) if share.stream is not None}
        while streams and (left_s := until - time.monotonic()) > 0:
            for slot in self._workers.ready(streams, left_s):
                batch = None
                with contextlib.suppress(ConsilienceError, WorkerDied, TimeoutError):
                    batch = self._workers.read(streams[slot], _LEAST_S)
                if batch is None:
                    del streams[slot]
                else:
                    durable.keep(dispatch.take(slot, batch)[0])

    def _begin(self, slot: int, share: Share, dispatch: Dispatch, durable: Durable | None) -> None:
        """Give a slot's worker the jobs that have no record yet, under a lease of their own."""
        share.begin(None)
        jobs = dispatch.next_jobs(slot)
        if not jobs:
            return
        if durable is not None:
            share.lease = durable.take_lease(f"worker {slot}")
        actor = self._workers.actors[slot]
        share.begin(actor.generate.options(num_returns="streaming").remote(jobs, share.lease))

    @property
    def transport(self) -> str:
        """What carries the weights: "shared_memory", "object_store" or "broadcast"."""
        return self._transport.name

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """Give every worker new weights; returns once all have verified and loaded them.

        WeightsRefused from a worker that received other bytes than were announced, or, before anything is
        sent, if a bare digest is not theirs (the old weights then stay the ones a replaced worker gets).
        """
        if isinstance(announced, Publication):
            publication = announced
        else:
            verify(weights, announced)
            publication = announce(weights, version)
        shipment = self._transport.ship(weights, publication, self._workers.actors)
        answers = [
            actor.publish.options(**self._post).remote(shipment.payload, publication)
            for actor in self._workers.actors
        ]
        with contextlib.suppress(BroadcastBroken):  # the workers' own answers say so too
            shipment.send()
        deadline = time.monotonic() + self._publish_limit_s
        dead, late = [], []
        for slot, answer in enumerate(answers):
            try:
                get(answer, max(_LEAST_S, deadline - time.monotonic()))
            except BroadcastBroken:
                late.append(slot)
            except DEATHS:
                dead.append(slot)
            except GetTimeoutError:
                self.stall_log.add(
                    self._workers.end_process(slot, "publish", self._publish_limit_s, self._publish_limit_s)
                )
                dead.append(slot)
        self._current = (shipment, publication)
        for slot in dead:
            self._replace(slot)
        for slot in late:
            try:
                self._catch_up(slot)
            except (*DEATHS, SilentWorker):
                self._replace(slot)

    def _catch_up(self, slot: int) -> None:
        """Give the worker in `slot` the current weights, if there are any, by themselves."""
        if self._current is None:
            return
        shipment, publication = self._current
        payload = shipment.again(self._workers.places[slot].host)
        answer = self._workers.actors[slot].publish.options(**self._post).remote(payload, publication)
        self._workers.answer(slot, "publish", answer)

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> dict[str, Evidence]:
        """What each worker holds and computes (`proof.py`), by its name."""
        found = self._ask("evidence", lambda actor: actor.evidence.remote(prompts, exact))
        names = [
            f"rollout worker {i} (process {p.pid} on {p.host})" for i, p in enumerate(self._workers.places)
        ]
        return dict(zip(names, found))

    def sleep(self, level: int = 1) -> None:
        """Let every worker give memory back until `wake`; EngineError where an engine cannot."""
        self._ask("sleep", lambda actor: actor.sleep.remote(level))

    def wake(self) -> None:
        """Undo `sleep`."""
        self._ask("wake", lambda actor: actor.wake.remote())

    def states(self) -> list[EngineState]:
        """Each worker's engine counters, by slot. EngineError from one that does not answer."""
        return self._ask("state", lambda actor: actor.state.remote())

    def _ask(self, stage: str, ask: Callable[[Any], Any]) -> list[Any]:
        """What each worker answers, by slot; one that is dead is replaced, and its successor asked."""
        answers = [ask(actor) for actor in self._workers.actors]
        return [self._answer_of(slot, stage, ask, answer) for slot, answer in enumerate(answers)]

    def _answer_of(self, slot: int, stage: str, ask: Callable[[Any], Any], answer: Any) -> Any:
        for num_left in reversed(range(self._max_restarts + 1)):
            try:
                return self._workers.answer(slot, stage, answer)
            except DEATHS as death:
                if not num_left:
                    why = f"rollout worker {slot} died again and again over '{stage}': {last_line(death)}"
                    raise EngineError(why) from None
                self._replace(slot)
                answer = ask(self._workers.actors[slot])

    def close(self) -> None:
        """Let the workers close their boxes, then end their processes. Safe to call twice."""
        self._workers.close()

    def _replace(self, slot: int, lease: Lease | None = None) -> None:
        """A fresh worker in `slot`, with the current weights before any job; the old one has no say now."""
        self._workers.replace(slot, self._catch_up, lease)
