"""Top-k whose ties go to the lowest index, against a stable sort."""

import pytest
import torch

from consilience.model.top_k import top_k

torch.set_num_threads(1)

NONE = float("-inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scores", "k", "chosen"),
    [
        ([3.0, 1.0, 2.0, 0.0], 2, [0, 2]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0, 1]),  # ReLU makes exact ties: the lowest index wins
        ([1.0, 0.0, 5.0, 0.0, 0.0], 4, [2, 0, 1, 3]),
        ([0.0, 2.0, 2.0, 2.0, 1.0], 2, [1, 2]),
        ([-1.0, -3.0, -2.0], 2, [0, 2]),  # weights may be negative, so scores may be
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),  # equal scores with different bits
        ([NONE, -7.0, NONE, float("inf")], 4, [3, 1, 0, 2]),
        ([5.0], 1, [0]),
        ([4.0, 5.0], 0, []),
    ],
)
def test_the_highest_come_first_and_of_equals_the_lowest_index(scores, k, chosen, dtype):
    assert top_k(torch.tensor(scores, dtype=dtype), k).tolist() == chosen


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ties_equal_a_stable_sort(dtype):
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (50, 7, 40), generator=g).to(dtype) / 4
    scores[torch.rand(50, 7, 40, generator=g) < 0.3] = NONE
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :11]
    assert torch.equal(top_k(scores, 11), expected)


def test_every_order_of_magnitude_sorts_as_torch_sorts_it():
    """Bit patterns of both signs, subnormals and infinities among them; no two of these scores are equal."""
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), 1 << 31, (4000,), generator=g).to(torch.int32)
    scores = bits.view(torch.float32)
    scores = scores[~scores.isnan()].unique()[torch.randperm(3900, generator=g)]
    assert torch.equal(scores[top_k(scores, 3900)], scores.sort(descending=True).values)


def test_the_scores_are_left_as_they_were():
    scores = torch.tensor([-0.0, 2.0])
    top_k(scores, 1)
    assert scores.view(torch.int32).tolist() == [-(1 << 31), 1 << 30]
