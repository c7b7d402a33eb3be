"""Another loss and other weights on stored rollouts and states: nothing sampled, no teacher loaded."""

from dataclasses import replace

import pytest
import torch
from small_teachers import CountingLoader, Sampler, registry_of, run, samples, side

from consilience.conf.errors import ConfigError, EngineError
from consilience.distill.objectives import Objective
from consilience.distill.replay import STATES, replay_phases
from consilience.rollout.store import RolloutStore
from consilience.teachers.registry import TeacherRegistry

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {"code": 1, "math": 2})


@pytest.fixture(scope="module")
def kept(registry, tmp_path_factory):
    """A stage that ran and kept its states."""
    folder = tmp_path_factory.mktemp("kept")
    loader = CountingLoader()
    _, log, result = run(folder, side(registry, folder / STATES, loader, keeps=True), Sampler(samples))
    assert len(loader.scored) == 12 and sum(row["teacher_loads"] for row in log.rows) == 6
    return folder, log, result


def again(folder, kept, registry, **settings):
    """A stage on the kept rollouts whose teachers must not be loaded; its sampler must not be asked."""

    def no_loader(record):
        raise AssertionError(f"{record.name} was loaded")

    def no_answers(step):
        raise AssertionError("sampled")

    replay_phases(kept, RolloutStore(folder / "rollouts"), 3)
    teachers = side(registry, folder / STATES, no_loader, may_load=False, also=[kept / STATES])
    sampler = Sampler(no_answers)
    engine, log, result = run(folder, teachers, sampler, **settings)
    assert sampler.calls == [] and all(row["teacher_loads"] == 0 for row in log.rows)
    return engine, log, result


def test_the_same_loss_on_kept_states_is_the_same_run_bit_for_bit(registry, kept, tmp_path):
    folder, log, result = kept
    _, its_log, its_result = again(tmp_path, folder, registry)
    assert its_result["kl"] == result["kl"]
    assert [row["grad_norm"] for row in its_log.rows] == [row["grad_norm"] for row in log.rows]


@pytest.mark.parametrize("objective", ["forward_kl", "jsd", "top_k_tail", "sampled_token"])
def test_another_loss_needs_no_teacher(registry, kept, tmp_path, objective):
    folder, _, result = kept
    _, _, found = again(tmp_path, folder, registry, objective=Objective(objective, top_k=8), balance="update")
    # In the first phase the students are at most one small update apart.
    assert found["kl"][0]["mean"] == pytest.approx(result["kl"][0]["mean"], rel=0.02)
    assert found["kl"] != result["kl"]


def test_other_weights_of_the_teachers_need_none_of_them(registry, kept, tmp_path):
    weights = {"code": 5.0, "math": 0.5}
    weighted = TeacherRegistry([replace(r, weight=weights[r.name]) for r in registry])
    engine, _, _ = again(tmp_path, kept[0], weighted)
    plain, _, _ = again(tmp_path / "plain", kept[0], registry)
    a, b = engine.model.state_dict(), plain.model.state_dict()
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_teacher_with_other_weights_than_those_kept_is_refused(kept, tmp_path):
    other = registry_of(tmp_path / "others", {"code": 1, "math": 7})
    with pytest.raises(
        EngineError, match=r"no stored states of teacher 'math' \(weights .*store holds those"
    ):
        again(tmp_path, kept[0], other)


def test_too_few_phases_are_refused_and_a_resume_copies_none_twice(kept, tmp_path):
    store = RolloutStore(tmp_path / "rollouts")
    with pytest.raises(ConfigError, match=r"has 3 phases of rollouts, but distill\.steps is 4"):
        replay_phases(kept[0], store, 4)
    assert (replay_phases(kept[0], store, 2), replay_phases(kept[0], store, 3)) == (2, 1)
    assert [r.uid for r in store.read()] == [r.uid for r in RolloutStore(kept[0] / "rollouts").read()]
