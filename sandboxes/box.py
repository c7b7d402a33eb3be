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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.archive import make_snapshot
from consilience.sandboxes.channel import Channel
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Limits, ShellState, Snapshot
from consilience.sandboxes.streamed import CHUNK_BYTES, Feeder, RunnerProcess

START_TIMEOUT_S = 30.0  # a loaded laptop; a start takes 0.03 s where nothing else runs
FILE_TIMEOUT_S = 10.0
PACK_TIMEOUT_S = 60.0
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
UIDS_PER_BOX = 64  # one for each time that a box is emptied
_CPU_SIGNALS = (-24, -9)  # SIGXCPU, and SIGKILL a second later for those that ignore it
_SIZE_SIGNALS = (-25,)  # SIGXFSZ


def new_uids(among: range = MODEL_UIDS) -> range:
    """User ids no other box has, the one to begin with first: they keep signals, process counts and key rings
    apart, and in one box those who use it after each other."""
    first = random.SystemRandom().choice(among[::UIDS_PER_BOX])
    return range(first, first + UIDS_PER_BOX)


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
        uids: Sequence[int] = (),
    ) -> None:
        """`uids` are those its programs may run as, in this order; none: always as the same user."""
        self.id = name
        self.enforced = enforced
        self.limits = limits
        self._channel = channel
        self._count_kills = count_kills
        self._kills: dict[str, int] = {}
        self._next_uids = iter(uids[1:])
        self._turn = asyncio.Lock()  # commands one after the other; streamed programs beside them

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
        request = _command("exec", argv, cwd, env)
        if refusal := _refuse([*argv, *request["env"], *request["env"].values(), cwd or ""]):
            return self._denied(refusal)
        return await self._run(request, timeout_s, stdin)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        """See `Sandbox.run_python`."""
        try:
            text = code.encode()
        except UnicodeEncodeError as error:
            return self._denied(f"the program is not valid text ({error})")
        request = {"verb": "python", "code_bytes": len(text)}
        return await self._run(request, timeout_s, text + stdin)

    async def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        """See `Sandbox.shell`. ValueError for a session without a name."""
        if not session:
            raise ValueError("session is empty; give the shell a name")
        if refusal := _refuse([script, session]):
            return self._denied(refusal)
        request = {"verb": "shell", "session": session, "background": is_background}
        return await self._run(request, timeout_s, script.encode("utf-8", "surrogateescape"))

    async def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> RunnerProcess:
        """See `Sandbox.spawn`. Errors as `exec`, but for what a program can cause: `wait` tells that."""
        request = _command("spawn", argv, cwd, env)
        words = [*argv, *request["env"], *request["env"].values(), cwd or ""]
        if refusal := _refuse(words):
            request = {**request, "argv": ["/"], "env": {}, "cwd": None}  # cannot be started either
            denied = self._denied(refusal)
            return await self._start(request, b"", timeout_s, judge=lambda *_: denied, has_more=True)
        return await self._start(request, stdin, timeout_s, has_more=True)

    async def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        """See `Sandbox.snapshot`."""
        limit = 2 * self.limits.workspace_bytes if max_bytes is None else max_bytes
        data = bytearray()
        async with self._turn:  # no limit: each command before has one
            process = await self._start({"verb": "pack"}, b"", PACK_TIMEOUT_S)
            while chunk := await process.read(timeout_s=PACK_TIMEOUT_S + FILE_TIMEOUT_S):
                data += chunk
                if len(data) > limit:
                    await process.kill()
                    await process.wait(FILE_TIMEOUT_S)
                    raise OSError(errno.EFBIG, f"the workspace packs to over {limit} bytes", self.id)
            ended = await process.wait(FILE_TIMEOUT_S)
            said = await process.read(is_stderr=True, timeout_s=FILE_TIMEOUT_S)
        if not ended.is_ok:
            raise OSError(errno.EIO, f"the workspace cannot be packed ({ended.status}): {_last_line(said)}")
        try:
            return await asyncio.to_thread(make_snapshot, bytes(data))
        except ValueError as error:
            raise OSError(errno.EIO, f"the workspace cannot be packed: {error}") from None

    async def restore(self, snapshot: Snapshot) -> None:
        """See `Sandbox.restore`. OSError (ENOSPC…) leaves an empty workspace."""
        checked = await asyncio.to_thread(make_snapshot, snapshot.archive)
        if checked.digest != snapshot.digest:
            raise ValueError(f"the archive is {checked.digest}, the snapshot says {snapshot.digest}")
        await self.reset()
        async with self._turn:  # no limit: each command before has one
            process = await self._start({"verb": "unpack"}, snapshot.archive, PACK_TIMEOUT_S)
            ended = await process.wait(PACK_TIMEOUT_S + FILE_TIMEOUT_S)
            said = await process.read(is_stderr=True, timeout_s=FILE_TIMEOUT_S)
        if not ended.is_ok:
            await self.reset()
            number = errno.ENOSPC if ended.status is ExecStatus.DISK else errno.EIO
            raise OSError(number, f"no room for the snapshot ({ended.status}): {_last_line(said)}", self.id)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        request = {"verb": "read", "path": path, "max_bytes": max_bytes}
        reply, data = await self._channel.call(request, timeout_s=FILE_TIMEOUT_S)
        _raise_os_error(reply, path)
        return data

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        request = {"verb": "write", "path": path, "mode": mode}
        reply, _ = await self._channel.call(request, data, timeout_s=FILE_TIMEOUT_S)
        _raise_os_error(reply, path)

    async def reset(self) -> bool:
        """See `Sandbox.reset`. SandboxLost (and the box is killed) if it cannot be brought back to empty."""
        uid = next(self._next_uids, None)
        request = {"verb": "reset"} if uid is None else {"verb": "reset", "uid": uid}
        async with self._turn:  # no limit: each command before has one
            reply, _ = await self._channel.call(request, timeout_s=FILE_TIMEOUT_S)
        if reply.get("clean") is not True:
            await self._channel.abandon(f"reset left something behind: {reply.get('text', 'a process')}")
            raise SandboxLost(f"{self.id} is gone: {self._channel.lost}")
        return uid is not None

    async def ping(self) -> None:
        await self._channel.call({"verb": "ping"}, timeout_s=FILE_TIMEOUT_S)

    async def destroy(self) -> None:
        await self._channel.abandon("it was destroyed")

    async def _run(self, request: dict[str, Any], timeout_s: float | None, data: bytes) -> ExecResult:
        _check_timeout(timeout_s)
        limit_s = self.limits.wall_s if timeout_s is None else min(timeout_s, self.limits.wall_s)
        is_fed = request["verb"] != "shell"  # a script goes whole; input as the program takes it
        first, rest = (data[:CHUNK_BYTES], data[CHUNK_BYTES:]) if is_fed else (data, b"")
        header = {**request, "timeout_s": limit_s, "more": bool(rest)}
        async with self._turn:  # no limit: each command before has one
            began = time.monotonic()
            try:
                reply, blob = await self._exchange(header, first, rest, limit_s)
            except SandboxLost:
                before, self._kills = self._kills, dict(self._count_kills())
                if self._kills.get("oom", 0) > before.get("oom", 0):  # it made the kernel choose the runner
                    wall_s = time.monotonic() - began
                    return ExecResult(ExecStatus.OOM, None, b"", b"", 0, 0, wall_s, self.enforced)
                raise
            except asyncio.CancelledError:
                await asyncio.shield(self._channel.abandon("its request was cancelled"))
                raise
            if "errno" in reply:
                if reply["errno"] == errno.EAGAIN and request["verb"] == "shell":
                    return self._denied(reply["text"])
                await self._lose(f"the runner could not start a command: {reply['text']}")
            if reply["clean"] is not True:
                await self._lose("a process of it cannot be killed")
            return self._judge(reply, blob)

    async def _exchange(
        self, header: dict[str, Any], first: bytes, rest: bytes, limit_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply, with what does not fit the request sent after it as the program takes it."""
        feeder = Feeder(self._channel)
        feeder.count_sent(len(first))
        request = await self._channel.begin(
            header, first, timeout_s=limit_s, on_event=lambda event, _: feeder.on_taken(event["bytes"])
        )
        if not rest:
            return await self._channel.finish(request, limit_s)
        feeding = asyncio.create_task(feeder.send(request.id, rest, is_last=True))
        try:
            return await self._channel.finish(request, limit_s)
        finally:
            feeder.stop()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _start(
        self,
        request: dict[str, Any],
        stdin: bytes,
        timeout_s: float | None,
        *,
        judge: Callable[[dict[str, Any], int, int], ExecResult] | None = None,
        has_more: bool = False,
    ) -> RunnerProcess:
        _check_timeout(timeout_s)
        limit_s = self.limits.wall_s if timeout_s is None else timeout_s
        process = RunnerProcess(self._channel, judge or self._judge_streamed)
        await process.start(request, stdin, has_more=has_more, timeout_s=limit_s)
        return process

    async def _lose(self, reason: str) -> None:
        await self._channel.abandon(reason)
        raise SandboxLost(f"{self.id} is gone: {self._channel.lost}")

    def _judge_streamed(self, report: dict[str, Any], num_stdout: int, num_stderr: int) -> ExecResult:
        if "cpu_s" not in report:  # it was refused a start
            return self._denied(report["failure"]["text"])
        kept = {"stdout_bytes": 0, "stderr_bytes": 0, "stdout_kept": 0, "shell": None, "is_broken": False}
        outcome = self._judge({**report, **kept}, b"")
        return replace(outcome, stdout_bytes=num_stdout, stderr_bytes=num_stderr)

    def _judge(self, reply: dict[str, Any], blob: bytes) -> ExecResult:
        kills = {**reply["counters"], **self._count_kills()}
        grown = {name for name, number in kills.items() if number > self._kills.get(name, 0)}
        self._kills = kills
        return replace(_result(reply, blob, grown, self.limits), enforced=self.enforced)

    def _denied(self, reason: str) -> ExecResult:
        return replace(_denied(reason), enforced=self.enforced)


def _command(verb: str, argv: list[str], cwd: str | None, env: dict[str, str] | None) -> dict[str, Any]:
    if not argv or not all(isinstance(word, str) for word in argv):
        raise ValueError(f"argv is {argv!r}; it must be a non-empty list of strings")
    return {"verb": verb, "argv": list(argv), "env": env or {}, "cwd": cwd}


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be above 0")


def _last_line(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace").strip().rpartition("\n")[2][:200]


def _result(reply: dict[str, Any], blob: bytes, grown: set[str], limits: Limits) -> ExecResult:
    exit_code, failure = reply["exit"], reply["failure"]
    is_capped = max(reply["stdout_bytes"], reply["stderr_bytes"]) > limits.output_bytes
    stderr = blob[reply["stdout_kept"] :]
    # the limit counts ticks, the report exact time: they differ where many share a processor
    is_out_of_cpu = exit_code in _CPU_SIGNALS and reply["cpu_s"] > 0.5 * limits.cpu_s
    if failure is not None:
        return _denied(f"cannot start: {failure['text']}", wall_s=reply["wall_s"], number=failure["errno"])
    checks = [
        (ExecStatus.OOM, "oom" in grown and exit_code != 0),
        (ExecStatus.OUTPUT_CAPPED, is_capped),
        (ExecStatus.PROTOCOL_ERROR, reply["is_broken"]),
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
        shell=ShellState(reply["shell"]) if reply["shell"] else None,
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
