"""report.html: one page, one file, everything a reader of the run wants to see first."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.cli.charts import PALETTE, Bar, Dot, Line, bar_chart, dot_chart, line_chart
from consilience.cli.report import Report, ScoreRow, spoken_health, write_atomic

_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f6f7f9;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 2px} h3{font-size:14px;margin:0 0 4px;color:#46525e;font-weight:600}
p{margin:2px 0 12px;color:#586573;max-width:74ch} code{font:13px ui-monospace,Menlo,Consolas,monospace}
section{background:#fff;border:1px solid #e3e7ec;border-radius:10px;padding:20px 22px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin-top:20px}
.tile{background:#fff;border:1px solid #e3e7ec;border-radius:10px;padding:13px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:#66727f;font-size:13px}
.cols{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:10px 26px}
.wide{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:18px 26px}
svg{display:block;width:100%;height:auto} svg text{font:11.5px system-ui,-apple-system,"Segoe UI",sans-serif}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;color:#66727f;font-weight:600;font-size:13px}
td,th{padding:5px 14px 5px 0;border-bottom:1px solid #eef1f4;vertical-align:top}
td.num,th.num{text-align:right} tr:last-child td{border-bottom:0}
.ok{color:#21764a;font-weight:600} .bad{color:#b3261e;font-weight:600}
.key{color:#66727f;font-size:13px}
"""


@dataclass(frozen=True)
class Chart:
    """A line chart of the page: series name -> (steps, values)."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str = "step"
    y_label: str = ""


def write_page(path: Path, report: Report, charts: Sequence[Chart] = ()) -> None:
    """Write report.html beside its place, then rename it there."""
    write_atomic(path, render_page(report, charts))


def render_page(report: Report, charts: Sequence[Chart] = ()) -> str:
    """The page. `charts` are what metrics.jsonl adds to report.json: rewards, losses, shares."""
    domains = sorted({row.domain for row in report.scores})
    colors = {domain: PALETTE[i % len(PALETTE)] for i, domain in enumerate(domains)}
    parts = [
        _head(report),
        _tiles(report),
        _section(
            "Held-out scores",
            _SCORES_TEXT,
            f'<div class="cols">{_score_charts(report, domains, colors)}</div>',
        ),
        _section("What GRPO added, what the student kept", _GAINS_TEXT, _gain_table(report)),
        _section("Curves", "", f'<div class="wide">{_curves(report, charts, colors)}</div>'),
        _section("Where the time went", "", _time_chart(report, colors)),
        _section("Checks", "What the run had to show, and what it showed.", _check_table(report)),
        _section("Disturbances", _HEALTH_TEXT, _facts(spoken_health(report.health))),
        _section(
            "Machine",
            "",
            _facts({**report.machine, **{f"sandbox {k}": v for k, v in report.sandbox.items()}}),
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Consilience · report</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


_SCORES_TEXT = (
    "Filled: one sample a problem at the temperature of training, with the 95 % interval of a paired "
    "bootstrap. Hollow: greedy decoding."
)
_HEALTH_TEXT = (
    "Waits over their limit, samples given out again or given up with their groups, samples that went on "
    "from their log after a death. stalls.jsonl in the run folder names each."
)
_GAINS_TEXT = (
    "Gain: the specialist after GRPO minus after SFT, on its own domain. "
    "Retention: (student − base) / (specialist − base)."
)


def _head(report: Report) -> str:
    held = sum(row.ok for row in report.checks)
    verdict = (
        f'<span class="{"ok" if report.is_ok else "bad"}">{held} of {len(report.checks)} checks hold</span>'
    )
    commit = f"commit <code>{html.escape(report.commit[:12])}</code> · " if report.commit else ""
    return (
        "<h1>Specialists into one student</h1>"
        f'<div class="key">{verdict} · {commit}seed {report.seed} · '
        f"<code>{html.escape(report.command)}</code></div>"
    )


def _tiles(report: Report) -> str:
    student = [row.share for row in report.scores if row.model == "student" and row.temperature > 0]
    kept = [v for v in report.retention.values() if v is not None]
    elapsed = "–" if report.elapsed_s is None else _duration(report.elapsed_s)
    tokens = sum(row.train_tokens + row.sampled_tokens for row in report.stages)
    tiles = (
        (_percent(_mean(student)), "student, mean of the domains"),
        (_percent(_mean(kept)), "of the specialists' gain retained"),
        (elapsed, "elapsed while stages ran"),
        (f"{tokens / 1e6:.2f} M", "tokens trained or sampled"),
    )
    cells = (f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _score_charts(report: Report, domains: Sequence[str], colors: Mapping[str, str]) -> str:
    parts = []
    for domain in domains:
        rows = [row for row in report.scores if row.domain == domain]
        greedy = {row.model: row.share for row in rows if row.temperature == 0}
        sampled = sorted((row for row in rows if row.temperature > 0), key=_model_order)
        dots = [_dot(row, greedy.get(row.model), domain, colors[domain]) for row in sampled]
        chart = dot_chart(dots, title=f"scores on {domain}")
        parts.append(f"<div><h3>{html.escape(domain)}</h3>{chart}</div>")
    return "".join(parts)


def _model_order(row: ScoreRow) -> tuple[int, str]:
    kinds = ("base", "sft", "grpo", "student")
    kind = row.model.split("/")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds), row.model)


def _dot(row: ScoreRow, greedy: float | None, domain: str, color: str) -> Dot:
    own = row.model in ("base", "student") or row.model.endswith(f"/{domain}")
    low, high = row.ci95
    interval = None if low is None or high is None else (low, high)
    return Dot(row.model, row.share, interval, greedy, color if own else "#98a2ad")


def _gain_table(report: Report) -> str:
    rows = []
    for gain in report.gains:
        low, high = gain.ci95
        interval = "–" if low is None or high is None else f"{low:+.1%} to {high:+.1%}"
        kept = report.retention.get(gain.domain)
        cells = (
            html.escape(gain.domain),
            f"{gain.delta:+.1%}",
            interval,
            "–" if kept is None else f"{kept:.1%}",
        )
        rows.append(
            "<tr>"
            + "".join(f'<td class="{"num" if i else ""}">{c}</td>' for i, c in enumerate(cells))
            + "</tr>"
        )
    names = ("gain", "95 % interval", "retention")
    head = "<tr><th>domain</th>" + "".join(f'<th class="num">{name}</th>' for name in names) + "</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _curves(report: Report, charts: Sequence[Chart], colors: Mapping[str, str]) -> str:
    kl: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(report.kl, key=lambda r: r.step):
        steps, means = kl.setdefault(row.teacher, ([], []))
        steps.append(row.step)
        means.append(row.mean)
    everything = [*charts, Chart("Distillation: mean KL to each teacher, nats per token", kl, y_label="KL")]
    return "".join(_one_chart(chart, colors) for chart in everything)


def _one_chart(chart: Chart, colors: Mapping[str, str]) -> str:
    lines = [
        Line(name, x, y, colors.get(name.split("/")[-1], PALETTE[i % len(PALETTE)]))
        for i, (name, (x, y)) in enumerate(chart.series.items())
    ]
    drawn = line_chart(lines, x_label=chart.x_label, y_label=chart.y_label or chart.title)
    return f"<div><h3>{html.escape(chart.title)}</h3>{drawn}</div>"


def _time_chart(report: Report, colors: Mapping[str, str]) -> str:
    bars = []
    for row in report.stages:
        note = f"{_duration(row.wall_s)} · {row.share:.0%}"
        if row.train_tokens + row.sampled_tokens:
            note += f" · {row.tokens_per_s:,.0f} tokens/s"
        bars.append(Bar(row.name, row.wall_s, note, colors.get(row.name.split("/")[-1], "#7b8794")))
    return bar_chart(bars, title="wall time of each stage")


def _check_table(report: Report) -> str:
    rows = []
    for row in report.checks:
        mark = '<span class="ok">✓ holds</span>' if row.ok else '<span class="bad">✗ fails</span>'
        value = "not measured" if row.value is None else f"{row.value:.4g}"
        cells = f'<td>{html.escape(row.name)}</td><td class="num">{value}</td>'
        rows.append(f'<tr>{cells}<td class="num">{html.escape(row.bound)}</td><td>{mark}</td></tr>')
    head = '<tr><th>what</th><th class="num">value</th><th class="num">bound</th><th></th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _section(title: str, text: str, body: str) -> str:
    intro = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{intro}{body}</section>"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {round(seconds % 60):02d} s"
