"""What waits, how long at most, and what was done where that was not enough.

a wait ─► its limit ─► over it: who, where and which samples (`Stall`), the stacks of the process, then
another attempt or an end. `stalls.jsonl` in the run's folder has one line each.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

STALLS = "stalls.jsonl"
REDISPATCHED, DROPPED, REPLACED, ENDED = "redispatched", "dropped", "replaced", "ended"
_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a worker waits for the threads which serve its episodes.

    tool_s          a tool call
    lease_s         a box, its files and, after a death, the calls that rebuild its workspace
    grade_s         one call of the grader, and grade_sample_s more for each of its samples
    release_s       cleaning a box that is given back
    close_s         threads that are still at work when the worker ends
    pause_s         saving the states of its streams, when it is to pause; 0: none is saved
    """

    tool_s: float = 600.0
    lease_s: float = 1800.0
    grade_s: float = 300.0
    grade_sample_s: float = 30.0
    release_s: float = 300.0
    close_s: float = 30.0
    pause_s: float = 8.0


@dataclass(frozen=True, slots=True)
class Stall:
    """One wait that took longer than it may.

    stage     what was waited for ("tool", "lease", "grade", "stream", "publish", "start", …)
    actor     who did not answer ("rollout worker 3", "stage grpo/math")
    uids      samples that it had
    action    what became of them or of it: redispatched, dropped (with their groups), replaced, ended
    stacks    file with the stacks of the process, "" where they could not be had
    """

    stage: str
    waited_s: float
    limit_s: float
    actor: str = ""
    uids: tuple[str, ...] = ()
    action: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    stacks: str = ""
    time: float = field(default_factory=lambda: round(time.time(), 3))

    def __str__(self) -> str:
        samples = f", {len(self.uids)} samples, {self.uids[0]} the first" if self.uids else ""
        return (
            f"{self.actor} (process {self.pid} on {self.host}) was silent in '{self.stage}' for "
            f"{self.waited_s:.1f} s, allowed are {self.limit_s:g} s{samples}: {self.action}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Stall:
        return cls(**{**row, "uids": tuple(row["uids"])})


class StallLog:
    """`stalls` of this process so far, each a line of `path` when `add` returns; None: memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.stalls: list[Stall] = []

    @property
    def stacks(self) -> Path | None:
        """Folder where processes leave their stacks."""
        return None if self.path is None else self.path.parent / "stacks"

    def add(self, stall: Stall) -> None:
        """Note it. A disk that does not take the line costs the line, never the run."""
        self.stalls.append(stall)
        _LOG.warning("%s", stall)
        if self.path is None:
            return
        line = (json.dumps(stall.to_dict()) + "\n").encode("utf-8", "surrogatepass")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(number, line)  # one write, so that lines of several processes do not mix
            finally:
                os.close(number)
        except OSError as error:
            _LOG.warning("%s does not take a line: %s", self.path, error)


def read_stalls(path: Path) -> list[Stall]:
    """Stalls of a run in the order in which they were noted; a torn line is left out."""
    stalls = []
    if path.exists():
        for line in path.read_text("utf-8", "surrogatepass").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                stalls.append(Stall.from_dict(json.loads(line)))
    return stalls


def stalls_of(stalls: Iterable[Stall], uids: Sequence[str]) -> list[Stall]:
    """Those that some of these samples were in."""
    wanted = set(uids)
    return [stall for stall in stalls if not wanted.isdisjoint(stall.uids)]


def num_stalls(stalls: Iterable[Stall]) -> int:
    """How many waits these lines are about: one of many samples may have several."""
    return len({(stall.time, stall.host, stall.pid, stall.stage) for stall in stalls})


def open_stacks(folder: Path, who: str) -> IO[str]:
    """The file for this process's stacks. OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / f"{who}-{socket.gethostname()}-{os.getpid()}.txt", "a")


def dump_stacks(file: IO[str] | None = None) -> str:
    """Write where every thread of this process is; the file's name, "" for the error output."""
    target = file if file is not None else sys.stderr
    with suppress(OSError, ValueError, AttributeError):  # an error output that is no real file
        faulthandler.dump_traceback(target, all_threads=True)
    return "" if file is None else str(file.name)


class Watch:
    """Watches what this process itself does: `begin` a piece of work, `end` it within `limit_s`.

    On a breach the stacks of all threads are written, the stall is noted, and the process is interrupted as
    by Ctrl-C; where it is not over after `grace_s`, it is killed: what stands on the disk is resumed from.
    For waits that nobody can give a limit to: a kernel on a device, a file system, a library.
    """

    def __init__(
        self, actor: str, limit_s: float, log: StallLog, *, grace_s: float = 60.0, look_s: float = _LOOK_S
    ) -> None:
        self._actor, self._limit_s, self._log, self._grace_s = actor, limit_s, log, grace_s
        self._look_s = look_s
        self._work: tuple[str, float] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"watch {actor}", daemon=True)
        self._thread.start()

    def begin(self, stage: str) -> None:
        self._work = (stage, time.monotonic())

    def end(self) -> None:
        self._work = None

    def close(self) -> None:
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10 * self._look_s)

    def _look(self) -> None:
        while not self._over.wait(self._look_s):
            work = self._work
            if work is None or (waited_s := time.monotonic() - work[1]) <= self._limit_s:
                continue
            stall = Stall(work[0], waited_s, self._limit_s, self._actor, action=ENDED)
            if self._log.stacks is not None:
                with suppress(OSError), open_stacks(self._log.stacks, self._actor.replace("/", "-")) as file:
                    stall = replace(stall, stacks=dump_stacks(file))
            self._log.add(stall)
            self._work = None
            os.kill(os.getpid(), signal.SIGINT)
            if not self._over.wait(self._grace_s):
                os.kill(os.getpid(), signal.SIGKILL)
