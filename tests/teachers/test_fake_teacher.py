"""The shipped fake behaves as a teacher must: causal, position by position, repeatable."""

import torch

from consilience.teachers.fake_teacher import FakeTeacher
from consilience.teachers.teacher import Teacher


def test_states_depend_only_on_the_tokens_up_to_the_position():
    teacher: Teacher = FakeTeacher("a")
    long, short = teacher.score([[1, 2, 3, 4], [1, 2]], [[0, 1, 3], [1]])
    assert long.shape == (3, 8) and torch.equal(long[1], short[0])


def test_one_seed_is_one_teacher_and_another_seed_another():
    one, same, other = (FakeTeacher("a", seed=s) for s in (1, 1, 2))
    assert (
        one.digest == same.digest != other.digest and one.head_digest == same.head_digest != other.head_digest
    )
    assert torch.equal(one.head(), same.head()) and one.head().shape == (32, 8)


def test_no_positions_give_an_empty_tensor_of_the_right_width():
    assert FakeTeacher("a", dtype=torch.bfloat16).score([[1]], [[]])[0].shape == (0, 8)
