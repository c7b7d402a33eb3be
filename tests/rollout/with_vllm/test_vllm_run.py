"""A whole training run on vLLM: GRPO of a dense model over Ray, its only worker killed while it samples."""

import numpy as np
import pytest
import torch
from dense_run import GROUP, PROMPTS, STEPS, TOKENS, DenseRun, prepare
from real_run import trainings
from tiny_qwen import MAX_MISMATCH

from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import load_checkpoint
from consilience.training.metrics import read_metrics

TOLERANCE = 1e-4  # see test_vllm_engine.py; here the trainer is the other side
BYTES_A_TOKEN = 16
pytestmark = pytest.mark.timeout(600)  # two starts of Ray's workers and of vLLM beside whatever else runs


def test_a_run_trains_on_what_vllm_sampled_and_a_killed_worker_goes_on_from_its_log(tmp_path):
    inputs = prepare(tmp_path / "inputs")
    with DenseRun(inputs, tmp_path / "run") as run:
        run.wait_for_log(1, PROMPTS * GROUP * TOKENS // 4 * BYTES_A_TOKEN)
        (worker,) = run.workers()
        run.end(worker)
        result = run.finish()

    records = list(RolloutStore(run.stage / "rollouts").read())
    resumed = [r for r in records if "resumed_at" in r.metadata]
    assert resumed and all(r.uid.startswith("grpo-mine/1/") for r in resumed)
    assert all(0 < r.metadata["resumed_at"] <= TOKENS for r in resumed)
    assert len(records) == STEPS * PROMPTS * GROUP
    assert trainings(run.stage / "rollouts" / "ledger.log") == {r.uid: 1 for r in records}
    for record in records:
        step = int(record.uid.split("/")[1])
        assert set(record.weight_version) == {step} and record.num_sampled == len(record.token_ids)
    assert {r.finish.value for r in records} >= {"stop", "length"}

    # Each update arrived, in both processes, and would have been missed: the probes moved.
    updates = run.read_updates()
    assert [u["version"] for u in updates] == [0, 1, 1, 2, 3]
    assert len({u["pid"] for u in updates[:2]}) == len({u["pid"] for u in updates[2:]}) == 1
    assert updates[0]["pid"] == worker != updates[2]["pid"]
    assert all(u["mean"] < MAX_MISMATCH for u in updates)
    assert [u["moved"] is None for u in updates] == [True, False, True, False, False]
    assert all(u["moved"] > 0.02 for u in updates if u["moved"] is not None)

    # The trainer computes of every token what the sampler said, resumed ones too.
    rows = read_metrics(run.stage / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and result["mismatch_max"] < TOLERANCE
    assert all(row["sampler_gap_max"] < TOLERANCE and row["sampler_kl_k3"] < TOLERANCE for row in rows)
    assert [row["resumed_samples"] > 0 for row in rows] == [False, True, False]
    assert all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)

    # What it leaves is a checkpoint that transformers reads, with the weights that vLLM had last.
    folder = tmp_path / "run" / "dense" / result["checkpoint"]
    model, meta = load_checkpoint(folder)
    assert meta.digest == updates[-1]["digest"] == result["digest"] != meta.parent
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=TOLERANCE)
