"""What a person sees while a run goes on: which stage, how far, what remains.

`ProgressBars` (progress_bars.py) draws a live panel on a terminal; `ProgressLines` writes a line every few
seconds elsewhere (a log, CI, a Ray job). Several stages may run at once, so every verb names its
stage; a trainer sees the `StageProgress` of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

LINE_EVERY_S = 5.0
MARKS = {"waiting": "·", "running": "▸", "done": "✓", "skipped": "✓", "failed": "✗", "interrupted": "‖"}


class RunProgress(Protocol):
    """What the graph tells (plan, enter, leave, note), and what each stage tells in between."""

    def plan(self, stages: Sequence[str]) -> None: ...
    def enter(self, stage: str) -> None: ...
    def leave(self, stage: str, state: str, wall_s: float) -> None: ...
    def note(self, text: str) -> None: ...
    def start(self, stage: str, total: int | None, unit: str) -> None: ...
    def advance(self, stage: str, n: int, info: Mapping[str, Any]) -> None: ...
    def finish(self, stage: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class StageProgress:
    """The `training.progress.Progress` of one stage on a display that several share."""

    display: RunProgress
    name: str

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.display.start(self.name, total, unit)

    def advance(self, n: int = 1, **info: Any) -> None:
        self.display.advance(self.name, n, info)

    def finish(self) -> None:
        self.display.finish(self.name)


@dataclass
class Bar:
    """The part of a stage that is being counted."""

    stage: str
    total: int | None
    unit: str
    began: float
    done: int = 0
    tokens: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)

    def count(self, n: int, info: Mapping[str, Any]) -> None:
        """`tokens` among the info is summed and shown per second; everything else is shown as it is."""
        self.done += n
        for name, value in info.items():
            if name == "tokens":
                self.tokens += value
            else:
                self.info[name] = value

    def left_s(self, now: float) -> float | None:
        """Seconds to go at the pace so far; None before the first step or without a known total."""
        if not self.done or self.total is None:
            return None
        return (now - self.began) / self.done * max(0, self.total - self.done)

    def count_text(self) -> str:
        return f"{self.done} {self.unit}" if self.total is None else f"{self.done}/{self.total} {self.unit}"

    def facts(self, now: float) -> str:
        spent = now - self.began
        shown = [f"{self.tokens / spent:,.0f} tokens/s"] if self.tokens and spent > 0 else []
        shown += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.info.items()]
        return ", ".join(shown)


def duration(seconds: float) -> str:
    """ "0:07", "12:30", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLines:
    """Plain lines: one when a stage starts, ends or is skipped, and one every few seconds between."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every_s, self._clock = stream or sys.stderr, every_s, clock
        self._stages: list[str] = []
        self._left: set[str] = set()
        self._bars: dict[str, Bar] = {}
        self._last_line: dict[str, float] = {}
        self._began = clock()

    def plan(self, stages: Sequence[str]) -> None:
        self._stages, self._left = list(stages), set()

    def enter(self, stage: str) -> None:
        self._write(f"{self._place(stage)}{stage}: starts")

    def leave(self, stage: str, state: str, wall_s: float) -> None:
        place = self._place(stage)
        self._left.add(stage)
        self._bars.pop(stage, None)  # a stage that was killed did not finish its own
        remaining = [s for s in self._stages if s not in self._left]
        then = f"; {len(remaining)} to go: {' '.join(remaining)}" if remaining and state != "skipped" else ""
        self._write(f"{place}{stage}: {state} ({duration(wall_s)}){then}")

    def note(self, text: str) -> None:
        self._write(text)

    def start(self, stage: str, total: int | None, unit: str) -> None:
        now = self._clock()
        self._bars[stage], self._last_line[stage] = Bar(stage, total, unit, now), now

    def advance(self, stage: str, n: int, info: Mapping[str, Any]) -> None:
        bar, now = self._bars.get(stage), self._clock()
        if bar is None:
            return
        bar.count(n, info)
        is_full = bar.done == bar.total  # `finish` tells of it
        if not is_full and now - self._last_line[stage] >= self._every_s:
            self._last_line[stage] = now
            self._write(self._bar_line(bar, now))

    def finish(self, stage: str) -> None:
        bar = self._bars.pop(stage, None)
        if bar is not None:
            self._write(self._bar_line(bar, self._clock()))

    def close(self) -> None:
        self._bars.clear()

    def _bar_line(self, bar: Bar, now: float) -> str:
        left = bar.left_s(now)
        remains = f", {duration(left)} left" if left else ""
        facts = bar.facts(now)
        return f"  {bar.stage}: {bar.count_text()}{remains}{', ' + facts if facts else ''}"

    def _place(self, stage: str) -> str:
        return f"[{self._stages.index(stage) + 1}/{len(self._stages)}] " if stage in self._stages else ""

    def _write(self, line: str) -> None:
        self._stream.write(f"{duration(self._clock() - self._began):>7}  {line}\n")
        self._stream.flush()


class Silence:
    """No output at all (`log.progress=off`)."""

    def plan(self, stages: Sequence[str]) -> None: ...
    def enter(self, stage: str) -> None: ...
    def leave(self, stage: str, state: str, wall_s: float) -> None: ...
    def note(self, text: str) -> None: ...
    def start(self, stage: str, total: int | None, unit: str) -> None: ...
    def advance(self, stage: str, n: int, info: Mapping[str, Any]) -> None: ...
    def finish(self, stage: str) -> None: ...
    def close(self) -> None: ...


def open_progress(kind: str, stream: TextIO | None = None) -> RunProgress:
    """The display `log.progress` asks for: auto, bars, lines or off. `close` it at the end."""
    out: TextIO = sys.stderr if stream is None else stream
    if kind == "off":
        return Silence()
    if kind == "bars" or (kind == "auto" and out.isatty()):
        from consilience.cli.progress_bars import ProgressBars

        return ProgressBars(out)
    return ProgressLines(out)
