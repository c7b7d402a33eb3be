"""Charts: round ticks, labels that do not cover each other, gaps where nothing was measured."""

import itertools
import math
import re

import pytest

from consilience.cli.charts import Bar, Dot, Line, bar_chart, dot_chart, line_chart, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.0012, 0.0031), (5, 5), (0, 0), (1e6, 3e6)])
def test_ticks_are_round_even_and_cover_the_range(low, high):
    marks = ticks(low, high)
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 9
    assert steps == pytest.approx([steps[0]] * len(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-6


def test_a_value_that_was_not_measured_breaks_the_line():
    drawn = line_chart([Line("a", [0, 1, 2, 3], [1, 2, math.nan, 3], "red")], x_label="step", y_label="y")
    path = re.search(r'<path d="([^"]+)"', drawn)
    assert path is not None
    assert (path[1].count("M"), path[1].count("L")) == (2, 1)


def test_labels_of_curves_that_end_together_do_not_cover_each_other():
    lines = [Line(f"teacher {i}", [0, 1], [1, 0.5 + i * 1e-4], "red") for i in range(4)]
    drawn = line_chart(lines, x_label="step", y_label="KL")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="start"', drawn))
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12.9


@pytest.mark.parametrize("num", [1, 2])
def test_a_single_step_is_visible(num):
    drawn = line_chart([Line("a", list(range(num)), [0.5] * num, "red")], x_label="step", y_label="y")
    assert ("<circle" in drawn) == (num == 1)


def test_names_are_escaped_and_nothing_says_so():
    assert "&lt;b&gt;" in dot_chart([Dot("<b>", 0.5, (0.4, 0.6), 0.7, "red")], title="t")
    assert "nothing was recorded" in bar_chart([], title="t")
    assert "nothing was recorded" in line_chart([], x_label="x", y_label="y")
    assert "<rect" in bar_chart([Bar("base", 0.0, "0 s", "red")], title="t")
