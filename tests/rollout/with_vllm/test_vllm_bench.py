"""bench/rollout.py with vLLM as one of its arms."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(600)
def test_vllm_and_transformers_hold_and_sample_from_the_same_dense_checkpoint():
    command = [sys.executable, "bench/rollout.py", "--quick", "--tables", "speed", "--threads", "1"]
    command += ["--vllm-python", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    held = dict(re.findall(r"^\| dense \| (.+?) \| ([0-9a-f]{64}) \|", done.stdout, re.M))
    assert set(held) == {"vllm", "transformers"} and len(set(held.values())) == 1
    rates = re.findall(r"^\| dense \| (\d) \| (.+?) \| \d+ \(\d+–\d+\) \|", done.stdout, re.M)
    assert rates == [(batch, arm) for batch in "14" for arm in ("vllm", "transformers")]
