"""vLLM in the worker processes of a pool: killed, taken over, updated, put to sleep.

The worker is the one of `cli/worker_factory.py`; its interpreter is named, as for vLLM's own environment.
"""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from tiny_qwen import MAX_LENGTH, MAX_MISMATCH, SETTINGS, other_weights, write_checkpoint

from consilience.model.digest import weights_digest
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Durable
from consilience.rollout.ray_workers import RolloutPool, ray_cluster
from consilience.rollout.vllm_reference import reference_of
from consilience.sandboxes.protocol import SandboxSpec

TOLERANCE = 1e-4  # see test_vllm_engine.py
pytestmark = pytest.mark.timeout(300)  # three starts of vLLM, 17 s each on an idle core


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, write_checkpoint(folder)


@pytest.fixture(scope="module")
def pool(checkpoint, tmp_path_factory):
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(tokenizer)
    kwargs = {
        "model": {},
        "tokenizer_path": str(tokenizer),
        "max_rows": 8,
        "max_length": MAX_LENGTH,
        "sandbox": SandboxSpec(),
        "warm": 0,
        "rewards": (),
        "reward_timeout_s": 1.0,
        "reward_processes": 1,
        "needs_boxes": False,
        "family": "official",
        "engine": "vllm",
        "vllm": {"checkpoint": str(checkpoint[0]), "max_mismatch": MAX_MISMATCH, "settings": SETTINGS},
    }
    factory = "consilience.cli.worker_factory:build_worker"
    with (
        ray_cluster(1, object_store_bytes=100 << 20),
        RolloutPool(1, factory, kwargs, python=sys.executable) as pool,
    ):
        yield pool


def jobs(name, num=24):
    return [
        RolloutJob(
            f"{name}/{i}",
            name,
            "math",
            "chat",
            ({"role": "user", "content": "2 + 2 ="},),
            max_tokens=60,
            sampling=SamplingParams(max_tokens=60, seed=i),
        )
        for i in range(num)
    ]


def logged_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.log"))


def worst(folder, weights, records):
    """Largest |log-probability − transformers'| over the sampled tokens of all records."""
    streams = [[*r.prompt_ids, *r.token_ids] for r in records]
    scores = reference_of(folder)(weights, streams)
    return max(
        abs(own - float(right))
        for record, row in zip(records, scores)
        for own, right in zip(record.logprobs, row[len(record.prompt_ids) - 1 :], strict=True)
    )


def test_a_killed_worker_is_replaced_and_its_episodes_go_on_under_proven_weights(pool, checkpoint, tmp_path):
    folder, weights = checkpoint
    new = other_weights(weights, 1)
    pool.publish(new, weights_digest(new), 1)
    (victim,) = pool.pids

    def kill_in_the_midst():
        until = time.monotonic() + 100
        while logged_bytes(tmp_path / "log") < 4000 and time.monotonic() < until:  # of 36,000
            time.sleep(1e-3)
        os.kill(victim, signal.SIGKILL)

    kept = {}
    durable = Durable(tmp_path / "log", lambda records: kept.update({r.uid: r for r in records}))
    killer = threading.Thread(target=kill_in_the_midst)
    killer.start()
    records = pool.generate(jobs("killed"), durable=durable)
    killer.join(timeout=10)
    assert pool.num_replaced == 1 and pool.pids != [victim]
    assert [r.uid for r in records] == [j.uid for j in jobs("killed")] and set(kept) == {
        r.uid for r in records
    }
    resumed = [r.metadata["resumed_at"] for r in records if "resumed_at" in r.metadata]
    assert resumed and all(0 < n <= 60 for n in resumed)
    assert {v for r in records for v in r.weight_version} == {1}
    assert worst(folder, new, records) < TOLERANCE
    (state,) = pool.states()
    assert (state.weight_version, state.digest) == (1, weights_digest(new))


def test_workers_sleep_between_two_phases_and_wake_with_new_weights(pool, checkpoint):
    folder, weights = checkpoint
    newer = other_weights(weights, 2)
    pool.sleep(2)
    pool.wake()
    pool.publish(newer, weights_digest(newer), 2)
    records = pool.generate(jobs("awake", 4))
    assert {v for r in records for v in r.weight_version} == {2}
    assert worst(folder, newer, records) < TOLERANCE
    assert worst(folder, weights, records) > 0.1  # or the line above could not fail
    assert torch.isfinite(torch.tensor([x for r in records for x in r.logprobs])).all()


def test_a_worker_that_dies_asleep_is_replaced_when_it_gets_weights(pool, checkpoint):
    folder, weights = checkpoint
    newer, num_replaced = other_weights(weights, 3), pool.num_replaced
    pool.sleep(2)
    os.kill(pool.pids[0], signal.SIGKILL)
    pool.wake()
    pool.publish(newer, weights_digest(newer), 3)
    records = pool.generate(jobs("replaced", 4))
    assert pool.num_replaced == num_replaced + 1 and {v for r in records for v in r.weight_version} == {3}
    assert worst(folder, newer, records) < TOLERANCE
