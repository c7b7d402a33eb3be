"""`RolloutStreams` in this process: one worker in a thread. For tests, and for trainers without Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from consilience.conf.errors import EngineError
from consilience.rollout.continuous import Inbox, serve
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, ask_to_pause
from consilience.rollout.phases import Durable
from consilience.rollout.publishing import Announced, verify
from consilience.rollout.records import RolloutRecord
from consilience.rollout.worker import RolloutWorker

if TYPE_CHECKING:
    from torch import Tensor


class LocalStreams:
    """Use it as a context manager: leaving ends the thread, not the worker.

    recompute  running requests compute their state again when weights arrive; else they keep it
    silence_s  how long the worker may say nothing (it speaks every few seconds); EngineError then
    """

    def __init__(self, worker: RolloutWorker, *, recompute: bool = False, silence_s: float = 900.0) -> None:
        self._worker, self._recompute, self._silence_s = worker, recompute, silence_s
        self._inbox = Inbox()
        self._durable_of: dict[str, Durable] = {}
        self._leases: list[Lease] = []
        self._heard: queue.SimpleQueue[list[RolloutRecord] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="rollout", daemon=True)
        self._thread.start()

    def __enter__(self) -> LocalStreams:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and not issubclass(kind, Exception):  # interrupted, to be gone on with
            ask_to_pause(self._leases)
        if self._thread.is_alive():
            with suppress(EngineError):  # it stops by itself
                self._inbox.end()
            self._thread.join(self._silence_s)

    def hand_over(self, jobs: Sequence[RolloutJob], durable: Durable) -> None:
        """See `RolloutStreams.hand_over`."""
        durable.fence()
        lease = durable.take_lease("local")
        self._leases.append(lease)
        self._durable_of |= dict.fromkeys((job.uid for job in jobs), durable)
        self._inbox.submit(jobs, lease)

    def hear(self) -> None:
        """See `RolloutStreams.hear`. Errors are the worker's."""
        try:
            heard = self._heard.get(timeout=self._silence_s)
        except queue.Empty:
            raise EngineError(f"the rollout worker said nothing for {self._silence_s:g} s") from None
        if isinstance(heard, BaseException):
            raise heard
        keep(heard, self._durable_of)

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutStreams.publish`. WeightsRefused unless they are what was announced."""
        verify(weights, announced)
        self._inbox.publish(weights, announced, version, recompute=self._recompute)

    def _serve(self) -> None:
        """(its thread)"""
        try:
            for batch in serve(self._worker, self._inbox):
                self._heard.put(batch)
        except BaseException as error:
            self._heard.put(error)


def keep(records: Sequence[RolloutRecord], durable_of: dict[str, Durable]) -> None:
    """Give each phase its records at once; a record of a job that nobody waits for is dropped."""
    shares: dict[int, tuple[Durable, list[RolloutRecord]]] = {}
    for record in records:
        if (durable := durable_of.pop(record.uid, None)) is not None:
            shares.setdefault(id(durable), (durable, []))[1].append(record)
    for durable, part in shares.values():
        durable.keep(part)
