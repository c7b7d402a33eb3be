"""Decoding on the state equals the full forward, however the tokens arrive."""

import itertools
from dataclasses import replace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.state import DecodeState

torch.set_num_threads(1)


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def near(found, expected):
    """fp32: logits have size about 5 here, and 1e-5 is the bound the decode state promises."""
    return (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("lookahead", [0, 3])
def test_rows_may_be_set_back_and_go_on_with_other_tokens(lookahead, smallest, rough_model):
    """Every position up to 25, so all borders of window 6, CSA 4 and HCA 12; every number of tokens.

    fp64: what differs is what was forgotten.
    """
    model = rough_model(replace(smallest, hc_sinkhorn_iters=2), dtype=torch.float64).requires_grad_(False)
    cases = [(start, back) for start in range(26) for back in range(1, lookahead + 2)]
    starts, backs = torch.tensor(cases).unbind(1)
    tokens = random_ids(smallest, len(cases), 34)
    state = DecodeState.allocate(model.config, len(cases), 40, lookahead=lookahead, dtype=torch.float64)
    model(tokens[:, :25], state=state, lengths=starts)
    # A draft of lookahead + 1 tokens of which all but the last `back` are the sequence's own.
    own = (torch.arange(lookahead + 1) < lookahead + 1 - backs[:, None]).long()
    window = starts[:, None] + torch.arange(lookahead + 1)
    draft = torch.where(own.bool(), tokens.gather(1, window), random_ids(smallest, *window.shape, seed=8))
    model(draft, state=state)
    state.position -= backs
    assert torch.equal(state.position, starts + own.sum(1))
    full, found, first = model(tokens), [], state.position.clone()
    for length in (1, 3, 1):  # a step on the ring, a chunk, and a step again
        here = state.position[:, None] + torch.arange(length)
        found.append(model(tokens.gather(1, here), state=state))
    where = first[:, None] + torch.arange(5)
    expected = full.gather(1, where[..., None].expand(-1, -1, full.shape[2]))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_state_decodes_as_near_to_fp64_as_the_full_forward(dtype, smallest, rough_model):
    """Both round alike in number, in another order: neither error may be half as large again as the other."""
    tokens = random_ids(smallest, 2, 40)
    model = rough_model(smallest, dtype=dtype).requires_grad_(False)
    exact = rough_model(smallest, dtype=torch.float64).requires_grad_(False)(tokens)
    state = DecodeState.allocate(smallest, 2, 40, dtype=dtype)
    found = fed(model, state, tokens, [7, 8, 9, 30])
    assert found.dtype == torch.promote_types(dtype, torch.float32)  # the head's logits
    decoded, full = ((logits - exact).square().mean() for logits in (found, model(tokens)))
    assert decoded <= 1.5**2 * full


def test_the_state_has_the_specified_shapes_and_counts_its_bytes(smallest):
    state = DecodeState.allocate(smallest, 2, 50, dtype=torch.bfloat16)
    sliding, csa, hca, _ = state.layers
    assert sliding.compressor is None and hca.indexer is None
    # 50 tokens take 5 blocks of lcm(4, 12) = 12; 2 · 5 of them, and the one that is nobody's.
    assert (state.block_tokens, state.tables.shape, state.pool.holders) == (12, (2, 5), [0] + [1] * 10)
    assert [tuple(t.shape) for t in csa.rings()] == [
        (2, 6, 16),
        (2, 8, 32),  # 8 raw tokens of both series, of the entries and of the index keys
        (2, 8, 32),
        (2, 8, 24),
        (2, 8, 24),
    ]
    assert [tuple(t.shape) for t in csa.pages()] == [(11, 3, 16), (11, 3, 12)]
    assert [tuple(t.shape) for t in hca.rings()] == [(2, 6, 16), (2, 12, 16), (2, 12, 16)]
    assert [tuple(t.shape) for t in hca.pages()] == [(11, 1, 16)]
    assert csa.compressor.values.dtype == torch.float32 and csa.compressor.entries.dtype == torch.bfloat16
    rings = 3 * 2 * 6 * 16 * 2 + 2 * 6 * 16 * 2 + 4 * 2 * (2 * 2 * 8 * 32 + 2 * 2 * 8 * 24 + 2 * 12 * 16)
    pages = 2 * 11 * (2 * 3 * 16 + 2 * 3 * 12 + 16)
    assert state.num_bytes() == 8 * (2 + 2 * 5) + rings + pages


def test_lookahead_lengthens_the_rings_alone(smallest):
    plain, ahead = (DecodeState.allocate(smallest, 1, 24, lookahead=n).layers[1] for n in (0, 3))
    assert [a.shape[1] - p.shape[1] for a, p in zip(ahead.rings(), plain.rings())] == [3] * 5
    assert [a.shape for a in ahead.pages()] == [p.shape for p in plain.pages()]


def test_released_models_have_blocks_of_128_tokens():
    state = DecodeState.allocate(TINY, 1, 300, num_blocks=2)
    assert (state.block_tokens, DecodeState.blocks_of(TINY, 256), DecodeState.blocks_of(TINY, 257)) == (
        128,
        2,
        3,
    )
    assert [layer.compressor.entries.shape[1] for layer in state.layers[1:]] == [32, 1]
    assert DecodeState.blocks_of(replace(TINY, compress_ratios=(0, 0, 0)), 257) == 3
