"""Workers that sleep while the trainer learns, by what a pool is asked for and in which order."""

import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.sleeping import SleepingSampler


class CalledPool:
    """Notes its calls; a phase named "fails" does."""

    def __init__(self):
        self.calls = []

    def publish(self, weights, announced, version):
        self.calls.append(f"publish {version}")

    def generate(self, jobs, on_progress=None, *, durable=None):
        self.calls.append(f"generate {jobs} {durable}")
        if jobs == "fails":
            raise EngineError("it failed")
        return ["record"]

    def sleep(self, level=1):
        self.calls.append(f"sleep {level}")

    def wake(self):
        self.calls.append("wake")


def test_workers_sleep_from_the_end_of_a_phase_to_the_next_weights():
    pool = CalledPool()
    sampler = SleepingSampler(pool, 2)
    sampler.publish({}, "digest", 0)
    assert sampler.generate("a", durable="d") == ["record"]
    sampler.publish({}, "digest", 1)
    sampler.publish({}, "digest", 2)  # a phase that was in the store already: nobody slept
    sampler.generate("b")
    assert pool.calls == [
        "publish 0",
        "generate a d",
        "sleep 2",
        "wake",
        "publish 1",
        "publish 2",
        "generate b None",
        "sleep 2",
    ]


def test_a_phase_without_new_weights_wakes_them_and_one_that_fails_leaves_them_awake():
    pool = CalledPool()
    sampler = SleepingSampler(pool, 0)
    sampler.generate("a")
    with pytest.raises(EngineError, match="it failed"):
        sampler.generate("fails")
    sampler.publish({}, "digest", 1)
    assert pool.calls == ["generate a None", "sleep 0", "wake", "generate fails None", "publish 1"]
