"""Decoding on the state equals the full forward, however the tokens arrive."""

import itertools
from dataclasses import replace

import pytest
import torch

from consilience.model.state import DecodeState

torch.set_num_threads(1)


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def near(found, expected):
    """fp32: logits have size about 5 here, and 1e-5 is the bound the decode state promises."""
    return (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.fixture
def case(smallest, rough_model):
    """(model, ids [3, 61], logits by the full forward). Few Sinkhorn rounds: they save half the time."""
    model = rough_model(replace(smallest, hc_sinkhorn_iters=3)).requires_grad_(False)
    tokens = random_ids(smallest, 3, 61)
    return model, tokens, model(tokens)


def fed(model, state, tokens, cuts):
    """Logits of `tokens` fed in chunks that end at `cuts`."""
    edges = [0, *cuts, tokens.shape[1]]
    return torch.cat([model(tokens[:, a:b], state=state) for a, b in itertools.pairwise(edges) if b > a], 1)


def test_token_by_token_equals_the_full_forward_at_every_length(case):
    model, tokens, full = case
    state = DecodeState.allocate(model.config, 3, 61)
    assert near(fed(model, state, tokens, range(1, 61)), full)
    assert state.position.tolist() == [61] * 3


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19, 24])
def test_a_prefill_of_any_length_hands_over_to_decoding(case, first):
    """Prefill, then single steps over the next borders of window (6), CSA (4) and HCA (12)."""
    model, tokens, full = case
    state = DecodeState.allocate(model.config, 3, 61)
    assert near(fed(model, state, tokens[:, : first + 9], range(first, first + 9)), full[:, : first + 9])


@pytest.mark.parametrize("seed", range(4))
def test_arbitrary_chunk_borders_change_nothing(case, seed):
    model, tokens, full = case
    g = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randperm(60, generator=g)[: 3 + 2 * seed].add(1).tolist())
    state = DecodeState.allocate(model.config, 3, 61)
    assert near(fed(model, state, tokens, cuts), full), cuts


def test_released_ratios_and_windows_decode_across_two_hca_blocks(smallest, rough_model):
    config = replace(smallest, compress_ratios=(0, 4, 128, 4), sliding_window=128)
    model = rough_model(config).requires_grad_(False)
    tokens = random_ids(config, 2, 270)
    full = model(tokens)
    state = DecodeState.allocate(config, 2, 270)
    singles = [*range(125, 132), *range(253, 260)]
    assert near(fed(model, state, tokens, [3, 100, *singles, 261, 262]), full)


def ragged(model, state, tokens, lengths):
    """Feed each row its next lengths[b] tokens, right-padded with junk; logits of the new tokens by row."""
    starts = state.position.tolist()
    widest = max(*lengths, 1)
    chunk = random_ids(model.config, len(lengths), widest, seed=99)
    for b, n in enumerate(lengths):
        chunk[b, :n] = tokens[b, starts[b] : starts[b] + n]
    logits = model(chunk, state=state, lengths=torch.tensor(lengths))
    return [logits[b, :n] for b, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(6))
def test_ragged_chunks_leave_rows_at_different_positions_and_each_equals_the_full_forward(case, seed):
    model, tokens, full = case
    g = torch.Generator().manual_seed(seed)
    state = DecodeState.allocate(model.config, 3, 61)
    for _ in range(9):
        starts = state.position.tolist()
        lengths = torch.randint(0, (3, 14, 30)[seed % 3], (3,), generator=g).tolist()
        lengths = [min(n, 60 - s) for n, s in zip(lengths, starts)]
        for b, logits in enumerate(ragged(model, state, tokens, lengths)):
            assert near(logits, full[b, starts[b] : starts[b] + lengths[b]]) if lengths[b] else True
        assert state.position.tolist() == [s + n for s, n in zip(starts, lengths)]
    where = state.position.clone()
    step = model(tokens.gather(1, where[:, None]), state=state)[:, 0]
    assert near(step, full[torch.arange(3), where])


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 0, 1]])
def test_one_token_chunks_with_lengths_equal_the_full_forward(case, lengths):
    model, tokens, full = case
    state = DecodeState.allocate(model.config, 3, 61)
    for _ in range(13):
        starts = state.position.tolist()
        for b, logits in enumerate(ragged(model, state, tokens, lengths)):
            assert lengths[b] == 0 or near(logits, full[b, starts[b] : starts[b] + 1])


@pytest.mark.parametrize("fork_at", [1, 7, 12, 23])
def test_a_fork_goes_its_own_way_and_leaves_its_source_alone(case, fork_at):
    model, tokens, full = case
    other = tokens.clone()
    other[:, fork_at:] = random_ids(model.config, 3, 61, seed=31)[:, fork_at:]
    full_other = model(other)
    state, parked = (DecodeState.allocate(model.config, 4, 61) for _ in range(2))
    model(random_ids(model.config, 4, 50, seed=3), state=state)  # stale values everywhere
    model(random_ids(model.config, 4, 50, seed=4), state=parked)
    state.position.zero_()
    view = state.view(1, 2)
    model(tokens[:1, :fork_at], state=view)
    assert state.position.tolist() == [0, fork_at, 0, 0]  # a view shares memory with its state
    parked.copy_from(state, [1], [3])
    state.copy_from(state, [1, 1], [0, 2])
    both = torch.stack((tokens[0], other[0], tokens[0]))[:, fork_at : fork_at + 14]
    found = torch.stack([model(both[:, i : i + 1], state=state.view(0, 3))[:, 0] for i in range(14)], 1)
    wanted = torch.stack((full[0], full_other[0], full[0]))[:, fork_at : fork_at + 14]
    assert near(found, wanted)
    late = model(other[:1, fork_at : fork_at + 14], state=parked.view(3, 4))
    assert near(late, full_other[:1, fork_at : fork_at + 14])


def test_a_slot_whose_position_is_0_remembers_nothing(case):
    model, tokens, full = case
    state = DecodeState.allocate(model.config, 3, 61)
    model(random_ids(model.config, 3, 57, seed=8), state=state)
    state.position.zero_()
    assert near(fed(model, state, tokens, [2, 3, 9, 40]), full)


def test_the_state_decodes_in_fp64_to_rounding(smallest, rough_model):
    model = rough_model(smallest, dtype=torch.float64).requires_grad_(False)
    tokens = random_ids(smallest, 2, 40)
    state = DecodeState.allocate(smallest, 2, 40, dtype=torch.float64)
    torch.testing.assert_close(fed(model, state, tokens, [7, 8, 9, 30]), model(tokens), rtol=0, atol=1e-11)


def test_the_state_has_the_specified_shapes_and_counts_its_bytes(smallest):
    state = DecodeState.allocate(smallest, 2, 50, dtype=torch.bfloat16)
    sliding, csa, hca, _ = state.layers
    assert sliding.compressor is None and hca.indexer is None
    assert [tuple(t.shape) for t in csa.tensors()] == [
        (2, 6, 16),
        (2, 12, 16),  # 50 // 4 entries
        (2, 8, 32),  # 8 raw tokens of both series
        (2, 8, 32),
        (2, 12, 12),
        (2, 8, 24),
        (2, 8, 24),
    ]
    assert [tuple(t.shape) for t in hca.tensors()] == [(2, 6, 16), (2, 4, 16), (2, 12, 16), (2, 12, 16)]
    assert csa.compressor.values.dtype == torch.float32 and csa.compressor.entries.dtype == torch.bfloat16
    half, full = 2, 4
    csa_bytes = half * (6 * 16 + 12 * 16 + 12 * 12) + full * 2 * (8 * 32 + 8 * 24)
    hca_bytes = half * (6 * 16 + 4 * 16) + full * 2 * 12 * 16
    assert state.num_bytes() == 2 * (8 + half * 6 * 16 + 2 * csa_bytes + hca_bytes)
