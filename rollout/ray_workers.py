"""Rollout workers as Ray actors. An actor is a mailbox: one-line methods over a plain RolloutWorker.

    jobs ─ split by group ─► actor 0 ─► batches of finished records ─┐
                        └──► actor 1 ─► …                            ├─► records in job order
    weights ─ one ray.put ─► every actor (digest checked on both sides)

An actor that dies, or that says nothing for `stall_s`, is replaced: its lease is fenced, the new one gets the
current weights first, then exactly those jobs whose records had not arrived, which go on from the token log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from consilience.conf.errors import ConfigError, ConsilienceError, EngineError
from consilience.rollout.engine import EngineState
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, fence, take_lease
from consilience.rollout.phases import Durable
from consilience.rollout.publishing import pack, unpack, verify
from consilience.rollout.ray_cluster import RayCluster, ray_cluster, start_ray, stop_ray, worker_environment
from consilience.rollout.records import RolloutRecord
from consilience.rollout.worker import RolloutWorker

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RayCluster", "RolloutPool", "ray_cluster", "split_by_group", "start_ray", "stop_ray"]

Progress = Callable[[int, int, int], None]
_DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError)
_CLOSE_TIMEOUT_S = 10.0
_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0  # how often a pool that waits looks for workers that say nothing


@dataclass(slots=True)
class _Share:
    """One slot's part of a call: jobs without a record, their stream and its lease, the last sign of life."""

    pending: dict[str, RolloutJob]
    stream: Any = None
    lease: Lease | None = None
    heard_at: float = 0.0


class _Mailbox:
    """The actor. `build` is not the constructor, so that its errors arrive typed."""

    def __init__(self, factory: str, kwargs: Mapping[str, Any]) -> None:
        self._factory, self._kwargs = factory, kwargs
        self._worker: RolloutWorker

    def build(self) -> tuple[str, int]:
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # a stalled worker says where it is
        self._worker = load_factory(self._factory)(**self._kwargs)
        return socket.gethostname(), os.getpid()

    def generate(self, jobs: Sequence[RolloutJob], lease: Lease | None) -> Iterator[list[RolloutRecord]]:
        yield from self._worker.stream(jobs, lease)

    def publish(self, packed: Mapping[str, Any], digest: str, version: int) -> None:
        self._worker.publish(unpack(packed), digest, version)

    def state(self) -> EngineState:
        return self._worker.state()

    def close(self) -> None:
        self._worker.close()


class RolloutPool:
    """`num_workers` processes, each with the RolloutWorker that `factory(**kwargs)` builds in it.

    factory       "import.path:function", imported in the actor from the driver's own tree
    num_threads   cores of one worker (its CPU share in Ray and its OMP threads)
    max_restarts  dead workers that one call replaces before it gives up
    start_timeout_s  how long a worker may wait for its cores and its build; EngineError after that
    stall_s       silence after which a worker counts as dead; it is named in `stalls`, asked for its stacks
                  (in its own error output) and killed. A worker speaks every few seconds, between two steps
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
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}, at least 1")
        load_factory(factory)  # a wrong name is found here, before any process starts
        self._factory, self._kwargs = factory, dict(kwargs or {})
        self._num_threads, self._max_restarts = num_threads, max_restarts
        self._start_timeout_s, self._stall_s = start_timeout_s, stall_s
        self._current: tuple[Any, str, int] | None = None  # (ref of packed weights, digest, version)
        self._actors: list[Any] = []
        self._processes: list[tuple[str, int]] = []  # (host, pid) by slot
        self.num_replaced = 0
        self.stalls: list[str] = []  # one line a worker that was killed for its silence
        try:
            for _ in range(num_workers):
                self._actors.append(self._spawn())
            answers = [actor.build.remote() for actor in self._actors]
            self._processes = [self._get(answer, self._start_timeout_s) for answer in answers]
        except BaseException as error:
            self.close()
            if isinstance(error, _DEATHS):
                raise EngineError(f"a rollout worker died at its start: {_last_line(error)}") from None
            raise

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, by slot."""
        return [pid for _, pid in self._processes]

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
        EngineError when jobs share a uid, or workers die more than `max_restarts` times.
        """
        if len({job.uid for job in jobs}) != len(jobs):
            raise EngineError("two jobs share a uid; uids are unique over a run")
        if durable is not None:
            fence(durable.log_folder)  # whoever still writes there belongs to a driver that is gone
        shares = [_Share({job.uid: job for job in s}) for s in split_by_group(jobs, len(self._actors))]
        for slot in range(len(shares)):
            self._begin(slot, shares[slot], durable)
        records: dict[str, RolloutRecord] = {}
        num_deaths = num_sampled = 0
        while any(share.stream is not None for share in shares):
            slot, batch, death = self._hear(shares)
            if slot is None:
                continue
            share = shares[slot]
            new = [r for r in batch or () if share.pending.pop(r.uid, None) is not None]
            if new and durable is not None:
                durable.keep(new)
            records |= {record.uid: record for record in new}
            num_sampled += sum(record.num_sampled for record in new)
            if death:
                num_deaths += 1
                if num_deaths > self._max_restarts:
                    raise EngineError(
                        f"a rollout worker died, {num_deaths} deaths in one call; last: {death}"
                    )
                self._replace(slot, share.lease)
            if batch is None:  # the stream is over, because all is done or because its worker died
                self._begin(slot, share, durable)
            elif new and on_progress is not None:
                on_progress(len(records), len(jobs), num_sampled)
        return [records[job.uid] for job in jobs]

    def _begin(self, slot: int, share: _Share, durable: Durable | None) -> None:
        """Give a slot's worker the jobs that have no record yet, under a lease of their own."""
        share.stream, share.heard_at = None, time.monotonic()
        if not share.pending:
            return
        if durable is not None:
            power = durable.survives_power
            share.lease = take_lease(durable.log_folder, f"worker {slot}", survives_power=power)
        actor = self._actors[slot]
        remote = actor.generate.options(num_returns="streaming").remote
        share.stream = remote(list(share.pending.values()), share.lease)

    def _hear(self, shares: Sequence[_Share]) -> tuple[int | None, list[RolloutRecord] | None, str]:
        """(slot, its next records, "") of a worker that speaks; (slot, None, why) of one that died or stalls.

        No records and no reason: the stream is over. A slot of None: nobody speaks, all within their time.
        """
        streams = {slot: share.stream for slot, share in enumerate(shares) if share.stream is not None}
        ready, _ = ray.wait(list(streams.values()), num_returns=1, timeout=_LOOK_S)
        now = time.monotonic()
        if ready:
            slot = next(s for s, stream in streams.items() if stream is ready[0])
            shares[slot].heard_at = now
            try:
                return slot, self._next_batch(streams[slot]), ""
            except _DEATHS as death:
                return slot, None, _last_line(death)
        for slot in streams:
            if (silent_s := now - shares[slot].heard_at) > self._stall_s:
                return slot, None, self._stalled(slot, shares[slot], silent_s)
        return None, None, ""

    def _stalled(self, slot: int, share: _Share, silent_s: float) -> str:
        """Note which worker says nothing and what it has, and have it write down where it is."""
        host, pid = self._processes[slot]
        first = next(iter(share.pending))
        line = (
            f"rollout worker {slot} (process {pid} on {host}) said nothing for {silent_s:.0f} s; it has "
            f"{len(share.pending)} unfinished samples, {first} the first"
        )
        self.stalls.append(line)
        _LOG.warning("%s; it is replaced", line)
        if host == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
                time.sleep(_LOOK_S)
                os.kill(pid, signal.SIGKILL)  # Ray asks a process to end, which a stopped one does not hear
        return line

    def publish(self, weights: Mapping[str, Tensor], digest: str, version: int) -> None:
        """Give every worker new weights; returns once all have them.

        WeightsRefused, before anything is sent, if `digest` is not theirs, or from a worker that received
        other bytes (the old weights then stay the ones a replaced worker gets).
        """
        verify(weights, digest)
        current = (ray.put(pack(weights)), digest, version)
        answers = [actor.publish.remote(*current) for actor in self._actors]
        dead = []
        for slot, answer in enumerate(answers):
            try:
                self._get(answer)
            except _DEATHS:
                dead.append(slot)
        self._current = current
        for slot in dead:
            self._replace(slot)

    def states(self) -> list[EngineState]:
        """Each worker's engine counters, by slot."""
        return [self._get(actor.state.remote()) for actor in self._actors]

    def close(self) -> None:
        """Let the workers close their boxes, then end their processes. Safe to call twice."""
        actors, built, self._actors, self._processes = self._actors, self._processes, [], []
        closing = [actor.close.remote() for actor in actors[: len(built)]]
        with contextlib.suppress(*_DEATHS, RayTaskError, GetTimeoutError):
            ray.get(closing, timeout=_CLOSE_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)

    def _spawn(self) -> Any:
        options = {
            "num_cpus": self._num_threads,
            "max_restarts": 0,  # a restarted actor would have no weights; we replace it ourselves
            "runtime_env": {"env_vars": worker_environment(self._num_threads)},
        }
        return ray.remote(_Mailbox).options(**options).remote(self._factory, self._kwargs)

    def _replace(self, slot: int, lease: Lease | None = None) -> None:
        """A fresh worker in `slot`, with the current weights before any job; the old one has no say now.

        One that dies at its start is replaced in turn, `max_restarts` times.
        """
        if lease is not None:
            fence(lease.folder, [lease.epoch])
        for num_left in reversed(range(self._max_restarts + 1)):
            with contextlib.suppress(Exception):  # it is dead already; this only makes sure
                ray.kill(self._actors[slot])
            self.num_replaced += 1
            actor = self._actors[slot] = self._spawn()
            try:
                self._processes[slot] = self._get(actor.build.remote(), self._start_timeout_s)
                if self._current is not None:
                    self._get(actor.publish.remote(*self._current))
                return
            except _DEATHS as death:
                if not num_left:
                    why = f"a replaced rollout worker died at its start: {_last_line(death)}"
                    raise EngineError(why) from None

    def _next_batch(self, stream: Any) -> list[RolloutRecord] | None:
        """The next records of a stream that is ready, None at its end."""
        try:
            return self._get(next(stream))
        except StopIteration:
            return None

    def _get(self, ref: Any, timeout_s: float | None = None) -> Any:
        """ray.get with the worker's own error in place of Ray's wrapping."""
        try:
            return ray.get(ref, timeout=timeout_s)
        except GetTimeoutError:
            wanted, there = self._num_threads, ray.cluster_resources().get("CPU", 0)
            raise EngineError(
                f"a rollout worker of {wanted} cores did not start in {timeout_s:g} s; the cluster has "
                f"{there:g} cores, {ray.available_resources().get('CPU', 0):g} of them free; ask for fewer "
                "workers or more cores"
            ) from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ConsilienceError):
                raise cause from None
            raise EngineError(f"rollout worker failed: {type(cause).__name__}: {cause}") from error


def split_by_group(jobs: Sequence[RolloutJob], num_shares: int) -> list[list[RolloutJob]]:
    """Shares of about equal token budgets; a group stays together, so that its prefill is shared.

    Larger groups are placed first, each with the least loaded share; job order is kept inside a share.
    """
    costs: dict[str, int] = {}
    for job in jobs:
        costs[job.group] = costs.get(job.group, 0) + job.max_tokens
    loads = [0] * num_shares
    share_of: dict[str, int] = {}
    for group in sorted(costs, key=lambda g: -costs[g]):
        share_of[group] = min(range(num_shares), key=lambda s: loads[s])
        loads[share_of[group]] += costs[group]
    shares: list[list[RolloutJob]] = [[] for _ in range(num_shares)]
    for job in jobs:
        shares[share_of[job.group]].append(job)
    return shares


def load_factory(path: str) -> Callable[..., RolloutWorker]:
    """The function that "import.path:function" names. ConfigError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"worker factory {path!r}: {error}; give it as import.path:function") from None


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
