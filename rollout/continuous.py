"""A rollout worker whose stream never ends: new jobs and new weights reach it between two engine steps.

    inbox.submit(jobs of a phase, its lease) ─┐
    inbox.publish(weights, announced, version) ──┴─► serve ─► batches of finished records

Messages act in the order in which they were sent: no job is begun with weights older than those sent before.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease
from consilience.rollout.publishing import Announced
from consilience.rollout.records import RolloutRecord
from consilience.rollout.worker_run import WorkerRun

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.rollout.worker import RolloutWorker

_LOOK_S = 0.005  # how soon an engine without work sees that a tool or a grader has answered


class Inbox:
    """What a serving worker is told, from any thread. After `end` and after its death it takes nothing."""

    def __init__(self) -> None:
        self._messages: deque[Callable[[Server], None]] = deque()
        self._waiting: set[Future[None]] = set()
        self._changed = threading.Condition()
        self._is_closed, self._why = False, "it was told to end"

    def submit(self, jobs: Sequence[RolloutJob], lease: Lease | None) -> None:
        """Begin these jobs beside what runs, with a token log under `lease`."""
        self._put(lambda server: server.begin(jobs, lease))

    def publish(
        self, weights: Mapping[str, Tensor], announced: Announced, version: int, *, recompute: bool = False
    ) -> None:
        """New weights before the next step; returns when the engine has them. WeightsRefused: it has not.

        recompute  running requests compute their state again with the new weights; else they keep it
        """
        done: Future[None] = Future()
        with self._changed:
            self._waiting.add(done)
        try:
            self._put(lambda server: server.publish(weights, announced, version, recompute, done))
            done.result()  # no limit: who asked for it has one, and the worker ends it by stopping
        finally:
            self._waiting.discard(done)

    def end(self) -> None:
        """The worker stops, whatever still runs."""
        self._put(lambda server: server.end())

    def take(self, timeout_s: float) -> list[Callable[[Server], None]]:
        """(serving thread) Messages in order; waits for the first one for up to `timeout_s`."""
        with self._changed:
            if not self._messages and timeout_s > 0:
                self._changed.wait(timeout_s)
            taken = list(self._messages)
            self._messages.clear()
            return taken

    def close(self, why: str) -> None:
        """(serving thread) Nothing is taken from here on; who waits is told."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed, self._why = True, why
            for done in list(self._waiting):  # who is told may leave at once
                if not done.done():
                    done.set_exception(EngineError(f"the rollout worker has stopped: {why}"))

    def _put(self, message: Callable[[Server], None]) -> None:
        with self._changed:
            if self._is_closed:
                raise EngineError(f"the rollout worker has stopped: {self._why}")
            self._messages.append(message)
            self._changed.notify()


def serve(worker: RolloutWorker, inbox: Inbox) -> Iterator[list[RolloutRecord]]:
    """Records as they become final, in batches; an empty batch now and then says that this worker lives.

    Ends after `Inbox.end`. Errors are those of `RolloutWorker.stream`.
    """
    server = Server(worker)
    last = time.monotonic()
    try:
        while not server.is_over:
            for message in inbox.take(server.patience_s):
                message(server)
            final = server.advance()
            if final or time.monotonic() - last > worker.heartbeat_s:
                last = time.monotonic()
                yield final
    except BaseException as error:
        inbox.close(f"{type(error).__name__}: {error}")
        raise
    finally:
        inbox.close("it was told to end")
        server.close()


class Server:
    """The runs of several phases on one engine; used by one thread."""

    def __init__(self, worker: RolloutWorker) -> None:
        self._worker, self._engine = worker, worker.engine
        self._runs: list[WorkerRun] = []
        self._final: list[RolloutRecord] = []
        self._flushed_at = time.monotonic()
        self.is_over = False

    @property
    def patience_s(self) -> float:
        """How long a message may be waited for before there is something else to do."""
        if self._final or any(run.is_decoding for run in self._runs):
            return 0.0
        return _LOOK_S if self._runs else self._worker.heartbeat_s

    def begin(self, jobs: Sequence[RolloutJob], lease: Lease | None) -> None:
        run = WorkerRun(self._worker, jobs, lease)
        self._runs.append(run)
        run.begin()

    def publish(
        self,
        weights: Mapping[str, Tensor],
        announced: Announced,
        version: int,
        recompute: bool,
        done: Future[None],
    ) -> None:
        try:
            self._engine.publish(weights, announced, version)
        except WeightsRefused as error:  # the old ones stay, and who sent them hears it
            done.set_exception(error)
            return
        if recompute:
            unfinished, held = self._engine.clear()
            for run in self._runs:
                run.forget_streams(unfinished, held)
        done.set_result(None)

    def end(self) -> None:
        self.is_over = True

    def advance(self) -> list[RolloutRecord]:
        """One engine step and what else has come; finished records every `flush_s`, a run's last at once."""
        if any(run.pause.is_due() for run in self._runs):
            self.is_over = True
            return self._flush()
        for run in self._runs:
            run.take_events(may_wait=False)
        if any(run.is_decoding for run in self._runs):
            completed = self._engine.step()
            for run in self._runs:
                run.take_step(completed)
        is_due = time.monotonic() - self._flushed_at >= self._worker.flush_s
        for run in list(self._runs):
            run.grade_some()
            self._final += run.take_final()
            if run.is_over:
                self._runs.remove(run)
                run.close()
                is_due = True  # somebody may be waiting for the last of a phase
        return self._flush() if is_due else []

    def _flush(self) -> list[RolloutRecord]:
        self._flushed_at = time.monotonic()
        batch, self._final = self._final, []
        return batch

    def close(self) -> None:
        """Give back boxes and rows of what did not finish; where it is only paused, save it first."""
        with contextlib.suppress(EngineError):  # somebody has taken over
            for run in self._runs:
                if run.pause.is_due(must_look=True):
                    run.save_streams()
        self._engine.clear()
        for run in self._runs:
            run.close()
