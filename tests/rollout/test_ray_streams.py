"""Real Ray workers that sample all the time: new weights while they do, a death, a frozen one."""

import os
import signal
import threading

import pytest
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout.ahead import PhasesAhead, ages
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.ray_streams import ray_streams
from consilience.rollout.ray_workers import RolloutPool, ray_cluster
from consilience.rollout.store import RolloutStore

FACTORY = "consilience.rollout.fake_worker:build_fake_worker"
SLOW = {"reply": "a rather long answer", "step_s": 0.01, "max_running": 64}
WEIGHTS = {"w": torch.arange(64.0)}
DIGEST = weights_digest(WEIGHTS)


def jobs_of(step):
    return [
        RolloutJob(
            f"s/{step}/{i // 4}/{i % 4}", f"s/{step}/{i // 4}", "d", "chat",
             ({"role": "user", "content": "x"},),
            reward="x", sampling=SamplingParams(seed=16 * step + i),
        )
        for i in range(16)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(3, object_store_bytes=100 << 20) as cluster:
        yield cluster


def steps(folder, streams, num, max_age, disturb=lambda step: None):
    """The records of each step."""
    store, taken = RolloutStore(folder), []
    phases = PhasesAhead(store, streams, jobs_of, start=0, num_steps=num, max_age=max_age)
    for step in range(num):
        streams.publish(WEIGHTS, DIGEST, step)
        phases.admit(step)
        disturb(step)
        taken.append(phases.take(step))
        assert [r.uid for r in taken[-1]] == [job.uid for job in jobs_of(step)]
        assert min(ages(taken[-1], step)) >= 0 and max(ages(taken[-1], step)) <= max_age
        store.ledger.trained(step, [r.uid for r in taken[-1]])
    store.ledger.check()
    return taken


def test_two_workers_sample_ahead_take_weights_meanwhile_and_one_may_die(cluster, tmp_path):
    def kill(step):
        if step == 2:
            threading.Timer(0.1, lambda: os.kill(pool.pids[0], signal.SIGKILL)).start()

    with RolloutPool(2, FACTORY, SLOW, is_continuous=True) as pool:
        with ray_streams(pool) as streams:
            taken = steps(tmp_path, streams, 6, 2, kill)
            assert pool.num_replaced == 1 and len(set(pool.pids)) == 2
            with pytest.raises(WeightsRefused):
                streams.publish(WEIGHTS, "0" * 64, 9)
        mixed = [r for records in taken for r in records if len(set(r.weight_version)) > 1]
        assert mixed and any("resumed_at" in r.metadata for records in taken for r in records)
        again = pool.generate(jobs_of(0))  # the pool is free again for a synchronous stage
        assert [(r.uid, r.token_ids) for r in again] == [(r.uid, r.token_ids) for r in taken[0]]


def test_a_frozen_worker_is_named_and_its_samples_go_on_from_the_log(cluster, tmp_path):
    def freeze(step):
        if step == 0:
            os.kill(pool.pids[0], signal.SIGSTOP)

    with RolloutPool(2, FACTORY, SLOW, stall_s=5.0, is_continuous=True) as pool:
        frozen, alive = pool.pids
        with ray_streams(pool) as streams:
            steps(tmp_path, streams, 2, 1, freeze)
        assert pool.num_replaced == 1 and pool.pids[1] == alive
        assert [(stall.pid, stall.stage) for stall in pool.stalls] == [(frozen, "stream")]


def test_workers_that_keep_dying_are_one_clear_error(cluster, tmp_path):
    with (
        RolloutPool(1, FACTORY, {**SLOW, "die_after": 3}, max_restarts=0, is_continuous=True) as pool,
        ray_streams(pool) as streams,
        pytest.raises(EngineError, match="1 deaths in one step"),
    ):
        steps(tmp_path, streams, 1, 0)
