"""The cluster that stages in processes of their own share with the one that started them."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path

import pytest
import ray

from consilience.cli.graph import Graph
from consilience.cli.grpo_stage import run_grpo
from consilience.cli.progress_display import ProgressLines
from consilience.cli.rank_processes import on_ranks
from consilience.cli.ray_session import close_session, rollout_pool, share_cluster
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import warm_up
from consilience.cli.supervised_stages import run_base
from consilience.conf.errors import ConfigError
from consilience.conf.load import from_plain
from consilience.conf.schema import Config, RolloutConfig
from consilience.model.dense import DenseConfig
from consilience.training.metrics import read_metrics
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder


def test_children_attach_to_this_process_s_cluster_and_leave_it_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    program = importlib.import_module("side_by_side_program")
    warm_up(program.LIGHT)
    nodes = program.stages(needs_workers="grpo", grpo_a=program.attaches, grpo_b=program.attaches)
    small = Config(rollout=RolloutConfig(num_workers=1, threads_per_worker=1))
    graph = Graph(RunFolder(tmp_path), nodes, ProgressLines(io.StringIO()))
    try:
        found = graph.run(slots=2, open_workers=lambda _, slots: share_cluster([small], slots))
        node = ray.get_runtime_context().get_node_id()
        for name in ("grpo/a", "grpo/b"):
            assert found[name] == {"is_ours": False, "node": node, "answer": True}
        assert share_cluster([small], 2).num_stages == 2, "there is room for every slot's workers"
        large = Config(rollout=RolloutConfig(num_workers=64, threads_per_worker=2))
        assert share_cluster([large], 2).num_stages == 1, "at least one stage samples"
    finally:
        close_session()
    assert not ray.is_initialized() and "RAY_ADDRESS" not in os.environ


def test_the_native_engine_is_not_asked_to_sample_from_a_dense_model(tmp_path):
    with pytest.raises(ConfigError, match=r"model of type qwen3; set rollout\.engine=vllm"):
        rollout_pool(Config(), DenseConfig({"model_type": "qwen3"}), tmp_path, {}, "official")


SHORT = {"steps": 1, "tokens_per_step": 300, "row_tokens": 128, "num_examples": 6, "warmup": 1}
PLAIN = {
    "task": {"domains": {"math": {"kind": "math", "max_tokens": 24}}, "vocab_size": 400},
    "model": {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 2, "compress_ratios": [0, 4]},
    "engine": {"threads": 1, "device": "cpu"},
    "log": {"wandb": "disabled"},
    "base": SHORT,
    "rollout": {"num_workers": 2, "max_batch": 8, "max_length": 400},
}


def stage_of(root, name, domain, **groups):
    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    return StageContext(name, domain, from_plain(PLAIN | groups), folder, run, {}, SilentProgress())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("experts", [1, 2])
def test_roles_that_take_turns_with_their_memory_end_with_the_bits_of_roles_that_do_not(experts, tmp_path):
    base = run_base(stage_of(tmp_path / "base", "base", None))
    grpo = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "lr": 1e-2}
    grpo["init"] = str(tmp_path / "base" / base["checkpoint"])
    ends = {}
    for placement in ("free", "colocated"):
        groups = {"grpo": grpo, "cluster": {"placement": placement}}
        groups["engine"] = PLAIN["engine"] | {"ranks": 2, "threads": 2, "expert_ranks": experts}
        stage = stage_of(tmp_path / placement, "grpo/math", "math", **groups)
        try:
            result = on_ranks(run_grpo, stage)
        finally:
            close_session()
        ends[placement] = result["digest"], result["sampled_tokens"]
        assert [row["step"] for row in read_metrics(stage.folder.metrics)] == [1, 2]
    assert ends["free"] == ends["colocated"]
