"""Threads whose tasks have limits: a thread that is late is written off, and another takes its place.

A thread cannot be killed. One that never comes back costs its stack and nothing else: its task counts as
ended, its place in the pool is taken by a fresh one, and it does not keep the process from exiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Task:
    """One piece of work. `work` reports by itself; what it raises is only logged.


    on_late  called by the owner's `overdue` loop, never by the thread
    limit_s  from the moment a thread takes it; the queue before that moves on as late threads are replaced
    """

    work: Callable[[], object]
    stage: str
    limit_s: float
    uids: tuple[str, ...] = ()
    on_late: Callable[[Task], None] | None = None
    began: float | None = None
    is_given_up: bool = False

    @property
    def waited_s(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began


class WatchedThreads:
    """At most `num` threads at work; whoever owns them calls `overdue` every now and then."""

    def __init__(self, num: int, name: str) -> None:
        self._num, self._name = num, name
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._at_work: dict[threading.Thread, Task] = {}
        self._threads: list[threading.Thread] = []

    def submit(self, task: Task) -> None:
        self._queue.put(task)
        if len(self._threads) < self._num:
            self._start()

    def overdue(self) -> list[Task]:
        """Tasks over their limit, each once; from now on they are given up and their threads replaced."""
        late = []
        with self._lock:  # no limit: held for a few statements only
            for thread, task in list(self._at_work.items()):
                if task.waited_s > task.limit_s:
                    task.is_given_up = True
                    del self._at_work[thread]
                    self._threads.remove(thread)
                    late.append(task)
        for _ in late:
            self._start()
        return late

    def close(self, limit_s: float) -> int:
        """Let the queue run empty and end the threads; how many were still at work after `limit_s`."""
        deadline = time.monotonic() + limit_s
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _start(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        me = threading.current_thread()
        while (task := self._queue.get()) is not None:  # no limit: idle until `close`, in a daemon thread
            with self._lock:  # no limit: held for a few statements only
                task.began = time.monotonic()
                self._at_work[me] = task
            try:
                task.work()
            except Exception as error:
                _LOG.warning("%s: %s: %s", task.stage, type(error).__name__, error)
            with self._lock:  # no limit: held for a few statements only
                if task.is_given_up:
                    return
                del self._at_work[me]
