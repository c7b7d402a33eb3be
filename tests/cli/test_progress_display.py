"""Progress as lines and as a panel: what runs, how far, what remains, and never a flood."""

import io

import pytest
from rich.console import Console

from consilience.cli.progress_bars import ProgressBars
from consilience.cli.progress_display import ProgressLines, Silence, StageProgress, duration, open_progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (7.4, 750, 3723)] == ["0:07", "12:30", "1:02:03"]


def test_lines_name_the_stage_its_place_and_what_remains():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, clock=clock)
    lines.plan(["base", "sft/math", "distill"])
    lines.enter("base")
    clock.now = 61
    lines.leave("base", "done", 61.0)
    assert out.getvalue().splitlines() == [
        "   0:00  [1/3] base: starts",
        "   1:01  [1/3] base: done (1:01); 2 to go: sft/math distill",
    ]


def test_steps_are_reported_every_few_seconds_with_speed_and_time_left():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, every_s=5, clock=clock)
    stage = StageProgress(lines, "grpo/math")
    stage.start("grpo/math", 100, "steps")
    for _ in range(40):
        clock.now += 0.25
        stage.advance(1, tokens=1000, reward=0.25)
    assert out.getvalue().splitlines() == [
        "   0:05    grpo/math: 20/100 steps, 0:20 left, 4,000 tokens/s, reward 0.25",
        "   0:10    grpo/math: 40/100 steps, 0:15 left, 4,000 tokens/s, reward 0.25",
    ]


def test_the_end_of_a_stage_is_always_told():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, clock=clock)
    lines.start("base", 2, "steps")
    lines.advance("base", 2, {})
    lines.finish("base")
    lines.finish("base")
    assert out.getvalue().count("base: 2/2 steps") == 1


def test_the_last_step_is_told_once_however_long_it_took():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, every_s=5, clock=clock)
    lines.start("base", 2, "steps")
    for _ in range(2):
        clock.now += 60
        lines.advance("base", 1, {})
    lines.finish("base")
    assert out.getvalue().splitlines() == [
        "   1:00    base: 1/2 steps, 1:00 left",
        "   2:00    base: 2/2 steps",
    ]


def test_advance_without_a_start_is_harmless():
    for progress in (ProgressLines(io.StringIO()), ProgressBars(Terminal()), Silence()):
        progress.advance("base", 1, {"tokens": 3})
        progress.finish("base")
        progress.close()


def test_the_panel_shows_every_stage_the_bar_and_what_is_left():
    clock, console = Clock(), Console(file=io.StringIO(), width=100)
    bars = ProgressBars(console=console, clock=clock)
    bars.plan(["base", "sft/math", "distill"])
    try:
        bars.leave("base", "skipped", 61.0)
        bars.enter("sft/math")
        bars.start("sft/math", 10, "steps")
        clock.now = 4.0
        bars.advance("sft/math", 4, {"tokens": 8000, "loss": 1.5})
        with console.capture() as capture:
            console.print(bars.panel())
    finally:
        bars.close()
    shown = capture.get()
    for part in ("✓ base", "1:01", "finished before", "▸ sft/math", "· distill", "4/10 steps", "0:06 left"):
        assert part in shown
    assert "2,000 tokens/s, loss 1.5" in shown
    assert "1 of 3 stages, 0:04" in shown


def test_stages_side_by_side_have_lines_of_their_own():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, every_s=5, clock=clock)
    math, code = StageProgress(lines, "sft/math"), StageProgress(lines, "sft/code")
    math.start("sft/math", 10, "step")
    code.start("sft/code", 4, "step")
    clock.now = 6
    math.advance(3)
    code.advance(1, loss=2.0)
    math.finish()
    code.advance(1)
    clock.now = 12
    code.advance(1)
    assert out.getvalue().splitlines() == [
        "   0:06    sft/math: 3/10 step, 0:14 left",
        "   0:06    sft/code: 1/4 step, 0:18 left, loss 2",
        "   0:06    sft/math: 3/10 step, 0:14 left",
        "   0:12    sft/code: 3/4 step, 0:04 left, loss 2",
    ]


def test_the_panel_has_a_bar_for_each_stage_that_runs():
    console = Console(file=io.StringIO(), width=100)
    bars = ProgressBars(console=console, clock=Clock())
    bars.start("sft/math", 10, "step")
    bars.start("sft/code", 8, "step")
    bars.advance("sft/code", 2, {})
    console.print(bars.panel())
    bars.leave("sft/math", "done", 3.0)
    console.print(bars.panel())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("0/10 step") == 1 and shown.count("2/8 step") == 2


def test_a_log_gets_lines_and_a_terminal_gets_bars():
    assert isinstance(open_progress("auto", io.StringIO()), ProgressLines)
    assert isinstance(open_progress("auto", Terminal()), ProgressBars)
    assert isinstance(open_progress("lines", Terminal()), ProgressLines)
    assert isinstance(open_progress("off", Terminal()), Silence)


def test_a_stage_without_a_known_total_is_counted():
    out, clock = io.StringIO(), Clock()
    lines = ProgressLines(out, clock=clock)
    lines.start("evaluate", None, "problems")
    clock.now = 6
    lines.advance("evaluate", 3, {})
    assert out.getvalue() == "   0:06    evaluate: 3 problems\n"


@pytest.mark.parametrize("total", [0, 1])
def test_an_empty_stage_is_drawn_too(total):
    console = Console(file=io.StringIO(), width=80)
    bars = ProgressBars(console=console, clock=Clock())
    bars.start("evaluate", total, "problems")
    console.print(bars.panel())
    assert f"0/{total} problems" in console.file.getvalue()  # type: ignore[attr-defined]
