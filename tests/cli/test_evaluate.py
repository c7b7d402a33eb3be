"""Evaluation's pure parts: which models, which jobs, which grades, and what V4's parts did."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from consilience.cli import evaluate
from consilience.conf.errors import RunError
from consilience.conf.load import from_plain
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.tasks.fake_domain import FakeDomain

torch.set_num_threads(1)


def context(tmp_path, inputs=None, **settings):
    cfg = from_plain({"task": {"domains": {"math": {"kind": "math"}}}, "evaluate": settings})
    return SimpleNamespace(cfg=cfg, inputs=inputs or {}, run=SimpleNamespace(path=tmp_path))


def record(problem, reward, *, domain="math", correct=None, tokens=(5, 6, 1)):
    n = len(tokens)
    return RolloutRecord(
        uid=f"{domain}/{problem}",
        group="g",
        domain=domain,
        effort="chat",
        teacher=None,
        prompt_ids=(3, 4),
        token_ids=tuple(tokens),
        logprobs=(-1.0,) * n,
        loss_mask=(1,) * n,
        weight_version=(0,) * n,
        finish=FinishReason.STOP,
        outcome=Outcome(OutcomeKind.GRADED if reward is not None else OutcomeKind.INFRA),
        reward=reward,
        reward_parts={} if correct is None else {"correct": correct},
        metadata={"problem": problem},
    )


def test_every_model_of_the_run_is_evaluated_under_its_name(tmp_path):
    inputs = {name: {"checkpoint": f"stages/{name}/c"} for name in ("base", "grpo/math", "distill")}
    found = evaluate.models_of(context(tmp_path, inputs | {"notes": {"text": "no model"}}))
    assert list(found) == ["base", "grpo/math", "student"]
    assert found["student"] == tmp_path / "stages/distill/c"


def test_a_named_checkpoint_is_evaluated_alone_and_none_at_all_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = evaluate.models_of(context(tmp_path, {"base": {"checkpoint": "x"}}, checkpoint=str(tmp_path)))
    assert found == {"checkpoint": tmp_path}
    with pytest.raises(RunError, match=r"evaluate\.checkpoint"):
        evaluate.models_of(context(tmp_path))


def test_models_and_temperatures_are_asked_the_same_test_problems_under_their_own_uids(tmp_path):
    cfg = context(tmp_path).cfg
    domains = {"fake": FakeDomain(), "more": FakeDomain("more", side=90)}
    asked = [evaluate._jobs(cfg, domains, m, t, 5) for m in ("base", "student") for t in (1.0, 0.0)]
    assert len({job.uid for jobs in asked for job in jobs}) == 4 * 10
    assert len({json.dumps([job.messages for job in jobs]) for jobs in asked}) == 1
    expected = {p.id for d in domains.values() for p in d.problems("test", 5)}
    assert {job.metadata["problem"] for job in asked[0]} == expected
    assert {job.sampling.temperature for job in asked[1]} == {0.0}


def test_all_jobs_are_asked_in_one_call_short_answers_first(tmp_path):
    cfg = context(tmp_path).cfg
    domains = {"long": FakeDomain("long"), "short": FakeDomain("short", side=90)}
    domains["long"].max_tokens, domains["short"].max_tokens = 90, 9
    asked = [evaluate._jobs(cfg, domains, "m", 1.0, 40), evaluate._jobs(cfg, domains, "m", 0.0, 8)]
    jobs = evaluate.short_first(asked)
    assert sorted(j.uid for j in jobs) == sorted(j.uid for each in asked for j in each)
    assert [j.domain for j in jobs] == ["short"] * 48 + ["long"] * 48


def test_grades_are_correctness_and_a_failed_grading_is_absent():
    records = [
        record("a", 0.5, correct=1.0),
        record("b", 1.0),
        record("c", None),
        record("a", 0.0, domain="code"),
    ]
    rows = evaluate._grade_rows("base", 0.0, records, {"math": None, "code": None, "agent": None})
    assert rows == [
        {"model": "base", "domain": "math", "temperature": 0.0, "grades": {"a": 1.0, "b": 1.0}},
        {"model": "base", "domain": "code", "temperature": 0.0, "grades": {"a": 0.0}},
        {"model": "base", "domain": "agent", "temperature": 0.0, "grades": {}},
    ]
    assert [evaluate._mean(row["grades"]) for row in rows[:2]] == [1.0, 0.0]
    assert math.isnan(evaluate._mean({}))


def test_grades_of_an_interrupted_evaluation_are_found_by_model(tmp_path):
    assert evaluate._read(tmp_path) == {}
    rows = [{"model": m, "domain": d, "grades": {}} for m in ("base", "student") for d in ("x", "y")]
    (tmp_path / evaluate.GRADES).write_text(json.dumps(rows))
    assert evaluate._read(tmp_path) == {"base": rows[:2], "student": rows[2:]}


def test_parts_that_acted_are_counted_on_the_longest_episodes():
    config = replace(
        TINY,
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 16),
        index_topk=4,
        n_routed_experts=4,
        moe_intermediate_size=8,
    )
    model = initialize(Transformer(config), 0)
    generator = torch.Generator().manual_seed(0)
    long = record("a", 1.0, tokens=torch.randint(40, (298,), generator=generator).tolist())
    found = evaluate.parts_that_acted(model, [record("b", 1.0), long, record("c", 1.0)], num=2)
    assert found["longest episode minus 255 tokens"] == 300 - 255
    assert all(value > 0 for value in found.values()), found
    short = evaluate.parts_that_acted(model, [record("b", 1.0)])
    assert short["CSA entries dropped by the indexer's top-k"] == 0
    assert short["longest episode minus 255 tokens"] == 5 - 255
