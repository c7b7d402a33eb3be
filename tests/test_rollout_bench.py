"""bench/rollout.py: its smallest run, and that arms with other weights end it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilience.model.checkpoint import to_official

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """(rollout.py, rollout_arms.py) as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import rollout_arms  # pyright: ignore

    import rollout  # pyright: ignore

    return rollout, rollout_arms


@pytest.mark.timeout(400)
def test_the_smallest_run_writes_a_page_with_equal_weights_and_a_rate_for_every_arm(tmp_path):
    command = [sys.executable, "bench/rollout.py", "--quick", "--tables", "speed", "log", "--threads", "1"]
    command += ["--vllm-python", "", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("*-rollout.md")
    text = page.read_text()
    arms = ["native", "native again", "transformers"]
    held = re.findall(r"^\| V4 \| (.+?) \| ([0-9a-f]{64}) \|", text, re.M)
    assert [name for name, _ in held] == arms and len({digest for _, digest in held}) == 1
    rate = r"^\| V4 \| (\d+) \| (.+?) \| (\d+) \(\d+–\d+\) \|"
    assert [row[:2] for row in re.findall(rate, text, re.M)] == [(b, arm) for b in "14" for arm in arms]
    assert all(int(row[2]) > 0 for row in re.findall(rate, text, re.M))
    assert len(re.findall(r"^\| (?:process|power) \| 8 \|.* \d+\.\d+ % \|", text, re.M)) == 2
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_only_what_lies_behind_the_first_tokens_of_all_rows_counts(bench):
    marks = bench[1].Marks(2)
    marks.marks = [(0.0, 0.0, 0), (10.0, 7.0, 7), (11.0, 8.0, 8), (13.0, 9.0, 12)]
    assert marks.measured() == {"s": 2.0, "cpu_s": 1.0, "tokens": 4, "all_s": 13.0, "all_tokens": 12}


def test_the_digest_of_an_arm_is_that_of_what_it_holds(bench, tmp_path):
    _, arms = bench
    folder = tmp_path / "v4"
    arms.write_v4(folder, "tiny")
    model = arms.native_model(folder, "cpu", torch.float32)
    digest = arms.digest_of_values(to_official(model), torch.float32)
    assert arms.digest_of_values(arms.stored_weights(folder), torch.float32) == digest
    assert arms.v4_twin(folder, "cpu", torch.float32)[1] == digest
    with torch.no_grad():
        model.layers[1].attn.attn_sink[2] += 1e-6
    assert arms.digest_of_values(to_official(model), torch.float32) != digest


def test_a_twin_whose_weights_were_changed_has_another_digest(bench, tmp_path, monkeypatch):
    """What is digested are the twin's own tensors, not those it was made of."""
    import transformers_oracle

    _, arms = bench
    folder = tmp_path / "v4"
    arms.write_v4(folder, "tiny")
    right = arms.v4_twin(folder, "cpu", torch.float32)[1]
    made = transformers_oracle.hf_state

    def one_off(model):
        state = made(model)
        return state | {"model.norm.weight": state["model.norm.weight"] * 2}

    monkeypatch.setattr(transformers_oracle, "hf_state", one_off)
    assert arms.v4_twin(folder, "cpu", torch.float32)[1] != right


def test_arms_that_hold_different_weights_end_the_run(bench):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    try:
        arms = [
            bench[0].Arm("V4", name, process, Path("none"), {"digest": digest})
            for name, digest in (("native", "a"), ("transformers", "a"), ("vllm", "b"))
        ]
        bench[0].check_digests(arms[:2])
        with pytest.raises(SystemExit, match="weights of V4 differ"):
            bench[0].check_digests(arms)
    finally:
        process.kill()
        process.wait(timeout=10)
