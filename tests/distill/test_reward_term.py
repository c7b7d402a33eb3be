"""Reward beside the KL: advantages by hand, the gradient against fp64, and denominators that stay apart."""

from dataclasses import replace

import pytest
import torch
from small_teachers import model, phase, record, registry_of, samples, side
from small_trainer import GradientKeeper

from consilience.distill.reward_term import RewardSettings, RewardTerm, advantages, episode_of
from consilience.rollout.records import Outcome, OutcomeKind

torch.set_num_threads(1)

ON = RewardSettings(weight=2.0)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {"code": 1, "math": 2})


def rewarded(rewards, teachers=None, logprob=None):
    """Samples of one group with these rewards, their tokens drawn by the student of seed 0."""
    made = samples(0, teachers or ["math"] * len(rewards))
    found = []
    for r, reward in zip(made, rewards, strict=True):
        ids = torch.tensor([r.prompt_ids + r.token_ids])
        with torch.no_grad():
            student = model()
            logp = student.head(student.hidden(ids))[0].log_softmax(-1)
        at = range(2, 2 + len(r.token_ids))
        own = [float(logp[t, ids[0, t + 1]]) for t in at] if logprob is None else [logprob] * len(at)
        found.append(replace(r, group="g", reward=reward, logprobs=tuple(own)))
    return found


def test_advantages_are_rewards_above_the_mean_of_the_group_streams_counted_once():
    made = [
        replace(record(uid, "math", (5, 6)), group=uid[0], reward=reward)
        for uid, reward in [("a/0", 1.0), ("a/1", 0.0), ("a/2", 0.0), ("b/0", 1.0), ("b/1", 1.0), ("c", 3.0)]
    ]
    made.append(replace(made[0], uid="a/0@0"))
    failed = replace(made[0], uid="a/3", reward=9.0, outcome=Outcome(OutcomeKind.FAILED))
    found = advantages([*made, failed, replace(made[0], uid="a/4", reward=None)])
    assert found == pytest.approx({"a/0": 2 / 3, "a/1": -1 / 3, "a/2": -1 / 3})
    assert (episode_of("a/0@0@math"), episode_of("a/0")) == ("a/0", "a/0")


@pytest.mark.parametrize("logprob", [None, -3.0])  # on policy, and so far off that the clip binds
def test_the_gradient_is_that_of_its_definition_in_fp64(registry, tmp_path, logprob):
    records = rewarded([1.0, 0.0, 0.5], logprob=logprob)
    grads = {}
    for weight in (0.0, 2.0):
        engine = GradientKeeper(model())
        report = phase(
            engine,
            records,
            side(registry, tmp_path / str(weight)),
            mini_batches=1,
            reward=RewardSettings(weight),
        )
        grads[weight] = engine.steps[0]
    assert report["reward_mean"] == 0.5 and report["no_advantage_share"] == 0
    student = model().double()
    loss = 0.0
    for r, A in zip(records, (0.5, -0.5, 0.0)):
        ids = torch.tensor([r.prompt_ids + r.token_ids])
        logp = student.head(student.hidden(ids))[0].log_softmax(-1)
        own = logp[torch.arange(2, 2 + len(r.token_ids)), ids[0, 3:]]
        ratio = (own - torch.tensor(r.logprobs, dtype=torch.float64)).exp()
        loss = loss - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean() / 3
    (2.0 * loss).backward()
    assert report["policy_loss"] == pytest.approx(2.0 * float(loss.detach()), rel=1e-3, abs=1e-5)
    assert (report["policy_clip_share"] > 0) == (logprob is not None)
    for name, parameter in student.named_parameters():
        if parameter.grad is None or name not in grads[2.0]:
            continue
        found = grads[2.0][name] - grads[0.0][name]  # fp32 sums of two terms against fp64
        scale = float(parameter.grad.abs().max()) + float(grads[0.0][name].abs().max())
        assert float((found - parameter.grad.float()).abs().max()) <= 2e-4 * scale + 1e-7, name


def test_neither_term_dilutes_the_other_and_samples_without_a_reward_are_distilled(registry, tmp_path):
    term = RewardTerm(rewarded([1.0, 0.0, None, None]), ON)
    records = rewarded([1.0, 0.0, None, None])
    term.begin(records)
    arrays = term.arrays(records)["advantage"]
    assert [row[0] for row in arrays] == pytest.approx([2 / 2 * 0.5 / 6, -2 / 2 * 0.5 / 7, 0, 0])
    term.begin(records[2:])  # a mini-batch in which nobody has an advantage
    assert {value for row in term.arrays(records[2:])["advantage"] for value in row} == {0.0}
    report = phase(GradientKeeper(model()), records[2:], side(registry, tmp_path), mini_batches=1, reward=ON)
    assert report["policy_loss"] == 0 and report["kl"]["math"] > 0 and report["no_advantage_share"] == 1


def test_a_sample_with_several_teachers_has_its_reward_once(registry, tmp_path):
    found = {}
    for name, teachers in {"one": ["math"] * 2, "two": ["math+code"] * 2}.items():
        records = rewarded([1.0, 0.0], teachers)
        report = phase(
            GradientKeeper(model()), records, side(registry, tmp_path / name), mini_batches=1, reward=ON
        )
        found[name] = report["policy_loss"]
    assert found["two"] == pytest.approx(found["one"], rel=1e-5, abs=1e-7)


def test_cutting_the_mini_batch_changes_no_gradient(registry, tmp_path):
    records, found = rewarded([1.0, 0.0, 0.25, 0.75]), []
    for i, cut in enumerate(({}, {"row_tokens": 32, "micro_tokens": 32})):
        engine = GradientKeeper(model())
        phase(engine, records, side(registry, tmp_path / str(i)), mini_batches=1, reward=ON, **cut)
        found += engine.steps
    for name in found[0]:  # fp32 sums in another order
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_stale_rollout_is_distilled_under_the_current_student(registry, tmp_path):
    """The KL is computed anew from stored states: who sampled, when, how probable it was does not enter."""
    fresh = samples()
    stale = [
        replace(r, weight_version=(-7,) * len(r.token_ids), logprobs=(-9.0,) * len(r.token_ids))
        for r in fresh
    ]
    engines = [GradientKeeper(model(5)), GradientKeeper(model(5))]
    reports = [
        phase(e, records, side(registry, tmp_path / str(i)), mini_batches=1)
        for i, (e, records) in enumerate(zip(engines, (fresh, stale)))
    ]
    assert reports[0]["kl"] == reports[1]["kl"]
    a, b = (engine.steps[0] for engine in engines)
    assert all(torch.equal(a[name], b[name]) for name in a)
