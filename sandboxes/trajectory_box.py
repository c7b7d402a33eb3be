"""A sandbox under a trajectory log: commands by number, each sent once; who asks again gets the answer.

    fast-forward  number n is in the log with its result: that is the answer, nothing runs
    reattach      number n was sent by this process and has not answered yet: wait for that one
    else          sent by a process that is gone, result unknown: again if idempotent, else OutcomeUnknown
    verify        a fresh box, all commands again, results compared (`verify`): for audits, not for training

A command that is not the one the log has under its number is TrajectoryDiverged, and nothing runs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consilience.conf.errors import OutcomeUnknown, SandboxLost, TrajectoryDiverged
from consilience.sandboxes.host_creation import Opener
from consilience.sandboxes.protocol import Enforced, ExecResult, Process, Sandbox, SandboxSpec, Snapshot
from consilience.sandboxes.trajectory import Entry, TrajectoryLog, hash_of, outcome_of, unplain, value_of
from consilience.sandboxes.trajectory_process import EndedProcess, LoggedProcess

REPEATABLE = (
    "read",
    "write",
    "snapshot",
    "restore",
)  # twice in a row they leave and answer what they would have once
_RUN_TO_RUN = (  # what may differ in the output of the same command
    (re.compile(rb"0x[0-9a-f]{6,16}\b"), b"0xADDRESS"),
    (re.compile(rb"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?\b"), b"TIME"),
    (re.compile(rb"\b\d{1,2}:\d\d:\d\d(\.\d+)?\b"), b"TIME"),
    (re.compile(rb"\b1[6-9]\d{8}(\.\d+)?\b"), b"TIME"),  # seconds since 1970
    (re.compile(rb"/tmp/tmp\.?\w{6,10}\b"), b"/tmp/NAME"),
    (re.compile(rb"\b(pid|PID)([ =:]+)\d+\b"), rb"\1\2PID"),
    (re.compile(rb"\b\d+(\.\d+)? ?(ms|s|seconds)\b"), b"SPAN"),
)


def logged(opener: Opener, folder: Path) -> Opener:
    """`opener`, whose boxes write their logs to `folder`, each to a folder named by its id."""

    async def opened(spec: SandboxSpec) -> Sandbox:
        box = await opener(spec)
        return LoggedSandbox(box, TrajectoryLog(folder / box.id))

    return opened


class LoggedSandbox:
    """`Sandbox` whose commands are numbered from 1 and logged. `next_number` is the one that comes next.

    After a restart of whoever asks, set `next_number` back to what it knows the results of, and ask again.
    """

    def __init__(self, box: Sandbox, log: TrajectoryLog) -> None:
        self.id, self.enforced = box.id, box.enforced
        self.log = log
        self.next_number = len(log.entries) + 1
        self._box = box
        self._running: dict[int, asyncio.Task[Any]] = {}
        self._programs: dict[int, asyncio.Task[Process]] = {}
        log.pin(_facts(box))

    def rewind(self, number: int = 1) -> None:
        """The next command is number `number`. ValueError beyond the end of the log."""
        if not 1 <= number <= len(self.log.entries) + 1:
            raise ValueError(f"number {number}; the log holds {len(self.log.entries)} commands")
        self.log.note("client goes on", number=number)
        self.next_number = number

    async def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        given = {"argv": argv, "stdin": stdin, "cwd": cwd, "env": env, "timeout_s": timeout_s}
        return await self._once("exec", given)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        return await self._once("run_python", {"code": code, "stdin": stdin, "timeout_s": timeout_s})

    async def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        given = {"script": script, "session": session, "timeout_s": timeout_s, "is_background": is_background}
        return await self._once("shell", given)

    async def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Process:
        """Started once: asked for again it is the same program while it lives, then its outcome alone.

        OutcomeUnknown where it was started by a process that is gone, and nobody had waited for its end.
        """
        given = {"argv": argv, "stdin": stdin, "cwd": cwd, "env": env, "timeout_s": timeout_s}
        number = self.next_number
        if number <= len(self.log.entries):
            entry = self._known(number, "spawn", given)
            if number not in self._programs:
                if entry.outcome is None:
                    raise self._unknown(entry)
                return EndedProcess(self._answer(entry))
        else:
            entry = self.log.intend("spawn", given, is_idempotent=False)
            self.next_number += 1
            self._programs[number] = asyncio.create_task(self._start(entry, given))
            self._programs[number].add_done_callback(_take_error)
        return await asyncio.shield(self._programs[number])

    async def _start(self, entry: Entry, given: Mapping[str, Any]) -> Process:
        try:
            inner = await self._box.spawn(**given)
        except SandboxLost as error:
            self.log.note("lost", number=entry.seq, why=str(error))
            raise
        return LoggedProcess(inner, lambda outcome: self.log.settle(entry, outcome_of(outcome)))

    async def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        return await self._once("snapshot", {"max_bytes": max_bytes})

    async def restore(self, snapshot: Snapshot) -> None:
        await self._once("restore", {"archive": snapshot.archive, "digest": snapshot.digest})

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return await self._once("read", {"path": path, "max_bytes": max_bytes})

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await self._once("write", {"path": path, "data": data, "mode": mode})

    async def reset(self) -> bool:
        """Not a command of the model's: it is noted, and the box is empty."""
        self.log.note("reset")
        return await self._box.reset()

    async def destroy(self) -> None:
        self.log.note("destroyed")
        self.log.close()
        await self._box.destroy()

    async def _once(self, op: str, args: Mapping[str, Any]) -> Any:
        number = self.next_number
        if number <= len(self.log.entries):
            entry = self._known(number, op, args)
            if entry.outcome is not None:
                return self._answer(entry)
            if number in self._running:
                return await asyncio.shield(self._running[number])
            if not entry.is_idempotent:
                raise self._unknown(entry)
        else:
            entry = self.log.intend(op, args, is_idempotent=op in REPEATABLE)
            self.next_number += 1
        self._running[number] = asyncio.create_task(self._run(entry, args))
        self._running[number].add_done_callback(_take_error)
        return await asyncio.shield(self._running[number])

    def _known(self, number: int, op: str, args: Mapping[str, Any]) -> Entry:
        entry = self.log.entries[number - 1]
        check_same(entry, op, args)
        self.next_number += 1
        return entry

    def _answer(self, entry: Entry) -> Any:
        assert entry.outcome is not None
        value = value_of(entry.outcome)
        return replace(value, enforced=self.enforced) if isinstance(value, ExecResult) else value

    def _unknown(self, entry: Entry) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"command {entry.seq} of {self.id} ({entry.op}) was sent by a process that is gone, its result "
            "was never seen; it is not run a second time"
        )

    async def _run(self, entry: Entry, args: Mapping[str, Any]) -> Any:
        try:
            value = await call(self._box, entry.op, args)
        except SandboxLost as error:
            self.log.note("lost", number=entry.seq, why=str(error))
            raise
        except OSError as error:  # the verb's own answer: no such file, no room
            self.log.settle(entry, outcome_of(error))
            raise
        else:
            self.log.settle(entry, outcome_of(value))
            return value
        finally:
            self._running.pop(entry.seq, None)


def _take_error(task: asyncio.Task[Any]) -> None:
    """An error that nobody waits for any more is in the log, and is not reported."""
    if not task.cancelled():
        task.exception()  # no limit: it is done


async def call(box: Sandbox, op: str, args: Mapping[str, Any]) -> Any:
    """One verb by its logged name and arguments."""
    if op == "exec":
        return await box.exec(**args)
    if op == "run_python":
        return await box.run_python(**args)
    if op == "shell":
        return await box.shell(**args)
    if op == "read":
        return await box.read(**args)
    if op == "snapshot":
        return await box.snapshot(**args)
    if op == "restore":
        return await box.restore(Snapshot(args["digest"], args["archive"], 0))
    return await box.write(**args)


def check_same(entry: Entry, op: str, args: Mapping[str, Any]) -> None:
    """TrajectoryDiverged unless the log's command is this one."""
    if hash_of(op, args) != entry.args_hash:
        raise TrajectoryDiverged(
            f"command {entry.seq} is {op} {_short(args)} now, the log has {entry.op} {_short(entry.args)}; "
            "nothing was run"
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of one command's outcome that was not the same again."""

    seq: int
    field: str
    then: Any
    now: Any


async def verify(log: TrajectoryLog, opener: Opener, spec: SandboxSpec) -> list[Difference]:
    """Runs the logged commands again in a fresh box; what differs, `normalized`. The log stays as it is.

    Wall times are not compared. Commands whose result is not known are not run, nor are streamed programs:
    what they were told is not in the log.
    """
    box = await opener(spec)
    found: list[Difference] = []
    try:
        for entry in log.entries:
            if entry.outcome is None or entry.op == "spawn":
                continue
            try:
                now = outcome_of(await call(box, entry.op, unplain(entry.args)))
            except OSError as error:
                now = outcome_of(error)
            names = [name for name in sorted({*entry.outcome, *now}) if name != "wall_s"]
            for name in names:
                then, again = normalized(entry.outcome.get(name)), normalized(now.get(name))
                is_length = name.endswith("_bytes") and name[:6] in ("stdout", "stderr")
                if then != again and not is_length:  # such texts differ themselves
                    found.append(Difference(entry.seq, name, then, again))
    finally:
        await box.destroy()
    return found


def normalized(value: Any) -> Any:
    """Output without what differs from run to run: addresses, times, process ids, temporary names."""
    if isinstance(value, bytes):
        for pattern, name in _RUN_TO_RUN:
            value = pattern.sub(name, value)
    return value


def _facts(box: Sandbox) -> dict[str, Any]:
    enforced: Enforced = box.enforced
    names = ("driver", "runtime", "network", "seccomp", "memory_cap", "process_cap")
    return {"box": box.id, "level": enforced.level.label, **{name: getattr(enforced, name) for name in names}}


def _short(args: Mapping[str, Any]) -> str:
    return repr(dict(args))[:120]
