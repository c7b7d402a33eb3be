"""The trainer killed with SIGKILL at random points: stored states are not scored again, not a bit differs."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("kill_program.py")
SEED = 20261122


def stages(folder, keeps, points):
    """What each stage found that was killed at its event of `points`."""
    command = [sys.executable, str(PROGRAM), str(folder), "keeps" if keeps else "frees", *map(str, points)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def check(folder, keeps, num_points):
    (whole,) = stages(folder / "whole", keeps, [0])
    assert all(row["loads"] == row["distinct"] for row in whole["loads"])
    assert whole["scored"] == 24 + 23 and whole["again"] == 0
    points = random.Random(SEED + keeps).sample(range(2, whole["events"] + 1), num_points)
    for point, found in zip(points, stages(folder / "cut", keeps, points), strict=True):
        assert found["digest"] == whole["digest"], point
        assert found["kl"] == whole["kl"], point
        assert found["again"] == 0, point
        if keeps:  # each state was computed once, whatever was freed before the kill
            assert found["scored"] == whole["scored"], point


@pytest.mark.timeout(300)
@pytest.mark.parametrize("keeps", [False, True])
def test_killed_a_run_resumes_without_scoring_what_is_stored_and_ends_bit_equal(tmp_path, keeps):
    check(tmp_path, keeps, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("keeps", [False, True])
def test_killed_at_many_points(tmp_path, keeps):
    check(tmp_path, keeps, 12)
