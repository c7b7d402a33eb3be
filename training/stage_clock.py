"""Where a stage's wall time went: seconds by named phase, tokens by kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

OTHER = "other"


@dataclass
class Span:
    """Seconds of one phase; 0 until it has ended."""

    seconds: float = 0.0


class StageClock:
    """Accounts every second since construction to exactly one phase; "other" when none is open.

    A phase opened inside another one stops the outer one's count until it ends, so the phases sum
    to the wall time. `earlier` is the `state()` of the attempts before a resume; `on_phase` is told which
    phase counts from now on.

        clock = StageClock()
        with clock.phase("rollout"):
            clock.add_tokens("sampled", 4096)
        clock.report()  # {"wall_s": …, "phases": {"rollout": …, "other": …}, "share": …, "tokens": …}
    """

    def __init__(
        self,
        *,
        earlier: Mapping[str, Any] | None = None,
        now: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._now, self._on_phase = now, on_phase
        self._seconds: dict[str, float] = dict((earlier or {}).get("phases", {}))
        self._tokens: dict[str, int] = dict((earlier or {}).get("tokens", {}))
        self._open: list[str] = []
        self._since = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[Span]:
        """Seconds inside the block belong to `name`; the span says how many, inner phases left out."""
        self._settle()
        self._open.append(name)
        self._on_phase(name)
        span, before = Span(), self._seconds.get(name, 0.0)
        try:
            yield span
        finally:
            self._settle()
            self._open.pop()
            self._on_phase(self._open[-1] if self._open else OTHER)
            span.seconds = self._seconds[name] - before

    def add_tokens(self, kind: str, num_tokens: int) -> None:
        """Count tokens under a kind ("train", "sampled", "prefill")."""
        self._tokens[kind] = self._tokens.get(kind, 0) + int(num_tokens)

    def state(self) -> dict[str, Any]:
        """{"phases": {name: seconds}, "tokens": {kind: count}} so far, JSON-plain, for resume."""
        self._settle()
        return {"phases": dict(self._seconds), "tokens": dict(self._tokens)}

    def report(self, phase_of: Mapping[str, str] | None = None) -> dict[str, Any]:
        """wall_s, phases {name: s}, share {name: 0 … 1}, tokens {kind: n}, tokens_per_s {kind: rate}.

        phase_of  kind -> phase whose seconds its rate divides by ("sampled": "rollout"); a kind
                  that is not named, or whose phase took no time, is divided by the wall time.
        """
        state = self.state()
        seconds, tokens = state["phases"], state["tokens"]
        wall_s = sum(seconds.values())
        rates = {}
        for kind, count in tokens.items():
            spent = seconds.get((phase_of or {}).get(kind, ""), 0.0) or wall_s
            rates[kind] = count / spent if spent > 0 else 0.0
        share = {name: value / wall_s if wall_s > 0 else 0.0 for name, value in seconds.items()}
        return {"wall_s": wall_s, "phases": seconds, "share": share, "tokens": tokens, "tokens_per_s": rates}

    def _settle(self) -> None:
        """Book the time since the last change to the innermost open phase."""
        now = self._now()
        name = self._open[-1] if self._open else OTHER
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
