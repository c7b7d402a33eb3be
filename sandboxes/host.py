"""The sandboxes of one machine, in a process that outlives those who use them.

    owner ── lease ──► box of its own, warm or made now ── verbs, with the lease's key ──► release
      └── beat, beat, …          (silent for ttl_s: its boxes are destroyed)
    successor ── find(box id) ──► the same box, under a new key

Made at a pace and behind a circuit breaker (`host_creation.py`). A box serves one owner and is destroyed
after it. A verb that was begun goes on in the box when its caller dies, and ends within its own limit.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.host_creation import Breaker, Opener, PacedCreator
from consilience.sandboxes.leases import BoxLease, LeaseTable
from consilience.sandboxes.probe import open_sandbox
from consilience.sandboxes.protocol import Enforced, ExecResult, Process, Sandbox, SandboxSpec
from consilience.sandboxes.trajectory import TrajectoryLog
from consilience.sandboxes.trajectory_box import LoggedSandbox

VERBS = ("exec", "run_python", "shell", "spawn", "read", "write", "snapshot", "restore")
PROCESS_VERBS = ("write", "close_stdin", "read", "kill", "wait")
_NUM_LATENCIES = 512


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What one machine's host allows. Times in seconds.

    most_boxes     boxes on lease at once; those who want more wait, first come first served
    most_waiting   callers that may wait; beyond them a lease is refused at once
    lease_limit_s  the longest that one waits for a box
    ttl_s          how long an owner may be silent before its boxes are destroyed; its successor must have
                   found them by then, so longer than a worker takes to start
    sweep_s        how often that is looked at, and warm boxes are made up
    idle_s         without any lease for so long the warm boxes are destroyed too
    log_folder     where each box's trajectory log is written, for audits (`trajectory.py`); None: in memory,
                   enough for a successor to get the answer that its predecessor died waiting for
    """

    most_boxes: int = 64
    most_waiting: int = 1024
    lease_limit_s: float = 1800.0
    ttl_s: float = 300.0
    sweep_s: float = 5.0
    idle_s: float = 600.0
    log_folder: str | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease as its owner gets it: what to show, and what the box enforces."""

    box_id: str
    key: str
    enforced: Enforced


@dataclass(slots=True)
class HostCounts:
    """What a host has done so far."""

    leases: int = 0
    warm_hits: int = 0  # leases that found a box ready
    released: int = 0
    reaped: int = 0  # destroyed because their owner was silent
    taken_over: int = 0
    lost: int = 0  # died under their owner
    refused: int = 0  # leases that got no box
    execs: int = 0


@dataclass(slots=True)
class _Held:
    """A box on lease."""

    box: LoggedSandbox
    is_lost: bool = False
    processes: list[Process] = field(default_factory=list)  # streamed programs, by number


class SandboxHost:
    """Leases, heartbeats and boxes of one machine, on the event loop that uses it first."""

    def __init__(
        self,
        limits: HostLimits | None = None,
        *,
        opener: Opener = open_sandbox,
        breaker: Breaker | None = None,
        start_pace: int = 4,
    ) -> None:
        self.limits = limits or HostLimits()
        self.counts = HostCounts()
        self._breaker = breaker or Breaker()
        self._creator = PacedCreator(opener, self._breaker, start_pace=start_pace)
        self._leases = LeaseTable(self.limits.ttl_s)
        self._held: dict[str, _Held] = {}
        self._warm: dict[SandboxSpec, deque[Sandbox]] = {}
        self._wanted: dict[SandboxSpec, int] = {}  # how many to keep warm
        self._opening: dict[SandboxSpec, int] = {}
        self._free = asyncio.Semaphore(self.limits.most_boxes)
        self._num_waiting = 0
        self._used_at = time.monotonic()
        self._work: set[asyncio.Task[Any]] = set()
        self._ends: set[asyncio.Task[Any]] = set()  # boxes being destroyed
        self._sweeper: asyncio.Task[None] | None = None
        self._acquire_s: deque[float] = deque(maxlen=_NUM_LATENCIES)
        self._exec_s: deque[float] = deque(maxlen=_NUM_LATENCIES)
        self._is_closed = False

    async def keep_warm(self, spec: SandboxSpec, num: int) -> None:
        """Have `num` boxes of this kind ready from here on (the most that anybody asked for); at once."""
        self._start()
        self._wanted[spec] = max(num, self._wanted.get(spec, 0))
        self._used_at = time.monotonic()
        self._refill(spec)

    async def lease(self, owner: str, spec: SandboxSpec, limit_s: float | None = None) -> Granted:
        """A box of its own for this owner, empty; waits `limit_s` for it, `lease_limit_s` at most.

        SandboxUnavailable when none gets free in time, too many wait, or none as strong as asked for can be
        made; CreationPaused after many failures.
        """
        self._start()
        began = self._used_at = time.monotonic()
        limit_s = min(limit_s or math.inf, self.limits.lease_limit_s)
        if self._num_waiting >= self.limits.most_waiting:
            self.counts.refused += 1
            raise SandboxUnavailable(f"{self._num_waiting} callers already wait for a sandbox here")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(limit_s):
                await self._free.acquire()
                try:
                    box = await self._take(spec)
                except BaseException:
                    self._free.release()
                    raise
                if self._is_closed:
                    await _destroy(box)
                    self._start()
        except TimeoutError:
            self.counts.refused += 1
            raise SandboxUnavailable(
                f"no sandbox got free in {limit_s:g} s; {len(self._held)} are on lease, "
                f"{self.limits.most_boxes} are allowed"
            ) from None
        except SandboxUnavailable:
            self.counts.refused += 1
            raise
        finally:
            self._num_waiting -= 1
        folder = self.limits.log_folder
        log = TrajectoryLog(None if folder is None else Path(folder, box.id))
        self._held[box.id] = _Held(LoggedSandbox(box, log))
        self.counts.leases += 1
        self._acquire_s.append(time.monotonic() - began)
        return self._granted(box, self._leases.grant(box.id, owner))

    async def find(self, owner: str, box_id: str) -> Granted | None:
        """The box, from here on this owner's alone, with what runs in it; None if it is gone."""
        self._start()
        held = self._held.get(box_id)
        if held is None or held.is_lost:
            return None
        self.counts.taken_over += 1
        return self._granted(held.box, self._leases.grant(box_id, owner))

    async def beat(self, owner: str) -> int:
        """A sign of life; how many boxes the owner holds."""
        return self._leases.beat(owner)

    async def call(self, box_id: str, key: str, verb: str, *args: Any, **options: Any) -> Any:
        """A verb of `VERBS` on a box. SandboxLost if this key does not hold it, or it is gone.

        "spawn" answers with the program's number, for `talk`.
        """
        if verb not in VERBS:
            raise ValueError(f"{verb!r} is no verb of a leased box; those are {', '.join(VERBS)}")
        self._leases.check(box_id, key)
        held = self._held[box_id]
        self._used_at = time.monotonic()
        # a caller that is gone does not end what it began: its successor finds the box as that leaves it
        work = getattr(held.box, verb)(*args, **options)
        value = await asyncio.shield(self._in_background(self._do(held, work)))
        if verb != "spawn":
            return value
        if value not in held.processes:  # a client that starts again asks for the same program
            held.processes.append(value)
        return held.processes.index(value)

    async def talk(self, box_id: str, key: str, number: int, verb: str, *args: Any, **options: Any) -> Any:
        """A verb of `PROCESS_VERBS` on a spawned program. SandboxLost as `call`; ValueError if there is none.

        What a caller that is gone had read is read: its successor gets what comes after.
        """
        if verb not in PROCESS_VERBS:
            raise ValueError(f"{verb!r} is no verb of a program; those are {', '.join(PROCESS_VERBS)}")
        self._leases.check(box_id, key)
        held = self._held[box_id]
        if not 0 <= number < len(held.processes):
            raise ValueError(f"program {number} of {box_id}; {len(held.processes)} were spawned there")
        self._used_at = time.monotonic()
        work = getattr(held.processes[number], verb)(*args, **options)
        return await asyncio.shield(self._in_background(self._do(held, work)))

    async def rewind(self, box_id: str, key: str, number: int) -> None:
        """The next verb is the box's number `number`, counted from 1 over all of its owners.

        If it was sent already it is not run again: its answer is what it answered, or will. SandboxLost if so
        many were never sent.
        """
        self._leases.check(box_id, key)
        try:
            self._held[box_id].box.rewind(number)
        except ValueError as error:
            raise SandboxLost(f"{box_id} is not where its log says: {error}") from None

    async def release(self, box_id: str, key: str) -> None:
        """Gives a box back; it is destroyed in the background. SandboxLost if this key does not hold it."""
        self._leases.check(box_id, key)
        self.counts.released += 1
        self._let_go(box_id)

    async def leave(self, owner: str) -> int:
        """The owner ends in order: all it still holds is given back; how many that were."""
        boxes = self._leases.held_by(owner)
        for box_id in boxes:
            self.counts.released += 1
            self._let_go(box_id)
        return len(boxes)

    async def close(self) -> None:
        """Destroys every box. Those who wait for one get SandboxUnavailable."""
        self._is_closed = True
        for task in (self._sweeper, *self._work):
            if task is not None:
                task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        for _ in range(self._num_waiting):
            self._free.release()  # each finds that the host is closed
        boxes: list[Sandbox | LoggedSandbox] = [held.box for held in self._held.values()]
        boxes += [box for ready in self._warm.values() for box in ready]
        self._held.clear()
        self._warm.clear()
        await asyncio.gather(*map(_destroy, boxes), *self._ends)

    async def metrics(self) -> dict[str, float]:
        """Numbers for the run's metrics: counts since the start, what there is now, latencies in ms."""
        counted = {f.name: float(getattr(self.counts, f.name)) for f in fields(self.counts)}
        return counted | {
            "created": float(self._creator.num_created),
            "failures": float(self._creator.num_failed),
            "breaker_openings": float(self._breaker.num_openings),
            "pace": float(self._creator.pace),
            "warm": float(sum(map(len, self._warm.values()))),
            "leased": float(len(self._held)),
            "waiting": float(self._num_waiting),
            "create_p50_ms": 1e3 * self._creator.percentile_s(0.5),
            "create_p95_ms": 1e3 * self._creator.percentile_s(0.95),
            "acquire_p50_ms": 1e3 * percentile(self._acquire_s, 0.5),
            "acquire_p95_ms": 1e3 * percentile(self._acquire_s, 0.95),
            "exec_p50_ms": 1e3 * percentile(self._exec_s, 0.5),
            "exec_p95_ms": 1e3 * percentile(self._exec_s, 0.95),
        }

    def _start(self) -> None:
        if self._is_closed:
            raise SandboxUnavailable("the sandbox host is closed")
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            for box_id in self._leases.end_silent(self.limits.sweep_s):
                self.counts.reaped += 1
                self._let_go(box_id)
            if not self._held and time.monotonic() - self._used_at > self.limits.idle_s:
                self._wanted.clear()
                for ready in self._warm.values():
                    while ready:
                        self._ends_with(_destroy(ready.popleft()))
            for spec in list(self._wanted):
                self._refill(spec)

    async def _take(self, spec: SandboxSpec) -> Sandbox:
        """A warm box that still answers, or a new one."""
        self._start()
        ready = self._warm.setdefault(spec, deque())
        while ready:
            box = ready.popleft()
            self._refill(spec)
            try:
                await box.reset()
            except SandboxLost:
                continue
            self.counts.warm_hits += 1
            return box
        return await self._creator.create(spec)

    def _refill(self, spec: SandboxSpec) -> None:
        """Make up what is missing of the warm boxes. After a failure the next sweep tries again."""
        ready = self._warm.setdefault(spec, deque())
        missing = self._wanted.get(spec, 0) - len(ready) - self._opening.get(spec, 0)
        for _ in range(missing):
            self._opening[spec] = self._opening.get(spec, 0) + 1
            self._in_background(self._open_warm(spec))

    async def _open_warm(self, spec: SandboxSpec) -> None:
        try:
            with suppress(SandboxUnavailable, SandboxLost):  # counted by the creator
                box = await self._creator.create(spec)
                self._warm[spec].append(box)
        finally:
            self._opening[spec] -= 1

    async def _do(self, held: _Held, work: Awaitable[Any]) -> Any:
        try:
            value = await work
        except SandboxLost:
            self.counts.lost += not held.is_lost
            held.is_lost = True
            raise
        if isinstance(value, ExecResult):
            self.counts.execs += 1
            self._exec_s.append(value.wall_s)
        return value

    def _let_go(self, box_id: str) -> None:
        self._leases.drop(box_id)
        held = self._held.pop(box_id)

        async def end() -> None:
            try:
                await _destroy(held.box)
            finally:
                self._free.release()

        self._ends_with(end())

    def _granted(self, box: Sandbox | LoggedSandbox, lease: BoxLease) -> Granted:
        return Granted(box.id, lease.key, box.enforced)

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._forget)
        return task

    def _ends_with(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # no limit: it is done; one that nobody awaits any more is not reported


def percentile(values: deque[float], share: float) -> float:
    """0 where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def _destroy(box: Sandbox | LoggedSandbox) -> None:
    with suppress(SandboxLost):
        await box.destroy()
