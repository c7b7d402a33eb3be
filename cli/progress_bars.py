"""The live panel: every stage with its time, and a bar for each one that runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from consilience.cli.progress_display import MARKS, Bar, duration

STYLES = {
    "running": "bold cyan",
    "done": "green",
    "skipped": "dim",
    "failed": "bold red",
    "interrupted": "yellow",
}


class ProgressBars:
    """Draws at most four times a second from its own thread; the stage only counts.

    `console` may be handed in by a test; it need not be a terminal.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(file=stream)
        self._clock = clock
        self._states: dict[str, tuple[str, float]] = {}  # stage -> (state, wall_s or when it began)
        self._bars: dict[
            str, Bar
        ] = {}  # of the stages that count now; replaced whole, the other thread reads
        self._began = clock()
        self._live = Live(
            get_renderable=self.panel, console=self._console, refresh_per_second=4, transient=False
        )

    def plan(self, stages: Sequence[str]) -> None:
        self._states = dict.fromkeys(stages, ("waiting", 0.0))
        self._live.start()

    def enter(self, stage: str) -> None:
        self._states = {**self._states, stage: ("running", self._clock())}

    def leave(self, stage: str, state: str, wall_s: float) -> None:
        self._states = {**self._states, stage: (state, wall_s)}
        self.finish(stage)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self._bars = {**self._bars, stage: Bar(stage, total, unit, self._clock())}

    def advance(self, stage: str, n: int, info: Mapping[str, Any]) -> None:
        if stage in self._bars:
            self._bars[stage].count(n, info)

    def finish(self, stage: str) -> None:
        self._bars = {name: bar for name, bar in self._bars.items() if name != stage}

    def close(self) -> None:
        self._bars = {}
        if self._live.is_started:
            self._live.stop()

    def panel(self) -> RenderableType:
        """What stands on the screen now."""
        now, states, bars = self._clock(), self._states, self._bars
        table = Table.grid(padding=(0, 2))
        for stage, (state, since) in states.items():
            spent = now - since if state == "running" else since
            note = {"skipped": "finished before", "interrupted": "interrupted", "failed": "failed"}.get(
                state, ""
            )
            style = STYLES.get(state, "dim")
            shown = "" if state == "waiting" else duration(spent)
            table.add_row(Text(f"{MARKS[state]} {stage}", style), Text(shown, "dim"), Text(note, style))
        ended = sum(state in ("done", "skipped") for state, _ in states.values())
        total = Text(f"{ended} of {len(states)} stages, {duration(now - self._began)}", "bold")
        rows = [row for bar in bars.values() for row in self._bar_rows(bar, now)]
        return Group(table, *rows, total)

    def _bar_rows(self, bar: Bar, now: float) -> list[RenderableType]:
        left = bar.left_s(now)
        row = Table.grid(padding=(0, 2))
        remains = "" if left is None else f"{duration(left)} left"
        row.add_row(
            Text(bar.stage, "bold cyan"),
            ProgressBar(total=None if bar.total is None else max(1, bar.total), completed=bar.done, width=32),
            Text(bar.count_text()),
            Text(remains, "dim"),
        )
        facts = bar.facts(now)
        return [row, Text("  " + facts, "dim", overflow="ellipsis", no_wrap=True)] if facts else [row]
