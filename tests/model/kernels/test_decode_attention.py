"""The compiled decoding step against its PyTorch twins, on rings and blocks at every border."""

import math
from dataclasses import replace

import pytest
import torch

from consilience.model.compressor import Compressor
from consilience.model.exact import exact_mode
from consilience.model.forward_trace import Trace
from consilience.model.indexer import Indexer
from consilience.model.kernels import decode_attention
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.compiled import library
from consilience.model.kernels.sink_attention import sink_attention
from consilience.model.layout import chunk_layout
from consilience.model.quantization import FP4
from consilience.model.state import DecodeState

torch.set_num_threads(1)

STARTS = [0, 1, 3, 5, 6, 11, 12, 47, 60]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config, starts=STARTS, lookahead=0):
    """A state whose rows stand at `starts`, every number of it drawn; blocks lie in mixed order."""
    state = DecodeState.allocate(config, len(starts), 72, num_blocks=60, lookahead=lookahead)
    for length in range(12, 73, 12):
        for row in range(len(starts)):
            state.reserve(row, length)
    state.position[:] = torch.tensor(starts)
    for seed, tensor in enumerate(t for t in state.tensors() if t.is_floating_point()):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    return state


def step_of(config, state):
    return chunk_layout(config, state, 1, None, None)


def test_this_machine_runs_the_compiled_kernel_where_nothing_is_traced(smallest):
    assert not isinstance(library("decode_attention"), str), library("decode_attention")
    state = filled(smallest)
    layout, x = step_of(smallest, state), draw(1)
    assert not decode_attention.is_available(layout, x)
    with torch.no_grad():
        assert decode_attention.is_available(layout, x)
        assert not decode_attention.is_available(layout, x.double())
        assert not decode_attention.is_available(replace(layout, trace=Trace()), x)
        assert not decode_attention.is_available(replace(layout, is_step=False), x)
        with exact_mode():
            assert not decode_attention.is_available(layout, x)


def test_a_token_on_its_own_key_and_the_sink_worked_by_hand(smallest):
    """One key k = q with q·k·scale = ln 3 and a sink of 0: the key's weight is 3 / 4."""
    state = filled(smallest, [0])
    layout, key = step_of(smallest, state), state.layers[0].window[:, :1].clone()
    scale = math.log(3) / float(key.square().sum())
    query = key.view(1, 1, 1, -1).contiguous()
    ring = torch.full_like(state.layers[0].window, 7.0)
    found = decode_attention.attend(query, key, ring, torch.zeros(1), scale, layout, None)
    assert torch.equal(ring[:, :1], key) and (ring[:, 1:] == 7).all()
    torch.testing.assert_close(found, 0.75 * query)


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize(("ratio", "topk"), [(0, 0), (4, 0), (12, 0), (4, 5), (4, 1)])
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (3, 18)])
def test_attention_on_rings_and_blocks_equals_the_twin(lookahead, ratio, topk, heads, width, smallest):
    config = replace(smallest, head_dim=width, qk_rope_head_dim=4)
    state = filled(config, lookahead=lookahead)
    layout = step_of(config, state)
    layer = state.layers[config.compress_ratios.index(ratio)]
    query, sink = draw(len(STARTS), 1, heads, width, seed=90), draw(heads, seed=91)
    keys, compressed = Keys(layout, config.sliding_window, layer.window), None
    if ratio:
        windows, picks = layout.windows[ratio], None
        if topk:
            picks = torch.full((len(STARTS), 1, topk), -1)
            for row, start in enumerate(STARTS):
                some = torch.randperm((start + 1) // 4, generator=torch.Generator().manual_seed(row))[:topk]
                picks[row, 0, : len(some)] = some.sort().values
        entries = layer.compressor.read(state.tables, windows.num_columns)
        keys = replace(keys, entries=entries, windows=windows, picks=picks)
        compressed = (ratio, layer.compressor, picks)
    slot = torch.tensor(STARTS) % layer.window.shape[1]
    own = layer.window[torch.arange(len(STARTS)), slot]
    attend = lambda: decode_attention.attend(query, own, layer.window, sink, 0.3, layout, compressed)
    torch.testing.assert_close(attend(), sink_attention(query, keys, sink, 0.3), rtol=1e-5, atol=2e-6)
    assert torch.equal(attend(), attend())


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("ratio", [4, 12])
def test_entries_that_close_equal_the_twin_s_to_rounding(lookahead, ratio, smallest):
    compressor = Compressor(smallest, smallest.head_dim, ratio, None).requires_grad_(False)
    for seed, p in enumerate(compressor.parameters()):
        p.copy_(draw(*p.shape, seed=seed))
    index, states = smallest.compress_ratios.index(ratio), []
    for wants_grad in (True, False):
        state = filled(smallest, lookahead=lookahead)
        with torch.set_grad_enabled(wants_grad):
            for token in range(12):
                hidden = draw(len(STARTS), 1, smallest.hidden_size, seed=token)
                compressor.advance(hidden, step_of(smallest, state), state.layers[index].compressor)
                state.position += 1
        states.append(state.layers[index].compressor)
    for name in ("values", "gates", "entries"):
        twin, ours = (getattr(state, name) for state in states)
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)  # entries are normed: size about 1


@torch.no_grad()
@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("topk", [1, 2, 5, 14])
def test_picks_equal_the_twin_s_also_among_equal_scores(topk, has_ties, smallest):
    config = replace(smallest, index_topk=topk)
    indexer = Indexer(config, None)
    for seed, p in enumerate(indexer.parameters()):
        p.copy_(draw(*p.shape, seed=seed))
    state = filled(config)
    layout, keys = step_of(config, state), state.layers[1].indexer
    if has_ties:  # keys of ±1 or 0 in one channel: scores of a few values, exact in any order
        keys.entries.zero_()
        keys.entries[..., 0] = draw(*keys.entries.shape[:2]).round().clamp(-1, 1)
    rows, width = len(STARTS), config.hidden_size
    hidden, latent = draw(rows, 1, width, seed=7), draw(rows, 1, config.q_lora_rank, seed=8)
    found = keys.read(state.tables, layout.windows[4].num_columns)
    index = indexer.queries(hidden, latent, found, layout)
    ours = decode_attention.pick(index.query, index.weight, topk, layout, 4, keys)
    assert torch.equal(ours, indexer.pick(index, layout))


@torch.no_grad()
def test_scores_that_are_not_numbers_pick_visible_columns_only(smallest):
    state = filled(smallest)
    layout, keys = step_of(smallest, state), state.layers[1].indexer
    keys.entries[2] = float("nan")
    rows = len(STARTS)
    picks = decode_attention.pick(draw(rows, 1, 6, 12), draw(rows, 1, 6), 3, layout, 4, keys)
    assert (picks < layout.windows[4].stop[..., None]).all() and (picks >= -1).all()


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("quantization", [None, FP4])
def test_a_model_s_steps_equal_those_of_the_twins(lookahead, quantization, rough_model, smallest):
    config = smallest if quantization is None else replace(smallest, index_head_dim=16)
    model = rough_model(config).requires_grad_(False)
    if quantization is not None:
        model.quantize(quantization)
    ids = torch.randint(53, (3, 40), generator=torch.Generator().manual_seed(1))
    hidden = []
    for wants_grad in (True, False):  # the twins go where gradients are wanted
        state = DecodeState.allocate(config, 3, 48, lookahead=lookahead)
        with torch.set_grad_enabled(wants_grad):
            model.hidden(ids[:, :10], state=state, lengths=torch.tensor([10, 3, 7]))
            hidden.append([model.hidden(ids[:, t : t + 1], state=state) for t in range(10, 40)])
    steps = len(hidden[0]) if quantization is None else 1  # a rounding that flips moves all that follows
    for twin, ours in zip(hidden[0][:steps], hidden[1]):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)  # four layers, values of size 1


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [2, 4, 5, 9])
@pytest.mark.parametrize("ratio", [0, 4, 12])
def test_attention_of_a_row_has_the_same_bits_in_any_company(ratio, num_rows, smallest):
    def attend(state, query, kv):
        layer, layout = state.layers[smallest.compress_ratios.index(ratio)], step_of(smallest, state)
        compressed = (ratio, layer.compressor, None) if ratio else None
        return decode_attention.attend(query, kv, layer.window, sink, 0.3, layout, compressed)

    state, query, kv, sink = filled(smallest, STARTS[:num_rows]), draw(9, 1, 4, 16), draw(9, 1, 16), draw(4)
    together = attend(state, query[:num_rows], kv[:num_rows])
    for row in range(num_rows):
        one = slice(row, row + 1)
        assert torch.equal(attend(state.view(row, row + 1), query[one], kv[one])[0], together[row])


@torch.no_grad()
def test_picks_and_entries_of_a_row_have_the_same_bits_in_any_company(smallest):
    together, alone = filled(smallest), filled(smallest)
    layer = smallest.compress_ratios.index(4)
    compressor = Compressor(smallest, smallest.head_dim, 4, None)
    values, gates = (draw(9, 1, 2 * smallest.head_dim, seed=seed) for seed in (1, 2))
    heads, width = 6, smallest.index_head_dim
    query, weight = draw(9, 1, heads, width, seed=3), draw(9, 1, heads, seed=4)
    main, index = together.layers[layer].compressor, together.layers[layer].indexer
    layout = step_of(smallest, together)
    decode_attention.compress(compressor, values, gates, layout, main)
    picks = decode_attention.pick(query, weight, 3, layout, 4, index)
    for row in range(9):
        one, view = slice(row, row + 1), alone.view(row, row + 1)
        layout, own = step_of(smallest, view), view.layers[layer]
        decode_attention.compress(compressor, values[one], gates[one], layout, own.compressor)
        assert torch.equal(
            decode_attention.pick(query[one], weight[one], 3, layout, 4, own.indexer)[0], picks[row]
        )
    for ours, company in zip(alone.tensors(), together.tensors()):
        assert torch.equal(ours, company)
