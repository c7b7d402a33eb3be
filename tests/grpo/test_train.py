"""GRPO's phase: the good gains probability, what was not sampled teaches nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from graded_records import PROMPT, engine_of, logprobs, record
from small_trainer import AHEAD, GradientKeeper, small_model

from consilience.conf.errors import EngineError
from consilience.grpo.advantage import Advantages, group_advantages
from consilience.grpo.train import (
    GrpoSettings,
    rollout_report,
    rollout_rows,
    train_phase,
)
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, UserTurn
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)


def phase(engine, records, **settings):
    advantages = group_advantages([r.reward for r in records], [r.group for r in records])
    return train_phase(engine, small_model(), records, advantages, GrpoSettings(10, **settings), 5)


def gradients(records, **settings):
    engine = GradientKeeper(small_model())
    report = phase(engine, records, **settings)
    return engine.steps, report


FOUR = [
    record("a", (5, 6, 1), 1.0),
    record("b", (7, 8, 9, 1), 0.0),
    record("c", (20, 21, 22, 23, 1), 1.0, group="h"),
    record("d", (30, 1), 0.0, group="h"),
]


def test_tokens_of_positive_advantage_gain_probability_and_the_others_lose():
    engine = engine_of()
    report = phase(engine, FOUR)
    assert engine.num_steps == 2 and report["train_tokens"] == sum(
        len(PROMPT) + len(r.token_ids) for r in FOUR
    )
    for r in FOUR:
        gain = sum(logprobs(engine.model, PROMPT, r.token_ids)) - sum(r.logprobs)
        assert gain * (r.reward - 0.5) > 0, r.uid


def test_the_mismatch_is_zero_where_the_log_probs_are_the_models_own_and_its_size_where_not():
    _, report = gradients(FOUR)
    assert 0 <= report["mismatch_max"] < 1e-4  # packed rows against single ones, fp32
    off = [replace(r, logprobs=tuple(x - 0.05 for x in r.logprobs)) for r in FOUR]
    assert gradients(off)[1]["mismatch_max"] == pytest.approx(0.05, abs=1e-4)


def test_log_probs_of_a_tempered_sampler_are_compared_at_its_temperature():
    def tempered(r):
        ids = torch.tensor([[*r.prompt_ids, *r.token_ids]])
        with torch.no_grad():
            logits = small_model().head(small_model().hidden(ids))[0].float() / 0.5
        logp = torch.log_softmax(logits, -1)
        first = len(r.prompt_ids)
        return replace(r, logprobs=tuple(float(logp[first + i - 1, t]) for i, t in enumerate(r.token_ids)))

    records = [tempered(r) for r in FOUR]
    assert gradients(records, temperature=0.5)[1]["mismatch_max"] < 1e-4
    assert gradients(records)[1]["mismatch_max"] > 1e-3


def test_the_prediction_block_follows_the_trunk_and_the_trunk_does_not_notice():
    """Five phases with and without its loss: parameters of the trunk equal to the bit, clipping included."""
    ends, losses = {}, []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        engine = TorchEngine(small_model(0, AHEAD), OptimizerSettings(lr=0.01, grad_clip=0.05))
        for _ in range(5):
            report = phase(engine, FOUR, mtp_weight=weight, warmup=0)
            losses += [report["mtp_loss"]] if weight else []
            assert ("mtp_loss" in report) == (weight > 0)
        ends[weight] = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    assert all(torch.equal(p, ends[3.0][n]) for n, p in ends[0.0].items() if not n.startswith("mtp."))
    assert not torch.equal(ends[0.0]["mtp.0.e_proj.weight"], ends[3.0]["mtp.0.e_proj.weight"])
    assert losses[-1] < losses[0]
    assert "mtp_loss" not in phase(engine_of(), FOUR)  # a model without blocks


def test_only_the_first_mini_batch_measures_the_mismatch():
    engine = engine_of(lr=0.05)
    report = phase(engine, FOUR, warmup=0)
    assert report["mismatch_max"] < 1e-4 < report["max_abs_log_ratio"]


@pytest.mark.parametrize("normalisation", ["episode", "turn"])
def test_a_conversation_split_by_user_turns_weighs_one_or_as_many_as_it_has(normalisation):
    """Against its streams as records of their own: at ratio 1 the gradient is linear in the advantage."""
    first, last = record("t@0", (5, 6, 1), 1.0), record("t", (7, 8, 9, 11, 1), 1.0, prompt=(3, 30, 31))
    columns = (first.prompt_ids, first.token_ids, first.logprobs, first.loss_mask, first.weight_version)
    talk = replace(last, earlier=(UserTurn(*columns),))
    other = record("o", (20, 1), 0.0)

    def gradient(records, advantages, **settings):
        engine, kept = GradientKeeper(small_model()), np.ones(len(records), bool)
        given = Advantages(np.array(advantages), kept, ~kept, 1, 0, 0)
        settings = GrpoSettings(10, mini_batches=1, kl_beta=0.0, mtp_weight=0.0, **settings)
        train_phase(engine, small_model(), records, given, settings, 5)
        return engine.steps[0]

    split = gradient([talk, other], [0.5, -0.5], normalisation=normalisation)
    scale = [3 / 8 * 3 / 2, 5 / 8 * 3 / 2, 3 / 2] if normalisation == "episode" else [1, 1, 1]
    apart = gradient([first, last, other], [0.5 * scale[0], 0.5 * scale[1], -0.5 * scale[2]])
    for name in apart:
        torch.testing.assert_close(split[name], apart[name], rtol=1e-3, atol=1e-6, msg=name)


def test_observations_get_no_gradient():
    """A last token that was not sampled is neither rewarded nor waited for: any other will do."""
    kept = record("b", (7, 8, 1), 0.0)
    seen, unseen = (record("a", (5, 6, last), 1.0, mask=(1, 1, 0)) for last in (11, 33))
    one, report = gradients([seen, kept], mini_batches=1)
    other, _ = gradients([unseen, kept], mini_batches=1)
    sampled, _ = gradients([record("a", (5, 6, 33), 1.0), kept], mini_batches=1)
    assert all(torch.allclose(one[0][n], other[0][n], atol=1e-7) for n in one[0])
    assert not torch.allclose(one[0]["head.weight"], sampled[0]["head.weight"], atol=1e-4)
    assert math.isfinite(report["mean_abs_log_ratio"])


def test_a_sampled_token_without_a_log_prob_is_an_error_before_any_parameter_changes():
    broken = replace(FOUR[0], logprobs=(math.nan, *FOUR[0].logprobs[1:]))
    engine = engine_of()
    with pytest.raises((ValueError, EngineError)):
        phase(engine, [broken, *FOUR[1:]], mini_batches=1)
    assert weights_digest(to_official(engine.model)) == weights_digest(to_official(small_model()))


def test_groups_without_signal_change_nothing_and_weigh_nothing():
    same = [record(f"s{i}", (5 + i, 1), 1.0, group="same") for i in range(3)]
    lost = [record("x", (12, 1), None, group="lost")]
    engine = engine_of()
    report = phase(engine, same + lost)
    assert engine.num_steps == 0 and report["train_tokens"] == 0
    assert weights_digest(to_official(engine.model)) == weights_digest(to_official(small_model()))
    alone, _ = gradients(FOUR, mini_batches=1)
    beside, _ = gradients(FOUR + same + lost, mini_batches=1)
    for name in alone[0]:
        torch.testing.assert_close(beside[0][name], alone[0][name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_mini_batch_divides_by_its_own_samples_however_it_is_cut():
    """At the sampler's own weights the mean of two half-size mini-batches is the whole one."""
    (whole,), _ = gradients(FOUR, mini_batches=1)
    halves, report = gradients(FOUR, mini_batches=2)
    (rows,), _ = gradients(FOUR, mini_batches=1, row_tokens=32, micro_tokens=32)
    assert len(halves) == 2 and report["masked_share"] == 0.0
    for name, gradient in whole.items():
        parts = [half.get(name, torch.zeros_like(gradient)) for half in halves]
        torch.testing.assert_close(sum(parts) / 2, gradient, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(rows[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_an_episode_longer_than_a_micro_batch_is_one_of_its_own():
    long = record("long", tuple(range(2, 40)) * 2, 1.0)
    (whole,), _ = gradients([long, *FOUR], mini_batches=1)
    (cut,), _ = gradients([long, *FOUR], mini_batches=1, row_tokens=32, micro_tokens=32)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-3, atol=1e-6, msg=name)


def test_fewer_kept_samples_than_mini_batches_take_fewer_steps():
    engine = engine_of()
    phase(engine, FOUR[:2], mini_batches=5)
    assert engine.num_steps == 2


def test_the_report_counts_what_was_lost():
    records = [*FOUR, replace(record("x", (12, 1), None, group="lost"), finish=FinishReason.LENGTH)]
    advantages = group_advantages([r.reward for r in records], [r.group for r in records])
    report = rollout_report(records, advantages)
    assert (report["reward"], report["correct"], report["failed"]) == (0.5, 0.5, 1.0)
    assert (report["truncated_share"], report["kept_samples"], report["groups"]) == (0.2, 4.0, 3.0)
    assert (report["tamper_rate"], report["infra_rate"]) == (0.0, 0.2)
    ends = [replace(FOUR[0], outcome=Outcome(kind)) for kind in (OutcomeKind.TAMPER, OutcomeKind.INFRA)]
    report = rollout_report([*FOUR[:2], *ends], advantages)
    assert (report["tamper_rate"], report["infra_rate"]) == (0.25, 0.25)


def test_the_table_shows_rollouts_spread_over_the_phase():
    advantages = group_advantages([r.reward for r in FOUR], [r.group for r in FOUR])

    def shown(num):
        return [row.uid for row in rollout_rows(FOUR, advantages, str, num)]

    assert (shown(2), shown(3), shown(99), shown(0)) == (["a", "c"], ["a", "c"], list("abcd"), [])
