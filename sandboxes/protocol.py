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


class ShellState(StrEnum):
    """What became of a shell's own state (folder, variables, functions) by one script.

    new: this script started the shell, so earlier state, if there was any, is gone; kept: it goes on;
    ended: the shell is gone (exit, `set -e`, a limit), and the next script starts a new one.
    """

    NEW = "new"
    KEPT = "kept"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A workspace at one moment: an uncompressed tar of folders, regular files and symbolic links.

    `digest` is the SHA-256 of `archive` in hex; equal workspaces give equal archives.
    """

    digest: str
    archive: bytes
    num_files: int


@dataclass(frozen=True, slots=True)
class ExecResult:
    """One command. stdout and stderr keep head and tail up to the cap; `*_bytes` count all of it.

    exit_code is negative for the signal that ended it, None if it was killed at a limit or never ran.
    `enforced` is what was verified of the box it ran in. `shell` is told by `Sandbox.shell` only.
    """

    status: ExecStatus
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    stderr_bytes: int
    wall_s: float
    enforced: Enforced | None = None
    shell: ShellState | None = None

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
    runtime: str = "runc"  # of docker: "runc", "runsc" or a Kata runtime's name, as the engine knows it
    allow_insecure: bool = False


class Process(Protocol):
    """A program that runs while its owner talks to it. Its output waits in the box until it is read:
    a program that prints faster than it is read stands still, and costs no memory of the host.
    """

    async def write(self, data: bytes) -> None:
        """Hands over stdin, no faster than the program takes it. BrokenPipeError once it has ended."""
        ...

    async def close_stdin(self) -> None: ...

    async def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        """What has come of stdout (or stderr), at least one byte; b"" at its end. TimeoutError."""
        ...

    async def kill(self, number: int = 9) -> None:
        """A signal to the program; 9 ends it and all that it has started."""
        ...

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        """The outcome, once it has ended; stdout and stderr are empty: they were streamed. TimeoutError."""
        ...


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

    async def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        """`script` in a bash that stays: folder, variables and functions last until the next script.

        Sessions of different names know nothing of each other. What a script leaves running is killed at
        its end; with `is_background` jobs that are still children of the shell go on. A script that runs
        out of time ends its shell. See `ExecResult.shell`.
        """
        ...

    async def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Process:
        """Starts a program and returns at once. It may run beside commands, which leave it alone.

        `timeout_s` may be longer than the box's own limit for commands, which it is when not given. A
        program that cannot start is one whose `wait` says denied.
        """
        ...

    async def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        """The workspace as it is, while everything else in the box stands still.

        OSError (EFBIG) above `max_bytes` (twice what the workspace may hold), or when it cannot be read.
        """
        ...

    async def restore(self, snapshot: Snapshot) -> None:
        """`reset`, then the snapshot's files. ValueError for an archive that is none of ours; OSError."""
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

    async def reset(self) -> bool:
        """Kill what runs and empty what can be written, so that who comes next starts clean.

        Whether programs run as another user from here on. False where the box has one user only, or has no
        other left: whoever must not meet the user before then takes another box.
        """
        ...

    async def destroy(self) -> None: ...
