"""Run folders: written once, resumed, locked, and finished only when everything is there."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from consilience.conf.errors import RunError
from consilience.training import run_lock
from consilience.training.run_folder import open_run
from consilience.training.run_lock import RunLock

ROOT = Path(__file__).parents[2]


def start(tmp_path, config="seed: 1\n", name="demo", **kwargs):
    return open_run(tmp_path, name, config_yaml=config, manifest={"seed": 1, "command": ["x"]}, **kwargs)


def test_a_new_run_has_config_and_manifest_and_gives_the_lock_back(tmp_path):
    with start(tmp_path) as run:
        assert (run.path / "config.yaml").read_text() == "seed: 1\n"
        assert run.manifest() == {"seed": 1, "command": ["x"]}
        assert run.stages() == []
    with start(tmp_path) as run:
        assert run.manifest()["resumes"] == [{"seed": 1, "command": ["x"]}]


def test_a_stage_is_done_only_after_its_last_file(tmp_path):
    with start(tmp_path) as run:
        stage = run.stage("grpo-math").create()
        assert stage.done() is None and stage.rollouts.is_dir() and stage.checkpoints.is_dir()
        stage.finish({"step": 4, "checkpoint": "step-000004"})
        assert stage.done() == {"step": 4, "checkpoint": "step-000004"}
        assert [s.name for s in run.stages()] == ["grpo-math"]
        assert sorted(os.listdir(stage.path)) == ["checkpoints", "done.json", "rollouts"]
        stage.reset()
        assert stage.done() is None and run.stages() == []


def test_numbers_of_other_libraries_are_written_and_what_is_not_finite_is_null(tmp_path):
    with start(tmp_path) as run:
        stage = run.stage("sft").create()
        stage.finish({"loss": np.float32(0.5), "kl": float("nan"), "steps": (1, 2)})
        assert stage.done() == {"loss": 0.5, "kl": None, "steps": [1, 2]}
        run.write_json("report.json", {"scores": []})
        assert run.read_json("report.json") == {"scores": []} and run.read_json("graph.json") is None


def test_a_full_disk_leaves_the_stage_unfinished_with_one_error(tmp_path):
    with start(tmp_path) as run:
        stage = run.stage("sft").create()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        try:
            with pytest.raises(RunError, match=r"done.json could not be written .*Free disk space"):
                stage.finish({"step": 123456})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert stage.done() is None and sorted(os.listdir(stage.path)) == ["checkpoints", "rollouts"]


def test_a_damaged_done_file_is_an_error_not_a_finished_stage(tmp_path):
    with start(tmp_path) as run:
        stage = run.stage("sft").create()
        (stage.path / "done.json").write_text('{"step"')
        with pytest.raises(RunError, match=r"done.json cannot be read .*remove it to run that part again"):
            stage.done()


def test_another_configuration_is_refused_with_the_lines_that_differ(tmp_path):
    with start(tmp_path):
        pass
    with (
        pytest.raises(RunError, match=r"another configuration \(-seed: 1; \+seed: 2\)"),
        start(tmp_path, "seed: 2\n"),
    ):
        pass
    with start(tmp_path, "seed: 2\n", accept_changed_config=True) as run:
        assert (run.path / "config.yaml").read_text() == "seed: 2\n"
        assert (run.path / "config.1.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="cannot be a folder"), start(tmp_path, name=name):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(RunError, match="is a file"), start(tmp_path):
        pass


HOLDER = """
import sys
from pathlib import Path
from consilience.training.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder_and_a_dead_one_is_taken_over(tmp_path):
    (tmp_path / "demo").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "demo/.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=rf"in use by process {holder.pid} of this machine"),
            start(tmp_path),
        ):
            pass
        assert os.listdir(tmp_path / "demo") == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    with start(tmp_path) as run:
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()


def test_the_same_process_cannot_open_a_run_twice(tmp_path):
    with start(tmp_path), pytest.raises(RunError, match="in use by process"), start(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": null}'])
def test_a_torn_lock_belongs_to_nobody_unless_it_names_another_host(tmp_path, text):
    path = tmp_path / ".lock"
    path.write_text(text)
    lock = RunLock(path)
    if "host" in text:
        with pytest.raises(RunError, match=r"remove .*\.lock"):
            lock.acquire()
    else:
        lock.acquire()
        lock.release()
        lock.release()
        assert path.read_text() == ""


def test_a_pid_used_again_by_another_process_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path / ".lock")
    lock.acquire()
    owner = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(owner | {"started": owner["started"] - 1000}))
    other = RunLock(tmp_path / ".lock")
    other.acquire()
    other.release()


def test_a_process_that_stops_while_it_writes_the_lock_does_not_hang_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "GUARD_LIMIT_S", 0.2)
    with open(tmp_path / ".lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as that process would
        with pytest.raises(RunError, match="is being written by a process that does not go on"):
            run_lock.RunLock(tmp_path / ".lock").acquire()
    lock = run_lock.RunLock(tmp_path / ".lock")
    lock.acquire()
    lock.release()
