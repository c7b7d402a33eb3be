"""Workers that sample ahead and die, freeze or hang, at any point: each sample is there once, none too old.

The processes are forked (`forked_streams.py`); `test_ray_streams.py` has the same over Ray.
"""

import os
import random
import signal
import threading
import time
from contextlib import closing, suppress

import pytest
import torch
from forked_streams import ForkedStreams

from consilience.conf.errors import EngineError
from consilience.model.digest import weights_digest
from consilience.rollout.ahead import PhasesAhead, ages
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.listening import WorkerDied
from consilience.rollout.pooled_streams import PooledStreams
from consilience.rollout.store import RolloutStore
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()
WEIGHTS = {"w": torch.arange(6.0)}
DIGEST = weights_digest(WEIGHTS)
GROUPS, GROUP = 4, 3


def length(request):
    return 1 + int(random.Random(request.sampling.seed).expovariate(1 / 12))


def builder(reply=lambda request: None, step_s=0.002, heartbeat_s=0.05):
    """A worker whose answers are a function of the seed; `reply` is called as each request begins."""

    def say(request, context):
        reply(request)
        return [70 + request.sampling.seed % 100] * length(request) + [TOKENIZER.eos_id]

    def build():
        engine = FakeRolloutEngine(say, step_s=step_s)
        return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.01, heartbeat_s=heartbeat_s)

    return build


def jobs_of(step):
    jobs = []
    for i in range(GROUPS * GROUP):
        group, sampling = f"s/{step}/{i // GROUP}", SamplingParams(max_tokens=400, seed=100 * step + i)
        messages = ({"role": "user", "content": "x"},)
        jobs.append(
            RolloutJob(
                f"{group}/{i % GROUP}", group, "d", "chat", messages, reward="x", max_tokens=400,
                sampling=sampling,
            )
        )  # fmt: skip
    return jobs


def expected(step):
    seeds = [100 * step + i for i in range(GROUPS * GROUP)]
    counts = [1 + int(random.Random(seed).expovariate(1 / 12)) for seed in seeds]
    return [(70 + seed % 100,) * n + (TOKENIZER.eos_id,) for seed, n in zip(seeds, counts)]


def run(folder, pool, num, max_age, disturb=lambda step: None, start=0):
    """The records of each step, all that a stage does but learn."""
    store, taken = RolloutStore(folder), []
    store.ledger.resumed(start)
    with PooledStreams(pool) as streams, closing(store.ledger):
        phases = PhasesAhead(store, streams, jobs_of, start=start, num_steps=num, max_age=max_age)
        with closing(phases):
            for step in range(start, num):
                streams.publish(WEIGHTS, DIGEST, step)
                phases.admit(step)
                disturb(step)
                taken.append(phases.take(step))
                assert all(0 <= age <= max_age for age in ages(taken[-1], step))
                store.ledger.trained(step, [r.uid for r in taken[-1]])
        store.ledger.check()
    return taken


def whole(taken):
    """Whether every step has each of its samples once, as undisturbed."""
    for step, records in enumerate(taken):
        assert [r.uid for r in records] == [job.uid for job in jobs_of(step)]
        assert [r.token_ids for r in records] == expected(step)
        for r in records:
            assert list(r.weight_version) == sorted(r.weight_version)
    return True


def send(pool, slot, number):
    with suppress(ProcessLookupError):
        os.kill(pool.processes[slot].pid, number)


def test_a_frozen_worker_is_missed_though_another_one_speaks_all_the_time(tmp_path):
    def freeze(step):
        if step == 0:
            send(pool, 0, signal.SIGSTOP)

    began = time.monotonic()
    with ForkedStreams(builder(), stall_s=3.0) as pool:
        assert whole(run(tmp_path, pool, 2, 1, freeze))
        assert [stall.stage for stall in pool.log.stalls] == ["stream"] and pool.num_replaced == 1
    assert time.monotonic() - began < 60  # it was for ever


def test_a_trainer_that_is_busy_for_longer_than_the_limit_replaces_nobody(tmp_path):
    with ForkedStreams(builder(), stall_s=2.0) as pool:
        assert whole(run(tmp_path, pool, 2, 1, lambda step: time.sleep(3.0)))
        assert (pool.num_replaced, pool.log.stalls) == (0, [])


def test_a_trainer_that_was_busy_gives_a_fresh_worker_no_more_time_than_others(tmp_path):
    store = RolloutStore(tmp_path)
    with ForkedStreams(builder()) as pool, PooledStreams(pool) as streams:
        streams.publish(WEIGHTS, DIGEST, 0)
        with closing(PhasesAhead(store, streams, jobs_of, start=0, num_steps=1, max_age=0)) as phases:
            phases.admit(0)
            time.sleep(1.0)
            send(pool, 0, signal.SIGKILL)
            streams.publish(WEIGHTS, DIGEST, 0)
            streams.hear()
            assert pool.num_replaced == 1
            assert all(share.heard_at <= time.monotonic() for share in streams._shares)
            assert [r.uid for r in phases.take(0)] == [job.uid for job in jobs_of(0)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_ends_while_it_is_given_weights_is_replaced_and_loses_nothing(tmp_path, number):
    class Ending(ForkedStreams):
        def publish(self, weights, announced, version):
            if version == 2:
                send(self, 1, number)
            super().publish(weights, announced, version)

    with Ending(builder(step_s=0.005), publish_limit_s=3.0) as pool:
        taken = run(tmp_path, pool, 5, 2)
        assert whole(taken) and pool.num_replaced == 1
        assert [s.stage for s in pool.log.stalls] == (["publish"] if number == signal.SIGSTOP else [])
    assert any("resumed_at" in r.metadata for records in taken for r in records)


def test_a_worker_that_dies_before_it_has_a_stream_is_replaced_in_turn(tmp_path):
    class Late(ForkedStreams):
        left = 2

        def open(self, slot, recompute):
            if self.left and slot == 0:
                self.left -= 1
                raise WorkerDied("it was killed just now")
            return super().open(slot, recompute)

    with Late(builder()) as pool:
        assert whole(run(tmp_path, pool, 2, 1)) and pool.num_replaced == 2
    with Late(builder(), max_restarts=1) as pool, pytest.raises(EngineError, match="2 deaths in one step"):
        run(tmp_path / "again", pool, 2, 1)


def test_a_sample_that_kills_its_worker_each_time_is_dropped_and_the_stage_goes_on(tmp_path):
    """With all that its worker had: nobody knows which one it was."""

    def poison(request):
        if request.uid.startswith("s/1/2/1#"):
            os.kill(os.getpid(), signal.SIGKILL)

    with ForkedStreams(builder(poison, heartbeat_s=20.0), max_restarts=20) as pool:
        taken = run(tmp_path, pool, 4, 1)
        assert pool.num_replaced >= 3 and [s.action for s in pool.log.stalls][-1] == "dropped"
    dropped = set(RolloutStore(tmp_path).ledger._dropped)
    assert {f"s/1/2/{i}" for i in range(GROUP)} <= dropped
    trained = [{r.uid for r in records} for records in taken]
    for step, uids in enumerate(trained):
        assert uids | {uid for uid in dropped if uid.startswith(f"s/{step}/")} == {
            job.uid for job in jobs_of(step)
        }
    assert len(trained[1]) >= GROUP and len(trained[2]) == len(trained[3]) == GROUPS * GROUP


def test_a_step_of_which_nothing_comes_back_is_one_clear_error_and_is_tried_anew(tmp_path):
    """Else a run whose workers all die would go through its steps without a sample, to a happy end."""
    healed = tmp_path / "healed"

    def poison(request):
        if not healed.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        with (
            ForkedStreams(builder(poison, heartbeat_s=60.0), max_restarts=1000) as pool,
            pytest.raises(EngineError, match="every group"),
        ):
            run(tmp_path, pool, 2, 0)
        assert RolloutStore(tmp_path).phases() == []
    healed.touch()
    with ForkedStreams(builder(poison)) as pool:
        assert whole(run(tmp_path, pool, 2, 0))


@pytest.mark.parametrize("seed", range(4))
def test_workers_are_killed_and_frozen_at_random_and_every_sample_is_trained_on_once(tmp_path, seed):
    rng, over = random.Random(seed), threading.Event()

    def disturb():
        while not over.wait(rng.expovariate(1 / 0.15)):
            slot = rng.randrange(2)
            if rng.random() < 0.7:
                send(pool, slot, signal.SIGKILL)
            else:  # woken before or after it is taken for dead
                send(pool, slot, signal.SIGSTOP)
                over.wait(rng.uniform(0, 0.8))
                send(pool, slot, signal.SIGCONT)

    with ForkedStreams(
        builder(step_s=0.01), stall_s=0.5, publish_limit_s=1.0, max_restarts=1000, most_redispatches=1000
    ) as pool:
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            taken = run(tmp_path, pool, 8, 2)
        finally:
            over.set()
            thread.join(timeout=10)
        assert whole(taken) and pool.num_replaced > 0
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("token_log/*"))
