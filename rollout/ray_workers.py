"""Rollout workers as Ray actors. An actor is a mailbox: one-line methods over a plain RolloutWorker.

    jobs ─ split by group ─► actor 0 ─► batches of finished records ─┐
                        └──► actor 1 ─► …                            ├─► records in job order
    weights ─ one ray.put ─► every actor (digest checked on both sides)

An actor that dies is replaced: the new one gets the current weights first, then exactly those jobs whose
records had not arrived. Seeds are part of a job, so the same weights sample the same tokens again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from consilience.conf.errors import ConfigError, ConsilienceError, EngineError
from consilience.rollout.engine import EngineState
from consilience.rollout.jobs import RolloutJob
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


class _Mailbox:
    """The actor. `build` is not the constructor, so that its errors arrive typed."""

    def __init__(self, factory: str, kwargs: Mapping[str, Any]) -> None:
        self._factory, self._kwargs = factory, kwargs
        self._worker: RolloutWorker

    def build(self) -> int:
        self._worker = load_factory(self._factory)(**self._kwargs)
        return os.getpid()

    def generate(self, jobs: Sequence[RolloutJob]) -> Iterator[list[RolloutRecord]]:
        yield from self._worker.stream(jobs)

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
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}, at least 1")
        load_factory(factory)  # a wrong name is found here, before any process starts
        self._factory, self._kwargs = factory, dict(kwargs or {})
        self._num_threads, self._max_restarts = num_threads, max_restarts
        self._start_timeout_s = start_timeout_s
        self._current: tuple[Any, str, int] | None = None  # (ref of packed weights, digest, version)
        self._actors: list[Any] = []
        self._pids: list[int] = []
        self.num_replaced = 0
        try:
            for _ in range(num_workers):
                self._actors.append(self._spawn())
            answers = [actor.build.remote() for actor in self._actors]
            self._pids = [self._get(answer, self._start_timeout_s) for answer in answers]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, by slot."""
        return list(self._pids)

    def generate(
        self, jobs: Sequence[RolloutJob], on_progress: Progress | None = None
    ) -> list[RolloutRecord]:
        """One record per job, in job order, whatever worker made it and however often one died.

        `on_progress(num_done, num_jobs, num_sampled_tokens)` is called as records arrive.
        EngineError when jobs share a uid, or workers die more than `max_restarts` times.
        """
        if len({job.uid for job in jobs}) != len(jobs):
            raise EngineError("two jobs share a uid; uids are unique over a run")
        shares = split_by_group(jobs, len(self._actors))
        pending = [{job.uid: job for job in share} for share in shares]
        streams = {slot: self._stream(slot, share) for slot, share in enumerate(shares) if share}
        records: dict[str, RolloutRecord] = {}
        num_deaths = num_sampled = 0
        while streams:
            ready, _ = ray.wait(list(streams.values()), num_returns=1)
            slot = next(s for s, stream in streams.items() if stream is ready[0])
            try:
                batch = self._next_batch(streams[slot])
            except _DEATHS as death:
                num_deaths += 1
                if num_deaths > self._max_restarts:
                    raise EngineError(
                        f"a rollout worker died, {num_deaths} deaths in one call; last: {_last_line(death)}"
                    ) from None
                self._replace(slot)
                batch = None
            for record in batch or ():
                if pending[slot].pop(record.uid, None) is not None:
                    records[record.uid] = record
                    num_sampled += record.num_sampled
            if batch is None:  # the stream is over, because all is done or because its worker died
                del streams[slot]
                if pending[slot]:
                    streams[slot] = self._stream(slot, list(pending[slot].values()))
            elif on_progress is not None:
                on_progress(len(records), len(jobs), num_sampled)
        return [records[job.uid] for job in jobs]

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
        actors, pids, self._actors, self._pids = self._actors, self._pids, [], []
        closing = [actor.close.remote() for actor in actors[: len(pids)]]  # those that were built
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

    def _replace(self, slot: int) -> None:
        """A fresh worker in `slot`, with the current weights before any job."""
        with contextlib.suppress(Exception):  # it is dead already; this only makes sure
            ray.kill(self._actors[slot])
        self.num_replaced += 1
        actor = self._actors[slot] = self._spawn()
        try:
            self._pids[slot] = self._get(actor.build.remote(), self._start_timeout_s)
            if self._current is not None:
                self._get(actor.publish.remote(*self._current))
        except _DEATHS as death:
            raise EngineError(f"a replaced rollout worker died at its start: {_last_line(death)}") from None

    def _stream(self, slot: int, jobs: Sequence[RolloutJob]) -> Any:
        return self._actors[slot].generate.options(num_returns="streaming").remote(jobs)

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
