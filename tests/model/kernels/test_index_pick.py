"""The compiled choice of the indexer against scores, masks and a stable sort."""

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.kernels.compiled import library
from consilience.model.kernels.index_pick import is_available, pick

torch.set_num_threads(1)


def _plainly(match, weight, first, stop, topk):
    """The definition: highest scores by a stable sort, visible ones only, in ascending order."""
    scores = torch.zeros(match.shape[0], match.shape[1], match.shape[3])
    for head in range(match.shape[2]):
        scores = scores + weight[:, :, head, None] * match[:, :, head].relu()
    column = torch.arange(match.shape[3])
    is_seen = (column >= first[..., None]) & (column < stop[..., None])
    best = scores.masked_fill(~is_seen, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    best = best[..., :topk]
    best = torch.where(is_seen.gather(-1, best), best, match.shape[3]).sort(dim=-1).values
    best = torch.where(best < match.shape[3], best, -1)
    return torch.nn.functional.pad(best, (0, topk - best.shape[-1]), value=-1)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("index_pick"), str), library("index_pick")
    assert is_available(torch.zeros(1)) and not is_available(torch.zeros(1).double())
    with exact_mode():
        assert not is_available(torch.zeros(1))


def test_three_columns_worked_by_hand():
    """Heads weigh 1 and -1; scores 3 - 0, 2 - 1, 0 - 0 (a negative match counts 0): 3, 1, 0."""
    match = torch.tensor([[[[3.0, 2.0, -5.0], [-9.0, 1.0, 0.0]]]])
    weight, first, stop = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[0]]), torch.tensor([[3]])
    found = [pick(match, weight, first, stop, topk).tolist() for topk in (1, 2, 4)]
    assert found == [[[[0]]], [[[0, 1]]], [[[0, 1, 2, -1]]]]
    assert pick(match, weight, first + 1, stop, 1).tolist() == [[[1]]]


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize(("columns", "topk"), [(1, 1), (9, 4), (200, 32), (3000, 64)])
def test_picks_are_those_of_a_stable_sort_however_many_scores_are_equal(levels, columns, topk):
    generator = torch.Generator().manual_seed(columns + levels)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    # Small integers: sums are exact in any order, so that equal scores are equal to the bit.
    match = draw(2 * levels + 1, 2, 7, 3, columns).float() - levels
    weight = draw(9, 2, 7, 3).float() - 4
    stop = draw(columns + 1, 2, 7)
    first = (stop * torch.rand(2, 7, generator=generator)).long()
    found = pick(match, weight, first, stop, topk)
    assert torch.equal(found, _plainly(match, weight, first, stop, topk))


def test_scores_that_differ_in_the_last_bit_are_told_apart():
    base = torch.tensor([1.0, -1.0, 1e-30, 0.0, 3e38])
    match = torch.cat((base, torch.nextafter(base, torch.tensor(float("inf"))))).relu()[None, None, None]
    for sign in (1.0, -1.0):
        weight, first, stop = torch.tensor([[[sign]]]), torch.tensor([[0]]), torch.tensor([[10]])
        for topk in range(1, 11):
            arguments = (match, weight, first, stop, topk)
            assert torch.equal(pick(*arguments), _plainly(*arguments))
