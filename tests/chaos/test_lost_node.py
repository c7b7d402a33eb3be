"""A node of the cluster is lost while its processes work: what they had to do is done by others, once."""

import os
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import ray
import torch

from consilience.cli import supervised_stages as supervised
from consilience.cli.rank_processes import on_ranks
from consilience.cli.ray_session import close_session, placement_of
from consilience.cli.stage import StageContext
from consilience.conf.errors import EngineError
from consilience.conf.load import from_plain
from consilience.rollout.deadlines import STALLS, read_stalls
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Durable
from consilience.rollout.ray_cluster import ray_cluster
from consilience.rollout.ray_placement import Needs, reserve
from consilience.rollout.ray_workers import RolloutPool
from consilience.training.metrics import read_metrics
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests.ray_nodes import nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FACTORY = "consilience.rollout.fake_worker:build_fake_worker"
SLOW = {"step_s": 0.05, "max_running": 8}
NEEDS = Needs(ranks=1, rank_cores=1, rank_gpus=0, workers=2, worker_cores=1, worker_gpus=0.0)


@pytest.fixture(autouse=True)
def by_value():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    torch.set_num_threads(1)


def jobs(num):
    content = ({"role": "user", "content": "?"},)
    return [
        RolloutJob(f"g{i // 4}/{i % 4}", f"g{i // 4}", "math", "chat", content, reward="x", sampling=s)
        for i, s in ((i, SamplingParams(seed=i)) for i in range(num))
    ]


def bare(records):
    """What a record says of its sample, less who made it and when."""
    return [(r.uid, r.token_ids, r.logprobs, r.loss_mask, r.weight_version, r.reward) for r in records]


def lose(cluster, node):
    """The end of one node, of which nobody is told."""
    raylet = next(n for n in cluster.worker_nodes if n.node_id == node)
    cluster.remove_node(raylet, allow_graceful=False)


def until_missed(node, limit_s=60.0):
    """Until the cluster has noticed."""
    end = time.monotonic() + limit_s
    while any(row["NodeID"] == node and row["Alive"] for row in ray.nodes()) and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.parametrize("is_placed", [False, True])
def test_samples_of_a_lost_node_are_drawn_by_others_each_once_as_undisturbed(is_placed, tmp_path):
    kept, lost = Counter(), []

    def lose_once(done, total, tokens):
        if not lost and 16 <= done < total:
            lost.append(pool.nodes[1])
            lose(cluster, lost[0])

    with nodes(1, 1, 2) as cluster, ray_cluster():
        place = reserve(NEEDS, is_colocated=False, spread=True, limit_s=30) if is_placed else None
        seats = place.workers if place else ()
        with RolloutPool(2, FACTORY, SLOW, seats=seats) as pool:
            undisturbed = bare(pool.generate(jobs(96)))
            before = list(pool.nodes)
            durable = Durable(tmp_path / "log", lambda records: kept.update(r.uid for r in records))
            records = pool.generate(jobs(96), lose_once, durable=durable)
            assert len(set(before)) == 2 and lost == before[1:]
            assert pool.num_replaced == 1 and pool.nodes[0] == before[0] and pool.nodes[1] != lost[0]
    assert bare(records) == undisturbed
    assert kept == Counter(job.uid for job in jobs(96))
    assert sum("resumed_at" in r.metadata for r in records) > 0, "some went on from their tokens"


PLAIN = {
    "task": {"domains": {"code": {"kind": "code"}}, "vocab_size": 300},
    "model": {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 2, "compress_ratios": [0, 4]},
    "engine": {"threads": 2, "device": "cpu", "ranks": 2, "checkpoint_s": 0.0},
    "log": {"wandb": "disabled"},
    "base": {"steps": 3, "tokens_per_step": 300, "row_tokens": 128, "num_examples": 6, "warmup": 1},
}


class Losing(SilentProgress):
    """Loses the node of rank 1 after the first step."""

    def __init__(self, lose):
        super().__init__()
        self.lose = lose

    def advance(self, n=1, **info):
        super().advance(n, **info)
        if self.done == 1 and self.lose is not None:
            lose, self.lose = self.lose, None
            lose()


def lose_second(cluster, place):
    """The end of rank 1's node; a real step takes longer than the cluster to notice."""
    node = place.nodes(place.trainer)[1]
    lose(cluster, node)
    until_missed(node)


def test_a_rank_of_a_lost_node_goes_on_elsewhere_from_the_last_checkpoint(tmp_path):
    digests = []
    with nodes(1, 1, 1) as cluster:
        cfg = from_plain(PLAIN | {"cluster": {"address": os.environ["RAY_ADDRESS"], "placement": "apart"}})
        once = replace(cfg, cluster=replace(cfg.cluster, rank_restarts=0))
        try:
            for name, is_lost in (("whole", False), ("lost", True)):
                run = RunFolder(tmp_path / name)
                folder, progress = run.stage("base").create(), SilentProgress()
                if is_lost:
                    place = placement_of(cfg, samples=False)
                    progress = Losing(partial(lose_second, cluster, place))
                stage = StageContext("base", None, cfg, folder, run, {}, progress)
                digests.append(on_ranks(supervised.run_base, stage)["digest"])
                assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3]
            (stall,) = read_stalls(tmp_path / "lost" / STALLS)
            assert stall.stage == "death" and stall.actor.startswith("rank 1 of 2 (process")
            assert digests[0] == digests[1]
            lose_second(cluster, place)  # now there is no room left
            short = replace(once, cluster=replace(once.cluster, placement_limit_s=2.0))
            with pytest.raises(EngineError, match=r"cannot hold 2 ranks .* it has 1 nodes"):
                on_ranks(supervised.run_base, replace(stage, cfg=short, progress=SilentProgress()))
        finally:
            close_session()
