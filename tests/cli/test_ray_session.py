"""The cluster that stages in processes of their own share with the one that started them."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path

import pytest
import ray

from consilience.cli.graph import Graph
from consilience.cli.progress_display import ProgressLines
from consilience.cli.ray_session import close_session, rollout_pool, share_cluster
from consilience.cli.stage_process import warm_up
from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config, RolloutConfig
from consilience.model.dense import DenseConfig
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
