"""What a worker asks of a pool of sandboxes: blocking verbs, so that threads can use them.

`sandboxes/blocking.py` provides the real pool; `FakeBoxes` keeps files in memory and runs nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Protocol

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.archive import pack_files
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation, Snapshot


class Box(Protocol):
    """One leased sandbox with a workspace. SandboxLost from any verb when the box itself is gone."""

    @property
    def id(self) -> str: ...

    @property
    def enforced(self) -> Enforced: ...

    def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult: ...

    def run_python(self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None) -> ExecResult: ...

    def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes: ...

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None: ...

    def snapshot(self, *, max_bytes: int | None = None) -> Snapshot: ...


class BoxPool(Protocol):
    """Leases boxes; `lease` may block until one is free, `release` makes it clean for the next."""

    def lease(self) -> Box: ...

    def find(self, box_id: str) -> Box | None:
        """The box that a worker which is gone had leased, if it lives on, as it is; else None.

        It is the caller's from here on: whoever held it before can do nothing there any more. One that
        has `resume(num_done)` answers the verb that was begun when its worker died; it is not run again.
        """
        ...

    def release(self, box: Box) -> None: ...


class FakeBox:
    """Files in memory; `exec` is answered by the function given to the pool."""

    def __init__(self, box_id: str, run: Callable[[FakeBox, list[str], bytes], tuple[int, bytes]]) -> None:
        self.id = box_id
        self.files: dict[str, bytes] = {}
        self.is_lost = False
        self._run = run
        self.enforced = Enforced(Isolation.NONE, "fake", "memory", False, False, "none", "none")

    def _check(self) -> None:
        if self.is_lost:
            raise SandboxLost(f"box {self.id} is gone")

    def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        self._check()
        code, out = self._run(self, argv, stdin)
        status = ExecStatus.OK if code == 0 else ExecStatus.NONZERO
        return ExecResult(status, code, out, b"", len(out), 0, 0.0)

    def run_python(self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None) -> ExecResult:
        return self.exec(["python3", "-c", code], stdin=stdin, timeout_s=timeout_s)

    def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._check()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path][:max_bytes]

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._check()
        self.files[path] = data

    def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        self._check()
        return pack_files(self.files)


def _echo(box: FakeBox, argv: list[str], stdin: bytes) -> tuple[int, bytes]:
    return 0, " ".join(argv).encode() + stdin


class FakeBoxes:
    """At most `num` boxes at a time; `lease` blocks beyond that, as a real pool does."""

    def __init__(
        self,
        num: int = 4,
        run: Callable[[FakeBox, list[str], bytes], tuple[int, bytes]] = _echo,
        lease_limit_s: float = 1800.0,
    ) -> None:
        self._lease_limit_s = lease_limit_s
        self._free = threading.Semaphore(num)
        self._ids = itertools.count()
        self._run = run
        self.num_leased = 0
        self.num_released = 0

    def lease(self) -> FakeBox:
        if not self._free.acquire(timeout=self._lease_limit_s):
            raise SandboxUnavailable(f"no box got free in {self._lease_limit_s:g} s")
        self.num_leased += 1
        return FakeBox(f"fake-{next(self._ids)}", self._run)

    def find(self, box_id: str) -> None:
        """None: what is in memory ends with its process."""

    def release(self, box: Box) -> None:
        self.num_released += 1
        self._free.release()
