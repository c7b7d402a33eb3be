"""Admission by age: no token is too old, no sample is dropped, and slow answers keep their place."""

import contextlib
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout.ahead import PhasesAhead, ages
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.frame_file import read_frames
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.local_streams import LocalStreams
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()
WEIGHTS = {"w": torch.arange(6.0)}
DIGEST = weights_digest(WEIGHTS)


def record(uid, versions):
    count = len(versions)
    return RolloutRecord(
        uid, uid, "math", "chat", None, (1,), (5,) * count, (-0.5,) * count, (1,) * count, tuple(versions),
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0,
    )  # fmt: skip


class Scripted:
    """Samples a token of each begun job a call, by the newest weights; lets a random few finish."""

    def __init__(self, rng):
        self.rng, self.version, self.jobs, self.most = rng, -1, {}, 0

    def publish(self, weights, digest, version):
        self.version = version

    def hand_over(self, jobs, durable):
        self.jobs |= {job.uid: ([], durable) for job in jobs}
        self.most = max(self.most, len(self.jobs))

    def hear(self):
        for uid, (versions, durable) in list(self.jobs.items()):
            versions.append(self.version)
            if self.rng.random() < 0.2:
                del self.jobs[uid]
                durable.keep([record(uid, versions)])


@pytest.mark.parametrize("max_age", [0, 1, 2, 5])
def test_whatever_finishes_when_no_token_is_too_old_and_every_job_is_in_its_own_step(tmp_path, max_age):
    seen_oldest = 0
    for seed in range(8):
        streams = Scripted(random.Random(seed))
        store = RolloutStore(tmp_path / str(seed))
        jobs_of = lambda step: [SimpleNamespace(uid=f"{step}/{i}") for i in range(4)]
        phases = PhasesAhead(store, streams, jobs_of, start=0, num_steps=9, max_age=max_age)
        for step in range(9):
            streams.publish({}, "", step)
            phases.admit(step)
            records = phases.take(step)
            assert [r.uid for r in records] == [f"{step}/{i}" for i in range(4)]
            assert min(ages(records, step)) >= 0 and max(ages(records, step)) <= max_age
            seen_oldest = max(seen_oldest, *ages(records, step))
            store.ledger.trained(step, [r.uid for r in records])
        store.ledger.check()
        assert streams.most <= 4 * (max_age + 1)
    assert seen_oldest == max_age  # the bound is used, so the test has power


def test_ages_count_sampled_tokens_only():
    mixed = replace(record("a", (3, 3, -1, 5)), loss_mask=(1, 1, 0, 1))
    assert ages([mixed, record("b", (4,))], 5) == {0: 1, 1: 1, 2: 2}
    assert ages([], 5) == {}


def test_what_an_earlier_attempt_has_is_neither_asked_for_again_nor_taken_out_of_order(tmp_path):
    jobs_of = lambda step: [SimpleNamespace(uid=f"{step}/{i}") for i in range(3)]
    store = RolloutStore(tmp_path)
    store.append("000001", [record(f"1/{i}", (0,)) for i in range(3)])
    store.ledger.issued(2, ["2/0", "2/1", "2/2"])
    partial = store.partial("000002")
    partial.add([record("2/1", (1,))])
    partial.close()
    streams = Scripted(random.Random(0))
    phases = PhasesAhead(RolloutStore(tmp_path), streams, jobs_of, start=0, num_steps=3, max_age=2)
    phases.admit(0)
    assert sorted(streams.jobs) == ["0/0", "0/1", "0/2", "2/0", "2/2"]
    taken = [[r.uid for r in phases.take(step)] for step in range(3)]
    assert taken == [[f"{step}/{i}" for i in range(3)] for step in range(3)]
    with pytest.raises(ValueError, match="max_age is -1"):
        PhasesAhead(store, streams, jobs_of, start=0, num_steps=3, max_age=-1)


LENGTHS = [1 + int(random.Random(i).expovariate(1 / 12)) for i in range(8 * 16)]


def long_jobs(step):
    """Answers of very different lengths, 16 a step, each length fixed by the job."""
    return [
        RolloutJob(
            f"{step}/{i}", f"{step}/{i}", "d", "chat", ({"role": "user", "content": "x"},), reward="x",
            max_tokens=400, sampling=SamplingParams(max_tokens=400, seed=16 * step + i),
        )
        for i in range(16)
    ]  # fmt: skip


@contextlib.contextmanager
def slow_worker(step_s=0.001, **engine):
    reply = lambda request, context: [70] * LENGTHS[request.sampling.seed] + [TOKENIZER.eos_id]
    engine = FakeRolloutEngine(reply, step_s=step_s, max_running=64, **engine)
    worker = RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.0)
    try:
        yield worker
    finally:
        worker.close()


@pytest.mark.parametrize(("max_age", "recompute"), [(0, False), (1, False), (3, False), (3, True)])
def test_a_slow_worker_delays_the_trainer_and_changes_neither_ages_nor_lengths(tmp_path, max_age, recompute):
    """Every step trains on its own jobs at their own lengths, though short ones were there long before."""
    oldest = {}
    with slow_worker() as worker, LocalStreams(worker, recompute=recompute) as streams:
        store = RolloutStore(tmp_path)
        phases = PhasesAhead(store, streams, long_jobs, start=0, num_steps=8, max_age=max_age)
        for step in range(8):
            streams.publish(WEIGHTS, DIGEST, step)
            phases.admit(step)
            records = phases.take(step)
            assert [r.num_sampled - 1 for r in records] == LENGTHS[16 * step : 16 * step + 16]
            oldest[step] = max(ages(records, step))
    assert max(oldest.values()) == max_age and all(oldest[step] <= step for step in oldest)
    events = [json.loads(payload) for payload in read_frames(tmp_path / "ledger.log").payloads]
    arrived = [uid for event in events if event["event"] == "stored" for uid in event["uids"]]
    step_0 = [LENGTHS[16 * int(step) + int(i)] for step, _, i in (u.partition("/") for u in arrived[:16])]
    if max_age:  # a trainer that takes what is ready first would see this in its first step
        assert sum(step_0) / 16 < 0.5 * sum(LENGTHS) / len(LENGTHS)


def test_workers_sample_the_next_step_while_the_trainer_is_busy(tmp_path):
    with slow_worker() as worker, LocalStreams(worker) as streams:
        phases = PhasesAhead(RolloutStore(tmp_path), streams, long_jobs, start=0, num_steps=8, max_age=1)
        streams.publish(WEIGHTS, DIGEST, 0)
        phases.admit(0)
        phases.take(0)
        before, patience = worker.state().sampled_tokens, time.monotonic() + 60
        streams.publish(WEIGHTS, DIGEST, 1)
        phases.admit(1)
        while worker.state().sampled_tokens < before + 16:  # and nobody listens to them
            assert time.monotonic() < patience
            time.sleep(0.001)
        phases.close()


def test_errors_of_the_worker_reach_the_trainer(tmp_path):
    with slow_worker(die_after=5) as worker, LocalStreams(worker) as streams:
        with pytest.raises(WeightsRefused):
            streams.publish(WEIGHTS, "0" * 64, 0)
        phases = PhasesAhead(RolloutStore(tmp_path), streams, long_jobs, start=0, num_steps=2, max_age=1)
        phases.admit(0)
        with pytest.raises(EngineError, match="died after 5 steps"):
            phases.take(0)
        phases.close()
