"""Membership, the stable sort by teacher, and that the sort leaves the accumulated gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.distill.loss import distill_loss
from consilience.distill.minibatch import Segment, draw_minibatches, segments_by_teacher, sort_by_teacher
from consilience.teachers.fake_teacher import FakeTeacher
from consilience.teachers.heads import HeadCache, HeadLoads
from consilience.teachers.registry import TeacherRecord

torch.set_num_threads(1)


def test_the_example_of_the_docstring():
    teachers = ["", "", "", "", "math", "math", "", "code"]
    assert segments_by_teacher([4, 7, 5], teachers) == [Segment("code", (7,)), Segment("math", (4, 5))]


names = st.lists(st.sampled_from(["agent", "code", "math"]), max_size=30)


@given(names, st.integers(1, 5), st.integers(0, 9))
def test_minibatches_cover_every_sample_once_and_differ_in_size_by_at_most_one(teachers, num, seed):
    parts = draw_minibatches(len(teachers), num, np.random.default_rng(seed))
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(teachers)))
    sizes = [len(part) for part in parts]
    assert not sizes or (max(sizes) - min(sizes) <= 1 and min(sizes) > 0)


@given(names, st.randoms())
def test_the_sort_is_a_stable_permutation_with_one_segment_a_teacher(teachers, random):
    members = list(range(len(teachers)))
    random.shuffle(members)
    found = sort_by_teacher(members, teachers).tolist()
    assert found == sorted(members, key=lambda i: teachers[i])  # Python's sort is stable
    segments = segments_by_teacher(members, teachers)
    assert [s.teacher for s in segments] == sorted(set(teachers))
    assert [i for s in segments for i in s.samples] == found


def test_one_seed_gives_one_membership_and_mixes_teachers():
    parts = [draw_minibatches(90, 3, np.random.default_rng(4)) for _ in "ab"]
    assert all((x == y).all() for x, y in zip(*parts))
    teachers = ["math"] * 30 + ["code"] * 30 + ["agent"] * 30
    assert all(len(segments_by_teacher(part, teachers)) == 3 for part in parts[0])


def test_no_minibatch_is_refused():
    with pytest.raises(ValueError, match="num_minibatches is 0"):
        draw_minibatches(4, 0, np.random.default_rng(0))


def test_sorting_by_teacher_leaves_the_accumulated_gradient_and_loads_each_head_once():
    """Four samples of three tokens, two teachers, in drawn order and in sorted order."""
    g = torch.Generator().manual_seed(0)
    teachers = ["math", "code", "math", "code"]
    fakes = {
        name: FakeTeacher(name, vocab_size=16, width=6, seed=i) for i, name in enumerate(["math", "code"])
    }
    weights = {"math": 1.0, "code": 2.5}
    ids = [torch.randint(16, (3,), generator=g).tolist() for _ in teachers]
    embedding = torch.randn(16, 4, generator=g).double().requires_grad_()
    head = torch.randn(16, 4, generator=g).double().requires_grad_()

    def gradient(order):
        heads = HeadCache(read=lambda record: fakes[record.name].head())
        for i in order:
            record = TeacherRecord(teachers[i], None, (teachers[i],), weights[teachers[i]])
            states = fakes[record.name].score([ids[i]], [range(3)])[0]
            loss = distill_loss(
                embedding[ids[i]],
                head,
                states,
                heads.take(record),
                torch.full((3,), record.weight / 12),
            ).loss
            loss.backward()
        found = embedding.grad, head.grad
        embedding.grad = head.grad = None
        return found, heads.finish()

    drawn = [2, 1, 0, 3]
    (before, loads_before), (after, loads_after) = (
        gradient(drawn),
        gradient(sort_by_teacher(drawn, teachers).tolist()),
    )
    for x, y in zip(before, after):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-15)
    assert loads_before == HeadLoads(distinct=2, loads=4)
    assert loads_after == HeadLoads(distinct=2, loads=2)
