"""Distillation on 2 and 4 ranks ends where one process does: gradients, weights and reports to 1e-5."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import small_trainer
import torch
from graded_records import record
from small_trainer import small_model
from stage_ranks import (
    META,
    StageParts,
    assert_cut_same,
    assert_divided_same,
    assert_ranks_agree,
    assert_same,
)

from consilience.distill.train import DistillSettings, TeacherSide, train_distill
from consilience.model.ranks import ALONE
from consilience.rollout.publishing import verify
from consilience.rollout.store import RolloutStore
from consilience.teachers.heads import HeadCache
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import save_checkpoint
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("distillation", "torch")

torch.set_num_threads(1)

CONFIG = replace(small_trainer.AHEAD, initializer_range=0.2)  # teachers of two seeds really disagree
SEEDS = {"code": 1, "math": 2}
PART_BYTES = 5 << 10
"""A phase has 75 loss tokens, 14 of them of two teachers: 5696 bytes of states, at most 4160 a mini-batch."""
OWNERS = ("math", "code", "math", "code+math", "code", "math")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    (root / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    for name, seed in SEEDS.items():
        given = replace(META, domain=name)
        save_checkpoint(root / name, small_model(seed, CONFIG), root / "tokenizer.json", given)
    return root


def side(root, folder, ranks, budget=None):
    registry = TeacherRegistry([TeacherRecord(name, root / name, (name,)) for name in SEEDS], True)
    store = HiddenStore(folder, budget_bytes=budget, is_reader=not ranks.is_first)
    return TeacherSide(registry, TeacherScheduler(registry, load_model_teacher, store), store, HeadCache())


class RankSampler:
    def publish(self, weights, announced, version):
        verify(weights, announced)

    def generate(self, jobs, on_progress=None, *, durable=None):
        made = []
        for number, (job, owner) in enumerate(zip(jobs, OWNERS, strict=True)):
            generator = torch.Generator().manual_seed(100 * job.step + number)
            ids = torch.randint(2, 40, (5 + 3 * number,), generator=generator).tolist()
            made.append(replace(record(job.uid, ids, None), teacher=owner, domain=owner.split("+")[0]))
        return made


def jobs_of(step):
    return [SimpleNamespace(uid=f"{step}/{number}", step=step) for number in range(len(OWNERS))]


def distill(ranks, folder, root, balance="weights", budget=None, context=1, kind="torch"):
    parts = StageParts(small_model(0, CONFIG), ranks.with_context(context), folder, kind=kind)
    teachers = side(root, folder / "hidden", ranks, budget)
    result = train_distill(
        parts.engine,
        RankSampler() if ranks.is_first else None,
        jobs_of,
        teachers,
        DistillSettings(2, row_tokens=32, micro_tokens=32, warmup=0, balance=balance),
        store=RolloutStore(folder / "rollouts"),
        decode=str,
        start=parts.start,
        **parts.named(),
    )
    assert len(teachers.store) == 0
    left = parts.left()
    if ranks.is_first and budget is not None:
        assert [row["parts"] for row in left["rows"]] == [2, 2]
    shared = (
        "step",
        "train_tokens",
        "grad_norm",
        "lr",
        "kl",
        "kl_p99",
        "kl_max",
        "top1_agreement",
        "student_entropy",
        "mtp_loss",
    )
    rows = [{k: v for k, v in r.items() if k in shared or k.endswith("share")} for r in left["rows"]]
    samples = sorted((step, row.uid, row.kl) for step, row in parts.log.samples)
    return left | {"result": result, "rows": rows, "samples": samples}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("size", "balance", "budget", "context"),
    [
        (2, "weights", None, 1),
        (2, "update", None, 1),
        (4, "update", None, 1),
        (2, "weights", PART_BYTES, 1),
        (2, "weights", None, 2),
        (4, "update", None, 2),
    ],
)
def test_distillation_is_that_of_one_process(size, balance, budget, context, teachers, tmp_path):
    one = distill(ALONE, tmp_path / "one", teachers, balance)
    given = (tmp_path / "more", teachers, balance, budget, context)
    several = assert_ranks_agree(on_ranks(size, distill, *given, folder=tmp_path))
    assert len(one["gradients"]) == 4 and {"update_share", "loss_share"} <= one["rows"][0].keys()
    assert_same(several, one)
    assert not list((tmp_path / "more" / "hidden").iterdir())


def cut_distill(ranks, folder, root, kind, context):
    return distill(ranks, folder, root, "update", kind=kind, context=context)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("kind", "size", "context"), [("fsdp", 2, 1), ("zero3", 2, 1), ("fsdp", 4, 2)])
@pytest.mark.row("distillation, {context} a row", "{kind}")
def test_distillation_with_a_model_cut_over_ranks_is_that_of_one_process(
    kind, size, context, teachers, tmp_path
):
    one = distill(ALONE, tmp_path / "one", teachers, "update")
    given = (tmp_path / "more", teachers, kind, context)
    assert_cut_same(on_ranks(size, cut_distill, *given, folder=tmp_path), one)


def divided_distill(ranks, folder, root, context):
    return distill(ranks, folder, root, "update", context=context, kind="experts2")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("size", "context"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.row("distillation, {context} a row", "experts over 2 ranks")
def test_distillation_with_experts_divided_over_pairs_is_that_of_one_process(
    size, context, teachers, tmp_path
):
    one = distill(ALONE, tmp_path / "one", teachers, "update")
    given = (tmp_path / "more", teachers, context)
    assert_divided_same(on_ranks(size, divided_distill, *given, folder=tmp_path), one, 2)
