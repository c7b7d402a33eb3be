"""Sandboxes for code that does not await: plain reward functions and the episode workers.

One event loop in a thread of its own serves all blocking boxes of a process. Boxes belong to the
process that opened them: after a fork the child must open its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.box import FILE_TIMEOUT_S, PACK_TIMEOUT_S
from consilience.sandboxes.pool import LEASE_LIMIT_S, LeasedSandbox, Opener, SandboxPool
from consilience.sandboxes.probe import open_sandbox
from consilience.sandboxes.protocol import Enforced, ExecResult, Process, Sandbox, SandboxSpec, Snapshot
from consilience.sandboxes.trajectory_box import logged

T = TypeVar("T")
ORDER_LIMIT_S = 60.0  # what only tells the loop to begin something
OPEN_LIMIT_S = 300.0
CLOSE_LIMIT_S = 120.0
BATCH_LIMIT_S = 24 * 3600.0
OVERHEAD_S = 90.0  # beyond a command's own time: sending it, its grace, killing the box


class LoopThread:
    """An event loop in a daemon thread. Boxes die with the thread that started them, so it stays."""

    def __init__(self) -> None:
        self._process_id = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sandboxes", daemon=True)
        self._thread.start()

    @property
    def is_ours(self) -> bool:
        return self._process_id == os.getpid()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        """Blocks until the coroutine is done. Never to be called from a coroutine of the loop itself.

        What is awaited has limits of its own; `limit_s` is for a loop that is stuck. SandboxLost after it.
        """
        if not self.is_ours:
            work.close()
            raise SandboxLost("this sandbox belongs to the process that was forked; open one after the fork")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "a blocking sandbox was used on the loop that serves it; await the sandbox itself"
            )
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout=limit_s)
        except TimeoutError:
            if future.done():  # the coroutine's own
                raise
            future.cancel()
            raise SandboxLost(f"the sandboxes of this process did not answer in {limit_s:g} s") from None


_shared: LoopThread | None = None
_guard = threading.Lock()


def loop_thread() -> LoopThread:
    """The one of this process, started on first use."""
    global _shared
    with _guard:  # no limit: held for a few statements only
        if _shared is None or not _shared.is_ours:
            _shared = LoopThread()
        return _shared


class BlockingProcess:
    """The verbs of `Process`, blocking. `limit_s`: where a wait has no limit of its own."""

    def __init__(self, inner: Process, thread: LoopThread, limit_s: float) -> None:
        self.inner, self._thread, self._limit_s = inner, thread, limit_s

    def write(self, data: bytes) -> None:
        self._thread.run(self.inner.write(data), self._limit_s)

    def close_stdin(self) -> None:
        self._thread.run(self.inner.close_stdin(), self._limit_s)

    def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        work = self.inner.read(max_bytes, is_stderr=is_stderr, timeout_s=timeout_s)
        return self._thread.run(work, self._limit_s)

    def kill(self, number: int = 9) -> None:
        self._thread.run(self.inner.kill(number), self._limit_s)

    def wait(self, timeout_s: float | None = None) -> ExecResult:
        return self._thread.run(self.inner.wait(timeout_s), self._limit_s)


class BlockingSandbox:
    """The verbs of `Sandbox`, blocking. `inner` is the awaitable box, `wall_s` the limit of its commands."""

    def __init__(self, inner: Sandbox, thread: LoopThread | None = None, *, wall_s: float = 60.0) -> None:
        self.inner = inner
        self._thread = thread or loop_thread()
        self._limit_s = 2 * max(wall_s, FILE_TIMEOUT_S) + OVERHEAD_S

    @property
    def id(self) -> str:
        return self.inner.id

    @property
    def enforced(self) -> Enforced:
        return self.inner.enforced

    def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        return self._thread.run(
            self.inner.exec(argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s), self._limit_s
        )

    def run_python(self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None) -> ExecResult:
        return self._thread.run(self.inner.run_python(code, stdin=stdin, timeout_s=timeout_s), self._limit_s)

    def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        work = self.inner.shell(script, session=session, timeout_s=timeout_s, is_background=is_background)
        return self._thread.run(work, self._limit_s)

    def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> BlockingProcess:
        work = self.inner.spawn(argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s)
        limit_s = self._limit_s if timeout_s is None else self._limit_s + timeout_s
        return BlockingProcess(self._thread.run(work, limit_s), self._thread, limit_s)

    def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        return self._thread.run(self.inner.snapshot(max_bytes=max_bytes), self._limit_s + 2 * PACK_TIMEOUT_S)

    def restore(self, snapshot: Snapshot) -> None:
        self._thread.run(self.inner.restore(snapshot), self._limit_s + 2 * PACK_TIMEOUT_S)

    def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return self._thread.run(self.inner.read(path, max_bytes=max_bytes), self._limit_s)

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._thread.run(self.inner.write(path, data, mode=mode), self._limit_s)

    def reset(self) -> bool:
        return self._thread.run(self.inner.reset(), self._limit_s)

    def destroy(self) -> None:
        self._thread.run(self.inner.destroy(), self._limit_s)


def open_blocking(spec: SandboxSpec, *, opener: Opener = open_sandbox) -> BlockingSandbox:
    """`open_sandbox` for blocking code."""
    thread = loop_thread()

    async def opened() -> Sandbox:
        return await opener(spec)

    return BlockingSandbox(thread.run(opened(), OPEN_LIMIT_S), thread, wall_s=spec.limits.wall_s)


class BlockingPool:
    """`SandboxPool` for blocking code; safe to use from many threads at once."""

    def __init__(
        self,
        spec: SandboxSpec,
        size: int,
        uses_per_box: int = 64,
        *,
        opener: Opener = open_sandbox,
        lease_limit_s: float = LEASE_LIMIT_S,
        log_folder: Path | None = None,
    ) -> None:
        """Begins to open the boxes in the background and returns. `log_folder`: of their trajectory logs."""
        self._thread = loop_thread()
        opener = opener if log_folder is None else logged(opener, log_folder)
        self._lease_limit_s, self._wall_s = lease_limit_s, spec.limits.wall_s
        self._pool = SandboxPool(spec, size, uses_per_box, opener=opener, lease_limit_s=lease_limit_s)
        self._thread.run(self._pool.start(), ORDER_LIMIT_S)

    def lease(self) -> BlockingSandbox:
        """Waits for a box that is ready. SandboxUnavailable when none can be opened, or none gets free."""
        box = self._thread.run(self._pool.lease(), self._lease_limit_s + ORDER_LIMIT_S)
        return BlockingSandbox(box, self._thread, wall_s=self._wall_s)

    def find(self, box_id: str) -> None:
        """None: every box ends with the process that opened it (its runner's pipe closes)."""

    def release(self, sandbox: BlockingSandbox) -> None:
        if not isinstance(sandbox.inner, LeasedSandbox):
            raise ValueError(f"{sandbox.id} was not leased from a pool")
        self._thread.run(self._pool.release(sandbox.inner), ORDER_LIMIT_S)

    def run_all(self, jobs: Sequence[Callable[[Sandbox], Awaitable[T]]]) -> list[T | BaseException]:
        """See `SandboxPool.run_all`; the jobs are coroutine functions that take the (awaitable) box."""
        return self._thread.run(self._pool.run_all(jobs), BATCH_LIMIT_S)

    def describe(self) -> dict[str, int]:
        return self._pool.describe()

    def close(self) -> None:
        """Destroys every box; harmless when done twice or in a forked child."""
        if self._thread.is_ours:
            self._thread.run(self._pool.close(), CLOSE_LIMIT_S)

    def __enter__(self) -> BlockingPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
