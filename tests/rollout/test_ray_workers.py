import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import ConfigError, EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout import ray_workers
from consilience.rollout.dispatch import REDISPATCHES
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Durable
from consilience.rollout.ray_transport import choose_transport
from consilience.rollout.ray_workers import RolloutPool, ray_cluster, split_by_group

FACTORY = "consilience.rollout.fake_worker:build_fake_worker"
SLOW = {"step_s": 0.005, "max_running": 16}


def jobs(num, size=8, step=0):
    """`num` jobs in groups of `size`."""
    names = [(f"s/{step}/{i // size}", i) for i in range(num)]
    return [
        RolloutJob(
            f"{group}/{i % size}",
            group,
            "math",
            "chat",
            ({"role": "user", "content": group},),
            reward="x",
            sampling=SamplingParams(seed=i),
        )
        for group, i in names
    ]


@pytest.fixture(scope="module")
def cluster():
    before = dict(os.environ)
    with ray_cluster(3, object_store_bytes=100 << 20) as cluster:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert os.environ["RAY_AUTH_MODE"] == "token" and token.stat().st_mode & 0o077 == 0
        yield cluster
    assert cluster.temp_dir is not None and not cluster.temp_dir.exists()
    assert {k: v for k, v in os.environ.items() if k.startswith("RAY_")} == {
        k: v for k, v in before.items() if k.startswith("RAY_")
    }


@pytest.fixture(scope="module")
def pool(cluster):
    with RolloutPool(2, FACTORY, SLOW) as pool:
        yield pool


def test_groups_stay_together_and_loads_are_even():
    shares = split_by_group([*jobs(40), *jobs(8, 8, step=1)], 3)
    groups = [{job.group for job in share} for share in shares]
    assert sorted(len(share) for share in shares) == [16, 16, 16]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6
    assert all([j.uid for j in s] == sorted(j.uid for j in s) for s in shares)
    assert split_by_group(jobs(8), 3)[1:] == [[], []]


def test_two_processes_return_every_record_in_job_order_with_progress(pool):
    seen = []
    records = pool.generate(jobs(48), lambda *progress: seen.append(progress))
    assert [r.uid for r in records] == [j.uid for j in jobs(48)]
    assert len(set(pool.pids)) == 2 and os.getpid() not in pool.pids
    assert seen[-1] == (48, 48, sum(r.num_sampled for r in records)) and len(seen) > 2
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert pool.generate([]) == []


def test_published_weights_reach_every_worker_and_wrong_ones_none(pool):
    weights = {"w": torch.randn(64, 8), "b": torch.ones(3, dtype=torch.bfloat16)}
    digest = weights_digest(weights)
    pool.publish(weights, digest, 3)
    weights["w"].view(torch.uint8)[5, 5] ^= 1
    with pytest.raises(WeightsRefused):
        pool.publish(weights, digest, 4)
    assert [(s.digest, s.weight_version) for s in pool.states()] == [(digest, 3)] * 2


def untold(record):
    kept = {key: value for key, value in record.metadata.items() if key != REDISPATCHES}
    return replace(record, metadata=kept).to_json()


def test_a_worker_killed_in_the_middle_loses_and_doubles_no_sample(pool):
    weights = {"w": torch.ones(4)}
    pool.publish(weights, weights_digest(weights), 9)
    undisturbed = pool.generate(jobs(96))
    victim, replaced = pool.pids[0], pool.num_replaced

    killed: list[int] = []  # progress may arrive again before the pool has noticed

    def kill_once(done, total, tokens):
        if 0 < done < total and not killed:
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)

    records = pool.generate(jobs(96), kill_once)
    assert pool.num_replaced == replaced + 1 and pool.pids[0] != victim
    assert [r.uid for r in records] == [j.uid for j in jobs(96)]
    # Those of a worker that dies before its first word say that they were given out again.
    assert [untold(r) for r in records] == [untold(r) for r in undisturbed]
    assert {v for r in records for v in r.weight_version} == {9}
    assert pool.states()[0].digest == weights_digest(weights)


def test_a_worker_that_dies_before_it_is_asked_is_replaced_and_its_successor_answers(pool):
    """The proof at a stage's start asks for evidence: a death then is no reason to end the stage."""
    weights = {"w": torch.ones(4)}
    pool.publish(weights, weights_digest(weights), 11)
    victim, replaced = pool.pids[1], pool.num_replaced
    os.kill(victim, signal.SIGKILL)
    found = pool.evidence([(1, 2, 3)], True)
    assert pool.num_replaced == replaced + 1 and pool.pids[1] != victim
    assert [f"process {pid} on" in name for pid, name in zip(pool.pids, found)] == [True, True]
    assert len({evidence.tensors["w"].digest for evidence in found.values()}) == 1
    os.kill(pool.pids[0], signal.SIGKILL)
    assert [(s.digest, s.weight_version) for s in pool.states()] == [(weights_digest(weights), 11)] * 2


def test_workers_that_keep_dying_are_one_clear_error(cluster):
    kwargs = {**SLOW, "die_after": 3}
    with (
        RolloutPool(1, FACTORY, kwargs, max_restarts=0) as pool,
        pytest.raises(EngineError, match="1 deaths"),
    ):
        pool.generate(jobs(8))


MORTAL = """
import os, signal
from pathlib import Path
from consilience.rollout.fake_worker import build_fake_worker

def build(folder, deaths):
    (Path(folder) / str(os.getpid())).touch()
    if len(list(Path(folder).iterdir())) in deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return build_fake_worker(step_s=0.005, max_running=16)
"""


def mortal(tmp_path, monkeypatch, *deaths):
    """A factory whose n-th process, for n in `deaths`, dies while it is built."""
    (tmp_path / "mortal_factory.py").write_text(MORTAL)
    (tmp_path / "born").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "mortal_factory:build", {"folder": str(tmp_path / "born"), "deaths": deaths}


def test_a_replacement_that_dies_at_its_start_is_replaced_in_turn(cluster, tmp_path, monkeypatch):
    killed: list[int] = []

    def kill_once(done, total, tokens):
        if not killed:
            killed.append(pool.pids[0])
            os.kill(killed[0], signal.SIGKILL)

    with RolloutPool(1, *mortal(tmp_path, monkeypatch, 2, 3)) as pool:
        records = pool.generate(jobs(48), kill_once)
        assert pool.num_replaced == 3
    assert [r.uid for r in records] == [j.uid for j in jobs(48)]


def test_a_worker_that_dies_at_its_first_start_is_one_clear_error(cluster, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="died at its start"):
        RolloutPool(1, *mortal(tmp_path, monkeypatch, 1))


def test_a_worker_that_is_silent_after_its_start_is_one_clear_error(cluster, monkeypatch):
    """`choose_transport` asks each worker what it can map."""
    frozen = []

    def choose(wanted, actors, hosts, get, options):
        frozen.append(get(actors[0].build.remote(None)).pid)
        os.kill(frozen[0], signal.SIGSTOP)
        return choose_transport(wanted, actors, hosts, get, options)

    monkeypatch.setattr(ray_workers, "choose_transport", choose)
    with pytest.raises(EngineError, match="gave no answer for 3 s"):
        RolloutPool(1, FACTORY, publish_limit_s=3.0)
    assert len(frozen) == 1


def test_a_factory_that_cannot_be_loaded_or_fails_is_one_clear_error(cluster):
    with pytest.raises(ConfigError, match="no_such_room"):
        RolloutPool(1, "consilience.no_such_room:build")
    with pytest.raises(EngineError, match="unexpected keyword"):
        RolloutPool(1, FACTORY, {"speed": 3})
    with pytest.raises(ConfigError, match="at least 1"):
        RolloutPool(0, FACTORY)


def test_a_worker_that_finds_no_cores_is_one_clear_error_not_a_hang(cluster):
    with pytest.raises(EngineError, match="the cluster has 3 cores"):
        RolloutPool(1, FACTORY, num_threads=64, start_timeout_s=0.5)


def test_a_frozen_worker_is_named_and_replaced_and_its_samples_go_on_from_the_log(cluster, tmp_path):
    kept: dict[str, object] = {}
    frozen: list[int] = []

    def keep(records):
        kept.update({record.uid: record for record in records})

    def freeze_once(done, total, tokens):
        if not frozen:
            frozen.append(pool.pids[0])
            os.kill(frozen[0], signal.SIGSTOP)

    with RolloutPool(1, FACTORY, SLOW, stall_s=5.0) as pool:
        records = pool.generate(jobs(48), freeze_once, durable=Durable(tmp_path / "log", keep))
        (stall,) = pool.stalls
    assert (stall.pid, stall.stage, stall.actor) == (frozen[0], "stream", "rollout worker 0")
    assert stall.uids and stall.uids[0].startswith("s/0/") and stall.action == "redispatched"
    assert pool.num_replaced == 1 and f"process {frozen[0]}" in str(stall)
    assert [r.uid for r in records] == [j.uid for j in jobs(48)] and list(kept.values()) != []
    assert set(kept) == {r.uid for r in records}
    assert any("resumed_at" in r.metadata for r in records)
