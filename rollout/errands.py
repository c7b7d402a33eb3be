"""What the episodes of one stream have threads do: tools, leases, grading. Each with a limit.

send ─► a thread works ─► its event waits in a queue ─► take: the stream's thread runs it
           └─ over its limit ─► look: the stream's thread is told, once; its event comes late or never
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from consilience.rollout.watched_threads import Task, WatchedThreads

Event = Callable[[], None]


class Errands:
    """Work that is away. `on_late` gets each task that is given up; nobody waits for that any more.

    An event of such a task is still run when it comes: what it holds (a box) must be given back.
    """

    def __init__(
        self, threads: Sequence[WatchedThreads], on_late: Callable[[Task], None], look_s: float
    ) -> None:
        self._threads, self._on_late, self._look_s = threads, on_late, look_s
        self._events: queue.SimpleQueue[tuple[Task, Event]] = queue.SimpleQueue()
        self._looked_at = time.monotonic()
        self.num_away = 0

    def send(
        self,
        threads: WatchedThreads,
        stage: str,
        limit_s: float,
        work: Callable[[], Event],
        uids: Sequence[str],
    ) -> None:
        """Have a thread do `work`, which raises nothing and returns what the stream's thread is to run."""
        self.num_away += 1
        task = Task(
            lambda: self._events.put((task, work())), stage, limit_s, tuple(uids), on_late=self._give_up
        )
        threads.submit(task)

    def take(self, *, is_idle: bool) -> None:
        """Run what threads handed back; wait for one, a moment, only where there is nothing else to do."""
        while self.num_away and (is_idle or not self._events.empty()):
            try:
                task, event = self._events.get(timeout=self._look_s)
            except queue.Empty:
                break
            self.num_away -= not task.is_given_up
            is_idle = False
            event()
        self._look()

    def drain(self) -> None:
        """Until nothing is away: no longer than the limits of what is."""
        while self.num_away:
            with suppress(queue.Empty):
                task, event = self._events.get(timeout=self._look_s)
                self.num_away -= not task.is_given_up
                event()
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at >= self._look_s:
            self._looked_at = now
            for threads in self._threads:
                for task in threads.overdue():
                    if task.on_late is not None:
                        task.on_late(task)

    def _give_up(self, task: Task) -> None:
        self.num_away -= 1
        self._on_late(task)
