"""The measurement of sandboxes: its aims can be missed, and it finds what is left."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience.sandboxes.janitor import new_mark
from consilience.sandboxes.protocol import Limits, SandboxSpec

ROOT = Path(__file__).parents[1]
SPEC = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import sandbox  # pyright: ignore

    return sandbox


def test_an_aim_that_is_missed_is_said_and_counts(bench, capsys):
    assert bench.verdict("1 ms", "under 5 ms", True) and not bench.verdict("9 ms", "under 5 ms", False)
    assert (
        capsys.readouterr().out
        == "  ok: 1 ms; the aim is under 5 ms\n  MISSED: 9 ms; the aim is under 5 ms\n"
    )
    assert bench.row("x", [1.0, 2.0, 9.0]) == 2.0
    assert bench.num_of(1000, True) == 50 and bench.num_of(20, True) == 5


def test_what_a_dead_owner_left_is_found_and_what_others_have_is_not(bench):
    left = subprocess.Popen(["sh", "-c", "echo; sleep 100; true", new_mark()], stdout=subprocess.PIPE)
    try:
        assert left.stdout.readline()  # its arguments are those of `sh` by now
        found = bench.leftovers({os.getpid()})  # this process may have boxes of its own
        assert sum(text.startswith(f"process {left.pid} ") for text in found) == 1
        assert bench.leftovers({1 << 22}) == []
    finally:
        left.kill()
        left.wait(timeout=10)
        left.stdout.close()


def test_a_runner_whose_bubblewrap_is_gone_is_found(bench):
    runner = bench.RUNNER_INSIDE
    for parent, num in ((["sh", "-c"], 1), (["sh", "-c", "{}", new_mark()], 0)):
        text = f"sh -c 'sleep 100; true' {runner} & wait"
        words = [text if word == "{}" else word for word in parent]
        words = words if "{}" in parent else [*words, text]
        left = subprocess.Popen(words, start_new_session=True)
        try:
            time.sleep(0.3)
            assert sum(found.startswith("runner ") for found in bench.leftovers({1 << 22})) == num
        finally:
            os.killpg(left.pid, 9)
            left.wait(timeout=10)


@pytest.mark.timeout(120)
def test_floods_leave_the_memory_of_the_harness_flat(bench, capsys):
    assert asyncio.run(bench.measure_flood(SPEC, True)), capsys.readouterr().out


@pytest.mark.timeout(180)
def test_killed_owners_leave_nothing():
    command = [sys.executable, "bench/sandbox.py", "--quick", "--driver", "bwrap", "--table", "leaks"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=170)  # fmt: skip
    assert (
        done.returncode == 0 and "50 owners killed; 0 processes, groups and containers left" in done.stdout
    ), done.stdout
