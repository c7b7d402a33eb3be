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


def stages(folder, mode, points):
    """What each stage found that was killed at its event of `points`."""
    command = [sys.executable, str(PROGRAM), str(folder), mode, *map(str, points)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def check(folder, mode, num_points):
    (whole,) = stages(folder / "whole", mode, [0])
    assert all(row["loads"] == row["distinct"] for row in whole["loads"])
    assert whole["scored"] == 24 + 23 and whole["again"] == 0
    assert whole["parts"] == ([2, 2] if mode == "parts" else [1, 1])
    points = random.Random(f"{SEED} {mode}").sample(range(2, whole["events"] + 1), num_points)
    for point, found in zip(points, stages(folder / "cut", mode, points), strict=True):
        assert found["digest"] == whole["digest"], point
        assert found["kl"] == whole["kl"], point
        if mode != "parts":  # where states of a later part may have to make room
            assert found["again"] == 0, point
        if mode == "keeps":  # each state was computed once, whatever was freed before the kill
            assert found["scored"] == whole["scored"], point


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["frees", "keeps"])
def test_killed_a_run_resumes_without_scoring_what_is_stored_and_ends_bit_equal(tmp_path, mode):
    check(tmp_path, mode, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["frees", "keeps", "parts"])
def test_killed_at_many_points(tmp_path, mode):
    check(tmp_path, mode, 12)
