"""Workers that really stop, and functions that really hang: named, ended, given out again, dropped."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_ray_workers import FACTORY, jobs

from consilience.conf.errors import EngineError
from consilience.model.digest import weights_digest
from consilience.rollout import ray_mailbox
from consilience.rollout.deadlines import STALLS, Limits, StallLog, read_stalls
from consilience.rollout.drops import drop_groups
from consilience.rollout.fake_worker import Trouble
from consilience.rollout.phases import Durable
from consilience.rollout.ray_mailbox import Place, end_process
from consilience.rollout.ray_workers import RolloutPool, ray_cluster

LIMITS = Limits(grade_s=0.5, grade_sample_s=0.0, close_s=0.5)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(2, object_store_bytes=100 << 20) as cluster:
        yield cluster


def open_pool(tmp_path, trouble, num_workers=1, **options):
    kwargs = {"step_s": 0.002, "trouble": trouble, "limits": LIMITS}
    stalls = StallLog(tmp_path / STALLS)
    return RolloutPool(num_workers, FACTORY, kwargs, stalls=stalls, **{"stall_s": 3.0, **options})


def is_gone(pid, limit_s=20.0):
    """Whether a killed process ends: it is nowhere, or a zombie that Ray has not fetched yet."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_sample_whose_grading_hangs_is_given_out_again_and_goes_on_from_its_log(cluster, tmp_path):
    trouble = Trouble("grade", str(tmp_path / "tally"), "s/0/1/3", times=1)
    kept = []
    durable = Durable(tmp_path / "log", kept.extend)
    with open_pool(tmp_path, trouble) as pool:
        before = pool.pids
        records = pool.generate(jobs(24), durable=durable)
        assert pool.num_replaced == 1 and pool.pids != before and is_gone(before[0])
        (stall,) = read_stalls(tmp_path / STALLS)
    assert [r.uid for r in records] == [j.uid for j in jobs(24)] and drop_groups(records)[1] == {}
    assert sorted(r.uid for r in kept) == sorted(r.uid for r in records)
    again = {r.uid: r.metadata for r in records if "redispatches" in r.metadata}
    assert list(again) == ["s/0/1/3"] and again["s/0/1/3"]["redispatches"] == 1
    assert again["s/0/1/3"]["resumed_at"] > 0  # nothing was sampled twice
    assert (stall.stage, stall.uids, stall.action) == ("grade", ("s/0/1/3",), "redispatched")
    assert (stall.actor, stall.host, stall.pid) == ("rollout worker 0", socket.gethostname(), before[0])
    assert "score" in open(stall.stacks).read()  # noqa: SIM115


@pytest.mark.slow
def test_a_sample_that_always_hangs_is_dropped_with_its_group_and_the_others_are_there(cluster, tmp_path):
    trouble = Trouble("grade", str(tmp_path / "tally"), "s/0/1/3", times=99)
    kept = []
    durable = Durable(tmp_path / "log", kept.extend)
    with open_pool(tmp_path, trouble, most_redispatches=1) as pool:
        records = pool.generate(jobs(24), durable=durable)
    whole, groups = drop_groups(records)
    (dropped,) = groups.values()
    assert [r.uid for r in dropped] == [f"s/0/1/{i}" for i in range(8)] and len(whole) == 16
    assert [r.uid for r in dropped if "dropped" in r.metadata] == ["s/0/1/3"]
    assert "s/0/1/3" not in {r.uid for r in kept} and len(kept) == 23
    assert [s.action for s in read_stalls(tmp_path / STALLS)] == ["redispatched", "dropped"]


@pytest.mark.slow
def test_a_sample_that_hangs_the_engine_each_time_is_dropped_and_the_other_worker_is_left_alone(
    cluster, tmp_path
):
    trouble = Trouble("step", str(tmp_path / "tally"), "s/0/0/0", times=99)
    with open_pool(tmp_path, trouble, num_workers=2, most_redispatches=1) as pool:
        first, second = pool.pids
        records = pool.generate(jobs(16), durable=Durable(tmp_path / "log", lambda records: None))
        assert pool.num_replaced == 2 and pool.pids[1] == second and is_gone(first)
    whole, groups = drop_groups(records)
    (dropped,) = groups.values()
    assert {r.group for r in dropped} == {"s/0/0"} and {r.group for r in whole} == {"s/0/1"}
    stalls = read_stalls(tmp_path / STALLS)
    assert [(s.stage, s.action, len(s.uids)) for s in stalls] == [
        ("stream", "redispatched", 8),
        ("stream", "dropped", 8),
    ]
    assert stalls[0].pid == first and "submit" in open(stalls[0].stacks).read()  # noqa: SIM115


@pytest.mark.slow
def test_workers_that_lose_every_sample_are_an_error_that_names_them(cluster, tmp_path):
    trouble = Trouble("step", str(tmp_path / "tally"), times=99)
    with (
        open_pool(tmp_path, trouble, most_redispatches=0) as pool,
        pytest.raises(EngineError, match=r"all 8 samples .* rollout worker 0"),
    ):
        pool.generate(jobs(8), durable=Durable(tmp_path / "log", lambda records: None))


def test_a_worker_that_stops_while_it_takes_weights_is_replaced_by_one_that_has_them(cluster, tmp_path):
    trouble = Trouble("freeze", str(tmp_path / "tally"), times=1)
    weights = {"w": torch.ones(4)}
    with open_pool(tmp_path, trouble, publish_limit_s=2.0) as pool:
        (frozen,) = pool.pids
        pool.publish(weights, weights_digest(weights), 5)
        assert [(s.digest, s.weight_version) for s in pool.states()] == [(weights_digest(weights), 5)]
        assert is_gone(frozen) and pool.num_replaced == 1
        (stall,) = pool.stalls
        assert (stall.stage, stall.pid, stall.action) == ("publish", frozen, "replaced")


def test_a_pool_whose_workers_are_stopped_closes_within_its_time_and_leaves_no_process(cluster, tmp_path):
    pool = open_pool(tmp_path, None)
    (pid,) = pool.pids
    os.kill(pid, 19)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 60 and is_gone(pid)


def test_a_process_of_another_machine_is_ended_there(cluster):
    """This machine under another name: the order travels through the cluster to the node it names."""
    import ray

    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    node = ray.get_runtime_context().get_node_id()
    os.kill(victim.pid, 19)
    end_process(Place("elsewhere", victim.pid, node, ray_mailbox._began(victim.pid)))
    assert victim.wait(timeout=20) < 0
    end_process(Place(socket.gethostname(), os.getpid(), node, began=1.0))  # the number is another's by now
