"""The picture of `plan`: FLOPs of a token and bytes of decode state against context length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from consilience.cli.charts import INK, MUTED, PALETTE, RULE
from consilience.model.config import ModelConfig
from consilience.model.cost import (
    equivalent_flops,
    forward_work,
    report_state_bytes,
    serving_format,
    state_bytes,
)
from consilience.model.cost_v32 import v32_state_bytes, v32_work

LENGTHS = tuple(round(1000 * 10 ** (step / 24)) for step in range(73))  # 1K to 1M
SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"), (1, ""))
Curve = Callable[[int], float]


def draw(path: Path, models: Mapping[str, ModelConfig], num_tokens: int) -> None:
    """Write the picture, in the format that the suffix of `path` names; a rule marks `num_tokens`."""
    flops: dict[str, Curve] = {"V3.2": lambda n: equivalent_flops(v32_work(n))}
    state: dict[str, Curve] = {"V3.2": v32_state_bytes}
    for name, config in models.items():
        flops[name] = lambda n, c=config: equivalent_flops(forward_work(c, n))
        state[name] = lambda n, c=config: report_state_bytes(state_bytes(c, n, serving_format(c)))
    figure = Figure(figsize=(12, 4.4), facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.085, right=0.87, bottom=0.14, top=0.87, wspace=0.68)
    _panel(left, "FLOPs of one token, counted as FP8", "FLOP", flops, num_tokens)
    _panel(right, "Decode state of one sequence", "B", state, num_tokens)
    figure.savefig(path, dpi=160)


def _panel(axes: Axes, title: str, unit: str, curves: Mapping[str, Curve], num_tokens: int) -> None:
    """Curves on logarithmic axes; each is named at its end, with its value at the marked length."""
    marked = min(max(num_tokens, LENGTHS[0]), LENGTHS[-1])
    axes.set(xscale="log", yscale="log", xlim=(LENGTHS[0], LENGTHS[-1]))
    axes.axvline(marked, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    for curve, color in zip(curves.values(), PALETTE):
        axes.plot(LENGTHS, [curve(n) for n in LENGTHS], color=color, linewidth=2)
        axes.plot([marked], [curve(marked)], "o", color=color, markersize=5, clip_on=False)
    axes.set_title(title, color=INK, fontsize=11, loc="left", pad=10)
    axes.set_xlabel("context length, tokens", color=MUTED)
    axes.grid(True, which="major", color=RULE, linewidth=0.8)
    for axis, of in ((axes.xaxis, ""), (axes.yaxis, unit)):
        axis.set_major_locator(LogLocator(base=10, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _, u=of: _short(value, u)))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", colors=MUTED, length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.text(1.03, 1.03, "at " + _short(marked, ""), transform=axes.transAxes, color=MUTED, fontsize=9.5)
    _name_curves(axes, unit, curves, marked)


def _name_curves(axes: Axes, unit: str, curves: Mapping[str, Curve], marked: int) -> None:
    """Names beside the right edge, from the lowest curve up, moved up where one would cover another."""
    axes.set_ylim(axes.get_ylim())  # limits are found late; the places below need them
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((LENGTHS[-1], curve(LENGTHS[-1])))[1]) for curve in curves.values()]
    floor = 0.0
    for end, (name, curve), color in sorted(zip(ends, curves.items(), PALETTE), key=lambda row: row[0]):
        floor = max(floor, end)
        text = f"{name[:16]}  {_short(curve(marked), unit)}"
        axes.text(1.03, floor, text, transform=axes.transAxes, color=color, fontsize=9.5, va="center")
        floor += 0.06


def _short(value: float, unit: str) -> str:
    """(3.69e9, "B") as "3.69 GB"; (65536, "") as "65.5K"."""
    size, prefix = next((s, p) for s, p in SIZES if value >= 0.9995 * s or s == 1)
    number = f"{value / size:.3g}"
    return f"{number} {prefix}{unit}" if unit else number + prefix
