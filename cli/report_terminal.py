"""The summary a run ends with, for a terminal or a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilience.cli.progress_display import duration
from consilience.cli.report import Report, ScoreRow, spoken_health


def print_report(report: Report, stream: TextIO | None = None) -> None:
    """Scores, gains and retention, time, and the checks; failed checks last, where the eye is."""
    console = Console(file=stream, width=None if stream is None else 110, highlight=False)
    for table in (_scores(report), _gains(report), _times(report), _checks(report)):
        console.print(table)
    held = sum(row.ok for row in report.checks)
    verdict = Text(
        f"{held} of {len(report.checks)} checks hold", "bold green" if report.is_ok else "bold red"
    )
    console.print(verdict)
    if disturbed := {name: n for name, n in spoken_health(report.health).items() if n}:
        said = ", ".join(f"{name} {n}" for name, n in disturbed.items())
        where = "; stalls.jsonl names each wait" if disturbed.get("stalls") else ""
        console.print(Text(f"disturbances: {said}{where}", "yellow"))
    for row in report.checks:
        if not row.ok:
            console.print(Text(f"  fails: {row.name}: {_value(row.value)}, needs {row.bound}", "red"))


def _scores(report: Report) -> Table:
    domains = sorted({row.domain for row in report.scores})
    table = _table("Held-out scores: sampled with 95 % interval, greedy beside", "model", *domains)
    models = list(dict.fromkeys(row.model for row in sorted(report.scores, key=_order)))
    for model in models:
        table.add_row(model, *(_score_cell(report.scores, model, domain) for domain in domains))
    return table


def _order(row: ScoreRow) -> tuple[int, str]:
    kinds = ("base", "sft", "grpo", "student")
    kind = row.model.split("/")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds), row.model)


def _score_cell(scores: Sequence[ScoreRow], model: str, domain: str) -> str:
    cells = []
    for row in sorted(scores, key=lambda r: -r.temperature):
        if (row.model, row.domain) != (model, domain):
            continue
        low, high = row.ci95
        interval = (
            f" [{low:.1%}, {high:.1%}]"
            if row.temperature > 0 and low is not None and high is not None
            else ""
        )
        cells.append(f"{row.share:.1%}{interval}" if row.temperature > 0 else f"greedy {row.share:.1%}")
    return "  ".join(cells) or "–"


def _gains(report: Report) -> Table:
    table = _table(
        "GRPO - SFT on its own domain, and what the student kept", "domain", "gain", "95 %", "retention"
    )
    for row in report.gains:
        low, high = row.ci95
        interval = "–" if low is None or high is None else f"{low:+.1%} to {high:+.1%}"
        kept = report.retention.get(row.domain)
        table.add_row(row.domain, f"{row.delta:+.1%}", interval, "–" if kept is None else f"{kept:.1%}")
    return table


def _times(report: Report) -> Table:
    elapsed = "" if report.elapsed_s is None else f": {duration(report.elapsed_s)} in all"
    table = _table(
        f"Where the time went{elapsed}", "stage", "wall", "share", "trained", "sampled", "tokens/s"
    )
    for row in report.stages:
        counts = (f"{row.train_tokens:,}", f"{row.sampled_tokens:,}", f"{row.tokens_per_s:,.0f}")
        table.add_row(row.name, duration(row.wall_s), f"{row.share:.0%}", *counts)
    return table


def _checks(report: Report) -> Table:
    table = _table("Checks", "what", "value", "bound", "")
    for row in report.checks:
        mark = Text("holds", "green") if row.ok else Text("fails", "bold red")
        table.add_row(row.name, _value(row.value), row.bound, mark)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _value(value: float | None) -> str:
    return "not measured" if value is None or math.isnan(value) else f"{value:.4g}"
