"""Sums come to their owners and results to everybody, whole, whatever the windows and types."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.ranks import ALONE
from consilience.training import ownership
from consilience.training.ownership import Ownership, Range
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("exchange with owners", "torch, shard_state")

torch.set_num_threads(1)

TYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32, "d": torch.float64}
# 10 numbers each; rank 1 has two parts of `a`, rank 2 nothing of fp32, nobody has c[8:]
OWNERS = [
    [Range("a", 0, 3), Range("b", 0, 10), Range("c", 2, 8)],
    [Range("a", 3, 4), Range("a", 6, 10), Range("c", 0, 2), Range("d", 5, 10)],
    [Range("d", 0, 5), Range("a", 4, 4)],
]
A_OF_RANK_0 = Range("a", 4, 6)


def owners():
    return [[*OWNERS[0], A_OF_RANK_0], *OWNERS[1:]]


def tensors_of(rank):
    return {
        name: (torch.arange(10, dtype=torch.float64) * 3 + 100 * rank).to(dtype).view(2, 5)
        for name, dtype in TYPES.items()
    }


def traffic(ranks, window_bytes):
    ownership.WINDOW_BYTES = window_bytes
    who = Ownership(ranks, owners())
    sums = who.sums(tensors_of(ranks.rank))
    rounded = who.sums({"a": tensors_of(ranks.rank)["a"]}, lambda name, x, at: (x * 0 + at).bfloat16())
    shared, whole = tensors_of(ranks.rank), tensors_of(ranks.rank)
    who.share_(shared)
    for name, tensor in whole.items():
        who.whole_(tensor, name)
    few = tensors_of(ranks.rank)
    who.share_({"c": few["c"]})
    return sums, rounded, shared, whole, few


def expected_shared(rank):
    """By hand: every number is that of its owner, where it has one."""
    found = tensors_of(rank)
    for owner, items in enumerate(owners()):
        for item in items:
            part = slice(item.start, item.stop)
            found[item.name].view(-1)[part] = tensors_of(owner)[item.name].view(-1)[part]
    return found


@pytest.mark.parametrize("window_bytes", [30, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_each_number_goes_to_its_owner_and_from_there_to_all(window_bytes, tmp_path):
    found = on_ranks(3, traffic, window_bytes, folder=tmp_path, is_apart=True)
    for rank, (sums, rounded, shared, whole, few) in enumerate(found):
        assert set(sums) == {item for item in owners()[rank] if item.start < item.stop}
        for item, total in sums.items():
            terms = [tensors_of(r)[item.name].view(-1)[item.start : item.stop] for r in range(3)]
            work = torch.promote_types(terms[0].dtype, torch.float32)
            assert torch.equal(total, sum(term.to(work) for term in terms)) and total.dtype == work
        for item, total in rounded.items():  # windows cut a range at places of their own
            assert item.name == "a" and (total[1:] >= total[:-1]).all() and total[0] == 3 * item.start
        for name, value in expected_shared(rank).items():
            assert torch.equal(shared[name], value) and torch.equal(whole[name], value)
        assert torch.equal(few["c"], expected_shared(rank)["c"])
        assert torch.equal(few["a"], tensors_of(rank)["a"])


def fractions(ranks):
    generator = torch.Generator().manual_seed(ranks.rank)
    values = torch.randn(64, generator=generator)
    who = Ownership(ranks, [[Range("a", 16 * r, 16 * r + 16)] for r in range(4)])
    return who.sums({"a": values})


@pytest.mark.slow
def test_terms_are_added_in_the_order_of_the_ranks(tmp_path):
    """The same bits as 0 + x₀ + x₁ + x₂ + x₃ in fp32, which another order would not give everywhere."""
    terms = [torch.randn(64, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    in_order, backwards = ((a + b) + c + d for a, b, c, d in (terms, terms[::-1]))
    assert not torch.equal(in_order, backwards)
    found = on_ranks(4, fractions, folder=tmp_path)
    parts = [own[Range("a", 16 * rank, 16 * rank + 16)] for rank, own in enumerate(found)]
    assert torch.equal(torch.cat(parts), in_order)


def test_alone_there_is_nothing_to_add_and_nobody_to_tell():
    values = {"a": torch.randn(4, 4)}
    who = Ownership(ALONE, [[Range("a", 0, 7), Range("a", 7, 16)]])
    sums = who.sums(values)
    assert torch.equal(torch.cat([*sums.values()]).view(4, 4), values["a"])
    before = values["a"].clone()
    who.share_(values)
    assert torch.equal(values["a"], before)
    with pytest.raises(EngineError, match="owners of 2 ranks, there are 1"):
        Ownership(ALONE, [[], []])
