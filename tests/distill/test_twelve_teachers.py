"""A dozen tiny teachers and one student: heads, gradients, and what a student equal to its teacher does."""

import random
import weakref
from dataclasses import replace

import pytest
import torch
from small_teachers import model, phase, registry_of, samples, side
from small_trainer import GradientKeeper

from consilience.teachers.heads import HeadCache, read_head
from consilience.teachers.registry import TeacherRegistry
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

NAMES = [f"t{i:02d}" for i in range(12)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {name: i + 1 for i, name in enumerate(NAMES)})


class CountedHeads:
    """Reads heads, and knows the most bytes of them that were alive at once."""

    def __init__(self):
        self.alive = self.most = 0

    def __call__(self, record):
        head = read_head(record.checkpoint)
        self.alive += head.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(head, self._gone, head.nbytes)
        return head

    def _gone(self, num_bytes):
        self.alive -= num_bytes


@pytest.mark.parametrize("num_mini_batches", [1, 3])
def test_a_head_is_loaded_once_for_each_teacher_of_a_mini_batch(registry, tmp_path, num_mini_batches):
    records = samples(0, NAMES * 3)
    found = phase(GradientKeeper(model()), records, side(registry, tmp_path), mini_batches=num_mini_batches)
    assert len(found["head_loads"]) == num_mini_batches
    assert all(row["loads"] == row["distinct"] for row in found["head_loads"])
    assert sum(row["loads"] for row in found["head_loads"]) >= 12
    assert set(found["kl"]) == set(NAMES)


def test_the_bytes_of_heads_do_not_grow_from_2_to_12_teachers(registry, tmp_path):
    most = {}
    for num in (2, 6, 12):
        counted = CountedHeads()
        teachers = side(registry, tmp_path / str(num), heads=HeadCache(read=counted))
        phase(GradientKeeper(model()), samples(0, NAMES[:num]), teachers, mini_batches=1)
        most[num] = counted.most
    assert most[2] == most[6] == most[12] == 2 * model().head.weight.nbytes  # one in use, one being read


def gradients(registry, folder, records, **settings):
    engine = GradientKeeper(model())
    report = phase(engine, records, side(registry, folder), mini_batches=1, **settings)
    return engine.steps[0], report


@pytest.mark.parametrize("normalisation", ["tokens", "teacher", "sequences"])
def test_gradients_are_equal_under_any_order_of_teachers_and_any_cut(registry, tmp_path, normalisation):
    records = samples(0, NAMES)
    whole, report = gradients(registry, tmp_path / "a", records, normalisation=normalisation)
    # Names decide the order in which teachers come: other names for the same teachers, records shuffled.
    others = dict(zip(NAMES, random.Random(7).sample(NAMES, 12)))
    renamed = TeacherRegistry([replace(r, name=others[r.name]) for r in registry])
    shuffled = [replace(r, teacher=others[r.teacher]) for r in random.Random(8).sample(records, 12)]
    cuts = ({}, {"row_tokens": 32, "micro_tokens": 32, "chunk_tokens": 3})
    for i, cut in enumerate(cuts):
        folder = tmp_path / str(i)
        found, its = gradients(renamed, folder, shuffled, normalisation=normalisation, **cut)
        for name, gradient in whole.items():  # fp32 sums in another order
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
        for name in NAMES:
            assert its["kl"][others[name]] == pytest.approx(report["kl"][name], rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_student_equal_to_its_teacher_stays_there_for_100_steps(registry, tmp_path, kind):
    engine = TorchEngine(model(3), OptimizerSettings(lr=1e-3, kind=kind))
    teachers = side(registry, tmp_path)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    for step in range(50):
        report = phase(engine, samples(step, ["t02"] * 3), teachers, mini_batches=2)
        assert abs(report["kl"]["t02"]) <= 1e-6 and report["skipped_updates"] == 2
    assert engine.num_steps == 0 and all(p.grad is None for p in engine.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())


def test_a_student_that_differs_is_moved(registry, tmp_path):
    engine = TorchEngine(model(4), OptimizerSettings(lr=1e-3))
    report = phase(engine, samples(0, ["t02"] * 3), side(registry, tmp_path), mini_batches=2)
    assert report["skipped_updates"] == 0
    assert not torch.equal(engine.model.head.weight, model(4).head.weight)
