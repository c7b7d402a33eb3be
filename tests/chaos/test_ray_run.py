"""`consilience grpo` on Ray, disturbed: workers, driver, cluster killed, frozen, their disk lying or full.

Every sample is trained on once; tokens, log-probabilities, metrics, weights and optimiser are those of the
run that nobody disturbed, to the last bit (exact mode, one thread).

    make chaos KILLS=100 SEED=0            run i has seed SEED + i
    CHAOS_KILLS=1 CHAOS_SEED=7 python -m pytest -s tests/chaos/test_ray_run.py       starts with run 7
"""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass

import pytest
from disturber import SHORT, Disturber
from real_run import GROUP, PROMPTS, STEPS, facts, leftovers, prepare, resumptions
from session import Session, build_faulty_disk

IS_SHORT = "CHAOS_KILLS" not in os.environ
NUM_KILLS = len(SHORT) if IS_SHORT else int(os.environ["CHAOS_KILLS"])
SEED = int(os.environ.get("CHAOS_SEED", "0"))
MOST_A_RUN = 25  # kills; more runs see more beginnings and ends


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_faulty_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("real") / "inputs")


@pytest.fixture(scope="module")
def undisturbed(inputs, library, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Session(inputs, run, library, is_joined=False) as session:
        session.start()
        assert session.driver.wait() == 0, session.errors().read_text()
    found = facts(run)
    # Otherwise equal weights would prove nothing.
    assert len({tensor for name, tensor in found.tensors.items()}) > 10 and len(found.metrics) == STEPS
    assert resumptions(run) == (0, 0)
    return found


@pytest.mark.timeout(300 + 60 * NUM_KILLS)
def test_a_disturbed_run_ends_as_the_undisturbed_one(tmp_path, inputs, library, undisturbed):
    began, run = time.monotonic(), 0
    kills, others = Counter(), Counter()
    num_stops = num_resumed = num_damaged = 0
    while kills.total() < NUM_KILLS:
        seed, folder = SEED + run, tmp_path / str(run)
        done = disturbed(seed, folder, inputs, library, undisturbed, Shown(began, kills.total()))
        kills, others, num_stops = kills + done.kills, others + done.others, num_stops + done.stops
        found = resumptions(folder)
        num_resumed, num_damaged, run = num_resumed + found[0], num_damaged + found[1], run + 1
    print(
        f"{kills.total()} kills in {run} runs and {time.monotonic() - began:.0f} s: {dict(kills)}; also "
        f"{dict(others)}; {num_stops} clear stops; {num_resumed} samples went on from a log, "
        f"{num_damaged} of them beside a damaged one"
    )
    assert num_resumed > 0


@dataclass
class Shown:
    """Progress, a line an event. `num_kills` of the runs before."""

    began: float
    num_kills: int

    def line(self, seed, num_kills, text):
        seconds = time.monotonic() - self.began
        print(f"{seconds:6.0f} s  {self.num_kills + num_kills:3}/{NUM_KILLS}  run {seed}  {text}", flush=True)


def disturbed(seed, folder, inputs, library, undisturbed, shown):
    """Run `seed`, through its share of the kills, to its end, and compared."""
    num_kills, kinds = min(NUM_KILLS - shown.num_kills, MOST_A_RUN), SHORT if IS_SHORT else None
    with Session(inputs, folder, library, is_joined=seed % 3 != 0) as session:
        disturber = Disturber(session, random.Random(seed), num_kills, kinds)
        try:
            disturber.to_the_end(lambda text: shown.line(seed, disturber.kills.total(), text))
            check(folder, session, undisturbed)
        except BaseException:
            print(
                f"failed: run {seed} after {dict(disturber.kills)}, {dict(disturber.others)}; again:\n  "
                f"CHAOS_KILLS={num_kills} CHAOS_SEED={seed} python -m pytest -s tests/chaos/test_ray_run.py"
            )
            raise
    return disturber


def check(folder, session, undisturbed):
    found = facts(folder)
    assert found.trainings == {
        f"grpo-mine/{step}/{prompt}/{sample}": 1
        for step in range(STEPS)
        for prompt in range(PROMPTS)
        for sample in range(GROUP)
    }
    assert found.records == undisturbed.records
    assert found.tensors == undisturbed.tensors
    assert found.metrics == undisturbed.metrics
    assert found.counted == undisturbed.counted
    assert leftovers(folder) == []
    session.must_be_alone()
