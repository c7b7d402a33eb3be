"""A planned pause of a worker: when it is due, what is saved beside the log, where the next owner finds it.

driver interrupted ─► <epoch>.pause in the log's folder ─┐
node preempted ─────► SIGTERM ─► worker.pause() ─────────┴─► between two steps: states to streams/; the end
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from consilience.rollout.engine import Request, SavedStream
from consilience.rollout.lease import Lease
from consilience.rollout.token_log import TokenLog

if TYPE_CHECKING:
    from consilience.rollout.worker import RolloutWorker

_LOOK_S = 0.25


class Pause:
    """That of one stream of a worker, under the stream's lease if it has one."""

    def __init__(self, worker: RolloutWorker, lease: Lease | None) -> None:
        self._worker, self._lease = worker, lease
        self._is_asked, self._look_at = False, 0.0

    def is_due(self, *, must_look: bool = False) -> bool:
        """Whether the worker, or who gave the lease, wants the stream to end; looks there now and then."""
        now = time.monotonic()
        if self._lease is not None and not self._is_asked and (must_look or now >= self._look_at):
            self._look_at = now + _LOOK_S
            self._is_asked = self._lease.is_to_pause
        return self._is_asked or self._worker.is_to_pause

    def save(self, log: TokenLog | None, uids: Collection[str]) -> int:
        """Leave the states of these requests, running or held, to who goes on; how many could be saved.

        EngineError once somebody else has taken over, or when the log's disk is full.
        """
        save = getattr(self._worker.engine, "save_streams", None)
        if log is None or self._lease is None or save is None or not self._worker.limits.pause_s:
            return 0
        log.sync()  # a state is of use to somebody who finds its tokens
        return save(self._lease.streams_folder, uids, self._worker.limits.pause_s)

    def recalled(self, request: Request, newest: str | None) -> Request:
        """A request that goes on with what another owner logged, with the place where the state of its stream
        may lie, which has the name of the request `newest`."""
        if self._lease is None or newest is None:
            return request
        return replace(request, saved=SavedStream(self._lease.streams_folder, newest))
