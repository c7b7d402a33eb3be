"""The box a reward function judges in: another one for each grading, so that none meets what another left.

A grading has a uid, namespaces and a runner process of its own, because it has a box of its own; the next
one is opened while it runs. Where opening costs too much (a container: half a second), several gradings may
follow each other in one box: everything of the last one is killed, all that can be written is emptied, and
the next runs as another user. A box that has one user only serves one grading. After any abnormal outcome
it is thrown away at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation, Limits, SandboxSpec

ORDINARY = (ExecStatus.OK, ExecStatus.NONZERO)


class JudgeBox:
    """A place as the score function's `sandbox`: exec, run_python, read, write, all blocking.

    It notes every abnormal outcome (`is_soiled`); the owner then calls `renew`. `begin` gives the next
    grading a fresh box if the last one used this, or empties it while it may serve more, as another user.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        end: Callable[[Any], None] | None = None,
        *,
        gradings_per_box: int = 1,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` opens a box, `end` gives one back (None: it is destroyed)."""
        if gradings_per_box < 1:
            raise ValueError(f"gradings_per_box is {gradings_per_box}; it must be at least 1")
        self._start, self._end, self._on_close = start, end or (lambda box: box.destroy()), on_close
        self._gradings_per_box, self._num_gradings = gradings_per_box, 0
        self._box: Any = start()
        self._is_used = False
        self.is_soiled = False

    @classmethod
    def open(cls, spec: SandboxSpec, gradings_per_box: int = 1) -> JudgeBox:
        """SandboxUnavailable when this machine has no box as strong as `spec` asks for."""
        from consilience.sandboxes.blocking import OPEN_LIMIT_S, BlockingPool

        # the pool's other box is opened while this one is used; no box is leased twice
        pool = BlockingPool(spec, 2, uses_per_box=1, lease_limit_s=OPEN_LIMIT_S)
        try:
            return cls(pool.lease, pool.release, gradings_per_box=gradings_per_box, on_close=pool.close)
        except BaseException:
            pool.close()
            raise

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
        """Start of a grading: an empty workspace, in a box of its own or one that may serve more."""
        if not self._is_used:
            return
        self._num_gradings += 1
        if self._num_gradings >= self._gradings_per_box or not self._box.reset():
            self.renew()
        self._is_used = False

    def empty(self) -> None:
        """Between two cases of one grading: nothing runs or lies here any more, and another user comes, where
        the box has one left. A box whose last outcome was abnormal stays as it is: its owner ends it."""
        if self._is_used and not self.is_soiled:
            self._box.reset()

    def renew(self, *, is_lost: bool = False) -> None:
        """Another box in place of this one. SandboxUnavailable, SandboxLost if none can be had."""
        self._give_back()
        self._box = self._start()
        self._is_used = self.is_soiled = False
        self._num_gradings = 0

    def close(self) -> None:
        self._give_back()
        self._on_close()

    def _give_back(self) -> None:
        with suppress(SandboxLost):
            self._end(self._box)

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
