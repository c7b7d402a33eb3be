"""The GRPO stage for real: Ray workers that sample ahead on the native engine, with boxes and graders."""

import pytest
import torch

from consilience.cli import supervised_stages as supervised
from consilience.cli.grpo_stage import run_grpo
from consilience.cli.ray_session import close_session
from consilience.cli.stage import StageContext
from consilience.conf.errors import ConfigError
from consilience.conf.load import from_plain
from consilience.training.metrics import read_metrics
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests.small_stage import MODEL, SHORT

torch.set_num_threads(1)

PLAIN = {
    "task": {"domains": {"agent": {"kind": "agent", "max_tokens": 60}}, "vocab_size": 300},
    "model": MODEL,
    "engine": {"threads": 1, "device": "cpu"},
    "log": {"wandb": "disabled"},
    "base": {**SHORT, "episodes": 2, "prompt_weight": 0.1},
    "sft": SHORT,
    "rollout": {"num_workers": 2, "max_batch": 8},
}
GRPO = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "lr": 1e-3}


def context(cfg, root, name, domain=None, inputs=None):
    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    return StageContext(name, domain, cfg, folder, run, inputs or {}, SilentProgress())


@pytest.mark.timeout(400)
def test_a_stage_that_samples_ahead_trains_on_every_sample_at_a_bounded_age(tmp_path):
    base = supervised.run_base(context(from_plain(PLAIN), tmp_path, "base"))
    grpo = {**GRPO, "mode": "async", "max_age": 2, "state_on_publish": "recompute"}
    grpo["init"] = str(tmp_path / base["checkpoint"])
    stage = context(from_plain({**PLAIN, "grpo": grpo}), tmp_path, "grpo/agent", "agent")
    try:
        result = run_grpo(stage)
    finally:
        close_session()
    rows = read_metrics(stage.folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["age_max"] <= 2 for row in rows)
    assert sum(sum(row["tokens_by_version"].values()) for row in rows) == result["sampled_tokens"] > 0
    assert sum(result["sandbox"].values()) == 12 and "wait" in result["time"]["phases"]
    assert all(row["failed"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("grpo", "what"), [({"mode": "later"}, "grpo.mode"), ({"max_age": -1}, "grpo.max_age")]
)
def test_modes_and_ages_that_do_not_exist_are_refused(grpo, what):
    with pytest.raises(ConfigError, match=what):
        from_plain({**PLAIN, "grpo": grpo})
