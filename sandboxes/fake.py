"""A sandbox in memory, for tests of what uses one: files are a dict, commands are scripted."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import replace

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation

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
        self.num_resets = 0
        self._script = script
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
        return answer if isinstance(answer, ExecResult) else result(answer)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> ExecResult:
        return await self.exec(["python", code], stdin=stdin, timeout_s=timeout_s)

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

    async def reset(self) -> None:
        self._check()
        self.files.clear()
        self.num_resets += 1

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


def _inside(path: str) -> str:
    relative = path.removeprefix("/workspace/")
    name = posixpath.normpath(relative)
    if relative.startswith("/") or ".." in relative.split("/") or name in (".", ""):
        raise PermissionError(1, "the path leaves the workspace", path)
    return name
