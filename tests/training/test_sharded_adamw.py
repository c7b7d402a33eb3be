"""AdamW's state cut into even parts: the same bits as torch's AdamW on one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.model.ranks import ALONE
from consilience.training.ownership import Range
from consilience.training.sharded_adamw import ShardedAdamW, cut_evenly
from tests.rank_processes import on_ranks
from tests.ranks_table import keep, off

pytestmark = pytest.mark.row("AdamW", "torch, shard_state")

torch.set_num_threads(1)
SLOW = pytest.mark.slow

DECAYED = {"embed.weight": (37, 24), "head.weight": (37, 24)}
PLAIN = {"norm.weight": (24,), "layers.0.attn.attn_sink": (5,), "layers.0.hc_attn.scale": (3,)}


def test_three_ranks_by_hand():
    """300 numbers in three: borders at 100 and 200, of which the next multiples of 64 in their tensor."""
    assert cut_evenly({"a": 250, "b": 50}, 3) == [
        [Range("a", 0, 128)],
        [Range("a", 128, 250)],
        [Range("b", 0, 50)],
    ]


@given(st.lists(st.integers(1, 3000), max_size=8), st.integers(1, 9))
def test_every_number_has_one_owner_and_parts_are_even(sizes, num_ranks):
    parts = cut_evenly({str(i): size for i, size in enumerate(sizes)}, num_ranks)
    for i, size in enumerate(sizes):
        ranges = sorted((r.start, r.stop) for own in parts for r in own if r.name == str(i))
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), size]
        assert all(start % 64 == 0 for start, _ in ranges)
    loads = [sum(r.stop - r.start for r in own) for own in parts]
    assert max(loads) - min(loads) <= 128


def weights():
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        for shapes in (DECAYED, PLAIN)
    ]


def gradients_of(step, rank):
    """The sink has a gradient from the second step on."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shapes = {**DECAYED, **PLAIN}
    grads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if step == 0:
        grads.pop("layers.0.attn.attn_sink")
    return grads


def on_one(size, steps):
    decayed, plain = weights()
    groups = [
        {"params": [*decayed.values()], "weight_decay": 0.1},
        {"params": [*plain.values()], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-20, fused=True)
    for step in range(steps):
        of_ranks = [gradients_of(step, rank) for rank in range(size)]
        for name, weight in {**decayed, **plain}.items():
            weight.grad = sum(g[name] for g in of_ranks) if name in of_ranks[0] else None
        adamw.step()
    state = {
        f"{key}.{name}": value
        for name, weight in {**decayed, **plain}.items()
        for key, value in adamw.state[weight].items()
    }
    return {name: weight.detach() for name, weight in {**decayed, **plain}.items()}, state


def sharded(ranks, steps, state=None, first=0):
    decayed, plain = weights()
    adamw = ShardedAdamW(decayed, plain, ranks=ranks)
    zeros = dict(adamw.each_state_tensor())
    if state is not None:
        weights_before, state = state
        for name, weight in {**decayed, **plain}.items():
            weight.data = weights_before[name].clone()
        adamw.load_state_tensors(state)
    for step in range(first, steps):
        adamw.sides[0].sum_gradients(gradients_of(step, ranks.rank))
        adamw.step(0.01)
    held = sum(part.numel() for part in adamw.sides[0].parts.values())
    found = {name: weight.detach() for name, weight in {**decayed, **plain}.items()}
    return found, dict(adamw.each_state_tensor()), held, zeros


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
        keep(off(found[name], expected[name]))
        assert found[name].dtype == expected[name].dtype


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_weights_and_state_are_the_bits_of_one_process(size, tmp_path):
    expected, state = on_one(size, 3)
    found = on_ranks(size, sharded, 3, folder=tmp_path) if size > 1 else [sharded(ALONE, 3)]
    for own, own_state, _, zeros in found:
        assert_same(own, expected)
        assert_same(own_state, state)
        assert zeros.keys() == state.keys() and not any(value.any() for value in zeros.values())
    held = [held for *_, held, _ in found]
    assert sum(held) == sum(w.numel() for w in expected.values()) and max(held) - min(held) <= 128


@SLOW
def test_state_of_two_ranks_goes_on_with_two_as_if_nothing_had_been(tmp_path):
    straight = on_ranks(2, sharded, 4, folder=tmp_path)[0]
    half = on_ranks(2, sharded, 2, folder=tmp_path)[0]
    resumed = on_ranks(2, sharded, 4, half[:2], 2, folder=tmp_path)[1]
    assert_same(resumed[0], straight[0])
    assert_same(resumed[1], straight[1])
