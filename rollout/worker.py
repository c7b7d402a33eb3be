"""A rollout worker: drives many episodes at once against one engine. Plain Python, no Ray.

The loop submits every episode's next request, steps the engine, and hands finished turns on: tool calls
to threads, finished episodes to grading threads. Decoding never waits for either. Per-turn work is
Python; per-token work is the engine's. `worker_run.py` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

from consilience.conf.errors import EngineError
from consilience.rollout.boxes import BoxPool
from consilience.rollout.deadlines import Limits
from consilience.rollout.engine import EngineState, RolloutEngine
from consilience.rollout.grading import Grader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease
from consilience.rollout.proof import Evidence
from consilience.rollout.publishing import Announced
from consilience.rollout.records import RolloutRecord
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.watched_threads import WatchedThreads
from consilience.rollout.worker_run import WorkerRun

if TYPE_CHECKING:
    from torch import Tensor


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
    heartbeat_s       an empty batch leaves `stream` where nothing else did for so long
    max_tool_chars    characters of a tool's output that the model sees
    inline_tokens     tokens above which a record's per-token fields go into a file, where the lease names one
    limits            how long the threads may take; an episode whose thread is late ends with a stall in its
                      record, and the thread is written off
    stacks            where stacks are written on a stall; None: the error output
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
        heartbeat_s: float = 2.0,
        max_tool_chars: int = 2000,
        inline_tokens: int = 1024,
        limits: Limits | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.sandboxes, self.grader = engine, tokenizer, sandboxes, grader
        self.family, self.max_context = family, max_context
        self.flush_s, self.heartbeat_s = flush_s, heartbeat_s
        self.grade_batch, self.max_tool_chars = grade_batch, max_tool_chars
        self.num_grade_threads, self.inline_tokens = num_grade_threads, inline_tokens
        self.limits = limits or Limits()
        self.stacks: IO[str] | None = None
        self.is_to_pause = False
        self._on_close = on_close
        self.tool_threads = WatchedThreads(num_tool_threads, "tool")
        self.lease_threads = WatchedThreads(num_lease_threads, "lease")
        self.grade_threads = WatchedThreads(num_grade_threads, "grade")

    def run(self, jobs: Sequence[RolloutJob]) -> list[RolloutRecord]:
        """One record per job, in job order. EngineError on duplicate uids or an engine that stops."""
        records = {record.uid: record for batch in self.stream(jobs) for record in batch}
        return [records[job.uid] for job in jobs]

    def stream(self, jobs: Sequence[RolloutJob], lease: Lease | None = None) -> Iterator[list[RolloutRecord]]:
        """The same records as they become final, in batches.

        lease  write a token log under it, and go on with what former owners logged of these jobs. EngineError
               when its disk is full, or once the lease is fenced
        A worker that is to pause ends the stream early, some jobs without a record.
        """
        run = WorkerRun(self, jobs, lease)  # type: ignore[arg-type]  # the two files import each other
        try:
            yield from run.batches()
        finally:
            run.close()

    def pause(self) -> None:
        """(any thread, a signal's handler) Save what runs beside the log after this step, and end the stream.

        Who goes on with its jobs continues from there. Nothing is saved without a lease, or by an engine that
        cannot (vLLM): the streams are then computed again.
        """
        self.is_to_pause = True

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """New weights for the next step. WeightsRefused unless they are what was announced."""
        self.engine.publish(weights, announced, version)

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
        """What the engine holds and computes (`proof.py`). EngineError if it cannot tell."""
        tell = getattr(self.engine, "evidence", None)
        if tell is None:
            raise EngineError(f"{type(self.engine).__name__} cannot prove its weights; set rollout.proof=off")
        return tell(prompts, exact)

    def sleep(self, level: int) -> None:
        """Give memory back until `wake`: caches (0), weights to the host too (1), weights dropped (2)."""
        self.engine.sleep(level)

    def wake(self) -> None:
        self.engine.wake()

    def state(self) -> EngineState:
        return self.engine.state()

    def close(self) -> None:
        """End the threads, then whatever `on_close` was given for (pools, runners)."""
        for threads in (self.tool_threads, self.lease_threads, self.grade_threads):
            threads.close(self.limits.close_s)  # nothing is cancelled: releases of boxes may be queued
        if self._on_close is not None:
            self._on_close()
