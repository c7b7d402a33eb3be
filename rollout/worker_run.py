"""One stream of a rollout worker: its episodes, from the first request to the last record.

Threads only put closures on a queue; the thread that iterates runs them. With a token log, the tokens of a
step are on disk before anything reads them, and episodes that a former owner began go on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from consilience.conf.errors import (
    ConsilienceError,
    EngineError,
)
from consilience.rollout.boxes import Box
from consilience.rollout.branches import OpenBranches
from consilience.rollout.columns import ColumnFile
from consilience.rollout.deadlines import Stall, dump_stacks
from consilience.rollout.dispatch import STALLED
from consilience.rollout.engine import Completed, Request
from consilience.rollout.episode import Episode, State
from consilience.rollout.errands import Errands
from consilience.rollout.grading import Graded
from consilience.rollout.grading_queue import STAGE, GradingQueue
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease
from consilience.rollout.parsing import ToolCall
from consilience.rollout.pausing import Pause
from consilience.rollout.prompts import GroupPrompts
from consilience.rollout.records import Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.recovery import Begun, box_for, kind_of, take_over, without_parent
from consilience.rollout.token_log import TokenLog
from consilience.rollout.tools import argument_error, run_tool
from consilience.rollout.watched_threads import Task

if TYPE_CHECKING:
    from consilience.rollout.worker import RolloutWorker

_MAX_EMPTY_STEPS = 4096  # steps without a finished turn before the engine is asked whether it still works


class WorkerRun:
    """The state of one `stream`. Threads only put closures on `_events`; this thread runs them."""

    def __init__(self, worker: RolloutWorker, jobs: Sequence[RolloutJob], lease: Lease | None = None) -> None:
        if len({job.uid for job in jobs}) != len(jobs):
            raise EngineError("two jobs share a uid; uids are unique over a run")
        self.worker, self.engine, self.jobs = worker, worker.engine, jobs
        self._decoding: dict[str, Episode] = {}
        self._episodes: dict[str, Episode] = {}  # by job uid
        self._boxes: dict[str, Box] = {}  # job uid -> leased box
        threads = (worker.tool_threads, worker.lease_threads, worker.grade_threads)
        self._errands = Errands(threads, self._on_late, worker.flush_s)
        self._grading = GradingQueue(worker, self._errands, self._boxes, self._take_verdict)
        self._final: list[RolloutRecord] = []
        self._num_final = self._num_empty = 0
        self._is_closed = False
        self._prompts = GroupPrompts(worker.tokenizer)
        self.pause = Pause(worker, lease)
        self._branches = OpenBranches(worker)
        self._log = None if lease is None else TokenLog(lease)
        folder = None if lease is None else lease.columns_folder
        self._columns = None if lease is None or folder is None else ColumnFile(folder, lease.epoch)
        self._lost_streams: set[str] = set()  # request uids whose state died with a former worker
        self._given_up: set[str] = set()  # job uids whose thread was late; what it still says is not heard

    def batches(self) -> Iterator[list[RolloutRecord]]:
        self.begin()
        last = time.monotonic()  # an empty batch now and then says that this worker lives
        while not self.is_over and not self.pause.is_due():
            self.take_events(may_wait=True)
            if self._decoding:
                self.take_step(self.engine.step())
            self.grade_some()
            waited = time.monotonic() - last
            if waited > (self.worker.flush_s if self._final else self.worker.heartbeat_s):
                last = time.monotonic()
                yield self.take_final()
        if not self.is_over:
            self.save_streams()
            self.engine.clear()
        if self._final:
            yield self.take_final()

    def save_streams(self) -> None:
        """The states of what is being decoded, or waits for a tool, for who goes on (`pausing.py`)."""
        held = (uid for episode in self._episodes.values() for uid in episode.held)
        self.pause.save(self._log, {*self._decoding, *held})

    def begin(self) -> None:
        """Send the first requests, or those that go on with what a former owner logged."""
        jobs = [*self.jobs, *self._branches.beside(self.jobs)]
        episodes = [episode for job in jobs if (episode := self._build(job)) is not None]
        self._go_on(episodes, lambda episode: self._build(episode.job) or episode)

    def _go_on(self, episodes: list[Episode], rebuild: Callable[[Episode], Episode]) -> None:
        begun: dict[str, Begun | None] = {}
        if self._log is not None:
            begun, lost = take_over(self._log, episodes, rebuild)
            self._lost_streams.update(lost)
        self._episodes |= {episode.job.uid: episode for episode in episodes}
        titles = [title for e in episodes if (title := self._branches.title_of(e)) is not None]
        if titles:
            self._go_on(titles, self._branches.again)
        for episode in episodes:
            self._begin(episode, begun.get(episode.job.uid))

    def _fork_title(self, episode: Episode) -> None:
        """The first answer has just ended: if a title is asked for, it branches off the state there."""
        if (title := self._branches.title_of(episode)) is None:
            return
        self._episodes[title.job.uid] = title
        request = title.next_request()
        self._open_in_log(title, request)
        if self._branches.fork(episode.request_uid, request):
            self._decoding[request.uid] = title
        else:
            self._send(title, request)

    @property
    def is_over(self) -> bool:
        """Every job has its record."""
        return self._num_final == len(self.jobs)

    @property
    def is_decoding(self) -> bool:
        return bool(self._decoding)

    def take_final(self) -> list[RolloutRecord]:
        """Records that became final since the last call."""
        batch, self._final = self._final, []
        return batch

    def forget_streams(self, unfinished: Sequence[Request], held: Sequence[str]) -> None:
        """The engine was cleared: send this run's requests again, each with all of its stream."""
        self._lost_streams.update(held)
        for request in unfinished:
            episode = self._decoding.pop(request.uid, None)
            if episode is not None:
                if request.parent is not None:
                    self._lost_streams.add(request.parent)
                self._send(episode, request)

    def _build(self, job: RolloutJob) -> Episode | None:
        """A fresh episode; a job that cannot be encoded ends as INFRA, None."""
        worker = self.worker
        episode = None
        try:
            ids = self._prompts.ids_of(job, worker.family)
            context, family = worker.max_context, worker.family
            episode = Episode(job, ids, worker.tokenizer, max_context=context, family=family)
            if worker.max_context is not None and len(ids) >= worker.max_context:
                raise EngineError(f"prompt of {len(ids)} tokens, the context holds {worker.max_context}")
            if job.tools and worker.sandboxes is None:
                raise EngineError("the job has tools but this worker has no sandboxes")
        except ConsilienceError as error:
            episode = episode or Episode(job, (), worker.tokenizer)
            self._abort(episode, f"{type(error).__name__}: {error}")
            return None
        return episode

    def _begin(self, episode: Episode, begun: Begun | None) -> None:
        """Start an episode, or go on with the turn that was being decoded, or with what comes next."""

        def go_on() -> None:
            if begun is not None:
                request, prefix = begun
                self._send(episode, replace(request, prefix=prefix))
            else:
                self._advance(episode)

        if episode.boxes:  # the calls of the turns before need their workspace, and so does the grader
            self._send_away("lease", lambda: self._lease(episode, go_on), episode)
        else:
            go_on()

    def _submit(self, episode: Episode) -> None:
        if self._is_closed:
            self._release_box(episode.job.uid)
            return
        request = episode.next_request()
        self._open_in_log(episode, request)
        self._send(episode, request)

    def _open_in_log(self, episode: Episode, request: Request) -> None:
        if self._log is not None:
            seed, turn = request.sampling.seed, episode.turn
            self._log.open(request.uid, episode.job.uid, turn, request.prompt_ids, seed)

    def _send(self, episode: Episode, request: Request) -> None:
        newest = request.uid if request.prefix is not None else request.parent
        if request.parent in self._lost_streams:
            request = without_parent(request, episode, self.worker.max_context)
        if request.parent is None:
            request = self.pause.recalled(request, newest)
        try:
            self.engine.submit([request])
        except EngineError as error:
            self._abort(episode, f"EngineError: {error}")
            return
        self._decoding[request.uid] = episode

    def take_step(self, completed: Sequence[Completed]) -> None:
        """What the engine's last step did for this run, on the disk first where there is a log."""
        if not self._decoding:
            return
        if self._log is not None:
            self._write_step(self._log, completed)
        for done in completed:
            episode = self._decoding.pop(done.uid, None)
            if episode is None:  # left over from a run that was broken off
                continue
            episode.on_completed(done)
            if episode.turn == 1:
                self._fork_title(episode)
            self._advance(episode)
        self._num_empty = 0 if completed else self._num_empty + 1
        if self._num_empty >= _MAX_EMPTY_STEPS:
            self._num_empty = 0
            state = self.engine.state()
            if state.num_running + state.num_waiting == 0:
                raise EngineError(f"the engine lost {len(self._decoding)} requests and is idle; restart it")

    def _write_step(self, log: TokenLog, completed: Sequence[Completed]) -> None:
        """The step's tokens, durable where a turn is over: only then does anything else see them."""
        log.step(self.engine.new_tokens())
        ended = [done for done in completed if done.uid in self._decoding]
        for done in ended:
            log.end(done.uid, done.finish)
        if ended:
            log.sync()

    def _advance(self, episode: Episode) -> None:
        """What comes next: a pending call, in a thread and a box; or the next turn; or the grader."""
        uid = episode.job.uid
        while episode.state is State.TOOLS:
            call = episode.pending_calls[len(episode.answers)]
            if error := argument_error(call, episode.job.tools):
                self._answer(episode, error)  # nothing would run, so no box is needed
            elif uid in self._boxes:
                return self._tool_in(self._boxes[uid], episode, call)
            else:
                return self._send_away("lease", lambda: self._lease(episode), episode)
        if episode.is_done:
            self._finish(episode)
        else:
            self._submit(episode)

    def _lease(self, episode: Episode, then: Callable[[], None] | None = None) -> Callable[[], None]:
        """(lease thread) A box with its job's files and what the episode did there; then its calls."""
        pool = self.worker.sandboxes
        assert pool is not None  # _build refused the job otherwise
        box = box_for(pool, episode, self.worker.max_tool_chars)

        def leased() -> None:
            self._boxes[episode.job.uid] = box
            if episode.job.uid in self._given_up:
                self._release_box(episode.job.uid)
                return
            episode.used_box(box.id, box.enforced.level.label)
            if then is None:
                self._advance(episode)
            else:
                then()

        return leased

    def _tool_in(self, box: Box, episode: Episode, call: ToolCall) -> None:
        """Run a call once it is in the log that it begins, and that nobody has taken the episode over."""
        tools, max_chars = episode.job.tools, self.worker.max_tool_chars
        if self._is_closed:
            self._release_box(episode.job.uid)
            return
        if self._log is not None:
            self._log.intent(episode.request_uid, len(episode.answers), call.name, episode.boxes)
            self._log.sync()

        def work() -> Callable[[], None]:
            result = run_tool(box, call, tools, max_chars=max_chars)

            def answered() -> None:
                if self._is_closed:  # what was not logged in time has no result
                    return self._release_box(episode.job.uid)
                if episode.job.uid in self._given_up:
                    return None
                self._answer(episode, result)
                if self._log is not None:
                    self._log.sync()
                self._advance(episode)

            return answered

        self._send_away("tool", work, episode)

    def _answer(self, episode: Episode, result: str) -> None:
        """Take a call's result, which is in the log with the next write."""
        if self._log is not None:
            self._log.results(episode.request_uid, [result], episode.boxes, len(episode.answers))
        episode.on_tool_result(result)

    def _send_away(self, stage: str, work: Callable[[], Callable[[], None]], episode: Episode) -> None:
        """Run `work` in a thread, then what it returns in this one; any exception ends the episode only."""

        def guarded() -> Callable[[], None]:
            try:
                return work()
            except Exception as error:
                detail, kind = f"{type(error).__name__}: {error}", kind_of(error)
                return lambda: self._abort(episode, detail, kind)

        worker, limits = self.worker, self.worker.limits
        threads, limit_s = (
            (worker.tool_threads, limits.tool_s)
            if stage == "tool"
            else (worker.lease_threads, limits.lease_s)
        )
        self._errands.send(threads, stage, limit_s, guarded, [episode.job.uid])

    def take_events(self, *, may_wait: bool) -> None:
        """Run what threads handed back; wait for one only when there is nothing else to do."""
        self._errands.take(is_idle=may_wait and not self._decoding and not self._grading.can_send)

    def _on_late(self, task: Task) -> None:
        """End the episodes of a thread that is late, each with the stall in its record."""
        if task.stage == STAGE:
            self._grading.give_up(task)
        waited_s = round(task.waited_s, 3)
        stall = Stall(task.stage, waited_s, task.limit_s, stacks=dump_stacks(self.worker.stacks))
        outcome = Outcome(OutcomeKind.INFRA, f"stalled in '{task.stage}' for {waited_s:.1f} s")
        for uid in task.uids:
            self._given_up.add(uid)
            episode = self._episodes[uid]
            if not episode.is_done:
                episode.abort(outcome.detail)
            self.engine.release(episode.held)
            record = episode.record(Graded(None, {}, outcome))
            fact = {STALLED: replace(stall, uids=(uid,)).to_dict()}
            self._settle(episode, replace(record, metadata={**record.metadata, **fact}))

    def _abort(self, episode: Episode, detail: str, kind: OutcomeKind = OutcomeKind.INFRA) -> None:
        if episode.job.uid in self._given_up:
            return
        episode.abort(detail, kind)
        self.engine.release(episode.held)
        self._settle(episode, episode.aborted_record())

    def _finish(self, episode: Episode) -> None:
        if episode.held:
            self.engine.release(episode.held)  # now, not after grading: a held stream takes up a row
        if not episode.job.reward:
            self._take_verdict(episode, Graded(None, {}, Outcome(OutcomeKind.GRADED, "no reward asked for")))
        elif self.worker.grader is None:
            verdict = Graded(None, {}, Outcome(OutcomeKind.FAILED, "not graded: this worker has no grader"))
            self._take_verdict(episode, verdict)
        else:
            self._grading.add(episode)

    def _take_verdict(self, episode: Episode, verdict: Graded) -> None:
        self._settle(episode, episode.record(verdict))

    def grade_some(self) -> None:
        """Hand finished episodes to a free grading thread."""
        self._grading.send()

    def _settle(self, episode: Episode, record: RolloutRecord) -> None:
        """The record is final: give back what the episode held."""
        self._release_box(episode.job.uid)
        if (record := self._branches.take(episode.job, record)) is None:  # type: ignore[assignment]
            return
        is_long = record.num_tokens > self.worker.inline_tokens
        if self._columns is not None and is_long and not self._is_closed:
            record = self._columns.put(record)
        self._final.append(record)
        self._num_final += 1

    def _release_box(self, uid: str) -> None:
        box = self._boxes.pop(uid, None)
        if box is not None and self.worker.sandboxes is not None:
            pool = self.worker.sandboxes
            limit_s = self.worker.limits.release_s  # a release cleans the box, which takes time
            self.worker.tool_threads.submit(Task(lambda: pool.release(box), "release", limit_s, (uid,)))

    def close(self) -> None:
        """After a broken-off stream: let threads end, submit nothing more, give back every box."""
        self._is_closed = True
        if self._log is not None:
            self._log.close()
        if self._columns is not None:
            self._columns.close()
        for episode in self._decoding.values():
            self._release_box(episode.job.uid)
        self._errands.drain()
        for uid in list(self._boxes):
            self._release_box(uid)
