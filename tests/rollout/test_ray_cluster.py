import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.ray_cluster import start_ray, worker_environment


def test_a_port_in_use_is_refused_before_anything_starts():
    before = dict(os.environ)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port}"):
            start_ray(1, dashboard_port=port)
    assert dict(os.environ) == before


def test_workers_import_the_tree_that_the_driver_runs():
    first = worker_environment(num_threads=3)["PYTHONPATH"].split(os.pathsep)[0]
    assert Path(first) == Path(__file__).resolve().parents[2]
    assert worker_environment(num_threads=3)["OMP_NUM_THREADS"] == "3"


def test_a_cluster_that_does_not_answer_is_one_clear_error_at_once():
    code = "from consilience.rollout.ray_cluster import start_ray; start_ray(1)"
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    failed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert "EngineError: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in failed.stderr
