"""The processes behind a pool of rollout workers, a slot each: begun, asked, ended, replaced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from consilience.conf.errors import ConsilienceError, EngineError
from consilience.rollout.deadlines import REPLACED, Stall, StallLog
from consilience.rollout.lease import Lease, fence
from consilience.rollout.listening import WorkerDied
from consilience.rollout.ray_cluster import worker_runtime
from consilience.rollout.ray_mailbox import Mailbox, Place, end_process, is_running_here, load_factory
from consilience.rollout.ray_placement import Seat
from consilience.rollout.records import RolloutRecord

DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError)
_KILL_S = 2.0
_CLOSE_TIMEOUT_S = 10.0


class SilentWorker(EngineError):
    """A worker did not answer in time, and was ended."""


class WorkerSlots:
    """`actors[slot]` and `places[slot]`, its process. Arguments are those of `RolloutPool`.

    answer_limit_s  how long `answer` waits
    ConfigError on a factory that cannot be named or loaded, before any process starts.
    """

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, Any],
        *,
        num_threads: int,
        max_restarts: int,
        start_timeout_s: float,
        answer_limit_s: float,
        is_continuous: bool,
        python: str | None,
        stalls: StallLog,
        seats: Sequence[Seat] = (),
        num_gpus: float = 0.0,
    ) -> None:
        load_factory(factory)
        self._factory, self._kwargs = factory, dict(kwargs)
        self._num_threads, self._max_restarts = num_threads, max_restarts
        self._start_timeout_s, self._answer_limit_s = start_timeout_s, answer_limit_s
        self._groups: dict[str, Any] = {"concurrency_groups": {"post": 1}} if is_continuous else {}
        self._python, self._stall_log = python, stalls
        self._seats, self._num_gpus = seats, num_gpus
        self.actors: list[Any] = []
        self.places: list[Place] = []
        self.num_replaced = 0

    def start(self, num: int) -> None:
        """Fill `num` slots, all at once. EngineError from one without cores; after any error, `close`."""
        for slot in range(num):
            self.actors.append(self._spawn(slot))
        answers = [actor.build.remote(self._stacks) for actor in self.actors]
        self.places = [self._built(answer) for answer in answers]

    def answer(self, slot: int, stage: str, ref: Any) -> Any:
        """What a worker says within `answer_limit_s`. SilentWorker, and its end, if it says nothing."""
        try:
            return get(ref, self._answer_limit_s)
        except GetTimeoutError:
            stall = self.end_process(slot, stage, self._answer_limit_s, self._answer_limit_s)
            self._stall_log.add(stall)
            raise SilentWorker(str(stall)) from None

    def end_process(
        self, slot: int, stage: str, waited_s: float, limit_s: float, uids: tuple[str, ...] = ()
    ) -> Stall:
        """Stacks and end of a worker's process; the stall it is, not noted yet."""
        place = self.places[slot]
        end_process(place)
        return Stall(
            stage,
            round(waited_s, 3),
            limit_s,
            name_of(slot),
            uids,
            REPLACED,
            place.host,
            place.pid,
            place.stacks,
        )

    def ready(self, streams: Mapping[int, Any], limit_s: float) -> list[int]:
        """See `Processes.ready`."""
        waiting = list(streams.values())
        ready = ray.wait(waiting, num_returns=1, timeout=limit_s)[0]
        if ready and len(waiting) > 1:  # all that are, so that none speaks for the others
            ready = ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] or ready
        return [slot for slot, stream in streams.items() if any(stream is one for one in ready)]

    def read(self, stream: Any, limit_s: float) -> list[RolloutRecord] | None:
        """See `Processes.read`."""
        try:
            return get(next(stream), limit_s)
        except StopIteration:
            return None
        except GetTimeoutError:
            raise TimeoutError from None
        except DEATHS as death:
            raise WorkerDied(last_line(death)) from None

    def died(self, slot: int, waited_s: float, uids: tuple[str, ...]) -> Stall:
        """See `Processes.died`."""
        place = self.places[slot]
        return Stall("death", waited_s, 0.0, name_of(slot), uids, REPLACED, place.host, place.pid)

    def replace(self, slot: int, welcome: Callable[[int], None], lease: Lease | None = None) -> None:
        """A fresh worker in `slot`, which `welcome` gives what it needs; the old one has no say now.

        One that dies at its start, or is silent there, is replaced in turn, `max_restarts` times.
        """
        if lease is not None:
            fence(lease.folder, [lease.epoch])
        end_process(self.places[slot], has_stacks=False)
        for num_left in reversed(range(self._max_restarts + 1)):
            with contextlib.suppress(Exception):  # it is dead already; this only makes sure
                ray.kill(self.actors[slot])
            self.num_replaced += 1
            actor = self.actors[slot] = self._spawn(slot)
            try:
                self.places[slot] = self._built(actor.build.remote(self._stacks))
                welcome(slot)
                return
            except (*DEATHS, SilentWorker) as death:
                if not num_left:
                    why = f"a replaced rollout worker died at its start: {last_line(death)}"
                    raise EngineError(why) from None

    def close(self) -> None:
        """Let the workers close their boxes, then end their processes. Safe to call twice."""
        actors, places, self.actors, self.places = self.actors, self.places, [], []
        closing = [actor.close.remote() for actor in actors[: len(places)]]
        with contextlib.suppress(*DEATHS, RayTaskError, GetTimeoutError):
            ray.get(closing, timeout=_CLOSE_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)
        until = time.monotonic() + _KILL_S  # Ray reports a worker that ends by another hand
        while any(map(is_running_here, places)) and time.monotonic() < until:
            time.sleep(0.05)
        for place in places:  # one that is stopped does not hear Ray
            end_process(place, has_stacks=False)
        if self._stall_log.stacks is not None:
            with contextlib.suppress(OSError):
                self._stall_log.stacks.rmdir()  # nobody left anything there

    @property
    def _stacks(self) -> str | None:
        stacks = self._stall_log.stacks
        return None if stacks is None else str(Path(stacks).resolve())

    def _spawn(self, slot: int) -> Any:
        where = {"num_cpus": self._num_threads, "num_gpus": self._num_gpus}
        if self._seats:
            where = self._seats[slot].options()
        options = {
            **where,
            "max_restarts": 0,  # a restarted actor would have no weights; we replace it ourselves
            "runtime_env": worker_runtime(self._num_threads, self._python),
        }
        # A thread of its own for messages also moves the rest out of the main thread: only where needed.
        make = ray.remote(**self._groups) if self._groups else ray.remote
        return make(Mailbox).options(**options).remote(self._factory, self._kwargs)  # type: ignore[union-attr]

    def _built(self, ref: Any) -> Place:
        try:
            return get(ref, self._start_timeout_s)
        except GetTimeoutError:
            wanted, there = self._num_threads, ray.cluster_resources().get("CPU", 0)
            raise EngineError(
                f"a rollout worker of {wanted} cores did not start in {self._start_timeout_s:g} s; the "
                f"cluster has {there:g} cores, {ray.available_resources().get('CPU', 0):g} of them free; ask "
                "for fewer workers or more cores"
            ) from None


def get(ref: Any, timeout_s: float) -> Any:
    """ray.get with the worker's own error in place of Ray's wrapping. GetTimeoutError as it is."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ConsilienceError):
            raise cause from None
        raise EngineError(f"rollout worker failed: {type(cause).__name__}: {cause}") from error


def name_of(slot: int) -> str:
    return f"rollout worker {slot}"


def last_line(error: BaseException) -> str:
    """The last line of an error's text that says anything, else its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
