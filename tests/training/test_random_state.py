"""All three global generators continue where they were."""

import random

import numpy as np
import pytest
import torch

from consilience.conf.errors import CheckpointError
from consilience.training.random_state import random_state_tensors, restore_random_state
from consilience.training.tensor_files import as_bytes_tensor


def draw():
    return (
        torch.randn(3).tolist(),
        np.random.standard_normal(3).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
    )


def test_the_same_numbers_follow_a_restored_state():
    draw()
    state = random_state_tensors()
    first = draw()
    draw()
    restore_random_state(state)
    assert draw() == first
    assert all(tensor.dtype == torch.uint8 for tensor in state.values())


@pytest.mark.parametrize("name", ["rng.torch", "rng.numpy", "rng.python"])
def test_a_damaged_state_is_refused_and_changes_nothing(name):
    state = random_state_tensors()
    before = [t.clone() for t in random_state_tensors().values()]
    for broken in ({k: v for k, v in state.items() if k != name}, state | {name: as_bytes_tensor(b"[1]")}):
        with pytest.raises(CheckpointError, match="random state cannot be restored"):
            restore_random_state(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, random_state_tensors().values()))
