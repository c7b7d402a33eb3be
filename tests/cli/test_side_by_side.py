"""Stages in processes of their own: overlap, order, failure, signals, and that nothing is left behind."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from consilience.cli import side_by_side
from consilience.cli.graph import Graph, covered_s
from consilience.cli.progress_display import ProgressLines
from consilience.cli.side_by_side import SharedWorkers, SideBySide, thread_share
from consilience.cli.stage import Stage
from consilience.cli.stage_process import NO_THREADS, PRELOAD, warm_up
from consilience.conf.errors import EngineError, RunError
from consilience.conf.schema import Config
from consilience.rollout.deadlines import STALLS, read_stalls
from consilience.training.run_folder import RunFolder, StageFolder

PROGRAM = Path(__file__).with_name("side_by_side_program.py")
ROOT = PROGRAM.parents[2]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The module of stage functions, importable in the children too: they get this process's path."""
    sys.path.insert(0, str(PROGRAM.parent))
    module = importlib.import_module(PROGRAM.stem)
    warm_up(module.LIGHT)
    yield module
    sys.path.remove(str(PROGRAM.parent))


def run(folder: Path, nodes: list[Stage], slots: int = 2, **options) -> SimpleNamespace:
    out = io.StringIO()
    graph = Graph(RunFolder(folder), nodes, ProgressLines(out, every_s=0.0))
    results = graph.run(slots=slots, **options)
    return SimpleNamespace(results=results, said=out.getvalue(), graph=graph)


def states(folder: Path, key: str = "state") -> dict[str, str]:
    saved = json.loads((folder / "graph.json").read_text())["stages"]
    return {name: entry[key] for name, entry in saved.items()}


def order(folder: Path) -> list[str]:
    path = folder / "order.txt"
    names = path.read_text().split()
    path.unlink()
    return names


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_of(folder: Path, stage: str) -> int:
    return int((folder / f"{stage.replace('/', '-')}.pid").read_text())


def wait_until(holds, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def meeting(program: ModuleType) -> dict[str, object]:
    """Every stage of a specialist waits for the other's, or the slower one might find itself alone."""
    return dict.fromkeys(("sft_a", "sft_b", "grpo_a", "grpo_b"), program.meets)


def test_stages_that_do_not_need_each_other_overlap_each_in_a_process_of_its_own(program, tmp_path):
    found = run(tmp_path, program.stages(**meeting(program))).results
    pids = {name: result["pid"] for name, result in found.items()}
    assert len({pids[name] for name in ("sft/a", "sft/b", "grpo/a", "grpo/b")} | {os.getpid()}) == 5
    assert pids["base"] == pids["distill"] == os.getpid(), "a stage that is alone runs in this process"
    assert list(found) == list(program.NEEDS), "results are in graph order, whatever ended first"
    assert set(states(tmp_path).values()) == {"done"}


def test_a_stage_starts_when_its_own_needs_are_done_whatever_else_still_runs(program, tmp_path):
    found = run(tmp_path, program.stages(program.overtakes))
    assert found.results["distill"]["inputs"] == ["grpo/a", "grpo/b"]
    names = order(tmp_path)
    assert names.index("grpo/a") < names.index("grpo/b") and names[-1] == "distill"


def test_no_more_stages_run_than_there_are_slots(program, tmp_path):
    nodes = [Stage("base", (), program.plain, Config())]
    nodes += [Stage(f"sft/{d}", ("base",), program.plain, Config()) for d in "abcd"]
    graph = Graph(RunFolder(tmp_path), nodes, ProgressLines(io.StringIO()))
    most = 0

    class Counting(SideBySide):
        def _hear(self) -> None:
            nonlocal most
            most = max(most, len(self._running))
            super()._hear()

    Counting(graph, 2).run()
    assert most == 2 and len(graph.results) == 5


def test_children_get_this_process_s_tree_folder_and_environment(program, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THE_PARENT", "set after the server started")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    child = run(tmp_path / "r", program.stages()).results["sft/a"]
    assert child["tree"] == sys.modules["consilience"].__path__[0]
    assert child["cwd"] == str(tmp_path)
    assert (child["variable"], child["omp"]) == ("set after the server started", None)


def test_children_run_the_uploaded_tree_that_a_ray_job_runs_not_the_installed_one(tmp_path):
    """Ray puts the tree first on PYTHONPATH and runs the program in it."""
    tree = tmp_path / "tree"
    for room in ("cli", "conf", "rollout", "training"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "consilience.py", tree)
    command = [sys.executable, str(PROGRAM), str(tmp_path / "r"), "plain"]
    subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, timeout=PATIENCE_S
    )
    for stage in ("base", "sft-a", "grpo-b"):
        done = StageFolder(tmp_path / "r/stages" / stage).done()
        assert done is not None and done["result"]["tree"] == str(tree)


def test_each_trainer_gets_its_share_of_the_threads_and_one_that_is_alone_all(program, tmp_path):
    found = run(tmp_path, program.stages(threads=5, **meeting(program))).results
    assert {name: result["threads"] for name, result in found.items()} == {
        "base": None, "sft/a": 2, "sft/b": 2, "grpo/a": 2, "grpo/b": 2, "distill": None,
    }  # fmt: skip
    found = run(tmp_path / "late", program.stages(program.lingers, threads=5)).results
    assert {name: result["threads"] for name, result in found.items()} == {
        "base": None, "sft/a": 2, "sft/b": 2, "grpo/a": 2, "grpo/b": None, "distill": None,
    }  # fmt: skip
    assert (thread_share(2, 3), thread_share(8, 3)) == (1, 2)
    assert thread_share(0, 1) == os.cpu_count()


def test_a_second_run_skips_everything_and_starts_no_process(program, tmp_path):
    first = run(tmp_path, program.stages()).results
    order(tmp_path)
    second = run(tmp_path, program.stages(program.divides))
    assert second.results == first and second.said.count("skipped") == len(first)
    assert not (tmp_path / "order.txt").exists()


def test_what_trainers_tell_arrives_by_stage(program, tmp_path):
    said = run(tmp_path, program.stages(program.counts)).said
    for name in ("sft/a", "sft/b", "grpo/a"):
        lines = [line for line in said.splitlines() if f" {name}: " in line]
        assert sum("3/3 step" in line and "loss 2" in line for line in lines) >= 1, said
        assert "starts" in lines[0] and "done" in lines[-1]


def test_a_failing_stage_stops_the_others_and_the_next_run_goes_on(program, tmp_path):
    nodes = program.stages(sft_a=program.fails, sft_b=program.forever)
    with pytest.raises(EngineError, match="loss is not finite") as raised:
        run(tmp_path, nodes)
    assert str(raised.value) == "loss is not finite"
    assert "in fails" in raised.value.__notes__[0], "--debug shows where"
    assert states(tmp_path) == {
        "base": "done", "sft/a": "failed", "sft/b": "interrupted",
        "grpo/a": "waiting", "grpo/b": "waiting", "distill": "waiting",
    }  # fmt: skip
    assert states(tmp_path, "message")["sft/a"] == "loss is not finite"
    assert not is_alive(pid_of(tmp_path, "sft/b"))
    assert StageFolder(tmp_path / "stages/sft-b").done() is None
    order(tmp_path)
    again = run(tmp_path, program.stages())
    assert sorted(order(tmp_path)) == ["distill", "grpo/a", "grpo/b", "sft/a", "sft/b"]
    assert again.said.count("resumes where it was cut short") == 2


def test_errors_arrive_as_what_they_are_or_say_the_same(program, tmp_path):
    with pytest.raises(ZeroDivisionError, match="division"):
        run(tmp_path / "a", program.stages(sft_a=program.divides))
    with pytest.raises(RuntimeError, match="OddError: this and that"):
        run(tmp_path / "b", program.stages(sft_a=program.breaks))
    with pytest.raises(Exception, match="pickle"):
        run(tmp_path / "c", program.stages(sft_a=program.leaves_an_object))


def test_a_function_that_cannot_travel_is_refused_with_what_to_do(program, tmp_path):
    with pytest.raises(RunError, match=r"'sft/a' cannot run .* set run\.parallel=1"):
        run(tmp_path, program.stages(sft_a=lambda context: {}))
    assert states(tmp_path)["sft/a"] == "failed"


def test_a_child_that_is_killed_is_named_with_the_signal_and_its_stage_resumes(program, tmp_path):
    nodes = program.stages(sft_a=program.is_killed, sft_b=program.forever)
    with pytest.raises(RunError, match="'sft/a' died without a word \\(killed by SIGKILL\\)"):
        run(tmp_path, nodes)
    assert (states(tmp_path)["sft/a"], states(tmp_path)["sft/b"]) == ("failed", "interrupted")
    assert "sft/a resumes" in run(tmp_path, program.stages()).said


def test_a_child_that_is_frozen_is_named_with_its_stacks_and_ended_and_its_stage_resumes(program, tmp_path):
    nodes = program.stages(sft_a=program.freezes)
    watched = replace(nodes[0].cfg, run=replace(nodes[0].cfg.run, silence_limit_s=5.0))
    with pytest.raises(RunError, match=r"stage sft/a .* was silent in 'stage' for 5\.0 s"):
        run(tmp_path, [replace(node, cfg=watched) for node in nodes])
    (stall,) = read_stalls(tmp_path / STALLS)
    frozen = pid_of(tmp_path, "sft/a")
    assert (stall.actor, stall.pid, stall.action) == ("stage sft/a", frozen, "ended") and not is_alive(frozen)
    assert "in freezes" in Path(stall.stacks).read_text()
    assert "sft/a resumes" in run(tmp_path, program.stages()).said
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == [Path(stall.stacks).name]


def test_an_interrupted_child_interrupts_the_run(program, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, program.stages(sft_a=program.stops_itself, sft_b=program.forever))
    assert (states(tmp_path)["sft/a"], states(tmp_path)["sft/b"]) == ("interrupted", "interrupted")


def test_a_stage_that_does_not_end_when_asked_is_killed(program, tmp_path, monkeypatch):
    nodes = program.stages(sft_a=program.fails, sft_b=program.stubborn)
    graph = Graph(RunFolder(tmp_path), nodes, ProgressLines(io.StringIO()))
    monkeypatch.setattr(side_by_side, "ASK_EVERY_S", 0.1)
    with pytest.raises(EngineError):
        SideBySide(graph, 2, grace_s=0.5).run()
    assert not is_alive(pid_of(tmp_path, "sft/b"))
    assert states(tmp_path)["sft/b"] == "interrupted"


def test_what_stages_share_to_sample_is_opened_once_and_limits_how_many_do(program, tmp_path):
    opened = []

    def open_workers(cfgs, slots):
        opened.append((len(cfgs), slots))
        return SharedWorkers({"OF_THE_PARENT": "an address"}, 1)

    nodes = program.stages(needs_workers="grpo")
    found = run(tmp_path, nodes, slots=3, open_workers=open_workers)
    assert opened == [(2, 3)]
    variables = {name: result["variable"] for name, result in found.results.items()}
    # the second has to wait, is then alone, and so runs in this process, whose own the cluster is
    assert {variables["grpo/a"], variables["grpo/b"]} == {"an address", None}
    assert variables["sft/a"] is None
    began = {name: s.spans[0] for name, s in found.graph.states().items()}
    assert began["grpo/a"][1] <= began["grpo/b"][0] or began["grpo/b"][1] <= began["grpo/a"][0]


def test_elapsed_time_counts_what_overlaps_once(program, tmp_path):
    assert covered_s([[0.0, 3.0], [1.0, 2.0], [2.5, 4.0], [10.0, 11.0]]) == 5.0
    graph = run(tmp_path, program.stages(sft_a=program.meets, sft_b=program.meets)).graph
    assert 0 < graph.elapsed_s() < sum(s.wall_s for s in graph.states().values())
    assert run(tmp_path, program.stages()).graph.elapsed_s() == pytest.approx(graph.elapsed_s())


def test_what_the_server_imports_starts_no_thread():
    """A thread does not survive the fork, and what it held stays locked."""
    program = (
        "import importlib, os, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *PRELOAD],
        env={**os.environ, **NO_THREADS, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1"]


@pytest.fixture
def at_work(tmp_path) -> Iterator[tuple[subprocess.Popen, Path, list[int]]]:
    """The program in a process group of its own, both its stages at work; (process, folder, child pids)."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(tmp_path), "forever"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        files = [tmp_path / "sft-a.pid", tmp_path / "sft-b.pid"]
        wait_until(lambda: process.poll() is not None or all(f.exists() for f in files), "stages began")
        yield process, tmp_path, [int(file.read_text()) for file in files]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("to_group", [True, False])
def test_ctrl_c_ends_every_stage_and_records_it(at_work, to_group):
    process, folder, children = at_work
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert "KeyboardInterrupt" in said and said.count("Traceback") == 1, "children end quietly"
    assert not any(is_alive(pid) for pid in children)
    found = states(folder)
    assert (found["base"], found["sft/a"], found["sft/b"]) == ("done", "interrupted", "interrupted")
    wait_until(lambda: not of_group(process.pid), "the fork server is gone too")


def test_children_end_at_once_when_the_run_is_killed(at_work):
    process, _, children = at_work
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in children), "children end")
    process.wait()
    wait_until(lambda: not of_group(process.pid), "the fork server is gone too")


def of_group(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(path.name))
    return found
