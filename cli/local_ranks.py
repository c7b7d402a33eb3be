"""A rank beside the first as a process of this machine, forked from the warm server of `stage_process.py`."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace

from consilience.cli.rank_follower import Ending, Meeting, Run, follow
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import PROCESSES, death, stacks_file, warm_up
from consilience.rollout.deadlines import STALLS, StallLog
from consilience.training.progress import SilentProgress

LEAVE_S = 3.0


class LocalRank:
    """A `rank_processes.Follower`, from construction on."""

    def __init__(self, run: Run, context: StageContext, meeting: Meeting, backend: str, rank: int) -> None:
        warm_up()
        self.rank = rank
        self.ending: Ending | None = None
        self._pipe, there = PROCESSES.Pipe(duplex=False)
        sent = replace(context, progress=SilentProgress(), ranks=None)
        given = (run, sent, meeting, rank, backend, dict(os.environ), there)
        self._process = PROCESSES.Process(target=follow, args=given, name=f"rank {rank}", daemon=True)
        self._process.start()
        there.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.place = f"process {self.pid}"
        stalls = StallLog(context.run.path / STALLS)
        self.stacks = stacks_file(stalls, f"{context.name}-rank-{rank}", self.pid)

    @property
    def has_ended(self) -> bool:
        return self.ending is not None or self._process.exitcode is not None

    @property
    def has_died(self) -> bool:
        if self._process.exitcode is None:
            return False
        self.hear()
        return self.ending is None

    def hear(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            if self.ending is None and self._pipe.poll():
                self.ending = self._pipe.recv()  # no limit: a sender that stops in the middle is ended

    def is_over(self, limit_s: float) -> bool:
        self._process.join(limit_s)
        return self._process.exitcode is not None

    def death(self) -> str:
        return death(self._process.exitcode)

    def dump(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.stacks is not None and self.stacks.exists():  # its handler is there
                os.kill(self.pid, signal.SIGUSR1)
                os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process.exitcode is None:
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self._process.join(LEAVE_S)
        self._pipe.close()
