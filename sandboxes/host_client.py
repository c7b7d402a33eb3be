"""A worker's side of a `SandboxHost`: blocking verbs, a heartbeat, boxes that are found again by their id.

`ask(verb, *args, limit_s=…, **options)` carries one call to the host and brings its value or its exception
back, SandboxLost if the host is gone. `ray_host.py` has the one through Ray; `LocalHost` keeps a host in this
process, where boxes end with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from typing import Any, Protocol

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.blocking import (
    CLOSE_LIMIT_S,
    LEASE_LIMIT_S,
    ORDER_LIMIT_S,
    OVERHEAD_S,
    LoopThread,
    loop_thread,
)
from consilience.sandboxes.box import FILE_TIMEOUT_S, PACK_TIMEOUT_S
from consilience.sandboxes.host import Granted, HostLimits, SandboxHost
from consilience.sandboxes.protocol import ExecResult, SandboxSpec, Snapshot


class Ask(Protocol):
    """One call to a host."""

    def __call__(self, verb: str, *args: Any, limit_s: float, **options: Any) -> Any: ...


class HostBox:
    """A leased box of a host. SandboxLost from any verb once it is gone, given back or taken over."""

    def __init__(self, ask: Ask, granted: Granted, wall_s: float) -> None:
        self.id, self.key, self.enforced = granted.box_id, granted.key, granted.enforced
        self._ask = ask
        self._limit_s = 2 * max(wall_s, FILE_TIMEOUT_S) + OVERHEAD_S

    def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        return self._call("exec", argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s)

    def run_python(self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None) -> ExecResult:
        return self._call("run_python", code, stdin=stdin, timeout_s=timeout_s)

    def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        return self._call("shell", script, session=session, timeout_s=timeout_s, is_background=is_background)

    def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> HostProcess:
        number = self._call("spawn", argv, stdin=stdin, cwd=cwd, env=env, timeout_s=timeout_s)
        return HostProcess(self._ask, self, number, self._limit_s + (timeout_s or 0.0))

    def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        return self._call("snapshot", more_s=2 * PACK_TIMEOUT_S, max_bytes=max_bytes)

    def restore(self, snapshot: Snapshot) -> None:
        self._call("restore", snapshot, more_s=2 * PACK_TIMEOUT_S)

    def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return self._call("read", path, max_bytes=max_bytes)

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._call("write", path, data, mode=mode)

    def resume(self, num_done: int) -> None:
        """The next verb is the one after `num_done` verbs of this box, whoever sent them.

        If a holder that is gone had sent it already it is not run again, and answers as it did.
        TrajectoryDiverged from the verb if it is another one, SandboxLost if fewer were ever sent.
        """
        self._ask("rewind", self.id, self.key, num_done + 1, limit_s=ORDER_LIMIT_S)

    def _call(self, verb: str, *args: Any, more_s: float = 0.0, **options: Any) -> Any:
        limit_s = self._limit_s + more_s
        return self._ask("call", self.id, self.key, verb, *args, limit_s=limit_s, **options)


class HostProcess:
    """A program that was spawned in a `HostBox`: the verbs of `Process`, blocking."""

    def __init__(self, ask: Ask, box: HostBox, number: int, limit_s: float) -> None:
        self._ask, self._box, self._number, self._limit_s = ask, box, number, limit_s

    def write(self, data: bytes) -> None:
        self._talk("write", data)

    def close_stdin(self) -> None:
        self._talk("close_stdin")

    def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        return self._talk("read", max_bytes, is_stderr=is_stderr, timeout_s=timeout_s)

    def kill(self, number: int = 9) -> None:
        self._talk("kill", number)

    def wait(self, timeout_s: float | None = None) -> ExecResult:
        return self._talk("wait", timeout_s)

    def _talk(self, verb: str, *args: Any, **options: Any) -> Any:
        box = self._box
        return self._ask("talk", box.id, box.key, self._number, verb, *args, limit_s=self._limit_s, **options)


class HostPool:
    """A `BoxPool` (rollout/boxes.py) over a host, for one owner; safe to use from many threads.

    lease_limit_s  how long `lease` waits
    owner   name of this process in the host's leases; None: one that no other process has
    warm    boxes of this kind to keep ready on the machine
    beat_s  between two signs of life; a third of the host's `ttl_s` or less
    Use it as a context manager, or call `close`: without, the boxes go `ttl_s` after this process.
    """

    def __init__(
        self,
        ask: Ask,
        spec: SandboxSpec,
        *,
        owner: str | None = None,
        warm: int = 0,
        beat_s: float = 15.0,
        lease_limit_s: float = LEASE_LIMIT_S,
    ) -> None:
        self.owner = owner or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.spec = spec
        self._ask, self._lease_limit_s = ask, lease_limit_s
        self._beat_s = beat_s
        self._is_over = threading.Event()
        self._ask("keep_warm", spec, warm, limit_s=ORDER_LIMIT_S)
        self._heart = threading.Thread(target=self._beat, name="sandbox-heartbeat", daemon=True)
        self._heart.start()

    def lease(self) -> HostBox:
        """Waits for a box. SandboxUnavailable when none can be made, or none gets free."""
        try:
            wait_s = self._lease_limit_s
            granted = self._ask("lease", self.owner, self.spec, wait_s, limit_s=wait_s + ORDER_LIMIT_S)
        except SandboxLost as error:
            raise SandboxUnavailable(f"no sandbox from this machine's host: {error}") from None
        return HostBox(self._ask, granted, self.spec.limits.wall_s)

    def find(self, box_id: str) -> HostBox | None:
        """The box that a worker which is gone had leased, as it is, if it lives on; else None."""
        try:
            granted = self._ask("find", self.owner, box_id, limit_s=ORDER_LIMIT_S)
        except SandboxLost:  # the host is gone, and its boxes with it
            return None
        return None if granted is None else HostBox(self._ask, granted, self.spec.limits.wall_s)

    def release(self, box: HostBox) -> None:
        """Gives a box back, which ends it; one that is gone or has another holder is left alone."""
        with contextlib.suppress(SandboxLost):
            self._ask("release", box.id, box.key, limit_s=ORDER_LIMIT_S)

    def describe(self) -> dict[str, float]:
        """The host's metrics (`SandboxHost.metrics`)."""
        return self._ask("metrics", limit_s=ORDER_LIMIT_S)

    def close(self) -> None:
        """Ends the heartbeat and gives back what is still held."""
        self._is_over.set()
        self._heart.join(timeout=ORDER_LIMIT_S)
        with contextlib.suppress(SandboxLost):
            self._ask("leave", self.owner, limit_s=CLOSE_LIMIT_S)

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._is_over.wait(self._beat_s):
            with contextlib.suppress(SandboxLost, SandboxUnavailable):  # the verbs say it to those who ask
                self._ask("beat", self.owner, limit_s=ORDER_LIMIT_S)


class LocalHost:
    """A host on the event loop of this process, and the `ask` to it."""

    def __init__(self, limits: HostLimits | None = None, **options: Any) -> None:
        self._thread: LoopThread = loop_thread()

        async def made() -> SandboxHost:
            return SandboxHost(limits, **options)

        self.host = self._thread.run(made(), ORDER_LIMIT_S)

    def ask(self, verb: str, *args: Any, limit_s: float, **options: Any) -> Any:
        return self._thread.run(getattr(self.host, verb)(*args, **options), limit_s)

    def close(self) -> None:
        self._thread.run(self.host.close(), CLOSE_LIMIT_S)
