"""A training stage on several ranks of this machine: started together, watched, ended together.

    this process, rank 0 ── the stage function ──────────► result
        │ starts      ▲ a thread looks: who has died, erred, or keeps others waiting
        ▼             │
    ranks 1 … R − 1 ── the same stage function, nothing left on the disk

The first thing that goes wrong on any rank is what the stage raises. What the others raise afterwards, of
connections that broke, follows from it. Ranks beside the first own nothing outside of their memory, so they
are killed, not asked.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from consilience.cli.engines import backend_of
from consilience.cli.rank_board import Board
from consilience.cli.rank_follower import Run, abort, follow, is_of_connection, join
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import PROCESSES, death, stacks_file, warm_up
from consilience.conf.errors import EngineError
from consilience.model.ranks import BROKE
from consilience.rollout.deadlines import ENDED, STALLS, Stall, StallLog, dump_stacks, open_stacks
from consilience.training.progress import SilentProgress

LOOK_S = 0.25
LEAVE_S = 3.0  # what a rank may take to notice that the others are gone
_A_RANK = re.compile(r"\brank \d")
_ADVICE = "the same command goes on where the stage stopped"


def on_ranks(run: Run, context: StageContext) -> Mapping[str, Any]:
    """`run(context)` on `engine.ranks` processes, each with its `Ranks` in the context; the first's result.

    run  a function that can be pickled: one of a module, or a partial of one
    ConfigError, before a process is started, where the machine cannot take so many ranks. What a rank raises
    is raised here, with the rank's name before it unless all say the same; EngineError names a rank that
    died, or kept the others waiting for more than `engine.rank_limit_s`.
    """
    backend = backend_of(context.cfg)
    with tempfile.TemporaryDirectory(prefix="consilience-ranks-") as folder:
        group = RankGroup(run, context, Path(folder), backend)
        try:
            result = _lead(run, context, group)
            group.finish()
            return result
        except BaseException as error:
            found = group.verdict(error)
            if found is error:
                raise
            raise found from error
        finally:
            group.close()


def _lead(run: Run, context: StageContext, group: RankGroup) -> Mapping[str, Any]:
    """Rank 0, in this process."""
    ranks = join(context, group.folder, 0, group.backend, group.board)
    try:
        result = run(replace(context, ranks=ranks))
    except BaseException:
        abort(ranks)
        raise
    ranks.close()
    return result


@dataclass
class _Follower:
    """A rank beside the first; `ending` is what it said last (`rank_follower.follow`)."""

    rank: int
    process: Any
    pipe: Any
    pid: int
    stacks: Path | None
    ending: tuple[Any, ...] | None = None

    def hear(self) -> None:
        """Take in what it has said; never waits."""
        with contextlib.suppress(EOFError, OSError):
            if self.ending is None and self.pipe.poll():
                self.ending = self.pipe.recv()  # no limit: a sender that stops in the middle is ended

    @property
    def has_ended(self) -> bool:
        """Whether it has said how it ended, or is gone."""
        return self.ending is not None or self.process.exitcode is not None

    @property
    def has_died(self) -> bool:
        """Whether it is gone without a word."""
        if self.process.exitcode is None:
            return False
        self.hear()
        return self.ending is None


@dataclass
class RankGroup:
    """Ranks 1 to R − 1 as processes, from construction on, and the thread that looks after all ranks."""

    run: Run
    context: StageContext
    folder: Path
    backend: str
    trouble: Exception | None = None
    followers: list[_Follower] = field(default_factory=list)

    def __post_init__(self) -> None:
        cfg = self.context.cfg
        self.size, self.limit_s = cfg.engine.ranks, cfg.engine.rank_limit_s
        self.board = Board(self.folder / "board", self.size)
        self._stalls = StallLog(self.context.run.path / STALLS)
        self._lock, self._is_leaving, self._over = threading.Lock(), False, threading.Event()
        warm_up()
        try:
            for rank in range(1, self.size):
                self._start(rank)
        except BaseException:
            self._kill()
            raise
        self._thread = threading.Thread(target=self._watch, name="watch ranks", daemon=True)
        self._thread.start()

    def _start(self, rank: int) -> None:
        here, there = PROCESSES.Pipe(duplex=False)
        sent = replace(self.context, progress=SilentProgress(), ranks=None)
        given = (self.run, sent, self.folder, rank, self.backend, dict(os.environ), there)
        process = PROCESSES.Process(target=follow, args=given, name=f"rank {rank}", daemon=True)
        process.start()
        there.close()
        assert process.pid is not None
        stacks = stacks_file(self._stalls, f"{self.context.name}-rank-{rank}", process.pid)
        self.followers.append(_Follower(rank, process, here, process.pid, stacks))

    # ---- in the first rank's own thread ------------------------------------------------------------

    def finish(self) -> None:
        """Return when the other ranks have ended too; raises what went wrong on them."""
        for follower in self.followers:
            follower.process.join(self.limit_s)
            if self.trouble is None and follower.process.exitcode is None:
                self._blame([follower.rank], self.limit_s)
        self._look()
        if self.trouble is not None:
            raise self.trouble

    def verdict(self, error: BaseException) -> BaseException:
        """What to raise where the first rank raised `error`: what went wrong first on any rank."""
        try:
            return self._verdict(error, time.monotonic())
        except KeyboardInterrupt:  # the watching thread's, which came too late
            return self._verdict(error, time.monotonic())

    def close(self) -> None:
        """End what still lives, and give back what it held here."""
        self._over.set()
        self._thread.join(timeout=10 * LOOK_S + LEAVE_S)
        self._kill()
        for follower in self.followers:
            follower.process.join(LEAVE_S)
            follower.pipe.close()
        self.board.close()

    def _verdict(self, error: BaseException, raised: float) -> BaseException:
        with self._lock:  # no limit: held for one call
            self._is_leaving = True
        if error is self.trouble:
            return error
        if isinstance(error, KeyboardInterrupt):
            return self.trouble or error
        follows = is_of_connection(error, self.board.row(0).state)
        end = time.monotonic() + (LEAVE_S if follows else 2 * LOOK_S)
        while self.trouble is None and time.monotonic() < end:
            self._look()
            if all(f.has_ended for f in self.followers):
                break
            time.sleep(LOOK_S / 5)
        if follows:
            silent = [f.rank for f in self.followers if not f.has_ended]
            if self.trouble is None and silent:
                self._blame(silent, self.limit_s)
            return self.trouble or error
        causes = [f.ending for f in self.followers if f.ending and f.ending[0] == "error" and not f.ending[2]]
        if any(ending[4] == str(error) for ending in causes):  # all ranks say so
            return error
        if self.trouble is not None and any(ending[1] < raised for ending in causes):
            return self.trouble
        return self._named(error, 0)

    def _named(self, error: Any, rank: int) -> Any:
        """The error itself, the rank before its message unless that names one."""
        if error.args and isinstance(error.args[0], str) and not _A_RANK.search(error.args[0]):
            error.args = (f"rank {rank} of {self.size}: {error.args[0]}", *error.args[1:])
        return error

    # ---- in the watching thread --------------------------------------------------------------------

    def _watch(self) -> None:
        """Look until something is wrong; then end the others, and this rank if it does not notice.

        Looks are counted, not hours: a Ctrl-Z stops this process too.
        """
        waits: Any = None
        waited_s = 0.0
        while self.trouble is None and not self._over.wait(LOOK_S):
            self._look()
            late = self.board.late()
            waited_s = waited_s + LOOK_S if late is not None and late == waits else 0.0
            waits = late
            if late is not None and waited_s > self.limit_s and self.trouble is None:
                self._blame(late[1], waited_s)
        if self.trouble is None:
            return
        self._kill()
        with contextlib.suppress(Exception):
            if self.backend == "nccl":
                dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage]
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end:  # a call to ranks that are gone raises by itself
            if self._over.wait(LOOK_S) or self._is_leaving or self.board.row(0).state == BROKE:
                return
        with self._lock:  # no limit: held for one call
            if not self._is_leaving:
                os.kill(os.getpid(), signal.SIGINT)

    def _look(self) -> None:
        """Take in what the ranks said and who is gone; the first of that is the trouble."""
        for follower in self.followers:
            follower.hear()
        if self.trouble is not None:
            return
        told = [
            (f.ending[1], f.rank, f.ending) for f in self.followers if f.ending and f.ending[0] == "error"
        ]
        causes = sorted((when, rank, ending[3]) for when, rank, ending in told if not ending[2])
        gone = [f for f in self.followers if f.has_died]
        if causes:
            self.trouble = self._named(causes[0][2], causes[0][1])
        elif gone:
            self.trouble = EngineError(
                f"rank {gone[0].rank} of {self.size} (process {gone[0].pid}) died without a word "
                f"({death(gone[0].process.exitcode)}); if memory ran out, lower engine.micro_batch_rows; "
                f"{_ADVICE}"
            )
        elif told and time.monotonic() - min(told)[0] > LEAVE_S:  # only connections that broke
            self.trouble = self._named(min(told)[2][3], min(told)[1])

    def _blame(self, late: list[int], waited_s: float) -> None:
        """The trouble is that these ranks are late (all, if none); the stacks of all ranks are written."""
        pids = {0: os.getpid()} | {f.rank: f.pid for f in self.followers}
        who = ", ".join(f"rank {rank} of {self.size} (process {pids[rank]})" for rank in late)
        who = who or f"the link between the {self.size} ranks"
        self.trouble = EngineError(
            f"{who} kept the others waiting for {waited_s:.0f} s, allowed are {self.limit_s:g} s "
            f"(engine.rank_limit_s); where each rank was: {self._stalls.stacks}; {_ADVICE}"
        )
        stacks = {f.rank: f.stacks for f in self.followers}
        with contextlib.suppress(OSError):
            assert self._stalls.stacks is not None
            name = f"stage-{self.context.name.replace('/', '-')}-rank-0"
            with open_stacks(self._stalls.stacks, name) as file:
                stacks[0] = Path(dump_stacks(file))
        for follower in self.followers:
            with contextlib.suppress(ProcessLookupError):
                if follower.stacks is not None and follower.stacks.exists():  # its handler is there
                    os.kill(follower.pid, signal.SIGUSR1)
                    os.kill(follower.pid, signal.SIGCONT)
        time.sleep(4 * LOOK_S)
        for rank in late or range(self.size):
            stall = Stall("rank", waited_s, self.limit_s, self._who(rank), action=ENDED)
            self._stalls.add(replace(stall, pid=pids[rank], stacks=str(stacks.get(rank) or "")))

    def _who(self, rank: int) -> str:
        return f"rank {rank} of {self.size}, stage {self.context.name}"

    def _kill(self) -> None:
        for follower in self.followers:
            with contextlib.suppress(ProcessLookupError):
                if follower.process.exitcode is None:
                    os.kill(follower.pid, signal.SIGKILL)
