"""What happens to a run while it goes on: deaths, frozen processes, a disk that lies or is full.

A deck of kinds is shuffled by the seed, so that each comes at its share; when the next one comes is counted
in logged bytes, in seconds, or from a phase's end on (into training, publishing, saving), again by the seed.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from real_run import STALL_S, stage
from session import WAIT_S, Session

# Kinds and their shares: few deaths of drivers and clusters, which take many seconds to start. All but
# "freeze" and "full" kill something with SIGKILL.
DECK = {
    "worker": 16,  # one Ray worker
    "workers": 4,  # both
    "driver": 3,  # a private cluster goes with it, one that was joined does not
    "orphan": 1,  # a worker is frozen, its driver killed; it wakes up beside its successor
    "cluster": 1,  # every process of Ray
    "everything": 1,  # driver and cluster at once
    "tear": 4,  # one write gets half way, and its process is dead
    "lose": 4,  # one write to a token log is acknowledged and gone; then the workers are killed
    "freeze": 2,  # SIGSTOP of a worker that wakes up in time or is taken for dead
    "full": 1,  # the disk takes nothing more, until the run has stopped by itself
}
SHORT = ("lose", "driver")
NO_KILLS = ("freeze", "full")
MEAN_BYTES = 4000  # logged between two events; a step of all samples is 250, a phase about 12,000
_LOOK_S = 0.02


class Disturber:
    """Runs a session to its end through events of `kinds`, at most `num_kills` of them kills.

    kills   by kind;  others: frozen workers, full disks
    stops   times the run ended itself with one clear error
    AssertionError when it ends in any other way, or does nothing for minutes.
    """

    def __init__(
        self, session: Session, rng: Random, num_kills: int, kinds: Sequence[str] | None = None
    ) -> None:
        self.session, self.rng, self.num_kills = session, rng, num_kills
        self.kills: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.stops = 0
        self._say: Callable[[str], None] = print
        self._given = kinds
        self._deck: list[str] = []
        self._seen: tuple[int, ...] = ()
        self._moved_at = time.monotonic()
        self._may_be_silent = False  # whether the newest driver may end without a word

    def to_the_end(self, say: Callable[[str], None]) -> None:
        """`say` gets one line an event."""
        self._say = say
        self.session.start()
        while not self._has_finished():
            if self.kills.total() < self.num_kills:
                self._wait()
                if self._has_ended():
                    continue
                kind = self._next_kind()
                if getattr(self, f"_{kind}")():
                    (self.others if kind in NO_KILLS else self.kills)[kind] += 1
                    self._say(f"{kind:<10} {self._where()}")
            else:
                self._sleep(0.2)

    def _next_kind(self) -> str:
        if not self._deck:
            self._deck = list(self._given or [k for k, share in DECK.items() for _ in range(share)])
            if self._given is None:
                self.rng.shuffle(self._deck)
        return self._deck.pop(0)

    # Events. Each says whether it happened.

    def _worker(self) -> bool:
        workers = self.session.workers()
        return bool(workers) and self.session.send(self.rng.choice(workers), signal.SIGKILL)

    def _workers(self) -> bool:
        return self._kill(self.session.workers())

    def _driver(self) -> bool:
        assert self.session.driver is not None
        self._may_be_silent = True
        self.session.driver.kill()
        self.session.driver.wait()
        return True

    def _cluster(self) -> bool:
        self._may_be_silent = True
        return self._kill(self.session.cluster())

    def _everything(self) -> bool:
        self._driver()
        self._cluster()
        return True

    def _orphan(self) -> bool:
        workers = self.session.workers()
        if not workers or not self.session.send(victim := self.rng.choice(workers), signal.SIGSTOP):
            return False
        self._driver()
        self._has_finished()  # starts the next driver
        self._sleep(self.rng.uniform(0, 20))
        self.session.send(victim, signal.SIGCONT)
        return True

    def _freeze(self) -> bool:
        workers = self.session.workers()
        if not workers or not self.session.send(victim := self.rng.choice(workers), signal.SIGSTOP):
            return False
        self._sleep(self.rng.uniform(0, 2 * STALL_S))
        self.session.send(victim, signal.SIGCONT)
        return True

    def _tear(self) -> bool:
        self._may_be_silent = True
        return self._is_taken("tear")

    def _lose(self) -> bool:
        if not self._is_taken("lose"):
            return False
        self._sleep(self.rng.uniform(0, 0.3))
        return self._workers()

    def _full(self) -> bool:
        self.session.inject("full")
        deadline = time.monotonic() + WAIT_S
        while not self._has_ended():
            assert time.monotonic() < deadline, f"the run does not notice its full disk in {WAIT_S:g} s"
            time.sleep(_LOOK_S)
        self.session.mend("full")
        return True

    def _is_taken(self, fault: str) -> bool:
        self.session.inject(fault)
        self._sleep(STALL_S, lambda: not (self.session.disk / fault).exists())
        return not self.session.mend(fault)

    def _kill(self, pids: list[int]) -> bool:
        sent = [self.session.send(pid, signal.SIGKILL) for pid in pids]
        return any(sent)

    # Time.

    def _wait(self) -> None:
        """Until the next event."""
        choice = self.rng.random() if self._given is None else 1.0
        if choice < 0.2:
            self._sleep(self.rng.uniform(0, 8))
        elif choice < 0.4:
            phases = self._signature()[1]
            self._sleep(WAIT_S, lambda: self._signature()[1] > phases)
            self._sleep(self.rng.uniform(0, 1.5))
        else:
            last, left = self._signature()[0], self.rng.expovariate(1 / MEAN_BYTES)

            def is_there() -> bool:
                nonlocal last, left
                now = self._signature()[0]
                left, last = left - max(0, now - last), now
                return left <= 0

            self._sleep(WAIT_S, is_there)

    def _sleep(self, limit_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """At most `limit_s`, until something is over, or the driver has ended."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not self._has_ended() and not is_over():
            time.sleep(_LOOK_S)
            self._must_move()

    def _signature(self) -> tuple[int, int, int]:
        """(logged bytes, phase files, checkpoints)"""
        folder = stage(self.session.run)
        logs = sum(_size(path) for path in (folder / "rollouts").rglob("*.log"))
        phases, points = (folder / "rollouts").glob("0*.jsonl"), (folder / "checkpoints").glob("*")
        return logs, len(list(phases)), len(list(points))

    def _must_move(self) -> None:
        seen, now = self._signature(), time.monotonic()
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
        assert now - self._moved_at < 3 * WAIT_S, f"nothing moves for {3 * WAIT_S:g} s; {self._where()}"

    def _where(self) -> str:
        _, phases, points = self._signature()
        return f"phase {phases}, {points} checkpoints"

    # The driver's end.

    def _has_ended(self) -> bool:
        assert self.session.driver is not None
        return self.session.driver.poll() is not None

    def _has_finished(self) -> bool:
        """Whether the run is over. A driver that ended otherwise is started again, if it had the right to."""
        if not self._has_ended():
            return False
        assert self.session.driver is not None
        code, text = self.session.driver.wait(), self.session.errors().read_text(errors="replace")
        if code == 0:
            return True
        own = [line for line in text.splitlines() if line.startswith("consilience: ")]
        if own:
            self.stops += 1
            self._say(f"  stopped: {own[-1][:150]}")
        is_clear = bool(own) and "--debug shows where" not in own[-1]
        assert is_clear or (self._may_be_silent and not own), f"the driver ended with {code}:\n{text[-3000:]}"
        self._may_be_silent = False
        self.session.start()
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
