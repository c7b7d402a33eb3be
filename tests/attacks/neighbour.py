"""Another box of the same driver that works while an attack runs: what its commands take, before and then."""

from __future__ import annotations

import textwrap
import threading
import time

from attack import BREACH

from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.protocol import ExecResult, SandboxSpec

WATCHED_S = 0.8
SLICES_S = 0.025  # what a turn on a processor that all of this machine shares may cost, however fair it is
TRIES = 3  # other work on the machine comes in bursts; a box that takes more than its share does so each time
MOST_CPUS = 1.0 * 1.25  # a box has one processor; a period of the quota may be cut in two


class Neighbour:
    """`arrange` and `check` of an attack on the processors. The program prints CPU and wall seconds."""

    def __init__(self, program: str) -> None:
        self._program = "import os, time\n" + textwrap.dedent(program)

    def arrange(self, box: BlockingSandbox) -> dict[str, float]:
        from conftest import LIMITS, PRESENT

        opener = next(opener for level, opener in PRESENT.values() if level == box.enforced.level)
        self._box = open_blocking(SandboxSpec(limits=LIMITS), opener=opener)
        return self._begin()

    def check(self, box: BlockingSandbox, result: ExecResult) -> None:
        try:
            for num_left in reversed(range(TRIES)):
                if self._is_served(box, result) or not num_left:
                    break
                seconds = self._begin()["seconds"]
                result = box.run_python(self._program.replace("<seconds>", str(seconds)))
        finally:
            self._box.destroy()
        if box.enforced.memory_cap == "cgroup":
            assert self._busy_s < 2 * self._quiet_s + SLICES_S, (self._quiet_s, self._busy_s)

    def _begin(self) -> dict[str, float]:
        """Measure without the attack, then start to measure beside it."""
        self._quiet_s = self._late_s()
        self._watch = threading.Thread(target=self._note, daemon=True)
        self._watch.start()
        return {"seconds": WATCHED_S + 0.2}

    def _is_served(self, box: BlockingSandbox, result: ExecResult) -> bool:
        """Whether the neighbour was answered in time beside a run of the attack, which had its share."""
        self._watch.join(timeout=30)
        assert result.is_ok and BREACH not in result.stdout
        used_s, wall_s = map(float, result.stdout.split())
        if box.enforced.memory_cap != "cgroup":  # without one nothing caps processors, and the notes say so
            return True
        assert used_s < MOST_CPUS * wall_s + 0.1, (used_s, wall_s)
        return self._busy_s < 2 * self._quiet_s + SLICES_S

    def _note(self) -> None:
        time.sleep(0.1)
        self._busy_s = self._late_s()

    def _late_s(self) -> float:
        """The time within which 19 of 20 commands are answered."""
        took, until = [], time.monotonic() + WATCHED_S
        while time.monotonic() < until or len(took) < 20:
            began = time.monotonic()
            assert self._box.run_python("pass").is_ok
            took.append(time.monotonic() - began)
            time.sleep(0.005)
        return sorted(took)[int(0.95 * len(took))]
