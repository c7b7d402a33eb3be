"""A training stage of the program on two processes: one result, resumed after a rank was killed."""

import functools
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from consilience.cli import supervised_stages as supervised
from consilience.cli.engines import build_engine
from consilience.cli.rank_processes import on_ranks
from consilience.cli.stage import StageContext
from consilience.conf.errors import CheckpointError, EngineError
from consilience.conf.load import from_plain
from consilience.model.checkpoint import to_official
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.checkpoint import load_checkpoint
from consilience.training.forward import hidden_at_loss
from consilience.training.metrics import read_metrics
from consilience.training.packing import split_micro_batches
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests import ranks_table
from tests.ranks_table import keep, off
from tests.small_stage import MODEL, SHORT
from tests.training.v4_ranks import CONFIG, SETTINGS, packed_rows

pytestmark = pytest.mark.row("base by the program", "torch")

torch.set_num_threads(1)

STAGE = SHORT | {"steps": 3}


def context(root, ranks, **engine):
    plain = {
        "task": {"domains": {"code": {"kind": "code"}}, "vocab_size": 300},
        "model": MODEL,
        "engine": {"threads": 1, "device": "cpu", "ranks": ranks, "checkpoint_s": 0.0, **engine},
        "optimizer": {"kind": "adamw", "eps": 1e-4},
        "log": {"wandb": "disabled"},
        "base": STAGE,
    }
    run = RunFolder(root)
    folder = run.stage("base").create()
    return StageContext("base", None, from_plain(plain), folder, run, {}, SilentProgress())


def killed_in_step(step, context):
    """The base stage; rank 1 is killed when the first step's checkpoint is there."""

    class Fatal(SilentProgress):
        def advance(self, n=1, **info):
            super().advance(n, **info)
            if self.done == step:
                os.kill(os.getpid(), signal.SIGKILL)

    if context.ranks.rank == 1:
        context = replace(context, progress=Fatal())
    return supervised.run_base(context)


def test_a_killed_rank_ends_the_stage_and_the_same_command_ends_where_one_process_does(tmp_path):
    whole = supervised.run_base(context(tmp_path / "one", 1))
    cut = context(tmp_path / "two", 2)
    with pytest.raises(EngineError, match=r"^rank 1 of 2 \(process \d+\) died without a word .*SIGKILL"):
        on_ranks(functools.partial(killed_in_step, 2), cut)
    first = [path.name for path in cut.folder.checkpoints.iterdir()]
    assert first and "step-000003" not in first
    with ranks_table.on(2):
        result = on_ranks(supervised.run_base, cut)
    assert result["train_tokens"] == whole["train_tokens"]
    assert [row["step"] for row in read_metrics(cut.folder.metrics)] == [1, 2, 3]
    ends = [tmp_path / "one" / whole["checkpoint"], tmp_path / "two" / result["checkpoint"]]
    assert_same_weights(*ends)


def assert_same_weights(*folders):
    one, two = (to_official(load_checkpoint(folder)[0]) for folder in folders)
    for name, value in one.items():
        # fp32 sums in another order; AdamW's eps keeps a gradient of rounding from being a step.
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
    keep(off(two, one))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "engine",
    [
        {"shard_state": True},
        {"kind": "deepspeed", "zero_stage": 1},
        {"kind": "deepspeed", "zero_stage": 2, "offload": True},
        {"kind": "deepspeed", "zero_stage": 3},
        {"kind": "fsdp", "recompute": ["block"]},
        {"expert_ranks": 2, "recompute": ["block"]},
    ],
)
@pytest.mark.row("base by the program", "{engine}")
def test_other_engines_end_where_one_process_does(engine, tmp_path):
    whole = supervised.run_base(context(tmp_path / "one", 1))
    two = context(tmp_path / "two", 2, **engine)
    with ranks_table.on(2):
        result = on_ranks(supervised.run_base, two)
    assert_same_weights(tmp_path / "one" / whole["checkpoint"], tmp_path / "two" / result["checkpoint"])
    kept = sorted(path.name for path in two.folder.checkpoints.iterdir())
    assert kept[-1] == "step-000003" and len(kept) > 1  # saved on the way too, by all ranks


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "fsdp"},
        {"kind": "deepspeed", "zero_stage": 3},
        {"expert_ranks": 2},
        {"expert_ranks": 2, "shard_state": True},
    ],
)
@pytest.mark.row("base by the program, resumed", "{engine}")
def test_a_stage_cut_over_two_ranks_goes_on_on_two_to_the_bit_and_on_one(engine, tmp_path):
    whole = on_ranks(supervised.run_base, context(tmp_path / "whole", 2, **engine))
    cut = context(tmp_path / "two", 2, **engine)
    with pytest.raises(EngineError, match="SIGKILL"):
        on_ranks(functools.partial(killed_in_step, 2), cut)
    assert not (cut.folder.checkpoints / "step-000003").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    with ranks_table.on(2):
        again = on_ranks(supervised.run_base, cut)
    alone = supervised.run_base(context(tmp_path / "one", 1))
    assert again["digest"] == whole["digest"]
    one = to_official(load_checkpoint(tmp_path / "one" / alone["checkpoint"])[0])
    for name, value in to_official(load_checkpoint(tmp_path / "two" / again["checkpoint"])[0]).items():
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-6, msg=name)
        keep(off(one[name], value))


def with_a_second_rank_that(fails, context):
    """One micro-batch a rank; in the second's, `fails` is called instead of the model."""
    model = initialize(Transformer(CONFIG), 0)
    engine = build_engine(context.cfg, model, replace(SETTINGS, kind="adamw"), context.ranks)

    def loss_fn(model, micro):
        if context.ranks.rank == 1:
            fails()
        return hidden_at_loss(model, micro).hidden.sum(), {}

    engine.forward_backward(loss_fn, split_micro_batches(packed_rows(), 160), {})
    return {}


def torn():
    raise CheckpointError("the second's own error")


CUT = [{"kind": "deepspeed", "zero_stage": 3}, {"kind": "fsdp"}, {"expert_ranks": 2}, {"context_ranks": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("engine", CUT)
@pytest.mark.row("one rank fails where others wait for it", "{engine}")
def test_what_one_rank_raises_where_others_wait_in_its_forward_is_said_at_once(engine, tmp_path):
    began = time.monotonic()
    with ranks_table.on(2), pytest.raises(CheckpointError, match=r"^rank 1 of 2: the second's own error"):
        on_ranks(functools.partial(with_a_second_rank_that, torn), context(tmp_path, 2, **engine))
    assert time.monotonic() - began < 60  # engine.rank_limit_s is 600


@pytest.mark.slow
@pytest.mark.parametrize("engine", CUT[:2])
@pytest.mark.row("one rank hangs where others wait for it", "{engine}")
def test_a_rank_that_hangs_where_others_wait_in_its_forward_is_named(engine, tmp_path):
    limited = context(tmp_path, 2, rank_limit_s=4.0, **engine)
    hangs = functools.partial(time.sleep, 100)
    with (
        ranks_table.on(2),
        pytest.raises(EngineError, match=r"^rank 1 of 2 \(process \d+\) kept the others waiting"),
    ):
        on_ranks(functools.partial(with_a_second_rank_that, hangs), limited)
