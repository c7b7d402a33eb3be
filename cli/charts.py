"""Charts as SVG text: no script, no font and no file from elsewhere, readable at any size.

Three kinds are enough for a report: lines over steps, values with intervals, bars of shares.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

PALETTE = ("#2563a8", "#c2571a", "#2c8457", "#8a4fa3", "#a8862a", "#5b6470")
INK, MUTED, RULE = "#1f2933", "#66727f", "#e3e7ec"


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; points that are not finite break the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval (None: none), and a second value shown hollow (None: none)."""

    label: str
    value: float
    interval: tuple[float, float] | None
    second: float | None
    color: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar; `note` stands after it."""

    label: str
    value: float
    note: str
    color: str


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, width: int = 470, height: int = 250
) -> str:
    """Curves over steps with a direct label at each end. An empty chart says so."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y) if math.isfinite(y)]
    if not points:
        return _empty(width, height)
    longest = max(len(line.name) for line in lines)
    left, right, top, bottom = 46, 14 + 7 * min(longest, 16), 14, 38
    x_ticks = _whole_ticks(min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(min(p[1] for p in points), max(p[1] for p in points))
    low, high = min(y_ticks[0], min(p[1] for p in points)), max(y_ticks[-1], max(p[1] for p in points))
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    place_x = _scale(x_low, x_high, left, width - right)
    place_y = _scale(low, high, height - bottom, top)
    parts = []
    for y in y_ticks:
        parts.append(_rule(left, place_y(y), width - right, place_y(y)))
        parts.append(_text(left - 7, place_y(y) + 3.5, _number(y), anchor="end"))
    parts += [_text(place_x(x), height - bottom + 16, _number(x), anchor="middle") for x in x_ticks]
    parts.append(_text((left + width - right) / 2, height - 5, x_label, anchor="middle"))
    for line, label_y in zip(
        lines, _spread([_last(line, place_y) for line in lines], top + 4, height - bottom)
    ):
        parts.append(_curve(line, place_x, place_y))
        parts.append(_text(width - right + 6, label_y + 3.5, line.name[:16], color=line.color))
    return _svg(width, height, parts, f"{y_label} over {x_label}")


def dot_chart(dots: Sequence[Dot], *, title: str, width: int = 340, label_width: int = 96) -> str:
    """Shares from 0 to 1: a filled dot with its interval, a hollow one for the second value."""
    if not dots:
        return _empty(width, 80)
    row, top = 25, 8
    height = top + row * len(dots) + 26
    place = _scale(0.0, 1.0, label_width + 8, width - 58)
    parts = []
    for x in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_rule(place(x), top, place(x), height - 24))
        parts.append(_text(place(x), height - 8, f"{x:.0%}", anchor="middle"))
    for i, dot in enumerate(dots):
        y = top + row * (i + 0.5)
        parts.append(_text(label_width, y + 3.5, dot.label, anchor="end", color=INK))
        if dot.interval:
            low, high = (place(min(1.0, max(0.0, v))) for v in dot.interval)
            parts.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{dot.color}" '
                'stroke-width="3" stroke-opacity=".38" stroke-linecap="round"/>'
            )
        if dot.second is not None:
            parts.append(_circle(place(dot.second), y, 3.6, "#fff", dot.color, f"greedy {dot.second:.1%}"))
        parts.append(_circle(place(dot.value), y, 4.2, dot.color, dot.color, f"{dot.label}: {dot.value:.1%}"))
        parts.append(_text(width - 4, y + 3.5, f"{dot.value:.1%}", anchor="end", color=INK))
    return _svg(width, height, parts, title)


def bar_chart(bars: Sequence[Bar], *, title: str, width: int = 960, label_width: int = 96) -> str:
    """Horizontal bars from zero, longest the full width."""
    if not bars:
        return _empty(width, 80)
    row, note_width = 25, 260
    height = row * len(bars) + 6
    most = max(bar.value for bar in bars) or 1.0
    parts = []
    for i, bar in enumerate(bars):
        y = row * i + 4
        length = max(1.5, (width - label_width - note_width) * bar.value / most)
        parts.append(_text(label_width, y + 12.5, bar.label, anchor="end", color=INK))
        parts.append(
            f'<rect x="{label_width + 8}" y="{y}" width="{length:.1f}" height="17" rx="2.5" '
            f'fill="{bar.color}" fill-opacity=".85">'
            f"<title>{html.escape(bar.label)}: {html.escape(bar.note)}</title></rect>"
        )
        parts.append(_text(label_width + 16 + length, y + 12.5, bar.note))
    return _svg(width, height, parts, title)


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round numbers from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, num - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, stop + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    """Tick marks on steps: whole numbers inside the range."""
    if high <= low:
        return [low]
    step = max(1.0, ticks(low, high, 6)[1] - ticks(low, high, 6)[0])
    return [x for x in (math.ceil(low / step) * step + i * step for i in range(12)) if x <= high]


def _scale(low: float, high: float, start: float, stop: float):
    span = high - low
    return lambda v: start + (stop - start) * ((v - low) / span if span else 0.5)


def _spread(positions: Sequence[float], top: float, bottom: float, gap: float = 13.0) -> list[float]:
    """Label heights moved apart so that none covers another, inside [top, bottom]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed: list[float] = [0.0] * len(positions)
    floor = top
    for i in order:
        placed[i] = floor = max(floor, positions[i])
        floor += gap
    ceiling = bottom
    for i in reversed(order):
        placed[i] = ceiling = min(ceiling, placed[i])
        ceiling -= gap
    return placed


def _last(line: Line, place_y) -> float:
    finite = [y for y in line.y if math.isfinite(y)]
    return place_y(finite[-1]) if finite else 0.0


def _curve(line: Line, place_x, place_y) -> str:
    path, pen = [], "M"
    for x, y in zip(line.x, line.y):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{place_x(x):.1f} {place_y(y):.1f}")
        pen = "L"
    dot = ""
    if len(path) == 1:
        x, y = path[0][1:].split()
        dot = f'<circle cx="{x}" cy="{y}" r="3" fill="{line.color}"/>'
    return (
        f'<path d="{"".join(path)}" fill="none" stroke="{line.color}" stroke-width="1.8" '
        f'stroke-linejoin="round"><title>{html.escape(line.name)}</title></path>{dot}'
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{html.escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{RULE}"/>'


def _circle(x: float, y: float, radius: float, fill: str, stroke: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.5">'
        f"<title>{html.escape(title)}</title></circle>"
    )


def _empty(width: int, height: int) -> str:
    return _svg(
        width, height, [_text(width / 2, height / 2, "nothing was recorded", anchor="middle")], "empty"
    )


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
