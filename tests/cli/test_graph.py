"""The graph on plain stages: order, skipping, redoing, and what a kill leaves behind."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience.cli.graph import Graph
from consilience.cli.progress_display import ProgressLines
from consilience.cli.stage import Stage, dependents, in_order, up_to
from consilience.conf.errors import EngineError, RunError
from consilience.conf.schema import Config
from consilience.training.run_folder import RunFolder, StageFolder

PROGRAM = Path(__file__).with_name("graph_program.py")
_spec = importlib.util.spec_from_file_location("graph_program", PROGRAM)
assert _spec is not None and _spec.loader is not None
graph_program = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(graph_program)
NAMES, stages = graph_program.NAMES, graph_program.stages


def run(folder: Path, nodes: list[Stage], redo_from: str | None = None) -> tuple[dict, str]:
    out = io.StringIO()
    return Graph(RunFolder(folder), nodes, ProgressLines(out)).run(redo_from=redo_from), out.getvalue()


def executed(folder: Path) -> list[str]:
    path = folder / "executed.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def states(folder: Path) -> dict[str, str]:
    saved = json.loads((folder / "graph.json").read_text())["stages"]
    return {name: entry["state"] for name, entry in saved.items()}


def node(name: str, *needs: str) -> Stage:
    return Stage(name, needs, lambda context: {}, Config())


def test_stages_come_after_what_they_need():
    names = [s.name for s in in_order([node("c", "a", "b"), node("b", "a"), node("a")])]
    assert names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node("a", "b"), node("b", "a")], "in a circle: a, b"),
        ([node("a", "bsae"), node("base")], "did you mean 'base'"),
        ([node("a"), node("a")], "two stages are called 'a'"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(nodes, said):
    with pytest.raises(RunError, match=said):
        in_order(nodes)


def test_a_target_brings_what_it_needs_and_nothing_else():
    assert [s.name for s in up_to(stages(), ["sft/code"])] == ["base", "sft/code"]
    with pytest.raises(RunError, match="did you mean 'sft/math'"):
        up_to(stages(), ["sft/maht"])


def test_dependents_are_everything_downstream():
    assert dependents(stages(), "sft/math") == {"sft/math", "distill"}


def test_a_second_run_skips_finished_stages_and_says_so(tmp_path):
    first, _ = run(tmp_path, stages())
    assert executed(tmp_path) == list(NAMES)
    second, said = run(tmp_path, stages())
    assert executed(tmp_path) == []
    assert second == first
    assert said.count("skipped") == 4
    assert set(states(tmp_path).values()) == {"done"}


def test_a_stage_gets_the_results_of_what_it_needs(tmp_path):
    results, _ = run(tmp_path, stages())
    assert results["distill"]["inputs"] == ["sft/code", "sft/math"]


def test_changed_settings_redo_the_stage_and_what_depends_on_a_changed_result(tmp_path):
    run(tmp_path, stages())
    executed(tmp_path)
    results, said = run(tmp_path, stages(settings={"sft/math": "other"}))
    # fingerprints chain, so distill sees other inputs; sft/code does not
    assert executed(tmp_path) == ["sft/math", "distill"]
    assert "sft/math is redone: its settings or inputs changed" in said
    assert results["sft/math"]["found"] == "fresh", "a changed stage must not resume the old checkpoints"
    assert (tmp_path / "stale/sft-math/checkpoint").exists()


def test_a_changed_outside_file_redoes_the_stage(tmp_path):
    reward = tmp_path / "reward.py"
    nodes = [Stage("grpo", (), lambda context: {"text": reward.read_text()}, Config(), files=(str(reward),))]
    reward.write_text("one")
    run(tmp_path / "r", nodes)
    reward.write_text("two")
    assert run(tmp_path / "r", nodes)[0] == {"grpo": {"text": "two"}}
    reward.unlink()
    with pytest.raises(RunError, match=r"reward.py' cannot be read"):
        run(tmp_path / "r", nodes)


def test_redoing_from_a_stage_redoes_its_dependents_from_nothing(tmp_path):
    run(tmp_path, stages())
    executed(tmp_path)
    results, _ = run(tmp_path, stages(), redo_from="sft/code")
    assert executed(tmp_path) == ["sft/code", "distill"]
    assert results["sft/code"]["found"] == "fresh"


def test_a_failing_stage_is_recorded_keeps_what_is_finished_and_resumes(tmp_path):
    with pytest.raises(EngineError):
        run(tmp_path, stages("sft/code", "raise"))
    assert states(tmp_path) == {
        "base": "done",
        "sft/math": "done",
        "sft/code": "failed",
        "distill": "waiting",
    }
    assert (
        json.loads((tmp_path / "graph.json").read_text())["stages"]["sft/code"]["message"]
        == "loss is not finite"
    )
    executed(tmp_path)
    results, said = run(tmp_path, stages())
    assert executed(tmp_path) == ["sft/code", "distill"]
    assert "sft/code resumes where it was cut short" in said
    assert results["sft/code"]["found"] == "half way"


@pytest.mark.parametrize(("number", "state"), [(signal.SIGKILL, "running"), (signal.SIGINT, "interrupted")])
def test_a_killed_run_resumes_in_the_stage_it_was_in(tmp_path, number, state):
    root = PROGRAM.parents[2]
    command = [sys.executable, str(PROGRAM), str(tmp_path), "sft/code", "sleep"]
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "here").exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        child.wait(30)
    finally:
        child.kill()
        child.communicate()
    assert states(tmp_path) == {"base": "done", "sft/math": "done", "sft/code": state, "distill": "waiting"}
    assert StageFolder(tmp_path / "stages/sft-code").done() is None
    assert executed(tmp_path) == ["base", "sft/math", "sft/code"]
    results, said = run(tmp_path, stages())
    assert executed(tmp_path) == ["sft/code", "distill"]
    assert results["sft/code"]["found"] == "half way"
    assert said.count("skipped") == 2
    assert json.loads((tmp_path / "graph.json").read_text())["stages"]["sft/code"]["attempts"] == 2


def test_a_result_that_is_not_plain_json_is_refused_and_leaves_the_stage_unfinished(tmp_path):
    nodes = [Stage("base", (), lambda context: {"model": object()}, Config())]
    with pytest.raises(RunError, match="not plain JSON"):
        run(tmp_path, nodes)
    assert StageFolder(tmp_path / "stages/base").done() is None
    assert not list((tmp_path / "stages/base").glob(".*"))


def test_a_result_is_the_same_whether_its_stage_ran_or_was_skipped(tmp_path):
    nodes = [Stage("base", (), lambda context: {"kl": float("nan"), "steps": (1, 2), "by": {3: 4}}, Config())]
    ran, skipped = run(tmp_path, nodes)[0], run(tmp_path, nodes)[0]
    assert ran == skipped == {"base": {"kl": None, "steps": [1, 2], "by": {"3": 4}}}


def test_a_damaged_record_is_named_with_what_to_do(tmp_path):
    run(tmp_path, stages())
    (tmp_path / "stages/base/done.json").write_text("{")
    with pytest.raises(RunError, match=r"done.json cannot be read .* remove it"):
        run(tmp_path, stages())
