"""GRPO's stage: nothing is sampled twice, what was lost is counted, a cut run ends as an uncut one."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from graded_records import engine_of, record
from power_cut import PowerCut
from small_trainer import small_model

from consilience.grpo.train import GrpoSettings, GrpoStage, publish, train_grpo
from consilience.model.checkpoint import load_official, to_official
from consilience.model.digest import weights_digest
from consilience.rollout.phase_health import HEALTH
from consilience.rollout.publishing import verify
from consilience.rollout.records import Outcome, OutcomeKind
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock

torch.set_num_threads(1)

META = CheckpointMeta(stage="grpo", seed=3, step=0, special_tokens={"<bos>": 0})


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
    assert publish(Sampler(), to_official(policy), 7, store) == 7
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
