"""A sandbox as a runner on a channel: what every driver hands out, whatever started the runner."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.channel import Channel
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Limits

START_TIMEOUT_S = 30.0  # a loaded laptop; a start takes 0.03 s where nothing else runs
FILE_TIMEOUT_S = 10.0
MAX_COMMAND_BYTES = 1 << 20  # argv and environment together; Linux itself refuses about 2 MiB
MODEL_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/workspace",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "SOURCE_DATE_EPOCH": "0",
}
OOM_SCORE = 500  # of the whole box: it goes before the harness does, and nothing inside may go lower
MODEL_UIDS = range(0x70000000, 0x71000000)  # above what systemd and subuid files hand out
_CPU_SIGNALS = (-24, -9)  # SIGXCPU, and SIGKILL a second later for those that ignore it
_SIZE_SIGNALS = (-25,)  # SIGXFSZ


def new_uid() -> int:
    """A user id no other box has: it keeps signals, process counts and key rings apart."""
    return random.SystemRandom().choice(MODEL_UIDS)


def new_box_id() -> str:
    return f"box-{uuid.uuid4().hex[:12]}"


@cache
def find_python() -> tuple[str, str | None]:
    """The interpreter inside, and the folder it needs besides /usr (None where /usr has one)."""
    for name in ("/usr/bin/python3", "/usr/local/bin/python3"):
        real = os.path.realpath(name)
        digits = real.rpartition("python3.")[2]
        if os.access(real, os.X_OK) and digits.isdigit() and int(digits) >= 10 and real.startswith("/usr/"):
            return real, None
    real = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return real, None if real.startswith("/usr/") else sys.base_prefix


def settings(
    limits: Limits, *, uid: int | None, nice: int, rlimit_memory: bool, rlimit_processes: bool, **more: Any
) -> dict[str, Any]:
    """The runner's `configure` request. `uid` None: commands run as the runner's own user."""
    cpu_s = max(1, math.ceil(limits.cpu_s))
    rlimits = {"CORE": 0, "FSIZE": limits.file_bytes, "NOFILE": 256, "MEMLOCK": 1 << 16}
    if rlimit_memory:
        rlimits |= {"AS": limits.memory_bytes, "DATA": limits.memory_bytes}
    if rlimit_processes:
        rlimits["NPROC"] = limits.processes
    base = {
        "verb": "configure",
        "workspace": "/workspace",
        "writable": ["/workspace", "/tmp", "/dev/shm"],
        "uid": uid,
        "env": MODEL_ENV,
        "rlimits": {name: [value, value] for name, value in rlimits.items()} | {"CPU": [cpu_s, cpu_s + 1]},
        "nice": nice,
        "output_bytes": limits.output_bytes,
        "die_with_parent": True,
        "counters": [],
    }
    return {**base, **more}


class RunnerSandbox:
    """`Sandbox` over a runner. `count_kills` reads the box's cgroup counters {"oom", "pids"}."""

    def __init__(
        self,
        name: str,
        channel: Channel,
        limits: Limits,
        enforced: Enforced,
        *,
        count_kills: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.id = name
        self.enforced = enforced
        self.limits = limits
        self._channel = channel
        self._count_kills = count_kills
        self._kills: dict[str, int] = {}

    async def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        """Runs a program in the workspace. `env` is laid over a small fixed environment.

        The time limit is the smaller of `timeout_s` and the box's own. ValueError for an empty argv
        or what is not text; SandboxLost when the box is gone.
        """
        if not argv or not all(isinstance(word, str) for word in argv):
            raise ValueError(f"argv is {argv!r}; it must be a non-empty list of strings")
        env = env or {}
        words = [*argv, *env, *env.values(), cwd or ""]
        if refusal := _refuse(words):
            return _denied(refusal)
        request = {"verb": "exec", "argv": list(argv), "env": env, "cwd": cwd}
        return await self._run(request, timeout_s, stdin)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        """See `Sandbox.run_python`."""
        try:
            text = code.encode()
        except UnicodeEncodeError as error:
            return _denied(f"the program is not valid text ({error})")
        request = {"verb": "python", "code_bytes": len(text)}
        return await self._run(request, timeout_s, text, stdin)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        request = {"verb": "read", "path": path, "max_bytes": max_bytes}
        reply, data = await self._channel.call(request, timeout_s=FILE_TIMEOUT_S)
        _raise_os_error(reply, path)
        return data

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        request = {"verb": "write", "path": path, "mode": mode}
        reply, _ = await self._channel.call(request, data, timeout_s=FILE_TIMEOUT_S)
        _raise_os_error(reply, path)

    async def reset(self) -> None:
        """SandboxLost (and the box is killed) if it cannot be brought back to empty."""
        reply, _ = await self._channel.call({"verb": "reset"}, timeout_s=FILE_TIMEOUT_S)
        if reply.get("clean") is not True:
            await self._channel.abandon(f"reset left something behind: {reply.get('text', 'a process')}")
            raise SandboxLost(f"{self.id} is gone: {self._channel.lost}")

    async def ping(self) -> None:
        await self._channel.call({"verb": "ping"}, timeout_s=FILE_TIMEOUT_S)

    async def destroy(self) -> None:
        await self._channel.abandon("it was destroyed")

    async def _run(self, request: dict[str, Any], timeout_s: float | None, *blobs: bytes) -> ExecResult:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be above 0")
        limit_s = self.limits.wall_s if timeout_s is None else min(timeout_s, self.limits.wall_s)
        began = time.monotonic()
        try:
            reply, blob = await self._channel.call(
                {**request, "timeout_s": limit_s}, *blobs, timeout_s=limit_s
            )
        except SandboxLost:
            before, self._kills = self._kills, dict(self._count_kills())
            if self._kills.get("oom", 0) > before.get("oom", 0):  # it made the kernel choose the runner
                wall_s = time.monotonic() - began
                return ExecResult(ExecStatus.OOM, None, b"", b"", 0, 0, wall_s)
            raise
        if "errno" in reply:
            await self._channel.abandon(f"the runner could not start a command: {reply['text']}")
            raise SandboxLost(f"{self.id} is gone: {self._channel.lost}")
        if reply["clean"] is not True:
            await self._channel.abandon("a process of it cannot be killed")
            raise SandboxLost(f"{self.id} is gone: {self._channel.lost}")
        kills = {**reply["counters"], **self._count_kills()}
        grown = {name for name, number in kills.items() if number > self._kills.get(name, 0)}
        self._kills = kills
        return _result(reply, blob, grown, self.limits)


def _result(reply: dict[str, Any], blob: bytes, grown: set[str], limits: Limits) -> ExecResult:
    exit_code, failure = reply["exit"], reply["failure"]
    is_capped = max(reply["stdout_bytes"], reply["stderr_bytes"]) > limits.output_bytes
    stderr = blob[reply["stdout_kept"] :]
    is_out_of_cpu = exit_code in _CPU_SIGNALS and reply["cpu_s"] > 0.9 * limits.cpu_s
    if failure is not None:
        return _denied(f"cannot start: {failure['text']}", wall_s=reply["wall_s"], number=failure["errno"])
    checks = [
        (ExecStatus.OOM, "oom" in grown and exit_code != 0),
        (ExecStatus.OUTPUT_CAPPED, is_capped),
        (ExecStatus.DISK, reply["is_flooded"]),
        (ExecStatus.TIMEOUT, exit_code is None or is_out_of_cpu),
        (ExecStatus.PIDS, "pids" in grown and exit_code != 0),
        (ExecStatus.DISK, exit_code != 0 and (reply["is_full"] or exit_code in _SIZE_SIGNALS)),
        (ExecStatus.NONZERO, exit_code != 0),
        (ExecStatus.OK, True),
    ]
    return ExecResult(
        status=next(status for status, applies in checks if applies),
        exit_code=exit_code,
        stdout=blob[: reply["stdout_kept"]],
        stderr=stderr,
        stdout_bytes=reply["stdout_bytes"],
        stderr_bytes=reply["stderr_bytes"],
        wall_s=reply["wall_s"],
    )


def _refuse(words: list[str]) -> str | None:
    """Why a command cannot even be sent, from what a model wrote: never an exception."""
    try:
        sizes = [len(os.fsencode(word)) + 1 for word in words]
    except UnicodeEncodeError as error:
        return f"an argument is not valid text ({error})"
    if sum(sizes) > MAX_COMMAND_BYTES:
        return f"arguments and environment hold {sum(sizes)} bytes; {MAX_COMMAND_BYTES} are allowed"
    return "an argument holds a NUL byte" if any("\0" in word for word in words) else None


def _denied(reason: str, *, wall_s: float = 0.0, number: int = 0) -> ExecResult:
    """A command that never ran; 127 where there is no such program, else 126, as a shell says it."""
    text = reason.encode("utf-8", "backslashreplace")
    exit_code = 127 if number == errno.ENOENT else 126
    return ExecResult(ExecStatus.DENIED, exit_code, b"", text, 0, len(text), wall_s)


def _raise_os_error(reply: dict[str, Any], path: str) -> None:
    if "errno" not in reply:
        return
    number, text = reply["errno"], reply["text"]
    if number in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EINVAL):
        number, text = errno.EPERM, f"{text}; only regular files without links on the way are reached"
    raise OSError(number, text, path)


async def wait_for_exit(poll: Callable[[], int | None], *, patience_s: float = 5.0) -> None:
    """Waits until `poll()` gives an exit status, so that nothing of the box is left unreaped."""
    delay_s, waited_s = 0.001, 0.0
    while poll() is None and waited_s < patience_s:
        await asyncio.sleep(delay_s)
        waited_s += delay_s
        delay_s = min(2 * delay_s, 0.05)
