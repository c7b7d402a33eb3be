"""What a sandbox is: verbs with limits and typed outcomes, whoever provides the isolation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol


class Isolation(IntEnum):
    """Isolation levels, weakest first; compared with `sandbox.min_isolation`."""

    NONE = 0
    RLIMIT = 1
    BWRAP_USER = 2
    BWRAP_ROOT = 3
    CONTAINER = 4
    CONTAINER_USERNS = 5
    GVISOR = 6
    VM = 7

    @property
    def label(self) -> str:
        """The lower-case name used in configuration and records ("bwrap_user")."""
        return self.name.lower()


class ExecStatus(StrEnum):
    """The closed set of outcomes of a command. The first of them that applies, in this order:

    denied (it could not be started at all), oom, output_capped (also of a flood that ran until its
    time was up: exit_code is None), timeout (wall or CPU), pids, disk, nonzero, ok. oom and pids are
    what a cgroup counted; under rlimits a program sees its own allocation fail and ends `nonzero`.
    """

    OK = "ok"
    NONZERO = "nonzero"
    TIMEOUT = "timeout"
    OOM = "oom"
    PIDS = "pids"
    DISK = "disk"
    OUTPUT_CAPPED = "output_capped"
    DENIED = "denied"
    PROTOCOL_ERROR = "protocol_error"
    SANDBOX_LOST = "sandbox_lost"


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps of one sandbox, all on by default. Sizes in bytes, times in seconds."""

    memory_bytes: int = 256 << 20
    processes: int = 64
    file_bytes: int = 16 << 20
    workspace_bytes: int = 64 << 20
    cpu_s: float = 10.0
    wall_s: float = 10.0
    output_bytes: int = 64 << 10  # head and tail kept of each stream, half each


@dataclass(frozen=True, slots=True)
class Enforced:
    """What was verified after start, not what was asked for. Stored in every rollout record."""

    level: Isolation
    driver: str  # "docker", "bwrap", "insecure_subprocess", "fake"
    runtime: str  # "runc", "bwrap 0.11.0", …
    network: bool  # True if any interface but loopback is reachable
    seccomp: bool
    memory_cap: str  # "cgroup", "rlimit" or "none"
    process_cap: str  # "cgroup", "rlimit" or "none"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecResult:
    """One command. stdout and stderr keep head and tail up to the cap; `*_bytes` count all of it.

    exit_code is negative for the signal that ended it, None if it was killed at a limit or never ran.
    """

    status: ExecStatus
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    stderr_bytes: int
    wall_s: float

    @property
    def is_ok(self) -> bool:
        return self.status is ExecStatus.OK


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What to start. `driver` "auto" picks the strongest present; `image` is for docker."""

    driver: str = "auto"
    min_isolation: Isolation = Isolation.BWRAP_USER
    limits: Limits = field(default_factory=Limits)
    image: str | None = None
    allow_insecure: bool = False


class Sandbox(Protocol):
    """One isolated place with a workspace (its working directory, empty at start), no network.

    `exec` never raises for anything the program inside can cause; it raises SandboxLost when the
    box itself is gone, and ValueError for our own mistakes.
    """

    id: str
    enforced: Enforced

    async def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult: ...

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        """`code` as a fresh `__main__` in a fork of the runner's started interpreter.

        The fast way for many small programs: 2-4 ms instead of an interpreter's start. Standard
        library only; same user, limits and clean-up as `exec`.
        """
        ...

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """A regular file of the workspace.

        FileNotFoundError; PermissionError for links, escapes and what is no regular file; OSError
        (EFBIG) when it is larger than `max_bytes`: never a silent part of it.
        """
        ...

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Replaces a file of the workspace, making its folders. PermissionError, OSError (ENOSPC)."""
        ...

    async def reset(self) -> None:
        """Kill what runs and empty the workspace, so that the next lease starts clean."""
        ...

    async def destroy(self) -> None: ...
