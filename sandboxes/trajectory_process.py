"""Streamed programs under a trajectory log: started once, their outcome written down when somebody hears it.

What a program prints and is told is not in the log: it can be attached to while it lives, and asked for its
outcome afterwards, but what one reader has taken the next does not get.
"""

from __future__ import annotations

from collections.abc import Callable

from consilience.sandboxes.protocol import ExecResult, Process


class LoggedProcess:
    """`Process` that calls `settle` with its outcome, before whoever waits for it sees it, once."""

    def __init__(self, inner: Process, settle: Callable[[ExecResult], None]) -> None:
        self._inner = inner
        self._settle: Callable[[ExecResult], None] | None = settle

    async def write(self, data: bytes) -> None:
        await self._inner.write(data)

    async def close_stdin(self) -> None:
        await self._inner.close_stdin()

    async def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        return await self._inner.read(max_bytes, is_stderr=is_stderr, timeout_s=timeout_s)

    async def kill(self, number: int = 9) -> None:
        await self._inner.kill(number)

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        outcome = await self._inner.wait(timeout_s)
        settle, self._settle = self._settle, None
        if settle is not None:
            settle(outcome)
        return outcome


class EndedProcess:
    """`Process` of which the outcome alone is left."""

    def __init__(self, outcome: ExecResult) -> None:
        self._outcome = outcome

    async def write(self, data: bytes) -> None:
        raise BrokenPipeError("the program has ended")

    async def close_stdin(self) -> None:
        pass

    async def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        return b""

    async def kill(self, number: int = 9) -> None:
        pass

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        return self._outcome
