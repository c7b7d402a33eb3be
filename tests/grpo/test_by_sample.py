"""Sums by sample, of one process and over ranks that each have some of a sample's tokens."""

import pytest
import torch

from consilience.grpo.by_sample import Samples
from consilience.model.context_parallel import context_parallel
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("rows cut over ranks: sums of samples", "library")

INDEX = torch.tensor([7, 7, 2, 7, 2, 9])
VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


def test_lengths_and_sums_are_those_of_each_sample():
    samples = Samples(INDEX, torch.float32)
    assert samples.length.tolist() == [2, 3, 1] and samples.of.tolist() == [1, 1, 0, 1, 0, 2]
    assert samples.sums(VALUES).tolist() == [20, 11, 32]
    assert samples.reported() == 3 and samples.reported(VALUES < 5) == 2


def cut(ranks):
    own = slice(0, 4) if ranks.is_first else slice(4, 6)
    with context_parallel(ranks):
        samples = Samples(INDEX[own], torch.float32)
        chosen = [samples.reported(), samples.reported(VALUES[own] < 5)]
        empty = Samples(INDEX[: 3 * ranks.rank], torch.float32)
        return samples.length.tolist(), samples.sums(VALUES[own]).tolist(), chosen, empty.length.tolist()


@pytest.mark.slow
def test_ranks_that_cut_rows_know_the_sums_and_one_of_them_reports(tmp_path):
    first, second = on_ranks(2, cut, folder=tmp_path)
    assert first == ([2, 3, 1], [20, 11, 32], [3, 2], [1, 2])
    assert second == ([2, 3, 1], [20, 11, 32], [0, 0], [1, 2])
