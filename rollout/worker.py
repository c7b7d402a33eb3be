"""A rollout worker: drives many episodes at once against one engine. Plain Python, no Ray.

The loop submits every episode's next request, steps the engine, and hands finished turns on: tool calls
to threads, finished episodes to grading threads. Decoding never waits for either. Per-turn work is
Python; per-token work is the engine's.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from consilience.conf.errors import ConsilienceError, EngineError
from consilience.rollout.boxes import Box, BoxPool
from consilience.rollout.engine import EngineState, RolloutEngine
from consilience.rollout.episode import Episode, State
from consilience.rollout.grading import Graded, GradeItem, Grader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.prompts import prompt_ids
from consilience.rollout.records import Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.tools import argument_error, run_tool

if TYPE_CHECKING:
    from torch import Tensor

_MAX_EMPTY_STEPS = 4096  # steps without a finished turn before the engine is asked whether it still works


class RolloutWorker:
    """engine + tokenizer + sandboxes + grader; one call of `run` or `stream` at a time.

    sandboxes         BoxPool for tool calls, None where no job has tools
    grader            judges episodes whose job names a reward; None makes such an episode FAILED. A job
                      without a reward path is GRADED with reward None (distillation)
    family            checkpoint family of the prompt protocol
    max_context       longest stream the engine can hold, in tokens
    num_tool_threads  tool calls that run at once
    num_lease_threads leases that may block at once (their own threads: a blocked lease must never keep
                      the holder of a box from running its next call)
    num_grade_threads grader calls at once; grade_batch is the most items a call gets
    flush_s           finished records leave `stream` at least this often, if there are any
    max_tool_chars    characters of a tool's output that the model sees
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        sandboxes: BoxPool | None = None,
        grader: Grader | None = None,
        *,
        family: str = "official",
        max_context: int | None = None,
        num_tool_threads: int = 8,
        num_lease_threads: int = 4,
        num_grade_threads: int = 1,
        grade_batch: int = 64,
        flush_s: float = 0.5,
        max_tool_chars: int = 2000,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.sandboxes, self.grader = engine, tokenizer, sandboxes, grader
        self.family, self.max_context, self.flush_s = family, max_context, flush_s
        self.grade_batch, self.max_tool_chars = grade_batch, max_tool_chars
        self.num_grade_threads = num_grade_threads
        self._on_close = on_close
        self.tool_threads = ThreadPoolExecutor(num_tool_threads, "tool")
        self.lease_threads = ThreadPoolExecutor(num_lease_threads, "lease")
        self.grade_threads = ThreadPoolExecutor(num_grade_threads, "grade")

    def run(self, jobs: Sequence[RolloutJob]) -> list[RolloutRecord]:
        """One record per job, in job order. EngineError on duplicate uids or an engine that stops."""
        records = {record.uid: record for batch in self.stream(jobs) for record in batch}
        return [records[job.uid] for job in jobs]

    def stream(self, jobs: Sequence[RolloutJob]) -> Iterator[list[RolloutRecord]]:
        """The same records as they become final, in batches."""
        run = _Run(self, jobs)
        try:
            yield from run.batches()
        finally:
            run.close()

    def publish(self, weights: Mapping[str, Tensor], digest: str, version: int) -> None:
        """New weights for the next step. WeightsRefused unless `digest` is theirs."""
        self.engine.publish(weights, digest, version)

    def state(self) -> EngineState:
        return self.engine.state()

    def close(self) -> None:
        """End the threads, then whatever `on_close` was given for (pools, runners)."""
        for threads in (self.tool_threads, self.lease_threads, self.grade_threads):
            threads.shutdown(wait=True)  # nothing is cancelled: releases of boxes may still be queued
        if self._on_close is not None:
            self._on_close()


class _Run:
    """The state of one `stream`. Threads only put closures on `_events`; this thread runs them."""

    def __init__(self, worker: RolloutWorker, jobs: Sequence[RolloutJob]) -> None:
        if len({job.uid for job in jobs}) != len(jobs):
            raise EngineError("two jobs share a uid; uids are unique over a run")
        self.worker, self.engine, self.jobs = worker, worker.engine, jobs
        self._decoding: dict[str, Episode] = {}
        self._boxes: dict[str, Box] = {}  # job uid -> leased box
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._num_away = 0  # tasks given to threads whose event has not come back
        self._to_grade: list[Episode] = []
        self._num_grading = 0
        self._final: list[RolloutRecord] = []
        self._num_final = self._num_empty = 0
        self._is_closed = False
        self._prompts: dict[tuple[str, str], tuple[Sequence, tuple[int, ...]]] = {}

    def batches(self) -> Iterator[list[RolloutRecord]]:
        for job in self.jobs:
            self._start(job)
        last = time.monotonic()
        while self._num_final < len(self.jobs):
            self._take_events()
            if self._decoding:
                self._step()
            self._grade_some()
            if self._final and (time.monotonic() - last > self.worker.flush_s):
                batch, self._final = self._final, []
                last = time.monotonic()
                yield batch
        if self._final:
            yield self._final

    def _start(self, job: RolloutJob) -> None:
        """Build the episode and submit its first turn; a job that cannot be encoded ends as INFRA."""
        worker = self.worker
        episode = None
        try:
            ids = self._prompt_ids(job)
            episode = Episode(job, ids, worker.tokenizer, max_context=worker.max_context)
            if worker.max_context is not None and len(ids) >= worker.max_context:
                raise EngineError(f"prompt of {len(ids)} tokens, the context holds {worker.max_context}")
            if job.tools and worker.sandboxes is None:
                raise EngineError("the job has tools but this worker has no sandboxes")
        except ConsilienceError as error:
            episode = episode or Episode(job, (), worker.tokenizer)
            self._abort(episode, f"{type(error).__name__}: {error}")
            return
        self._submit(episode)

    def _prompt_ids(self, job: RolloutJob) -> tuple[int, ...]:
        """Encoded once a group; the messages are compared, a group name alone proves nothing."""
        known = self._prompts.get((job.group, job.effort))
        if known is not None and known[0] == (job.messages, job.tools):
            return known[1]
        ids = prompt_ids(self.worker.tokenizer, job.messages, job.effort, job.tools, self.worker.family)
        self._prompts[job.group, job.effort] = ((job.messages, job.tools), ids)
        return ids

    def _submit(self, episode: Episode) -> None:
        if self._is_closed:
            self._release_box(episode.job.uid)
            return
        request = episode.next_request()
        try:
            self.engine.submit([request])
        except EngineError as error:
            self._abort(episode, f"EngineError: {error}")
            return
        self._decoding[request.uid] = episode

    def _step(self) -> None:
        completed = self.engine.step()
        for done in completed:
            episode = self._decoding.pop(done.uid, None)
            if episode is None:  # left over from a run that was broken off
                continue
            episode.on_completed(done)
            if episode.state is State.TOOLS:
                self._call_tools(episode)
            else:
                self._finish(episode)
        self._num_empty = 0 if completed else self._num_empty + 1
        if self._num_empty >= _MAX_EMPTY_STEPS:
            self._num_empty = 0
            state = self.engine.state()
            if state.num_running + state.num_waiting == 0:
                raise EngineError(f"the engine lost {len(self._decoding)} requests and is idle; restart it")

    def _call_tools(self, episode: Episode) -> None:
        """Run the pending calls in a thread, leasing a box first if the episode has none."""
        uid = episode.job.uid
        if uid in self._boxes:
            self._tools_in(self._boxes[uid], episode)
        elif all(argument_error(call, episode.job.tools) for call in episode.pending_calls):
            errors = [argument_error(call, episode.job.tools) for call in episode.pending_calls]
            self._after_tools(episode, errors)  # nothing would run, so no box is needed
        else:
            self._away(self.worker.lease_threads, lambda: self._lease(episode), episode)

    def _lease(self, episode: Episode) -> Callable[[], None]:
        """(lease thread) A box with the job's files in it."""
        pool = self.worker.sandboxes
        assert pool is not None  # _start refused the job otherwise
        box = pool.lease()
        try:
            for path, text in episode.job.files.items():
                box.write(path, text.encode("utf-8"))
        except BaseException:
            pool.release(box)
            raise

        def leased() -> None:
            self._boxes[episode.job.uid] = box
            episode.used_box(box.id, box.enforced.level.label)
            self._tools_in(box, episode)

        return leased

    def _tools_in(self, box: Box, episode: Episode) -> None:
        tools, max_chars = episode.job.tools, self.worker.max_tool_chars
        if self._is_closed:
            self._release_box(episode.job.uid)
            return

        def work() -> Callable[[], None]:
            results = [run_tool(box, call, tools, max_chars=max_chars) for call in episode.pending_calls]
            return lambda: self._after_tools(episode, results)

        self._away(self.worker.tool_threads, work, episode)

    def _after_tools(self, episode: Episode, results: list[str]) -> None:
        try:
            episode.on_tool_results(results)
        except ConsilienceError as error:
            self._abort(episode, f"{type(error).__name__}: {error}")
            return
        if episode.is_done:
            self._finish(episode)
        else:
            self._submit(episode)

    def _away(
        self, threads: ThreadPoolExecutor, work: Callable[[], Callable[[], None]], episode: Episode
    ) -> None:
        """Run `work` in a thread, then what it returns in this one; any exception ends the episode only."""
        self._num_away += 1

        def task() -> None:
            try:
                event = work()
            except Exception as error:
                detail = f"{type(error).__name__}: {error}"
                event = lambda: self._abort(episode, detail)
            self._events.put(event)

        threads.submit(task)

    def _take_events(self) -> None:
        """Run what threads handed back; wait for one only when there is nothing else to do."""
        idle = not self._decoding and not self._can_grade()
        while self._num_away and (idle or not self._events.empty()):
            try:
                event = self._events.get(timeout=self.worker.flush_s)
            except queue.Empty:
                return
            self._num_away -= 1
            idle = False
            event()

    def _abort(self, episode: Episode, detail: str) -> None:
        episode.abort(detail)
        self.engine.release(episode.held)
        self._settle(episode, episode.aborted_record())

    def _finish(self, episode: Episode) -> None:
        if episode.held:
            self.engine.release(episode.held)  # now, not after grading: a held stream takes up a row
        if not episode.job.reward:
            verdict = Graded(None, {}, Outcome(OutcomeKind.GRADED, "no reward asked for"))
            self._settle(episode, episode.record(verdict))
        elif self.worker.grader is None:
            verdict = Graded(None, {}, Outcome(OutcomeKind.FAILED, "not graded: this worker has no grader"))
            self._settle(episode, episode.record(verdict))
        else:
            self._to_grade.append(episode)

    def _can_grade(self) -> bool:
        return bool(self._to_grade) and self._num_grading < self.worker.num_grade_threads

    def _grade_some(self) -> None:
        """Hand finished episodes to a free grading thread."""
        grader, size = self.worker.grader, self.worker.grade_batch
        while grader is not None and self._can_grade():
            batch, self._to_grade = self._to_grade[:size], self._to_grade[size:]
            items = [episode.grade_item(self._boxes.get(episode.job.uid)) for episode in batch]
            self._num_grading += 1
            self._num_away += 1
            self.worker.grade_threads.submit(self._grade, grader, batch, items)

    def _grade(self, grader: Grader, batch: list[Episode], items: list[GradeItem]) -> None:
        """(grading thread) One verdict an episode, whatever the grader does."""
        try:
            verdicts = grader.grade(items)
            if len(verdicts) != len(items):
                raise EngineError(f"grader gave {len(verdicts)} verdicts for {len(items)} episodes")
        except Exception as error:
            outcome = Outcome(OutcomeKind.INFRA, f"grader: {type(error).__name__}: {error}")
            verdicts = [Graded(None, {}, outcome)] * len(items)
        checked = [_checked(verdict) for verdict in verdicts]

        def graded() -> None:
            self._num_grading -= 1
            for episode, verdict in zip(batch, checked):
                self._settle(episode, episode.record(verdict))

        self._events.put(graded)

    def _settle(self, episode: Episode, record: RolloutRecord) -> None:
        """The record is final: give back what the episode held."""
        self._final.append(record)
        self._num_final += 1
        self._release_box(episode.job.uid)

    def _release_box(self, uid: str) -> None:
        box = self._boxes.pop(uid, None)
        if box is not None and self.worker.sandboxes is not None:
            pool = self.worker.sandboxes
            self.worker.tool_threads.submit(pool.release, box)  # a release cleans the box, which takes time

    def close(self) -> None:
        """After a broken-off stream: let threads end, submit nothing more, give back every box."""
        self._is_closed = True
        for episode in self._decoding.values():
            self._release_box(episode.job.uid)
        while self._num_away:
            event = self._events.get()
            self._num_away -= 1
            event()
        for uid in list(self._boxes):
            self._release_box(uid)


def _checked(verdict: Graded) -> Graded:
    """A scored verdict needs a finite reward; anything else is a failure, not a zero."""
    if not verdict.outcome.is_scored:
        return verdict
    if verdict.reward is None or not math.isfinite(verdict.reward):
        outcome = Outcome(OutcomeKind.FAILED, f"reward is {verdict.reward}, must be a finite number")
        return Graded(None, {}, outcome, verdict.isolation, verdict.sandbox_ids)
    return verdict
