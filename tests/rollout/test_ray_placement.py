"""Bundles of the roles on a cluster of one machine; over several nodes: `test_ray_nodes.py`."""

import os
import time
from dataclasses import replace

import pytest
import ray

from consilience.conf.errors import EngineError
from consilience.rollout.ray_placement import Needs, reserve
from consilience.rollout.ray_workers import RolloutPool, ray_cluster

FACTORY = "consilience.rollout.fake_worker:build_fake_worker"
NEEDS = Needs(ranks=2, rank_cores=1, rank_gpus=0, workers=2, worker_cores=1, worker_gpus=0.0)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster(4, object_store_bytes=100 << 20) as cluster:
        yield cluster


def free_cores():
    return ray.available_resources().get("CPU", 0.0)


def until_free(cores, limit_s=10.0):
    end = time.monotonic() + limit_s
    while free_cores() != cores and time.monotonic() < end:
        time.sleep(0.05)
    return free_cores()


def test_roles_apart_have_bundles_of_their_own_and_successors_of_workers_the_same():
    place = reserve(NEEDS, is_colocated=False, spread=False, limit_s=20)
    try:
        assert len(place.trainer) == len(place.workers) == 2
        assert {s.group.id for s in place.trainer} != {s.group.id for s in place.workers}
        here = ray.get_runtime_context().get_node_id()
        assert place.nodes([*place.trainer, *place.workers]) == [here] * 4
        with RolloutPool(2, FACTORY, {}, seats=place.workers) as pool:
            assert pool.nodes == [here] * 2
            os.kill(first := pool.pids[0], 9)
            assert len(pool.states()) == 2 and pool.num_replaced == 1 and pool.pids[0] != first
    finally:
        place.release()
    assert until_free(4.0) == 4.0


def test_colocated_workers_are_in_the_bundles_of_the_ranks_in_turn():
    place = reserve(replace(NEEDS, ranks=1), is_colocated=True, spread=False, limit_s=20)
    try:
        assert [seat.bundle for seat in (*place.trainer, *place.workers)] == [0, 0, 0]
        assert len(place.groups) == 1 and [seat.cores for seat in place.workers] == [1, 1]
    finally:
        place.release()
    assert until_free(4.0) == 4.0


@pytest.mark.parametrize("is_colocated", [False, True])
def test_what_the_cluster_cannot_hold_is_refused_with_what_was_asked_and_what_is_there(is_colocated):
    many = replace(NEEDS, workers=7)
    with pytest.raises(EngineError, match=r"2 ranks of 1 cores .* 7 workers of 1 cores .* 1 nodes \(4 cores"):
        reserve(many, is_colocated=is_colocated, spread=True, limit_s=0.5)
    assert until_free(4.0) == 4.0
