"""bench/publication_gpu.py on CPUs: the same two processes and paths, by gloo."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_path_is_verified_and_timed_and_a_silent_worker_is_noticed():
    command = [sys.executable, "bench/publication_gpu.py", "--device", "cpu", "--models", "tiny"]
    command += ["--rounds", "1", "--limit", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    verified = re.findall(r"^  (.+): \d+ digests verified on arrival", done.stdout, re.M)
    assert sorted(verified) == ["broadcast"] * 2 + ["shared memory"] * 2
    rates = re.findall(r"^\| tiny \| (.+?) \| .+ \| (\d+\.\d+) \|", done.stdout, re.M)
    assert [arm for arm, _ in rates] == ["broadcast", "shared memory", "bare"]
    assert "a silent worker: broken off after" in done.stdout
