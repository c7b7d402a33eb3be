"""Lengths after many deaths, for an engine that never draws the same numbers twice.

Going on from the log leaves the law of lengths as it was; starting unfinished samples again from their prompt
does not (post-training notes 9.2), and this test sees it: the second must be refused where the first passes.
"""

import itertools
import math
import random

import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()
NUM, MEAN, LIFE = 5000, 60, 60  # samples, mean length, mean steps between two deaths
LETTER = TOKENIZER.encode_plain("a")[0]
JOBS = [
    RolloutJob(
        f"s/{i}",
        "s",
        "d",
        "chat",
        ({"role": "user", "content": "x"},),
        reward="x",
        max_tokens=4000,
        sampling=SamplingParams(max_tokens=4000),
    )
    for i in range(NUM)
]


def worker(rng, die_after):
    """Every token is the last with probability 1 / MEAN, whatever was sampled before, whoever samples it."""

    def reply(request, context):
        begun = [] if request.prefix is None else list(request.prefix.token_ids)
        if begun[-1:] == [TOKENIZER.eos_id]:
            return begun
        more = int(math.log(1 - rng.random()) / math.log(1 - 1 / MEAN))
        return [*begun, *[LETTER] * more, TOKENIZER.eos_id]

    engine = FakeRolloutEngine(reply, max_running=NUM, max_context=10**6, die_after=die_after)
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.0, grade_batch=NUM)


def lengths(folder, seed, *, has_log):
    """Sampled tokens of every job over as many workers as it takes, and how many died."""
    rng, done = random.Random(seed), {}
    for num_deaths in itertools.count():
        missing = [job for job in JOBS if job.uid not in done]
        if not missing:
            return list(done.values()), num_deaths
        fence(folder)
        lease = take_lease(folder, "w") if has_log else None
        life = worker(rng, int(rng.expovariate(1 / LIFE)) + 1)
        try:
            for batch in life.stream(missing, lease):
                done |= {record.uid: record.num_sampled for record in batch}
        except EngineError:
            pass
        finally:
            life.close()
    raise AssertionError("unreachable")


def ks_p_value(a, b):
    """Two-sample Kolmogorov-Smirnov, asymptotic; ties make it larger, so it refuses no more than it says."""
    at = sorted({*a, *b})
    a, b = sorted(a), sorted(b)
    i = j = 0
    distance = 0.0
    for x in at:
        while i < len(a) and a[i] <= x:
            i += 1
        while j < len(b) and b[j] <= x:
            j += 1
        distance = max(distance, abs(i / len(a) - j / len(b)))
    scaled = distance * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


def test_the_statistic_by_hand():
    assert ks_p_value([1, 2, 3], [1, 2, 3]) == 1.0
    # distance 1 with 50 and 50: sqrt(25) = 5, 2 exp(-50)
    assert ks_p_value(range(50), range(100, 150)) == pytest.approx(2 * math.exp(-50))
    # Stephens' table: P(scaled > 1.628) = 0.01
    assert 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * 1.628) ** 2) for k in range(1, 9)) == pytest.approx(
        0.01, rel=0.01
    )


def test_going_on_keeps_the_law_of_lengths_and_starting_again_does_not(tmp_path):
    rng = random.Random(99)
    undisturbed = [int(math.log(1 - rng.random()) / math.log(1 - 1 / MEAN)) + 1 for _ in range(NUM)]
    resumed, num_deaths = lengths(tmp_path / "log", 1, has_log=True)
    assert num_deaths >= 3
    assert ks_p_value(resumed, undisturbed) > 1e-3
    restarted, _ = lengths(tmp_path / "none", 1, has_log=False)
    assert ks_p_value(restarted, undisturbed) < 1e-6
    assert sum(restarted) / NUM < 0.9 * MEAN < sum(resumed) / NUM
