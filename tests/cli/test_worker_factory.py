"""The worker that runs build in their own process: engine, tokenizer and graders fit together."""

from dataclasses import replace

import pytest
import small_trainer
import torch

from consilience.cli.jobs import rollout_jobs
from consilience.cli.worker_factory import build_worker
from consilience.conf.errors import RewardError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.protocol import BOS, EFFORT_A, EFFORT_B
from consilience.rollout.records import OutcomeKind, RolloutRecord
from consilience.sandboxes.protocol import SandboxSpec
from consilience.tasks.fake_domain import FakeDomain

torch.set_num_threads(1)

CONFIG = replace(small_trainer.CONFIG, vocab_size=272)
REWARD = "consilience.rewards.exact_match:score"


def build(folder, reward=REWARD, family="official", max_length=64, config=CONFIG, **options):
    byte_tokenizer().save(folder / "tokenizer.json")
    return build_worker(
        model=config.to_json_dict(),
        tokenizer_path=str(folder / "tokenizer.json"),
        max_rows=4,
        max_length=max_length,
        sandbox=SandboxSpec(),
        warm=0,
        rewards=((reward, False),),
        reward_timeout_s=10.0,
        reward_processes=1,
        needs_boxes=False,
        family=family,
        **options,
    )


@pytest.fixture(autouse=True)
def gradients_stay_as_they_were():
    """A worker owns its process and switches gradients off in it; this process is shared with tests."""
    yield
    torch.set_grad_enabled(True)


def test_a_worker_samples_published_weights_grades_and_closes(tmp_path):
    worker = build(tmp_path)
    try:
        weights = to_official(small_trainer.small_model(3, CONFIG))
        worker.publish(weights, weights_digest(weights), 5)
        domain = FakeDomain("math")
        jobs = rollout_jobs(
            domain,
            domain.problems("train", 2),
            prefix="t/0",
            samples=1,
            temperature=1.0,
            run_seed=1,
        )
        records = worker.run(jobs)
        again = worker.run(jobs)
    finally:
        worker.close()
    assert [r.uid for r in records] == ["t/0/0/0", "t/0/1/0"]
    for r, repeated in zip(records, again, strict=True):
        assert r.outcome.kind is OutcomeKind.GRADED and r.reward in (0.0, 1.0)
        assert 1 <= r.num_sampled <= 16 and set(r.weight_version) == {5}
        assert all(x <= 0 for x in r.logprobs)
        assert r.token_ids == repeated.token_ids  # a sample is a function of its seed
    assert worker.sandboxes is None


def test_records_carry_experts_and_kept_sets_where_they_are_asked_for(tmp_path):
    config = replace(CONFIG, num_hash_layers=1)
    worker = build(tmp_path, config=config, records_routing=True)
    try:
        domain = FakeDomain("math")
        given = {"prefix": "t/0", "samples": 2, "temperature": 1.0, "run_seed": 1}
        jobs = rollout_jobs(domain, domain.problems("train", 1), **given, cut={"top_p": 0.5, "min_p": 0.01})
        records = worker.run(jobs)
    finally:
        worker.close()
    for r in records:
        experts = r.routing.experts()
        assert experts.shape == (len(r.prompt_ids) + len(r.token_ids), 1, 2)
        assert (experts[-1] == -1).all() and experts[:-1].min() >= 0 and experts.max() < 4
        sizes = r.kept.num_ids()
        assert sizes.min() >= 1 and sizes.max() < config.vocab_size
        assert RolloutRecord.from_json(r.to_json()) == r


@pytest.mark.parametrize(("family", "prefix"), [("preview", EFFORT_A), ("official", EFFORT_B)])
def test_prompts_are_those_of_the_checkpoint_s_family(tmp_path, family, prefix):
    worker = build(tmp_path, family=family, max_length=1024)
    try:
        domain = FakeDomain("math")
        domain.effort = "max"
        problems = domain.problems("train", 1)
        jobs = rollout_jobs(domain, problems, prefix="t/0", samples=1, temperature=1.0, run_seed=1)
        (record,) = worker.run(jobs)
    finally:
        worker.close()
    said = byte_tokenizer().decode(record.prompt_ids)
    assert said.startswith(BOS + prefix) and record.outcome.kind is OutcomeKind.GRADED


def test_a_reward_that_can_never_be_loaded_is_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(RewardError, match="nowhere"):
        build(tmp_path, reward="consilience.rewards.nowhere:score")


def test_workers_of_one_host_find_each_other_s_prompts(tmp_path):
    states = []
    for _ in range(2):
        prefixes = {"folder": str(tmp_path / "prefixes"), "window": "whole", "limit_bytes": 1 << 24}
        worker = build(tmp_path, max_length=1024, prefixes=prefixes)
        try:
            domain = FakeDomain("math")
            domain.effort = "max"  # a prompt of some hundred tokens
            problems = domain.problems("train", 1)
            worker.run(rollout_jobs(domain, problems, prefix="t/0", samples=2, temperature=1.0, run_seed=1))
            states.append(worker.state())
        finally:
            worker.close()
    assert [s.prefix_hits for s in states] == [0, 1]
    assert states[1].prefix_tokens == states[0].prefill_tokens - states[1].prefill_tokens > 100
