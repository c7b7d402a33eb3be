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
import ray
from consilience.rollout.ray_cluster import worker_environment

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


@pytest.mark.timeout(240)
def test_a_submitted_verb_and_its_workers_run_the_edited_uninstalled_tree(tmp_path, head):
    for name in KEPT:
        shutil.copy(ROOT / name, tmp_path / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
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
    assert "did you mean 'grpo.steps'?" in said, said
    assert done.returncode != 0, "a verb that fails must fail its job"
