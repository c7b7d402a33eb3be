"""Who of several workers speaks, and who has been silent for too long. No Ray here.

ready? ─► the one that was heard least recently ─► its records, its end, its death
silent for more than `stall_s`, and again when it alone is asked ─► stacks, the end of its process, a stall
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from consilience.rollout.deadlines import DROPPED, REDISPATCHED, Stall, StallLog
from consilience.rollout.dispatch import Dispatch
from consilience.rollout.lease import Lease
from consilience.rollout.records import RolloutRecord

LOOK_S = 1.0  # how often one who waits looks for workers that say nothing

Heard = tuple[int | None, list[RolloutRecord] | None, str]
"""(slot, its next records, "") of a worker that speaks; (slot, None, why) of one that died or stalls. No
records and no reason: the stream is over. A slot of None: nobody speaks, all within their time."""


class WorkerDied(Exception):
    """The process behind a slot is gone; the text says what is known of it."""


@dataclass(slots=True)
class Share:
    """One slot's stream and its lease, its last sign of life, if it gave any, if its threads stalled."""

    stream: Any = None
    lease: Lease | None = None
    heard_at: float = 0.0
    has_spoken: bool = False
    has_stalled: bool = False

    def begin(self, stream: Any) -> None:
        """A new stream, of which nothing is known yet."""
        self.stream, self.heard_at = stream, time.monotonic()
        self.has_spoken = self.has_stalled = False


class Processes(Protocol):
    """The workers' processes, a slot each."""

    def ready(self, streams: Mapping[int, Any], limit_s: float) -> Sequence[int]:
        """Slots whose streams have something to say; waits for the first for up to `limit_s`."""
        ...

    def read(self, stream: Any, limit_s: float) -> list[RolloutRecord] | None:
        """The next records of a stream that is ready, None at its end. WorkerDied; TimeoutError if they don't
        come; errors that the worker itself raised, as they are."""
        ...

    def end_process(
        self, slot: int, stage: str, waited_s: float, limit_s: float, uids: tuple[str, ...] = ()
    ) -> Stall:
        """Stacks and end of the slot's process; the stall it is, not noted yet."""
        ...

    def died(self, slot: int, waited_s: float, uids: tuple[str, ...]) -> Stall:
        """What a death before the first word is, not noted yet."""
        ...


class Listener:
    """Hears workers, and notes in `stalls` what was over its limit and what became of the samples."""

    def __init__(self, processes: Processes, stalls: StallLog, stall_s: float) -> None:
        self._processes, self._stalls, self._stall_s = processes, stalls, stall_s

    def hear(self, shares: Sequence[Share], dispatch: Dispatch) -> Heard:
        """What the next worker says; shares without a stream are left out."""
        streams = {slot: share.stream for slot, share in enumerate(shares) if share.stream is not None}
        ready = list(self._processes.ready(streams, LOOK_S))
        now = time.monotonic()
        for slot in streams.keys() - ready:  # first: others may speak all the time
            if (silent_s := now - shares[slot].heard_at) <= self._stall_s:
                continue
            if not self._processes.ready({slot: streams[slot]}, LOOK_S):
                return slot, None, self._stalled(slot, shares[slot], dispatch, silent_s)
            ready.append(slot)  # this process was away, not the worker
        if not ready:
            return None, None, ""
        slot = min(ready, key=lambda s: shares[s].heard_at)
        share = shares[slot]
        try:
            batch = self._processes.read(share.stream, self._stall_s)
        except TimeoutError:  # it was said that there is one; the machine that has it is gone
            return slot, None, self._stalled(slot, share, dispatch, self._stall_s)
        except WorkerDied as death:
            if not share.has_spoken:
                uids, waited_s = tuple(dispatch.pending[slot]), round(now - share.heard_at, 3)
                self.note(self._processes.died(slot, waited_s, uids), dispatch, slot)
            return slot, None, str(death)
        share.heard_at, share.has_spoken = now, True
        return slot, batch, ""

    def note(self, stall: Stall, dispatch: Dispatch, slot: int) -> None:
        """Write down a stall that counts against its samples, and what becomes of them."""
        why = f"{stall.waited_s:.1f} s in '{stall.stage}' of {stall.actor} on {stall.host}"
        again, dropped = dispatch.lost(slot, stall.uids, why)
        for uids, action in ((again, REDISPATCHED), (dropped, DROPPED)):
            if uids:
                self._stalls.add(replace(stall, uids=tuple(uids), action=action))
        if not again and not dropped:  # nobody's sample, and still a wait over its limit
            self._stalls.add(replace(stall, uids=()))

    def _stalled(self, slot: int, share: Share, dispatch: Dispatch, silent_s: float) -> str:
        """Note which worker says nothing and what it has, have it write down where it is, and end it."""
        uids = tuple(dispatch.pending[slot])
        stall = self._processes.end_process(slot, "stream", silent_s, self._stall_s, uids)
        if share.has_spoken:
            self._stalls.add(replace(stall, action=REDISPATCHED))
        else:
            self.note(stall, dispatch, slot)
        return str(stall)
