"""Stages that start from a checkpoint, with the model cut over two processes: they end as in one."""

import pytest
import torch

from consilience.cli.grpo_stage import run_grpo
from consilience.cli.rank_processes import on_ranks
from consilience.cli.ray_session import close_session
from consilience.cli.stage import StageContext
from consilience.cli.supervised_stages import run_base, run_sft
from consilience.conf.errors import CheckpointError
from consilience.conf.load import from_plain
from consilience.model.checkpoint import to_official
from consilience.training.checkpoint import load_checkpoint
from consilience.training.metrics import read_metrics
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests import ranks_table
from tests.ranks_table import keep, off
from tests.small_stage import MODEL, SHORT

pytestmark = pytest.mark.row("start from a damaged checkpoint", "fsdp")

torch.set_num_threads(1)

PLAIN = {
    "task": {"domains": {"math": {"kind": "math", "max_tokens": 24}}, "vocab_size": 300},
    "model": MODEL,
    "optimizer": {"kind": "adamw", "eps": 1e-4},
    "log": {"wandb": "disabled"},
    "base": SHORT,
    "sft": SHORT,
    "rollout": {"num_workers": 1, "max_batch": 8, "max_length": 400},
}
ONE, CUT = {"kind": "torch"}, {"kind": "fsdp", "ranks": 2}


def stage(root, name, engine, **groups):
    engine = {"threads": 1, "device": "cpu", **engine}
    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    cfg = from_plain(PLAIN | {"engine": engine} | groups)
    domain = name.partition("/")[2] or None
    return StageContext(name, domain, cfg, folder, run, {}, SilentProgress())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return root / run_base(stage(root, "base", ONE))["checkpoint"]


def assert_same_end(run, name, tmp_path, **groups):
    """Weights and the metrics of training to 1e-5 of one process."""
    ends, rows = [], []
    for engine in (ONE, CUT):
        context = stage(tmp_path / engine["kind"], name, engine, **groups)
        if engine is CUT:
            with ranks_table.on(2):
                result = on_ranks(run, context)
        else:
            result = run(context)
        folder = tmp_path / engine["kind"] / result["checkpoint"]
        ends.append(to_official(load_checkpoint(folder)[0]))
        rows.append(read_metrics(context.folder.metrics))
    for weight, value in ends[0].items():
        # fp32 sums in another order; AdamW's eps keeps a gradient of rounding from being a step.
        torch.testing.assert_close(ends[1][weight], value, rtol=1e-5, atol=1e-6, msg=weight)
    keep(off(ends[1], ends[0]))
    for one, cut in zip(*rows, strict=True):
        assert cut["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    return rows[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("SFT by the program", "fsdp")
def test_a_cut_specialist_starts_from_the_base(base, tmp_path):
    assert_same_end(run_sft, "sft/math", tmp_path, sft=SHORT | {"init": str(base)})


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("GRPO by the program", "fsdp")
def test_grpo_with_model_and_reference_cut_has_the_update_of_one_process(base, tmp_path):
    # One phase: what a second one samples would hang on the last bits of the first one's update.
    grpo = {"steps": 1, "prompts_per_step": 4, "group_size": 4, "lr": 1e-3, "kl_beta": 0.1, "init": str(base)}
    (tmp_path / "ids.py").write_text(
        "def is_even(completion, *, prompt, metadata, sandbox):\n"
        "    return float(sum(completion.token_ids) % 2 == 0)\n"
    )
    math = PLAIN["task"]["domains"]["math"] | {"reward": f"{tmp_path / 'ids.py'}:is_even"}
    task = PLAIN["task"] | {"domains": {"math": math}}
    try:
        rows = assert_same_end(run_grpo, "grpo/math", tmp_path, grpo=grpo, task=task)
    finally:
        close_session()
    assert rows[0]["kept_samples"] > 0 and rows[0]["mean_kl"] > 0


@pytest.mark.slow
def test_a_damaged_start_ends_all_ranks_with_one_error(base, tmp_path):
    path = next(base.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with ranks_table.on(2), pytest.raises(CheckpointError, match="the files were changed or damaged"):
            on_ranks(run_sft, stage(tmp_path, "sft/math", CUT, sft=SHORT | {"init": str(base)}))
    finally:
        path.write_bytes(whole)
