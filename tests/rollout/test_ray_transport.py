"""Weights through every transport to real actors: what arrives, what a damaged delivery says, who is late."""

import contextlib
import os
import signal
import socket

import pytest
import torch

from consilience.conf.errors import ConfigError, EngineError, WeightsRefused
from consilience.rollout import ray_transport
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.publishing import announce, tensor_records
from consilience.rollout.ray_transport import (
    ObjectStoreTransport,
    SharedMemoryTransport,
    choose_transport,
)
from consilience.rollout.ray_workers import RolloutPool, ray_cluster

FACTORY = "consilience.rollout.fake_worker:build_fake_worker"
PROMPTS = ((1, 2, 3),)


def weights(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(300, 70, generator=g), "b": torch.randn(3, generator=g).to(torch.bfloat16)}


def jobs(num):
    message = ({"role": "user", "content": "x"},)
    return [
        RolloutJob(f"j/{i}", f"g{i}", "math", "chat", message, sampling=SamplingParams(seed=i))
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(3, object_store_bytes=100 << 20) as cluster:
        yield cluster


@pytest.mark.parametrize("transport", ["shared_memory", "object_store", "broadcast"])
def test_every_worker_gets_every_version_damage_is_named_and_a_replaced_worker_catches_up(cluster, transport):
    with RolloutPool(2, FACTORY, {"step_s": 0.005, "max_running": 4}, transport=transport) as pool:
        assert pool.transport == transport
        for version in range(2):
            pool.publish(weights(version), announce(weights(version), version), version)
            expected = tensor_records(weights(version))
            assert [e.tensors for e in pool.evidence(PROMPTS, True).values()] == [expected] * 2
        moved = weights(1)
        moved["w"][7, 7] += 1
        with pytest.raises(WeightsRefused, match=r"version 2: tensor w: found float32 \[300, 70\]"):
            pool.publish(moved, announce(weights(1), 2), 2)
        assert [s.weight_version for s in pool.states()] == [1, 1]  # the old ones stay

        killed = []

        def kill_once(done, total, tokens):
            if not killed:
                killed.append(pool.pids[0])
                os.kill(pool.pids[0], signal.SIGKILL)

        records = pool.generate(jobs(24), kill_once)
        assert pool.num_replaced == 1 and {v for r in records for v in r.weight_version} == {1}
        assert [e.tensors for e in pool.evidence(PROMPTS, True).values()] == [expected] * 2
        pool.publish(weights(5), announce(weights(5), 5), 5)  # a broadcast forms a new group
        assert [s.weight_version for s in pool.states()] == [5, 5]


def test_a_worker_that_dies_while_a_broadcast_is_under_way_is_replaced_and_the_others_catch_up(cluster):
    with RolloutPool(2, FACTORY, transport="broadcast") as pool:
        with pytest.raises(WeightsRefused, match="tensor b: found nothing"):
            pool.publish({"w": weights(0)["w"]}, announce(weights(0), 0), 0)
        pool._transport._timeout_s = 5.0  # pyright: ignore[reportAttributeAccessIssue]
        pool.publish(weights(0), announce(weights(0), 0), 0)
        os.kill(pool.pids[1], signal.SIGKILL)
        pool.publish(weights(1), announce(weights(1), 1), 1)
        assert pool.num_replaced == 1 and [s.weight_version for s in pool.states()] == [1, 1]


class Answer:
    def __init__(self, value):
        self.remote = lambda *_: value


class Actor:
    """A worker that maps what it is given, or says why not."""

    def __init__(self, fault=""):
        self.can_map = Answer(fault)


def test_auto_takes_shared_memory_where_every_worker_can_map_it_and_says_why_not():
    here = socket.gethostname()
    good, bad = Actor(), Actor("cannot reach the weights of process 7")

    def chosen(wanted, actors, hosts):
        return choose_transport(wanted, actors, hosts, lambda answer: answer)

    assert isinstance(chosen("auto", [good, good], [here, here]), SharedMemoryTransport)
    for actors, hosts in (([good, bad], [here, here]), ([good, good], [here, "elsewhere"])):
        assert isinstance(chosen("auto", actors, hosts), ObjectStoreTransport)
    with pytest.raises(ConfigError, match="worker 1: cannot reach the weights of process 7; take auto"):
        chosen("shared_memory", [good, bad], [here, here])
    with pytest.raises(ConfigError, match="worker 1 runs on elsewhere"):
        chosen("shared_memory", [good, good], [here, "elsewhere"])
    with pytest.raises(ConfigError, match="allowed: auto"):
        chosen("pigeon", [good], [here])


def test_without_memory_for_a_segment_auto_takes_the_object_store(monkeypatch):
    def none_left(*_):
        raise EngineError("no shared memory for 128 bytes")

    monkeypatch.setattr(ray_transport, "SharedSegment", none_left)
    found = choose_transport("auto", [Actor()], [socket.gethostname()], lambda answer: answer)
    assert isinstance(found, ObjectStoreTransport)


def test_a_segment_lives_as_long_as_its_shipment():
    shipment = SharedMemoryTransport().ship(weights(0), announce(weights(0), 0), [])
    path = f"/proc/self/fd/{shipment.payload.descriptor}"
    assert "consilience-weights" in os.readlink(path)
    assert shipment.again(socket.gethostname()) == shipment.payload
    del shipment
    with contextlib.suppress(OSError):  # the number may serve another file by now
        assert "consilience-weights" not in os.readlink(path)
