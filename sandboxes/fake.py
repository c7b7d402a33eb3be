"""A sandbox in memory, for tests of what uses one: files are a dict, commands are scripted."""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import replace

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation, ShellState, Snapshot

Script = Callable[[list[str], bytes, dict[str, bytes]], ExecResult | bytes]
_numbers = itertools.count()
ENFORCED = Enforced(Isolation.NONE, "fake", "memory", False, False, "none", "none", ("runs nothing",))


def result(
    stdout: bytes = b"", *, stderr: bytes = b"", exit_code: int | None = 0, status: ExecStatus | None = None
) -> ExecResult:
    """An ExecResult whose status follows from the exit code unless it is given."""
    implied = ExecStatus.TIMEOUT if exit_code is None else ExecStatus.NONZERO if exit_code else ExecStatus.OK
    return ExecResult(status or implied, exit_code, stdout, stderr, len(stdout), len(stderr), 0.0)


class FakeSandbox:
    """`Sandbox` whose programs are `script(argv, stdin, files)`, which may change `files`.

    The script answers with an ExecResult or with stdout. `run_python(code)` calls it with
    `["python", code]`. Every call is kept in `calls`. `lose()` makes each later verb raise
    SandboxLost, as a box does whose runner died.
    """

    def __init__(
        self, script: Script = lambda argv, stdin, files: b"", *, files: Mapping[str, bytes] | None = None
    ) -> None:
        self.id = f"box-fake-{next(_numbers)}"
        self.enforced = ENFORCED
        self.files: dict[str, bytes] = dict(files or {})
        self.calls: list[tuple[list[str], bytes]] = []
        self.num_resets, self.is_reusable = 0, True
        self._script = script
        self._sessions: set[str] = set()
        self._lost: str | None = None

    async def exec(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> ExecResult:
        self._check()
        if not argv:
            raise ValueError(f"argv is {argv!r}; it must be a non-empty list of strings")
        self.calls.append((list(argv), stdin))
        answer = self._script(list(argv), stdin, self.files)
        outcome = answer if isinstance(answer, ExecResult) else result(answer)
        return replace(outcome, enforced=self.enforced)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        return await self.exec(["python", code], stdin=stdin, timeout_s=timeout_s)

    async def shell(
        self,
        script: str,
        *,
        session: str = "main",
        timeout_s: float | None = None,
        is_background: bool = False,
    ) -> ExecResult:
        """The script function's answer to `["shell", session, script]`."""
        is_new = session not in self._sessions
        self._sessions.add(session)
        outcome = await self.exec(["shell", session, script], timeout_s=timeout_s)
        return replace(outcome, shell=ShellState.NEW if is_new else ShellState.KEPT)

    async def spawn(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> FakeProcess:
        """A program that reads all of its input, then answers as `exec` would."""
        self._check()
        return FakeProcess(self, argv, stdin)

    async def snapshot(self, *, max_bytes: int | None = None) -> Snapshot:
        self._check()
        archive = json.dumps([[name, data.hex()] for name, data in sorted(self.files.items())]).encode()
        if max_bytes is not None and len(archive) > max_bytes:
            raise OSError(27, f"the workspace packs to over {max_bytes} bytes", self.id)
        return Snapshot(hashlib.sha256(archive).hexdigest(), archive, len(self.files))

    async def restore(self, snapshot: Snapshot) -> None:
        """Of a snapshot that another FakeSandbox made."""
        await self.reset()
        self.files.update((name, bytes.fromhex(data)) for name, data in json.loads(snapshot.archive))

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._check()
        name = _inside(path)
        if name not in self.files:
            raise FileNotFoundError(2, "no such file", path)
        if len(self.files[name]) > max_bytes:
            raise OSError(27, f"it holds {len(self.files[name])} bytes, max_bytes is {max_bytes}", path)
        return self.files[name]

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._check()
        self.files[_inside(path)] = bytes(data)

    async def reset(self) -> bool:
        """See `Sandbox.reset`; `is_reusable` says whether another user comes."""
        self._check()
        self.files.clear()
        self._sessions.clear()
        self.num_resets += 1
        return self.is_reusable

    async def destroy(self) -> None:
        self._lost = self._lost or "it was destroyed"

    def lose(self, reason: str = "it ended") -> None:
        """From now on the box is gone."""
        self._lost = reason

    def with_level(self, level: Isolation) -> FakeSandbox:
        """The same box, claiming another isolation level (for tests of what records it)."""
        self.enforced = replace(self.enforced, level=level)
        return self

    def _check(self) -> None:
        if self._lost is not None:
            raise SandboxLost(f"{self.id} is gone: {self._lost}")


class FakeProcess:
    """`Process` of a FakeSandbox: it runs when its input is closed or somebody waits for its output."""

    def __init__(self, box: FakeSandbox, argv: list[str], stdin: bytes) -> None:
        self._box, self._argv, self._stdin = box, argv, stdin
        self._outcome: ExecResult | None = None
        self._left = {False: b"", True: b""}

    async def _run(self) -> ExecResult:
        if self._outcome is None:
            self._outcome = await self._box.exec(self._argv, stdin=self._stdin)
            self._left = {False: self._outcome.stdout, True: self._outcome.stderr}
        return self._outcome

    async def write(self, data: bytes) -> None:
        if self._outcome is not None:
            raise BrokenPipeError("the program has ended")
        self._stdin += data

    async def close_stdin(self) -> None:
        await self._run()

    async def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        await self._run()
        data, self._left[is_stderr] = self._left[is_stderr][:max_bytes], self._left[is_stderr][max_bytes:]
        return data

    async def kill(self, number: int = 9) -> None:
        if self._outcome is None:
            self._outcome = result(exit_code=-number, status=ExecStatus.NONZERO)

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        return replace(await self._run(), stdout=b"", stderr=b"")


def _inside(path: str) -> str:
    relative = path.removeprefix("/workspace/")
    name = posixpath.normpath(relative)
    if relative.startswith("/") or ".." in relative.split("/") or name in (".", ""):
        raise PermissionError(1, "the path leaves the workspace", path)
    return name
