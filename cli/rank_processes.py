"""A training stage on several ranks: started together, watched, ended together.

    this process, rank 0 ── the stage function ──────────► result
        │ starts      ▲ a thread looks: who has died, erred, or keeps others waiting
        ▼             │
    ranks 1 … R − 1 ── the same stage function, nothing left on the disk

The first thing that goes wrong on any rank is what the stage raises. What the others raise afterwards, of
connections that broke, follows from it. Ranks beside the first own nothing outside of their memory, so they
are killed, not asked. They are processes of this machine (`local_ranks.py`), or, where the roles are placed
on a cluster, actors in the trainer's bundles (`ray_ranks.py`); all else is the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from consilience.cli.engines import backend_of
from consilience.cli.local_ranks import LocalRank
from consilience.cli.rank_follower import Ending, Meeting, Run, abort, is_of_connection, join
from consilience.cli.rank_meeting import FolderMeeting
from consilience.cli.stage import StageContext
from consilience.conf.errors import EngineError
from consilience.model.ranks import BROKE
from consilience.rollout.deadlines import ENDED, REPLACED, STALLS, Stall, StallLog, dump_stacks, open_stacks

LOOK_S = 0.25
LEAVE_S = 3.0  # what a rank may take to notice that the others are gone
# Code in which a thread waits for other ranks; in the last, DeepSpeed's handles do.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/utils/nvtx.py")
_A_RANK = re.compile(r"\brank \d")
_ADVICE = "the same command goes on where the stage stopped"


def on_ranks(run: Run, context: StageContext) -> Mapping[str, Any]:
    """`run(context)` on `engine.ranks` processes, each with its `Ranks` in the context; the first's result.

    run  a function that can be pickled: one of a module, or a partial of one
    ConfigError, before a process is started, where the machine cannot take so many ranks. What a rank raises
    is raised here, with the rank's name before it unless all say the same; EngineError names a rank that
    died, or kept the others waiting for more than `engine.rank_limit_s`.
    """
    if context.cfg.cluster.placement != "free":
        from consilience.cli.ray_ranks import placed_ranks  # imports ray

        for num_left in reversed(range(context.cfg.cluster.rank_restarts + 1)):
            try:
                with placed_ranks(run, context) as (here, start, meeting, backend, gpu):
                    return _on_group(run, here, RankGroup(here, start, meeting, backend), gpu)
            except RankDied as death:
                if not num_left:
                    raise
                who = str(death).partition(" died")[0]
                StallLog(context.run.path / STALLS).add(Stall("death", 0.0, 0.0, who, action=REPLACED))
    backend = backend_of(context.cfg)
    with tempfile.TemporaryDirectory(prefix="consilience-ranks-") as folder:
        meeting = FolderMeeting(Path(folder), context.cfg.engine.ranks)
        start = partial(LocalRank, run, context, meeting, backend)
        return _on_group(run, context, RankGroup(context, start, meeting, backend), None)


def _on_group(run: Run, context: StageContext, group: RankGroup, gpu: int | None) -> Mapping[str, Any]:
    """What the first rank, in this process, returns when the others have ended too."""
    try:
        result = _lead(run, context, group, gpu)
        group.finish()
        return result
    except BaseException as error:
        found = group.verdict(error)
        if found is error:
            raise
        raise found from error
    finally:
        group.close()


def _lead(run: Run, context: StageContext, group: RankGroup, gpu: int | None) -> Mapping[str, Any]:
    """Rank 0, in this process."""
    ranks = join(context, group.meeting, 0, group.backend, group.board, gpu)
    try:
        result = run(replace(context, ranks=ranks))
    except BaseException:
        abort(ranks)
        raise
    ranks.close()
    return result


class RankDied(EngineError):
    """A rank is gone without a word: its process, or its machine."""


class Follower(Protocol):
    """A rank beside the first; `ending` is what it said last, `place` how a message names its process."""

    rank: int
    pid: int
    place: str
    stacks: Path | None
    ending: Ending | None

    @property
    def has_ended(self) -> bool:
        """Whether it has said how it ended, or is gone."""
        ...

    @property
    def has_died(self) -> bool:
        """Whether it is gone without a word."""
        ...

    def hear(self) -> None:
        """Take in what it has said; never waits."""
        ...

    def is_over(self, limit_s: float) -> bool:
        """Whether it is done with its part within the limit."""
        ...

    def death(self) -> str:
        """What of one that has died."""
        ...

    def dump(self) -> None:
        """Ask for its stacks, in its file."""
        ...

    def kill(self) -> None: ...

    def close(self) -> None:
        """Give back what the ended process held here."""
        ...


@dataclass
class RankGroup:
    """Ranks 1 to R − 1, from construction on, and the thread that looks after all ranks.

    start  begins the rank of a number
    """

    context: StageContext
    start: Callable[[int], Follower]
    meeting: Meeting
    backend: str
    trouble: Exception | None = None
    followers: list[Follower] = field(default_factory=list)

    def __post_init__(self) -> None:
        cfg = self.context.cfg
        self.size, self.limit_s = cfg.engine.ranks, cfg.engine.rank_limit_s
        self.board = self.meeting.board()
        self._stalls = StallLog(self.context.run.path / STALLS)
        self._lock, self._is_leaving, self._over = threading.Lock(), False, threading.Event()
        try:
            for rank in range(1, self.size):
                self.followers.append(self.start(rank))
        except BaseException:
            self._kill()
            raise
        self._thread = threading.Thread(target=self._watch, name="watch ranks", daemon=True)
        self._thread.start()

    # ---- in the first rank's own thread ------------------------------------------------------------

    def finish(self) -> None:
        """Return when the other ranks have ended too; raises what went wrong on them."""
        for follower in self.followers:
            if not follower.is_over(self.limit_s) and self.trouble is None:
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
            follower.close()
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
            self.trouble = RankDied(
                f"rank {gone[0].rank} of {self.size} ({gone[0].place}) died without a word "
                f"({gone[0].death()}); if memory ran out, lower engine.micro_batch_rows; "
                f"{_ADVICE}"
            )
        elif told and time.monotonic() - min(told)[0] > LEAVE_S:  # only connections that broke
            self.trouble = self._named(min(told)[2][3], min(told)[1])

    def _blame(self, late: list[int], waited_s: float) -> None:
        """The trouble is that these ranks are late; the stacks of all ranks are written.

        Without any, all are in the same call or piece of work: then the stacks say who does not wait.
        """
        if late:  # before a stopped one wakes up to write its stacks, and goes on
            self.trouble = self._late(late, waited_s)
        stacks = self._dump()
        if not late:
            late = not_waiting(stacks)
            self.trouble = self.trouble or self._late(late, waited_s)
        pids = {0: os.getpid()} | {f.rank: f.pid for f in self.followers}
        for rank in late or range(self.size):
            stall = Stall("rank", waited_s, self.limit_s, self._who(rank), action=ENDED)
            self._stalls.add(replace(stall, pid=pids[rank], stacks=str(stacks.get(rank) or "")))

    def _late(self, late: list[int], waited_s: float) -> EngineError:
        places = {0: f"process {os.getpid()}"} | {f.rank: f.place for f in self.followers}
        who = ", ".join(f"rank {rank} of {self.size} ({places[rank]})" for rank in late)
        who = who or f"the link between the {self.size} ranks"
        return EngineError(
            f"{who} kept the others waiting for {waited_s:.0f} s, allowed are {self.limit_s:g} s "
            f"(engine.rank_limit_s); where each rank was: {self._stalls.stacks}; {_ADVICE}"
        )

    def _dump(self) -> dict[int, Path | None]:
        """The stacks of all ranks, written now, by rank."""
        stacks = {f.rank: f.stacks for f in self.followers}
        with contextlib.suppress(OSError):
            assert self._stalls.stacks is not None
            name = f"stage-{self.context.name.replace('/', '-')}-rank-0"
            with open_stacks(self._stalls.stacks, name) as file:
                stacks[0] = Path(dump_stacks(file))
        for follower in self.followers:
            follower.dump()
        time.sleep(4 * LOOK_S)
        return stacks

    def _who(self, rank: int) -> str:
        return f"rank {rank} of {self.size}, stage {self.context.name}"

    def _kill(self) -> None:
        for follower in self.followers:
            follower.kill()


def not_waiting(stacks: Mapping[int, Path | None]) -> list[int]:
    """Ranks that are in no collective by their stacks, while others are; none where they do not tell."""
    waiting = set()
    for rank, path in stacks.items():
        with contextlib.suppress(OSError):
            threads = path.read_text().split("hread 0x") if path else []
            newest = [next((line for line in each.splitlines() if "File" in line), "") for each in threads]
            if any(word in line for line in newest for word in _COLLECTIVES):
                waiting.add(rank)
    return sorted(set(stacks) - waiting) if waiting else []
