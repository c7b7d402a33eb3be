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
    """The closed set of outcomes of a command."""

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
    """One command. stdout and stderr keep head and tail up to the cap; `*_bytes` count all of it."""

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

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """A regular file of the workspace; FileNotFoundError, PermissionError (links, escapes)."""
        ...

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None: ...

    async def reset(self) -> None:
        """Kill what runs and empty the workspace, so that the next lease starts clean."""
        ...

    async def destroy(self) -> None: ...
