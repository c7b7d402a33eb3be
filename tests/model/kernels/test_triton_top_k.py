"""The Triton top-k against a stable sort: ties, ranges, rows cut into pieces; on a GPU, or interpreted."""

import pytest
import torch

from consilience.model.top_k import top_k

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

NONE = float("-inf")


def expected_of(scores, k, first=None, stop=None):
    """One row at a time, by a stable sort."""
    picks = torch.full((scores.shape[0], k), -1)
    for row, values in enumerate(scores.tolist()):
        low, high = (0, len(values)) if first is None else (int(first[row]), min(int(stop[row]), len(values)))
        seen = [i for i in range(low, high) if values[i] > NONE]
        best = sorted(sorted(seen, key=lambda i: (-values[i], i))[:k])
        picks[row, : len(best)] = torch.tensor(best, dtype=torch.long)
    return picks


@pytest.fixture
def select(triton_device):
    from consilience.model.kernels import triton_top_k

    def run(scores, k, first=None, stop=None):
        place = lambda x: None if x is None else x.to(triton_device)
        return triton_top_k.select(scores.to(triton_device), k, place(first), place(stop)).cpu()

    return run


@pytest.mark.parametrize(
    ("scores", "k", "chosen"),
    [
        ([3.0, 1.0, 2.0, 0.0], 2, [0, 2]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0, 1]),  # ReLU makes exact ties: the lowest column wins
        ([1.0, 0.0, 5.0, 0.0, 0.0], 4, [0, 1, 2, 3]),
        ([0.0, 2.0, 2.0, 2.0, 1.0], 2, [1, 2]),
        ([-1.0, -3.0, -2.0], 2, [0, 2]),  # weights may be negative, so scores may be
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),  # equal scores with different bits
        ([NONE, -7.0, NONE, float("inf")], 4, [1, 3, -1, -1]),
        ([NONE, NONE], 1, [-1]),
        ([5.0], 3, [0, -1, -1]),
        ([2.0, 4.0, 4.0, 4.0, 9.0, 4.0], 3, [1, 2, 4]),
    ],
)
def test_the_highest_are_taken_in_ascending_order(scores, k, chosen, select):
    assert select(torch.tensor([scores]), k)[0].tolist() == chosen


@pytest.mark.parametrize(("num_columns", "k"), [(40, 11), (64, 64), (200, 1), (300, 37), (130, 129)])
@pytest.mark.parametrize("is_coarse", [True, False])
def test_ties_and_ranges_equal_a_stable_sort(num_columns, k, is_coarse, select):
    g = torch.Generator().manual_seed(num_columns)
    scores = torch.randn(24, num_columns, generator=g)
    if is_coarse:
        scores = (scores * 2).round() / 2
    scores[torch.rand(24, num_columns, generator=g) < 0.1] = NONE
    assert torch.equal(select(scores, k), expected_of(scores, k))
    first = torch.randint(0, num_columns, (24,), generator=g)
    stop = first + torch.randint(0, num_columns, (24,), generator=g)
    assert torch.equal(select(scores, k, first, stop), expected_of(scores, k, first, stop))


def test_columns_out_of_a_rows_range_are_never_read(select):
    scores = torch.full((3, 70), float("nan"))
    first, stop = torch.tensor([3, 60, 9]), torch.tensor([7, 70, 9])
    for row in range(3):
        scores[row, first[row] : stop[row]] = torch.arange(float(stop[row] - first[row]))
    assert torch.equal(select(scores, 3, first, stop), torch.tensor([[4, 5, 6], [67, 68, 69], [-1, -1, -1]]))


def test_every_order_of_magnitude_is_ordered_as_torch_orders_it(select):
    """Bit patterns of both signs, subnormals and infinities among them."""
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), 1 << 31, (400,), generator=g).to(torch.int32)
    scores = bits.view(torch.float32)
    scores = scores[~scores.isnan() & (scores > NONE)].unique()
    scores = torch.cat((scores, torch.tensor([1e-45, -1e-45, 0.0, float("inf"), 3e38, -3e38])))[None]
    for k in (1, 57, 200):
        assert torch.equal(select(scores, k)[0], top_k(scores[0], k).sort().values)


@pytest.mark.parametrize("num_columns", [65, 200])
def test_rows_cut_into_pieces_give_what_whole_rows_give(num_columns, select, monkeypatch):
    from consilience.model.kernels import triton_top_k

    monkeypatch.setattr(triton_top_k, "LAUNCH", triton_top_k.Launch(64, 32))
    g = torch.Generator().manual_seed(3)
    scores = (torch.randn(4, num_columns, generator=g) * 4).round()
    first = torch.tensor([0, 5, 60, 1])
    stop = torch.tensor([num_columns, 20, num_columns - 3, 1])
    assert torch.equal(select(scores, 20), expected_of(scores, 20))
    for k in (3, 32):
        assert torch.equal(select(scores, k, first, stop), expected_of(scores, k, first, stop))
    with pytest.raises(ValueError, match="at most 32"):
        select(scores, 33)


def test_rows_may_be_columns_of_a_wider_tensor_and_stay_as_they_are(select, triton_device):
    from consilience.model.kernels import triton_top_k

    wide = torch.randn(5, 90, generator=torch.Generator().manual_seed(4))
    here = wide.to(triton_device)
    found = triton_top_k.select(here[:, :33], 6)
    assert torch.equal(found.cpu(), expected_of(wide[:, :33], 6))
    assert torch.equal(here.cpu(), wide)
