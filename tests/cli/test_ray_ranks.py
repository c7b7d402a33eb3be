"""Ranks as actors on two nodes of a cluster: the same program, errors, deaths and hangs as on one machine."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch

from consilience.cli import ray_ranks
from consilience.cli import supervised_stages as supervised
from consilience.cli.rank_processes import on_ranks
from consilience.cli.ray_session import close_session
from consilience.cli.stage import StageContext
from consilience.conf.errors import CheckpointError, ConfigError, EngineError
from consilience.conf.load import from_plain
from consilience.rollout.deadlines import STALLS, read_stalls
from consilience.rollout.ray_placement import require_shared
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests.ray_nodes import nodes

pytestmark = pytest.mark.slow


PLAIN = {
    "task": {"domains": {"code": {"kind": "code"}}, "vocab_size": 300},
    "model": {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 2, "compress_ratios": [0, 4]},
    "engine": {"threads": 2, "device": "cpu", "ranks": 2},
    "log": {"wandb": "disabled"},
    "base": {"steps": 2, "tokens_per_step": 300, "row_tokens": 128, "num_examples": 6, "warmup": 1},
}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with nodes(1, 1) as cluster:
        yield cluster
        close_session()


def context(root, limit_s=60.0, **cluster):
    plain = {
        "task": {"domains": {"fake": {"kind": "code"}}},
        "engine": {"ranks": 2, "rank_limit_s": limit_s, "device": "cpu", "threads": 1},
        "cluster": {"address": "auto", "placement": "apart", **cluster},
    }
    run = RunFolder(root)
    return StageContext(
        "sft/fake", "fake", from_plain(plain), run.stage("sft-fake"), run, {}, SilentProgress()
    )


def add_up(context):
    ranks = context.ranks
    ranks.sum_([value := torch.tensor([float(ranks.rank + 1)])])
    made = ranks.first(lambda: f"made by {ranks.rank}")
    node = ray.get_runtime_context().get_node_id()
    found = ranks.gather((os.getpid(), node, os.getcwd(), str(context.run.path), torch.get_num_threads()))
    return {"sum": float(value), "made": made, "found": found}


def test_the_other_rank_is_on_the_other_node_and_gone_when_the_stage_is_over(tmp_path):
    for _ in range(2):  # the process may open another group
        found = on_ranks(add_up, context(tmp_path))
        (pid, *one), (other, *two) = found["found"]
        assert found["sum"] == 3.0 and found["made"] == "made by 0"
        assert pid == os.getpid() and one[0] != two[0] and one[1:] == two[1:]
        assert not psutil.pid_exists(other) or psutil.Process(other).status() == "zombie"
    assert [path.name for path in tmp_path.iterdir()] in ([], ["stacks"])


def second_fails(context):
    if context.ranks.rank == 1:
        raise CheckpointError("step-000003/model.safetensors is torn; restore it")
    context.ranks.gather(1)


def second_is_killed(context):
    if context.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.ranks.gather(1)


def second_hangs(context):
    if context.ranks.rank == 1:
        time.sleep(60)
    context.ranks.gather(1)


def second_is_stopped(context):
    if context.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    context.ranks.sum_([torch.ones(1)])


def test_what_a_rank_on_another_node_raises_is_raised_with_its_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"^rank 1 of 2: step-000003/model.safetensors is torn"):
        on_ranks(second_fails, context(tmp_path))


def test_a_killed_rank_on_another_node_is_named(tmp_path):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"^rank 1 of 2 \(process \d+ on .*\) died without a word"):
        on_ranks(second_is_killed, context(tmp_path))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("run", [second_hangs, second_is_stopped])
def test_a_rank_that_hangs_on_another_node_is_named_with_the_stacks_of_all(run, tmp_path):
    with pytest.raises(EngineError, match=r"^rank 1 of 2 \(process \d+ on .*\) kept the others waiting"):
        on_ranks(run, context(tmp_path, limit_s=1.0))
    (stall,) = read_stalls(tmp_path / STALLS)
    written = {path: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert len(written) == 2 and run.__name__ in written[Path(stall.stacks)]


def test_a_machine_without_the_run_folder_is_one_clear_error(tmp_path):
    here = ray.get_runtime_context().get_node_id()
    nodes = [row["NodeID"] for row in ray.nodes()]
    require_shared(tmp_path, nodes)
    require_shared(tmp_path, [here], sees=lambda path: False)  # what is here needs no filesystem for it
    with pytest.raises(ConfigError, match=r"does not see the run folder .* all machines share"):
        require_shared(tmp_path, nodes, sees=lambda path: False)
    assert not list(tmp_path.iterdir())


def test_a_stage_on_two_nodes_ends_with_the_bits_of_two_ranks_on_one_machine(tmp_path):
    ends = []
    for name, placement in (("local", "free"), ("nodes", "apart")):
        plain = PLAIN | {"cluster": {"address": os.environ["RAY_ADDRESS"], "placement": placement}}
        run = RunFolder(tmp_path / name)
        folder = run.stage("base").create()
        stage = StageContext("base", None, from_plain(plain), folder, run, {}, SilentProgress())
        result = on_ranks(supervised.run_base, stage)
        ends.append(result["digest"])
    assert ends[0] == ends[1]


def test_a_port_in_use_is_one_clear_error_before_an_actor_is_asked_for(tmp_path):
    store = ray_ranks.open_store(None)
    with pytest.raises(EngineError, match=rf"^cluster.port is {store.port}, .* in use.* null for a free one"):
        on_ranks(add_up, context(tmp_path, port=store.port))


def test_more_ranks_than_the_cluster_holds_are_refused_with_what_is_there(tmp_path):
    three = context(tmp_path, placement_limit_s=1.0)
    three = replace(three, cfg=replace(three.cfg, engine=replace(three.cfg.engine, ranks=3)))
    with pytest.raises(EngineError, match=r"cannot hold 3 ranks of 1 cores .* 2 nodes \(1 cores"):
        on_ranks(add_up, three)
