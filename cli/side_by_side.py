"""Which stage of a graph runs when, with several slots: side by side where none needs the other.

A stage starts as soon as its needs are done and a slot is free; of several, one that is deeper in the
graph first, so that a domain's training and another's sampling overlap. Such stages run in processes of
their own. A stage that every other unfinished one waits for runs in this process, with all its threads.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consilience.cli.progress_display import StageProgress
from consilience.cli.stage import Stage, dependents
from consilience.cli.stage_process import StageProcess, wait_for, warm_up
from consilience.conf.schema import Config

if TYPE_CHECKING:
    from consilience.cli.graph import Attempt, Graph

GRACE_S = 20.0
ASK_EVERY_S = 1.0


@dataclass(frozen=True)
class SharedWorkers:
    """What stages in processes of their own share to sample.

    environment  variables by which their processes find it
    num_stages   stages that it has room for at once
    """

    environment: Mapping[str, str]
    num_stages: int


OpenWorkers = Callable[[Sequence[Config], int], SharedWorkers]
"""(settings of the stages that sample, slots) -> what they share; called before the first of them starts."""


@dataclass
class Running:
    """A stage in a process. `since` is when its end was recorded; its process may take a moment more."""

    attempt: Attempt
    process: StageProcess
    since: float | None = None


class SideBySide:
    """Runs what a graph has not finished, in up to `slots` processes.

    open_workers  None: no stage shares anything
    grace_s       what a stage may take to end after an interruption, and its process after its result
    """

    def __init__(
        self, graph: Graph, slots: int, open_workers: OpenWorkers | None = None, *, grace_s: float = GRACE_S
    ) -> None:
        self._graph, self._slots, self._grace_s = graph, slots, grace_s
        self._open_workers = open_workers
        self._waiting: list[Stage] = list(graph.stages)
        self._ready: list[Stage] = []
        self._running: list[Running] = []
        self._shared: SharedWorkers | None = None
        self._after = {stage.name: dependents(graph.stages, stage.name) for stage in graph.stages}

    def run(self) -> None:
        """Return when all are done. The first error interrupts what runs beside it and is raised."""
        try:
            while self._waiting or self._ready or self._running:
                self._find_ready()
                is_alone = self._is_alone()
                if is_alone and not self._running:
                    self._execute_here(self._ready.pop())
                    continue
                if not is_alone:
                    self._fill_slots()
                wait_for([each.process for each in self._running], ASK_EVERY_S)
                self._hear()
        except BaseException:
            self._stop()
            raise

    # ---- starting ---------------------------------------------------------------------------------

    def _find_ready(self) -> None:
        for stage in list(self._waiting):  # in order, so that one pass skips all that can be skipped
            if self._graph.results.keys() >= set(stage.needs):
                self._waiting.remove(stage)
                if not self._graph.skip(stage):
                    self._ready.append(stage)
        depth = {name: sum(name in after for after in self._after.values()) for name in self._after}
        self._ready.sort(key=lambda stage: -depth[stage.name])

    def _is_alone(self) -> bool:
        """Whether one stage is ready, none runs (a process may be about to go), and the rest wait for it."""
        if len(self._ready) != 1 or any(each.since is None for each in self._running):
            return False
        return {stage.name for stage in self._waiting} <= self._after[self._ready[0].name]

    def _execute_here(self, stage: Stage) -> None:
        names = [waiting.name for waiting in self._waiting]
        if any(b not in self._after[a] and a not in self._after[b] for a in names for b in names):
            warm_up()  # some will run side by side; their server imports while the stage runs here
        self._shared = None  # the stage may open workers of its own in this process
        self._graph.execute(stage)

    def _fill_slots(self) -> None:
        for stage in list(self._ready):
            if len(self._running) < self._slots:
                self._start(stage)
        if self._running and any(stage.needs_workers for stage in self._waiting):
            self._workers()  # the others work while it starts

    def _start(self, stage: Stage) -> None:
        environment = dict(os.environ)
        if stage.needs_workers and (workers := self._workers()):
            if sum(each.attempt.stage.needs_workers for each in self._running) >= workers.num_stages:
                return
            environment = {**os.environ, **workers.environment}
        self._ready.remove(stage)
        attempt = self._graph.begin(stage, thread_share(stage.cfg.engine.threads, self._slots))
        try:
            process = StageProcess(stage.run, attempt.context, environment)
        except BaseException as error:
            with contextlib.suppress(type(error)):
                self._graph.settle(attempt, _raising(error))
            raise
        self._running.append(Running(attempt, process))

    def _workers(self) -> SharedWorkers | None:
        if self._shared is None and self._open_workers is not None:
            settings = [stage.cfg for stage in self._graph.stages if stage.needs_workers]
            self._shared = self._open_workers(settings, self._slots)
        return self._shared

    # ---- listening --------------------------------------------------------------------------------

    def _hear(self) -> None:
        for each in list(self._running):
            has_ended = each.process.has_ended
            self._show(each)
            if each.since is None and (has_ended or each.process.has_spoken):
                each.since = time.monotonic()
                self._graph.settle(each.attempt, each.process.result)
            if has_ended:
                self._running.remove(each)
                each.process.close()
            elif each.since is not None and time.monotonic() - each.since > self._grace_s:
                each.process.kill()

    def _show(self, each: Running) -> None:
        progress = StageProgress(self._graph.progress, each.process.name)
        for verb, *arguments in each.process.messages():
            if verb == "start":
                progress.start(progress.name, *arguments)
            elif verb == "advance":
                progress.advance(arguments[0], **arguments[1])
            else:
                progress.finish()

    # ---- stopping ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Interrupt what runs, record it, return when all of it is gone; a second Ctrl-C waits no longer."""
        kill_at = time.monotonic() + self._grace_s
        while self._running:
            try:
                self._stop_once(is_patient=time.monotonic() < kill_at)
            except KeyboardInterrupt:
                kill_at = 0.0

    def _stop_once(self, *, is_patient: bool) -> None:
        for each in self._running:
            if is_patient:
                each.process.interrupt()
            else:
                each.process.kill()
        wait_for([each.process for each in self._running], ASK_EVERY_S)
        for each in list(self._running):
            has_ended = each.process.has_ended
            self._show(each)
            if not has_ended:
                continue
            self._running.remove(each)
            if each.since is None:  # what it raised now is our doing; a result it still had is one
                ending = each.process.result if each.process.has_result else _raising(KeyboardInterrupt())
                with contextlib.suppress(Exception, KeyboardInterrupt):
                    self._graph.settle(each.attempt, ending)
            each.process.close()


def thread_share(threads: int, slots: int) -> int:
    """CPU threads of one of `slots` trainers beside each other; `threads` 0 stands for all cores."""
    return max(1, (threads or os.cpu_count() or 1) // slots)


def _raising(error: BaseException) -> Callable[[], Mapping[str, object]]:
    def work() -> Mapping[str, object]:
        raise error

    return work
