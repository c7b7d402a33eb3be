"""Warm boxes: opened in the background before they are needed, emptied between leases, replaced when used up.

Exactly `size` tokens circulate. A token is a box that is ready, a box on lease, or one being opened
or emptied in the background; `lease` waits for the next one that is ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.probe import open_sandbox
from consilience.sandboxes.protocol import (
    Enforced,
    ExecResult,
    ExecStatus,
    Process,
    Sandbox,
    SandboxSpec,
    Snapshot,
)

T = TypeVar("T")
Opener = Callable[[SandboxSpec], Awaitable[Sandbox]]
LEASE_LIMIT_S = 1800.0  # a box is on lease for a whole episode, so the next one may come late
_REUSABLE = (ExecStatus.OK, ExecStatus.NONZERO, ExecStatus.DENIED)


@dataclass(slots=True)
class PoolCounts:
    """What the pool has done so far."""

    opened: int = 0
    open_failures: int = 0
    leases: int = 0
    resets: int = 0
    retired: int = 0  # destroyed after `uses_per_box` leases
    discarded: int = 0  # destroyed after an abnormal outcome or a failed reset
    lost: int = 0  # of the discarded, those that had died


class LeasedSandbox:
    """A box for one user. `id` is "box-…#k", the k-th lease of that box; after release it refuses to work."""

    def __init__(self, box: Sandbox, number: int) -> None:
        self.id = f"{box.id}#{number}"
        self.enforced: Enforced = box.enforced
        self.is_tainted = False  # an outcome after which the box is not used again
        self._box: Sandbox | None = box

    def _live(self) -> Sandbox:
        if self._box is None:
            raise SandboxLost(f"{self.id} was released; lease a sandbox for each use")
        return self._box

    async def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        work = self._live().exec(argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s)
        return self._judge(await self._watch(work))

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        work = self._live().run_python(code, stdin=stdin, timeout_s=timeout_s)
        return self._judge(await self._watch(work))

    async def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        work = self._live().shell(script, session=session, timeout_s=timeout_s, is_background=is_background)
        return self._judge(await self._watch(work))

    async def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Process:
        """Its outcome is not looked at: a box that streamed a program is not used again."""
        self.is_tainted = True
        return await self._watch(self._live().spawn(argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s))

    async def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        return await self._watch(self._live().snapshot(max_bytes=max_bytes))

    async def restore(self, snapshot: Snapshot) -> None:
        await self._watch(self._live().restore(snapshot))

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return await self._watch(self._live().read(path, max_bytes=max_bytes))

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await self._watch(self._live().write(path, data, mode=mode))

    async def reset(self) -> bool:
        return await self._watch(self._live().reset())

    async def destroy(self) -> None:
        self.is_tainted = True
        await self._live().destroy()

    def _judge(self, outcome: ExecResult) -> ExecResult:
        self.is_tainted |= outcome.status not in _REUSABLE
        return outcome

    async def _watch(self, work: Awaitable[T]) -> T:
        try:
            outcome = await work
        except (SandboxLost, asyncio.CancelledError):
            self.is_tainted = True
            raise
        return outcome

    def detach(self) -> Sandbox:
        """Ends the lease; the box itself. SandboxLost if it was released before."""
        box, self._box = self._live(), None
        return box


class SandboxPool:
    """`size` warm boxes of one kind, on the event loop that starts it."""

    def __init__(
        self,
        spec: SandboxSpec,
        size: int,
        uses_per_box: int = 64,
        *,
        opener: Opener = open_sandbox,
        lease_limit_s: float = LEASE_LIMIT_S,
    ) -> None:
        if size < 1 or uses_per_box < 1:
            raise ValueError(f"size is {size} and uses_per_box {uses_per_box}; both must be at least 1")
        self.spec = spec
        self.size = size
        self.uses_per_box = uses_per_box
        self.counts = PoolCounts()
        self._opener, self._lease_limit_s = opener, lease_limit_s
        self._ready: asyncio.Queue[tuple[Sandbox, int] | BaseException] = asyncio.Queue()
        self._leased: dict[LeasedSandbox, int] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._is_started = self._is_closed = False

    async def start(self) -> None:
        """Begins to open the boxes; returns at once. `lease` does it too."""
        if not self._is_started:
            self._is_started = True
            for _ in range(self.size):
                self._in_background(self._open())

    async def lease(self) -> LeasedSandbox:
        """The next box that is ready, empty.

        SandboxUnavailable if none opens, the pool is closed, or no box got free in `lease_limit_s`.
        """
        await self.start()
        if self._is_closed:
            raise SandboxUnavailable("the sandbox pool is closed")
        try:
            async with asyncio.timeout(self._lease_limit_s):
                token = await self._ready.get()
        except TimeoutError:
            raise SandboxUnavailable(
                f"none of {self.size} boxes got free in {self._lease_limit_s:g} s; raise sandbox.warm, or "
                "rollout.lease_limit_s where episodes are that long"
            ) from None
        if isinstance(token, BaseException):
            if self._is_closed:
                self._ready.put_nowait(token)  # for the next one that waits
            else:
                self._in_background(self._open())
            raise token
        box, uses = token
        leased = LeasedSandbox(box, uses + 1)
        self._leased[leased] = uses + 1
        self.counts.leases += 1
        return leased

    async def release(self, leased: LeasedSandbox) -> None:
        """Gives a box back; it is emptied or replaced in the background. Twice is a SandboxLost."""
        box = leased.detach()
        uses = self._leased.pop(leased)
        self._in_background(self._renew(box, uses, leased.is_tainted))

    async def run_all(self, jobs: Sequence[Callable[[Sandbox], Awaitable[T]]]) -> list[T | BaseException]:
        """Each job with a box of its own, as many at once as there are boxes; results in order.

        A job that raises leaves its exception in its place and never stops the others.
        """

        async def run(job: Callable[[Sandbox], Awaitable[T]]) -> T:
            leased = await self.lease()
            try:
                return await job(leased)
            finally:
                await self.release(leased)

        return await asyncio.gather(*map(run, jobs), return_exceptions=True)

    async def close(self) -> None:
        """Destroys every box, also those on lease; those who wait for one get SandboxUnavailable."""
        if self._is_closed:
            return
        self._is_closed = True
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        boxes = [leased.detach() for leased in self._leased]
        self._leased.clear()
        while not self._ready.empty():
            token = self._ready.get_nowait()
            if not isinstance(token, BaseException):
                boxes.append(token[0])
        self._ready.put_nowait(SandboxUnavailable("the sandbox pool is closed"))
        await asyncio.gather(*(box.destroy() for box in boxes), return_exceptions=True)

    def describe(self) -> dict[str, int]:
        """Counts for the metrics file."""
        return asdict(self.counts)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _open(self) -> None:
        try:
            box = await self._opener(self.spec)
        except Exception as error:
            self.counts.open_failures += 1
            self._ready.put_nowait(error)
            return
        self.counts.opened += 1
        self._ready.put_nowait((box, 0))

    async def _renew(self, box: Sandbox, uses: int, is_tainted: bool) -> None:
        try:
            if not is_tainted and uses < self.uses_per_box and await box.reset():
                self.counts.resets += 1
                self._ready.put_nowait((box, uses))
                return
            if not is_tainted:
                self.counts.retired += 1
            else:
                self.counts.discarded += 1
            await box.destroy()
        except SandboxLost:
            self.counts.discarded += 1
            self.counts.lost += 1
        except asyncio.CancelledError:
            await box.destroy()
            raise
        await self._open()
