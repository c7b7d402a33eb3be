"""The stage as a whole on tiny checkpoints: sampling ahead, kills, publication."""

import pytest
import torch
from power_cut import PowerCut
from small_teachers import Sampler, model, record, registry_of, run, samples, side

from consilience.distill.samples import score_request
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.publishing import verify
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

SEEDS = {"code": 1, "math": 2}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), SEEDS)


def answers(step):
    return [*samples(step), record(f"{step}/free", None, (5, 1))]


class CountingSampler(Sampler):
    """Counts publications too."""

    def __init__(self):
        super().__init__(answers)
        self.announced = []

    def publish(self, weights, announced, version):
        verify(weights, announced)
        self.announced.append((announced.digest, version))


def stage(folder, registry, sampler, *, seed=0, **settings):
    engine = TorchEngine(model(seed), OptimizerSettings(lr=0.01))
    return run(folder, side(registry, folder / "hidden"), sampler, engine=engine, **settings)


class Ahead(CountingSampler):
    """Streams that answer when they are listened to."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def hand_over(self, jobs, durable):
        self.begun.append((jobs[0].step, len(self.announced)))
        self._due = [*getattr(self, "_due", []), (jobs, durable)]

    def hear(self):
        jobs, durable = self._due.pop(0)
        durable.keep(self.generate(jobs, durable=durable))


def test_a_student_may_sample_ahead_and_with_nothing_ahead_it_is_the_same_run(registry, tmp_path):
    whole, log, result = stage(tmp_path / "whole", registry, CountingSampler())
    same, its_log, its_result = stage(tmp_path / "same", registry, Ahead(), ahead={"max_age": 0})
    a, b = whole.model.state_dict(), same.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a) and (its_log.rows, its_result) == (log.rows, result)
    sampler = Ahead()
    _, log, _ = stage(tmp_path / "ahead", registry, sampler, ahead={"max_age": 1, "is_whole": True})
    assert sampler.begun == [(0, 1), (1, 1), (2, 2)]  # (phase, publications before it)
    assert [row["step"] for row in log.rows] == [1, 2, 3] and all("age_max" in row for row in log.rows)


@pytest.mark.parametrize("balance", ["weights", "update"])
def test_a_killed_run_resumes_without_sampling_again_and_ends_bit_for_bit_equal(registry, tmp_path, balance):
    first, second = CountingSampler(), CountingSampler()
    whole, log, result = stage(tmp_path / "whole", registry, CountingSampler(), balance=balance)
    with pytest.raises(KeyboardInterrupt):  # a checkpoint of 1 update; phase 1 is sampled and not saved
        stage(tmp_path / "cut", registry, first, every_s=0.0, log=PowerCut(at=2), balance=balance)
    resumed, rest, again = stage(tmp_path / "cut", registry, second, seed=9, balance=balance)
    assert (first.calls, second.calls) == ([0, 1], [2])
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert again == result
    assert [row["step"] for row in rest.rows] == [2, 3]
    assert {(row["teacher"], row["step"]) for row in result["kl"]} == {
        (t, s) for t in SEEDS for s in (1, 2, 3)
    }
    assert all(loads["loads"] == loads["distinct"] for loads in result["head_loads"])
    # A sample without a teacher is kept on disk and taught by nobody.
    assert "0/free" not in {row.uid for _, row in log.samples}


def test_states_scored_before_a_kill_are_not_scored_again(registry, tmp_path):
    before = side(registry, tmp_path / "r" / "hidden")
    requests = [score_request(r) for r in samples(0)]
    assert before.scheduler.score(requests).num_scored == 4
    _, log, _ = stage(tmp_path / "r", registry, CountingSampler())
    assert [(row["reused"], row["teacher_loads"]) for row in log.rows] == [(4, 0), (0, 2), (0, 2)]


def test_publication_announces_the_digest_of_the_student(registry, tmp_path):
    sampler = CountingSampler()
    engine, _, _ = stage(tmp_path / "r", registry, sampler)
    assert [version for _, version in sampler.announced] == [0, 1, 2, 3]
    assert sampler.announced[0][0] == weights_digest(to_official(model()))
    assert sampler.announced[-1][0] == weights_digest(to_official(engine.model))
