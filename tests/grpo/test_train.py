"""GRPO: the good gains probability, what was not sampled teaches nothing, nothing is sampled twice."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_trainer import AHEAD, GradientKeeper, small_model

from consilience.conf.errors import EngineError
from consilience.grpo.advantage import Advantages, group_advantages
from consilience.grpo.train import (
    GrpoSettings,
    GrpoStage,
    publish,
    rollout_report,
    rollout_rows,
    train_grpo,
    train_phase,
)
from consilience.model.checkpoint import load_official, to_official
from consilience.model.digest import weights_digest
from consilience.rollout.phase_health import HEALTH
from consilience.rollout.publishing import verify
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord, UserTurn
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

META = CheckpointMeta(stage="grpo", seed=3, step=0, special_tokens={"<bos>": 0})
PROMPT = (3, 9, 17, 18)
GRADED = Outcome(OutcomeKind.GRADED)


def engine_of(seed=0, lr=3e-3):
    return TorchEngine(small_model(seed), OptimizerSettings(lr=lr, weight_decay=0.0))


@torch.no_grad()
def logprobs(policy, prompt, tokens):
    """[N] log-probability of each token after the prompt, through plain logits."""
    ids = torch.tensor([[*prompt, *tokens]])
    logp = torch.log_softmax(policy.head(policy.hidden(ids))[0].float(), -1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logp[places, ids[0, len(prompt) :]].tolist()


def record(uid, tokens, reward, *, group="g", mask=None, policy=None, prompt=PROMPT):
    """A record whose log-probs are the policy's own, and NaN where the token was not sampled."""
    mask = mask or (1,) * len(tokens)
    own = logprobs(policy or small_model(), prompt, tokens)
    return RolloutRecord(
        uid=uid,
        group=group,
        domain="math",
        effort="chat",
        teacher=None,
        prompt_ids=prompt,
        token_ids=tuple(tokens),
        logprobs=tuple(x if m else math.nan for x, m in zip(own, mask)),
        loss_mask=tuple(mask),
        weight_version=tuple(0 if m else -1 for m in mask),
        finish=FinishReason.STOP,
        outcome=GRADED if reward is not None else Outcome(OutcomeKind.INFRA, "box lost"),
        reward=reward,
        reward_parts={} if reward is None else {"correct": reward},
    )


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


def test_the_table_shows_rollouts_spread_over_the_phase():
    advantages = group_advantages([r.reward for r in FOUR], [r.group for r in FOUR])

    def shown(num):
        return [row.uid for row in rollout_rows(FOUR, advantages, str, num)]

    assert (shown(2), shown(3), shown(99), shown(0)) == (["a", "c"], ["a", "c"], list("abcd"), [])


class CountingSampler:
    """Answers every call with records sampled by the weights last published; counts the calls."""

    def __init__(self):
        self.calls, self.announced = [], []
        self.weights_model = small_model()

    def publish(self, weights, announced, version):
        verify(weights, announced)
        self.announced.append((announced.digest, version))
        load_official(self.weights_model, weights)

    def generate(self, jobs, on_progress=None, *, durable=None):
        step = int(jobs[0].uid.split("/")[0])
        self.calls.append(step)
        policy = self.weights_model
        records = [
            record(f"{step}/a", (5, 6 + step, 1), 1.0, policy=policy),
            record(f"{step}/b", (7, 8, 9, 1), 0.0, policy=policy),
        ]
        version = self.announced[-1][1]
        return [replace(r, weight_version=(version,) * len(r.token_ids)) for r in records]


class PowerCut(MemorySink):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def scalars(self, step, values):
        super().scalars(step, values)
        if step == self.at:
            raise KeyboardInterrupt


def jobs_ab(step):
    return [SimpleNamespace(uid=f"{step}/{name}") for name in "ab"]


def run(folder, sampler, *, seed=0, every_s=1e9, log=None, steps=4, warmup=2, jobs_of=jobs_ab):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer-source.json").write_text("{}")
    engine = engine_of(seed)
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer-source.json", META, every_s=every_s
    )
    start, cursor = checkpoints.resume()
    log = log or MemorySink()
    stage = GrpoStage(
        engine,
        small_model(),
        GrpoSettings(steps, warmup=warmup, seed=2),
        store=RolloutStore(folder / "rollouts"),
        decode=lambda ids: " ".join(map(str, ids)),
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(earlier=cursor.get("clock")),
        progress=SilentProgress(),
    )
    result = train_grpo(stage, sampler, jobs_of, start=start)
    return engine, log, result


def test_a_run_killed_after_sampling_reuses_the_records_and_ends_bit_for_bit_equal(tmp_path):
    whole, log, result = run(tmp_path / "whole", CountingSampler())
    first, second = CountingSampler(), CountingSampler()
    with pytest.raises(KeyboardInterrupt):  # checkpoints of 1 and 2 updates; phase 2 is sampled, not saved
        run(tmp_path / "cut", first, every_s=0.0, log=PowerCut(at=3))
    assert first.calls == [0, 1, 2]
    resumed, rest, again = run(tmp_path / "cut", second, seed=9)
    assert second.calls == [3]
    assert second.announced[0][1] == 2
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [row["reward"] for row in rest.rows] == [row["reward"] for row in log.rows[2:]]
    assert (again["train_tokens"], again["sampled_tokens"]) == (
        result["train_tokens"],
        result["sampled_tokens"],
    )


class LosingSampler(CountingSampler):
    """As before, and a group whose second sample lost its box; in step 1 there is nothing else."""

    def generate(self, jobs, on_progress=None, *, durable=None):
        found = super().generate(jobs)
        step = self.calls[-1]
        lost = replace(
            record(f"{step}/d", (5, 1), None, group="lost"), outcome=Outcome(OutcomeKind.LOST, "box gone")
        )
        own = [record(f"{step}/c", (5, 9, 1), 1.0, group="lost"), lost]
        return own + ([replace(r, group="lost") for r in found] if step == 1 else found)


def test_a_group_that_lost_an_environment_is_not_trained_on_counted_and_in_the_ledger(tmp_path):
    names = lambda step: [SimpleNamespace(uid=f"{step}/{name}") for name in "abcd"]
    losing, log, _ = run(tmp_path / "losing", LosingSampler(), steps=2, warmup=0, jobs_of=names)
    whole, _, _ = run(tmp_path / "whole", CountingSampler(), steps=1, warmup=0)
    assert losing.num_steps == whole.num_steps == 2
    a, b = losing.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [row["dropped_samples"] for row in log.rows] == [2.0, 4.0]
    assert [row["dropped_length"] for row in log.rows] == [2.5, 3.0]
    assert math.isnan(log.rows[1]["reward"]) and log.rows[0]["reward"] == 0.5
    RolloutStore(tmp_path / "losing" / "rollouts").ledger.check()


def test_the_loop_reports_curves_tables_and_a_mismatch_near_zero(tmp_path):
    sampler = CountingSampler()
    engine, log, result = run(tmp_path / "r", sampler, steps=2)
    assert result["mismatch_max"] < 1e-4
    for row in log.rows:  # the sampler's mismatch, at every step
        assert abs(row["sampler_kl_k1"]) < 1e-4 and 0 <= row["sampler_kl_k3"] < 1e-8
        assert row["sampler_gap_max"] == row["mismatch_max"] and row["sampler_out_of_bounds"] == 0.0
    assert len(log.rows) == 2
    assert result["curves"]["reward"] == [0.5, 0.5] and result["curves"]["clip_share"][0] == 0.0
    assert [version for _, version in sampler.announced] == [0, 1, 2]
    assert sampler.announced[-1][0] == weights_digest(to_official(engine.model))
    assert len({digest for digest, _ in sampler.announced}) == 3
    step, row = log.samples[0]
    assert (step, row.uid, row.prompt, row.advantage) == (1, "0/a", "3 9 17 18", 0.5)


def test_publish_records_and_announces_the_digest_of_the_weights_it_hands_over(tmp_path):
    handed = []

    class Sampler(CountingSampler):
        def publish(self, weights, announced, version):
            known = [p.digest for p in store.publications.publications]  # before a worker has them
            handed.append((weights, announced.digest, version, known))

    policy, store = small_model(4), RolloutStore(tmp_path, quantization="fp4")
    assert publish(Sampler(), policy, 7, store) == 7
    (weights, digest, version, known) = handed[0]
    assert known == [digest] and store.publications.trace(7).quantization == "fp4"
    assert digest == weights_digest(weights) == weights_digest(to_official(policy)) and version == 7
    assert torch.equal(weights["head.weight"], policy.head.weight)


class StallingSampler(CountingSampler):
    """In step 1 one of two groups never comes back from the workers."""

    def generate(self, jobs, on_progress=None, *, durable=None):
        records = super().generate(jobs, durable=durable)
        step = self.calls[-1]
        others = [replace(r, uid=r.uid + "2", group="other") for r in records]
        if step == 1:
            others[0] = replace(
                others[0], reward=None, metadata={"dropped": "9 s in 'tool'", "resumed_at": 4}
            )
        return [*records, *others]


def test_a_step_trains_on_the_groups_that_came_back_and_its_metrics_say_what_was_lost(tmp_path):
    names, log = ("a", "b", "a2", "b2"), MemorySink()
    store = RolloutStore(tmp_path / "rollouts")
    (tmp_path / "tokenizer").write_text("{}")
    engine = engine_of(0)
    stage = GrpoStage(
        engine,
        small_model(),
        GrpoSettings(3, seed=2),
        store=store,
        decode=str,
        checkpoints=StageCheckpoints(tmp_path / "checkpoints", engine, tmp_path / "tokenizer", META),
        log=log,
        clock=StageClock(),
        progress=SilentProgress(),
    )
    jobs_of = lambda step: [SimpleNamespace(uid=f"{step}/{name}") for name in names]
    train_grpo(stage, StallingSampler(), jobs_of)
    assert [row["kept_samples"] for row in log.rows] == [4.0, 2.0, 4.0]
    assert [row["dropped_samples"] for row in log.rows] == [0.0, 2.0, 0.0]
    assert [row["dropped_groups"] for row in log.rows] == [0.0, 1.0, 0.0]
    assert [(row["resumed_samples"], row["resumed_tokens"]) for row in log.rows] == [(0, 0), (1, 4), (0, 0)]
    assert set(HEALTH) <= set(log.rows[0]) and store.ledger.missing() == []
