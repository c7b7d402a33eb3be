"""The box a reward function judges in: clean at the start of each call, replaced after trouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation, Limits, SandboxSpec

ORDINARY = (ExecStatus.OK, ExecStatus.NONZERO)


class JudgeBox:
    """A held box as the score function's `sandbox`: exec, run_python, read, write, all blocking.

    It notes every abnormal outcome (`is_soiled`); the owner then calls `renew`, so that no candidate
    meets what another left behind. `begin` empties the workspace if the last call wrote into it.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        """`start` opens a box; it is called again by `renew`."""
        self._start = start
        self._box: Any = start()
        self._is_used = False
        self.is_soiled = False

    @classmethod
    def open(cls, spec: SandboxSpec) -> JudgeBox:
        """SandboxUnavailable when this machine has no box as strong as `spec` asks for."""
        from consilience.sandboxes.blocking import open_blocking

        return cls(lambda: open_blocking(spec))

    @property
    def id(self) -> str:
        return self._box.id

    @property
    def enforced(self) -> Enforced:
        return self._box.enforced

    @property
    def label(self) -> str:
        """The isolation level really enforced ("bwrap_user")."""
        return self.enforced.level.label

    def begin(self) -> None:
        """Start of a call: an empty workspace."""
        if self._is_used:
            self._box.reset()
            self._is_used = False

    def renew(self, *, is_lost: bool = False) -> None:
        """Another box in place of this one. SandboxUnavailable, SandboxLost if none can be had."""
        if not is_lost:
            self.close()
        self._box = self._start()
        self._is_used = self.is_soiled = False

    def close(self) -> None:
        with suppress(SandboxLost):
            self._box.destroy()

    def exec(self, argv: list[str], **options: Any) -> ExecResult:
        return self._noted(self._box.exec(argv, **options))

    def run_python(self, code: str, *, stdin: bytes = b"", timeout_s: float | None = None) -> ExecResult:
        return self._noted(self._box.run_python(code, stdin=stdin, timeout_s=timeout_s))

    def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return self._box.read(path, max_bytes=max_bytes)

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._is_used = True
        self._box.write(path, data, mode=mode)

    def _noted(self, result: ExecResult) -> ExecResult:
        self._is_used = True
        self.is_soiled |= result.status not in ORDINARY
        return result


def spec_to_dict(spec: SandboxSpec) -> dict[str, Any]:
    """JSON-plain form; `spec_from_dict` is its inverse."""
    return {**asdict(spec), "min_isolation": spec.min_isolation.label}


def spec_from_dict(row: Mapping[str, Any]) -> SandboxSpec:
    level = Isolation[str(row["min_isolation"]).upper()]
    return SandboxSpec(**{**row, "min_isolation": level, "limits": Limits(**row["limits"])})
