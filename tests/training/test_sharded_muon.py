"""Muon on 2, 3 and 4 ranks against Muon on one: updates, momentum, and what a rank keeps of it."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.ranks import ALONE
from consilience.training import ownership
from consilience.training.muon import Muon, MuonParameter
from consilience.training.sharded_muon import ShardedMuon
from tests.rank_processes import on_ranks
from tests.ranks_table import keep, off

pytestmark = pytest.mark.row("Muon", "torch, shard_state")

torch.set_num_threads(1)

SHAPES = {
    "layers.0.attn.wq_b.weight": ((48, 16), (48,)),
    "layers.0.attn.wo_a.weight": ((32, 24), (8,) * 4),
    "layers.0.hc_attn.fn": ((24, 32), (4, 4, 16)),
    "layers.0.ffn.experts.w1": ((5, 8, 16), (8,)),
    "layers.0.ffn.experts.w2": ((5, 16, 8), (16,)),
    "layers.0.ffn.experts.w3": ((5, 8, 16), (8,)),
    "layers.0.ffn.gate.weight": ((5, 16), (5,)),
    "layers.1.attn.wq_b.weight": ((48, 16), (48,)),
    "layers.1.ffn.shared_experts.w1.weight": ((12, 16), (12,)),
}
NUM_STEPS = 3
SLOW = pytest.mark.slow


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        MuonParameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)), blocks)
        for name, (shape, blocks) in SHAPES.items()
    ]


def gradients_of(step, rank, dtype=torch.float32):
    """Of one rank; the router's is only there on even steps, on no rank otherwise."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    grads = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in SHAPES.items()}
    if step % 2:
        grads.pop("layers.0.ffn.gate.weight")
    return grads


def state_of(owned, muon):
    return {p.name: p.parameter.detach() for p in owned}, muon.state_tensors()


def of_sums(size, dtype=torch.float32):
    """One process that has the sums, in the order of the ranks."""
    owned = parameters(dtype)
    muon = Muon(owned)
    for step in range(NUM_STEPS):
        of_ranks = [gradients_of(step, rank, dtype) for rank in range(size)]
        for p in owned:
            p.parameter.grad = sum(g[p.name] for g in of_ranks) if p.name in of_ranks[0] else None
        muon.step(0.05)
    return state_of(owned, muon)


def sharded(ranks, dtype=torch.float32, window_bytes=512, are_summed=False):
    ownership.WINDOW_BYTES = window_bytes  # windows end inside matrices; of a process that ends with the test
    owned = parameters(dtype)
    muon = ShardedMuon(owned, ranks=ranks)
    for step in range(NUM_STEPS):
        if are_summed:
            of_ranks = [gradients_of(step, rank, dtype) for rank in range(ranks.size)]
            for p in owned:
                p.parameter.grad = sum(g[p.name] for g in of_ranks) if p.name in of_ranks[0] else None
        else:
            muon.sum_gradients(gradients_of(step, ranks.rank, dtype), step)
        muon.step(0.05)
    held = sum(value.numel() for value in muon._muon.state_tensors().values())
    return *state_of(owned, muon), held


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_ranks_take_the_update_of_one_process_that_has_the_sums(size, tmp_path):
    """The same sums in the same order, so gradients and momentum are the same bits. Newton–Schulz runs on
    batches of other sizes, whose products the CPU may add up in another order: 1e-5 of weights about 1."""
    weights, momenta = of_sums(size)
    found = on_ranks(size, sharded, folder=tmp_path, is_apart=True)
    for own_weights, own_momenta, _ in found:
        for name in SHAPES:
            assert torch.equal(own_momenta[name], momenta[name]), name
            torch.testing.assert_close(own_weights[name], weights[name], rtol=0, atol=1e-5, msg=name)
            keep(off(own_weights[name], weights[name]))
            assert torch.equal(own_weights[name], found[0][0][name]), name
    assert sum(held for *_, held in found) == sum(value.numel() for value in momenta.values())


def both_ways_and_doubles(ranks):
    own_sums, others = sharded(ranks, window_bytes=1 << 20), sharded(ranks, are_summed=True)
    return own_sums, others, sharded(ranks, torch.float64)


@SLOW
def test_gradients_that_are_summed_already_and_windows_of_any_size_give_the_same_bits(tmp_path):
    found = on_ranks(2, both_ways_and_doubles, folder=tmp_path, is_apart=True)
    reference = of_sums(2, torch.float64)
    for by_owner, on_weights, doubles in found:
        for name in SHAPES:
            assert torch.equal(by_owner[0][name], on_weights[0][name])
            assert torch.equal(by_owner[1][name], on_weights[1][name])
            torch.testing.assert_close(doubles[0][name], reference[0][name], rtol=0, atol=1e-12)


def save_and_continue(ranks, state):
    """Momentum of some other number of ranks taken in, one more step, momentum given back."""
    owned = parameters()
    muon = ShardedMuon(owned, ranks=ranks)
    muon.load_state_tensors(state)
    taken = muon.state_tensors()
    muon.sum_gradients({n: g / ranks.size for n, g in gradients_of(8, 0).items()}, 8)
    muon.step(0.05)
    return taken, *state_of(owned, muon)


@SLOW
def test_momentum_does_not_know_how_many_ranks_it_came_from(tmp_path):
    _, momenta = of_sums(3)
    alone = save_and_continue(ALONE, momenta)
    for size in (2, 4):
        for taken, weights, after in on_ranks(size, save_and_continue, momenta, folder=tmp_path):
            for name in SHAPES:
                assert torch.equal(taken[name], momenta[name])
                assert torch.equal(after[name], alone[2][name])  # halves and quarters add up exactly
                torch.testing.assert_close(weights[name], alone[1][name], rtol=0, atol=1e-5)


def in_groups(ranks):
    """Two equal matrices on four ranks: two owners, the other two repeat their work."""
    owned = [MuonParameter(n, torch.nn.Parameter(torch.eye(8)), (8,)) for n in ("a", "b")]
    muon = ShardedMuon(owned, ranks=ranks)
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + ranks.rank)
        muon.sum_gradients({p.name: torch.randn(8, 8, generator=generator) for p in owned}, step)
        muon.step(0.05)
    return len(muon.dense.ownership.owners), *state_of(owned, muon)


@SLOW
def test_groups_that_repeat_the_work_add_their_gradients_and_agree(tmp_path):
    owned = [MuonParameter(n, torch.nn.Parameter(torch.eye(8)), (8,)) for n in ("a", "b")]
    muon = Muon(owned)
    for step in range(2):
        generators = [torch.Generator().manual_seed(10 * step + rank) for rank in range(4)]
        grads = [{p.name: torch.randn(8, 8, generator=g) for p in owned} for g in generators]
        for p in owned:
            p.parameter.grad = sum(g[p.name] for g in grads)
        muon.step(0.05)
    weights, momenta = state_of(owned, muon)
    found = on_ranks(4, in_groups, folder=tmp_path)
    for owners, own_weights, own_momenta in found:
        assert owners == 2
        for name in "ab":  # (0 + 1) + (2 + 3) in another order than 0 + 1 + 2 + 3: rounding of four terms
            torch.testing.assert_close(own_momenta[name], momenta[name], rtol=0, atol=2e-6)
            torch.testing.assert_close(own_weights[name], weights[name], rtol=0, atol=1e-5)
            assert torch.equal(own_weights[name], found[0][1][name])


def with_bf16_exchange(ranks, has_bf16_exchange):
    owned = parameters()
    muon = ShardedMuon(owned, ranks=ranks, has_bf16_exchange=has_bf16_exchange, seed=4)
    muon.sum_gradients(gradients_of(0, ranks.rank), 0)
    muon.step(0.05)
    return state_of(owned, muon)


@SLOW
def test_bf16_exchange_touches_experts_only_and_its_error_is_that_of_the_rounding(tmp_path):
    """After one step momentum is the summed gradient. A rounding errs by less than a step of bf16, 2⁻⁷ of the
    number, with a deviation of at most half of it; the sum of two ranks' by the root of two of that. And it
    does so again with the same seed."""
    exact = on_ranks(2, with_bf16_exchange, False, folder=tmp_path)[0]
    found = on_ranks(2, with_bf16_exchange, True, folder=tmp_path)
    repeated = on_ranks(2, with_bf16_exchange, True, folder=tmp_path)
    terms = [gradients_of(0, rank) for rank in range(2)]
    for name in SHAPES:
        assert torch.equal(found[0][1][name], repeated[1][1][name])
        assert torch.equal(found[0][0][name], repeated[1][0][name])
        error = found[0][1][name] - exact[1][name]
        if ".experts." not in name:
            assert not error.any()
            continue
        assert error.any()
        assert (error.abs() <= 2**-7 * (terms[0][name].abs() + terms[1][name].abs())).all()
        assert float(error.norm() / exact[1][name].norm()) < 2**-8
        assert abs(float(error.mean())) < 5 * float(error.std()) / error.numel() ** 0.5


def test_a_weight_that_is_not_contiguous_is_refused_by_name():
    owned = [MuonParameter("w", torch.nn.Parameter(torch.eye(4)[:, :3].t()), (3,))]
    with pytest.raises(EngineError, match="w is not contiguous"):
        ShardedMuon(owned)
