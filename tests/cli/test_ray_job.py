"""A verb as a Ray job: what runs, in the job's driver and on its workers, is the submitted tree.

`ray job submit --working-dir . -- consilience VERB` on a head of the test's own, from a copy of the
tree with one line edited in it. The copy is not installed anywhere; the edited line must answer.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
CONSILIENCE = Path(sys.executable).with_name("consilience")
KEPT = ("pyproject.toml", "consilience.py", ".rayignore", ".gitignore")
ROOMS = (
    "model",
    "rollout",
    "grpo",
    "distill",
    "teachers",
    "rewards",
    "sandboxes",
    "training",
    "tasks",
    "conf",
    "cli",
)

PROBE = """
import inspect, os, ray
from consilience.cli.stages import STAGE_FUNCTIONS, load_function
from consilience.cli.verbs import VERBS
from consilience.rollout.ray_cluster import worker_environment

functions = {**VERBS, **STAGE_FUNCTIONS}
files = {name: inspect.getsourcefile(load_function(path)) for name, path in functions.items()}
print("not of the tree:", [name for name, file in files.items() if not file.startswith(os.getcwd())])

@ray.remote(num_cpus=1)
def on_worker():
    import consilience.conf.errors
    return consilience.conf.errors.EDITED

ray.init(runtime_env={"env_vars": worker_environment()}, log_to_driver=False)
print("worker says:", ray.get(on_worker.remote(), timeout=60))
"""


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """The environment that reaches a Ray head of this test's own."""
    port, dashboard, agent, metrics = free_ports(4)
    folder = tempfile.mkdtemp(prefix="rj-", dir="/tmp")  # sockets want a short path
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = keep | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    url = f"http://127.0.0.1:{dashboard}"
    command = [
        str(RAY), "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        "--include-dashboard=true", "--num-cpus=2", "--object-store-memory=80000000",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{url}/api/version"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield env | {"RAY_API_SERVER_ADDRESS": url}
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def submit(tree: Path, env: dict[str, str], entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Submit and wait; the head's agent may come up a moment after its page."""
    command = [str(RAY), "job", "submit", "--working-dir", ".", "--", "bash", "-c", entrypoint]
    for _ in range(5):
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=100)
        if "No available agent" not in done.stdout + done.stderr:
            break
    return done


def copy_tree(folder: Path) -> None:
    """The files of the project that are needed to run it."""
    for name in KEPT:
        shutil.copy(ROOT / name, folder / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.timeout(240)
def test_a_submitted_verb_and_its_workers_run_the_edited_uninstalled_tree(tmp_path, head):
    copy_tree(tmp_path)
    (tmp_path / ".typing").mkdir()
    (tmp_path / ".typing" / "consilience").symlink_to("..")  # an endless folder unless .rayignore names it
    with (tmp_path / "conf" / "errors.py").open("a") as file:
        file.write('\nEDITED = "the edited line"\n')
    verbs = tmp_path / "cli" / "verbs.py"
    verbs.write_text(verbs.read_text().replace("talk to a checkpoint", "the edited verb"))
    (tmp_path / "probe.py").write_text(PROBE)

    done = submit(
        tmp_path, head, f"{CONSILIENCE} help && {sys.executable} probe.py && {CONSILIENCE} grpo grpo.stepz=1"
    )

    said = done.stdout + done.stderr
    assert "chat      the edited verb" in said, said
    assert "worker says: the edited line" in said, said
    assert "not of the tree: []" in said, said
    assert "did you mean 'grpo.steps'?" in said, said
    assert done.returncode != 0, "a verb that fails must fail its job"


SMALL = (
    "~task.domains.code ~task.domains.agent task.domains.math.max_tokens=24 task.vocab_size=400 "
    "task.num_test=8 model.hidden_size=16 model.num_hidden_layers=2 'model.compress_ratios=[0,4]' "
    "engine.threads=1 log.wandb=disabled log.progress=off base.steps=1 base.tokens_per_step=300 "
    "base.row_tokens=128 base.num_examples=6 sft.steps=1 sft.tokens_per_step=300 sft.row_tokens=128 "
    "sft.num_examples=6 grpo.steps=1 grpo.prompts_per_step=2 grpo.group_size=2 distill.steps=1 "
    "distill.prompts_per_step=2 rollout.num_workers=1 rollout.max_batch=8 rollout.max_length=400 "
    "evaluate.num_problems=4 evaluate.greedy_problems=0 evaluate.num_resamples=100 run.margins=false"
)

LEFT = """
import ray, ray.util.state as state
from ray.util.placement_group import placement_group_table

ray.init(log_to_driver=False)
groups = [row["state"] for row in placement_group_table().values()]
print("groups left:", [each for each in groups if each != "REMOVED"])
actors = [each.class_name for each in state.list_actors() if each.state != "DEAD"]
print("actors left:", [each for each in actors if each != "JobSupervisor"])  # this job's own
print("nodes left:", sum(row["Alive"] for row in ray.nodes()))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_runs_as_a_job_on_reserved_places_and_leaves_the_cluster_as_it_was(tmp_path, head):
    copy_tree(tmp_path)
    (tmp_path / "left.py").write_text(LEFT)
    runs = tmp_path.parent / "runs of the job"
    given = f"{SMALL} cluster=join cluster.placement=apart run.folder='{runs}'"
    verbs = ("sft", "grpo", "distill", "evaluate", "run")
    for verb in verbs:
        done = submit(tmp_path, head, f"{CONSILIENCE} {verb} {given}")
        assert done.returncode == 0, f"{verb}: {done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert (runs / "default" / "report.json").exists()
    said = submit(tmp_path, head, f"{sys.executable} left.py").stdout
    assert "groups left: []" in said and "actors left: []" in said and "nodes left: 1" in said, said
