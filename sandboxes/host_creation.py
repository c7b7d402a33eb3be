"""How fast a host makes boxes, and when it stops trying: a paced creator behind a circuit breaker.

Pace (additive increase, multiplicative decrease): so many creations at once, one more after each round of
that many that went well, half as many after a failure or when the 95th percentile is thrice what it was at
its best. Breaker: half of the last ten failed, so nothing is created for a while; then one probe decides.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from consilience.conf.errors import CreationPaused
from consilience.sandboxes.protocol import Sandbox, SandboxSpec

Opener = Callable[[SandboxSpec], Awaitable[Sandbox]]
_FEWEST_TO_JUDGE = 8  # latencies below that many say nothing about a percentile
_SLOW = 3.0


class Breaker:
    """Closed: all may try. Open: nobody, for `pause_s`. Half open: one, and its outcome decides."""

    def __init__(
        self,
        *,
        window: int = 10,
        share: float = 0.5,
        pause_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outcomes: deque[bool] = deque(maxlen=window)
        self._share, self._pause_s, self._clock = share, pause_s, clock
        self._opened_at: float | None = None
        self._is_probing = False
        self._last = ""
        self.num_openings = 0

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    def enter(self) -> bool:
        """To be called before a try; whether it is the probe. CreationPaused if it must not be made."""
        if self._opened_at is None:
            return False
        left_s = self._opened_at + self._pause_s - self._clock()
        if left_s <= 0 and not self._is_probing:
            self._is_probing = True
            return True
        when = f"in {left_s:.1f} s" if left_s > 0 else "under way"
        raise CreationPaused(
            f"{self._outcomes.count(False)} of the last {len(self._outcomes)} sandboxes could not be made; "
            f"the next try is {when}; the last error: {self._last}"
        )

    def succeed(self, is_probe: bool) -> None:
        if is_probe:
            self._outcomes.clear()
            self._opened_at, self._is_probing = None, False
        self._outcomes.append(True)

    def fail(self, is_probe: bool, reason: str) -> None:
        self._last = reason
        self._outcomes.append(False)
        is_bad = self._outcomes.count(False) >= self._share * (self._outcomes.maxlen or 1)
        if is_probe or (self._opened_at is None and is_bad):
            self._opened_at = self._clock()
            self.num_openings += 1
        if is_probe:
            self._is_probing = False

    def give_up(self, is_probe: bool) -> None:
        """The try was broken off and says nothing."""
        if is_probe:
            self._is_probing = False


class PacedCreator:
    """Opens boxes, at most `pace` at a time, in the order of the calls. On the event loop that uses it."""

    def __init__(self, opener: Opener, breaker: Breaker, *, start_pace: int = 4, most_pace: int = 16) -> None:
        if not 1 <= start_pace <= most_pace:
            raise ValueError(f"start_pace is {start_pace}; it must be from 1 to most_pace={most_pace}")
        self._opener, self._breaker = opener, breaker
        self._most_pace, self._pace = most_pace, float(start_pace)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._best_s = float("inf")  # the lowest 95th percentile seen
        self.num_running = self.num_created = self.num_failed = 0
        self.latencies_s: deque[float] = deque(maxlen=64)

    @property
    def pace(self) -> int:
        """How many may be under way at once."""
        return int(self._pace)

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A started, verified box. CreationPaused while the breaker is open; else what the opener raises."""
        await self._take_turn()
        try:
            is_probe = self._breaker.enter()
            began = time.monotonic()
            try:
                box = await self._opener(spec)
            except Exception as error:
                self.num_failed += 1
                self._pace = max(1.0, self._pace / 2)
                self._breaker.fail(is_probe, f"{type(error).__name__}: {error}")
                raise
            except BaseException:
                self._breaker.give_up(is_probe)
                raise
            self.num_created += 1
            self._breaker.succeed(is_probe)
            self._adapt(time.monotonic() - began)
            return box
        finally:
            self.num_running -= 1
            self._wake()

    def percentile_s(self, share: float) -> float:
        """Of the last creations; 0 before the first."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def _adapt(self, took_s: float) -> None:
        self.latencies_s.append(took_s)
        if len(self.latencies_s) >= _FEWEST_TO_JUDGE:
            now_s = self.percentile_s(0.95)
            self._best_s = min(self._best_s, now_s)
            if now_s > _SLOW * self._best_s:
                self._pace = max(1.0, self._pace / 2)
                self.latencies_s.clear()  # judged once
                return
        self._pace = min(float(self._most_pace), self._pace + 1 / self._pace)

    async def _take_turn(self) -> None:
        if self._waiting or self.num_running >= self.pace:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn  # no limit: whoever asks for a box has one, and each creation ends
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it was given the turn in the same moment
                    self.num_running -= 1
                self._wake()
                raise
        else:
            self.num_running += 1

    def _wake(self) -> None:
        while self._waiting and self.num_running < self.pace:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)
