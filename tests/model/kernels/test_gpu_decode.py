"""The decoding step's Triton kernels against PyTorch's twins, on rings and blocks at every border."""

import math
from dataclasses import replace

import pytest
import torch

from consilience.model.compressor import Compressor
from consilience.model.indexer import Indexer
from consilience.model.kernels import decode_attention, gpu_decode
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.sink_attention import sink_attention
from consilience.model.layout import chunk_layout
from consilience.model.state import DecodeState

torch.set_num_threads(1)

STARTS = [0, 1, 3, 5, 6, 11, 12, 47, 60]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config, device, starts=STARTS, lookahead=0, dtype=torch.float32):
    """A state whose rows stand at `starts`, every number of it drawn; blocks lie in mixed order."""
    state = DecodeState.allocate(
        config, len(starts), 72, num_blocks=60, lookahead=lookahead, device=device, dtype=dtype
    )
    for length in range(12, 73, 12):
        for row in range(len(starts)):
            state.reserve(row, length)
    state.position[:] = torch.tensor(starts)
    for seed, tensor in enumerate(t for t in state.tensors() if t.is_floating_point()):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    return state


def step_of(config, state, tokens=1):
    return chunk_layout(config, state, tokens, None, None)


def test_the_cpu_gradients_and_longer_chunks_keep_the_twin(smallest):
    state, x = filled(smallest, "cpu", lookahead=1), torch.zeros(9, 1, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert not gpu_decode.is_available(step_of(smallest, state), x)
    if torch.cuda.is_available():
        state, x = filled(smallest, "cuda", lookahead=1), x.cuda()
        assert not gpu_decode.is_available(step_of(smallest, state), x)
        with torch.no_grad():
            assert gpu_decode.is_available(step_of(smallest, state), x)
            assert gpu_decode.is_available(step_of(smallest, state, 2), x)
            assert not gpu_decode.is_available(step_of(smallest, state, 3), x)
            assert not gpu_decode.is_available(step_of(smallest, state), x.float())


def test_splits_are_those_of_the_state_in_every_view(smallest):
    state = DecodeState.allocate(smallest, 5, 30, num_blocks=4 * 3)
    assert gpu_decode.num_splits(state) == 132 // 4
    assert gpu_decode.num_splits(state.view(1, 2)) == gpu_decode.num_splits(state)
    assert gpu_decode.num_splits(state.view(0, 1, 12)) == gpu_decode.num_splits(state)
    assert gpu_decode.num_splits(DecodeState.allocate(smallest, 200, 12)) == 1
    assert gpu_decode.num_splits(DecodeState.allocate(smallest, 1, 12)) == gpu_decode.MOST_SPLITS


@pytest.mark.triton
@pytest.mark.parametrize("splits", [1, 3])
def test_a_token_on_its_own_key_and_the_sink_worked_by_hand(splits, smallest, triton_device, monkeypatch):
    """One key k = q with q·k·scale = ln 3 and a sink of 0: the key's weight is 3 / 4."""
    monkeypatch.setattr(gpu_decode, "num_splits", lambda state: splits)
    state = filled(smallest, triton_device, [0])
    layout, key = step_of(smallest, state), state.layers[0].window[:, :1].clone()
    scale = math.log(3) / float(key.square().sum())
    query, sink = key.view(1, 1, 1, -1).contiguous(), torch.zeros(1, device=triton_device)
    ring = torch.full_like(state.layers[0].window, 7.0)
    found = gpu_decode.attend(query, key, ring, sink, scale, layout, None)
    assert torch.equal(ring[:, :1], key) and (ring[:, 1:] == 7).all()
    torch.testing.assert_close(found, 0.75 * query)


def picks_of(starts, topk, tokens, tables, per):
    """Columns and rows of the pages [B, T, K] that queries at `starts` and behind may have picked."""
    picks = torch.full((len(starts), tokens, topk), -1)
    for row, start in enumerate(starts):
        for token in range(tokens):
            some = torch.randperm((start + token + 1) // 4, generator=torch.Generator().manual_seed(row))
            some = some[:topk].sort().values
            picks[row, token, : len(some)] = some
    blocks = tables.cpu()[torch.arange(len(starts))[:, None, None], picks.clamp(min=0) // per]
    return picks, torch.where(picks < 0, -1, blocks * per + picks % per).int()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("tokens", "splits", "heads", "width"), [(1, 1, 4, 16), (1, 4, 3, 18), (2, 2, 2, 16)]
)
@pytest.mark.parametrize(("ratio", "topk"), [(0, 0), (4, 0), (12, 0), (4, 5), (4, 1)])
def test_attention_on_rings_and_blocks_equals_the_twin(
    tokens, splits, ratio, topk, heads, width, smallest, triton_device, monkeypatch
):
    monkeypatch.setattr(gpu_decode, "num_splits", lambda state: splits)
    from consilience.model.kernels import triton_decode_attention

    monkeypatch.setitem(triton_decode_attention.ATTEND, "keys", 16)  # several tiles and stretches a row
    config = replace(smallest, head_dim=width, qk_rope_head_dim=4)
    starts = [0, 5, 12, 47, 60]
    state = filled(config, triton_device, starts, lookahead=tokens - 1)
    layer = state.layers[config.compress_ratios.index(ratio)]
    query, sink = draw(len(starts), tokens, heads, width, seed=90), draw(heads, seed=91)
    query, sink = query.to(triton_device), sink.to(triton_device)
    own = draw(len(starts), tokens, width, seed=92).to(triton_device)
    columns = rows = None
    if topk:
        columns, rows = picks_of(starts, topk, tokens, state.tables, layer.compressor.entries.shape[1])
        columns, rows = columns.to(triton_device), rows.to(triton_device)
    compressed = (ratio, layer.compressor, rows) if ratio else None
    layout = step_of(config, state, tokens)
    attend = lambda: gpu_decode.attend(query, own, layer.window, sink, 0.3, layout, compressed)
    found = attend()
    assert torch.equal(found, attend())
    for token in range(tokens):  # the twin, a token after the other
        state.position[:] = torch.tensor(starts) + token
        step = step_of(config, state)
        keys = Keys(step, config.sliding_window, layer.window)
        if ratio:
            windows = step.windows[ratio]
            entries = layer.compressor.read(state.tables, windows.num_columns)
            picks = None if columns is None else columns[:, token : token + 1]
            keys = replace(keys, entries=entries, windows=windows, picks=picks)
        expected = sink_attention(query[:, token : token + 1], keys, sink, 0.3)
        torch.testing.assert_close(found[:, token : token + 1], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.triton
def test_bf16_attention_is_within_its_roundings_of_fp64(smallest, triton_device):
    """Weights and output are rounded to bf16, 2**-9 each, of values that average below 1."""
    state = filled(smallest, triton_device, dtype=torch.bfloat16)
    wide = filled(smallest, "cpu", dtype=torch.float64)
    layer, exact = state.layers[1], wide.layers[1]
    query, own, sink = (
        draw(9, 1, 4, 16, seed=1).bfloat16(),
        draw(9, 1, 16, seed=2).bfloat16(),
        draw(4, seed=3),
    )
    place = torch.arange(9), torch.tensor(STARTS) % exact.window.shape[1]
    exact.window.copy_(layer.window), exact.compressor.entries.copy_(layer.compressor.entries)
    exact.window[place] = own[:, 0].double()
    step = step_of(smallest, wide)
    entries = exact.compressor.read(wide.tables, step.windows[4].num_columns)
    keys = Keys(step, smallest.sliding_window, exact.window, entries, step.windows[4])
    expected = sink_attention(query.double(), keys, sink.double(), 0.3)
    given = (t.to(triton_device) for t in (query, own))
    compressed = (4, layer.compressor, None)
    found = gpu_decode.attend(
        *given, layer.window, sink.to(triton_device), 0.3, step_of(smallest, state), compressed
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-8, atol=2**-7)


@pytest.mark.triton
def test_a_row_has_the_same_bits_in_any_company(smallest, triton_device, monkeypatch):
    monkeypatch.setattr(gpu_decode, "num_splits", lambda state: 3)

    def attend(state, query, kv):
        layer, layout = state.layers[1], step_of(smallest, state)
        return gpu_decode.attend(query, kv, layer.window, sink, 0.3, layout, (4, layer.compressor, None))

    state, sink = filled(smallest, triton_device), draw(4).to(triton_device)
    query, kv = draw(9, 1, 4, 16).to(triton_device), draw(9, 1, 16).to(triton_device)
    together = attend(state, query, kv)
    for row in (0, 5, 8):
        one = slice(row, row + 1)
        assert torch.equal(attend(state.view(row, row + 1), query[one], kv[one])[0], together[row])


@pytest.mark.triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("ratio", [4, 12])
def test_entries_that_close_equal_the_twin_s_to_rounding(ratio, lookahead, dtype, smallest, triton_device):
    compressor = Compressor(smallest, smallest.head_dim, ratio, dtype)
    for seed, p in enumerate(compressor.parameters()):
        p.copy_(draw(*p.shape, seed=seed))
    compressor, index, states = compressor.to(triton_device), smallest.compress_ratios.index(ratio), []
    for kernel in (compressor.advance, None):
        state = filled(smallest, triton_device, lookahead=lookahead, dtype=dtype)
        for token in range(12):
            hidden, layout = draw(len(STARTS), 1, smallest.hidden_size, seed=token), step_of(smallest, state)
            hidden, part = hidden.to(triton_device, dtype), state.layers[index].compressor
            if kernel is None:
                gpu_decode.compress(compressor, *compressor._projected(hidden), layout, part)
            else:
                with torch.enable_grad():  # the twin goes where gradients are wanted
                    kernel(hidden, layout, part)
            state.position += 1
        states.append(state.layers[index].compressor)
    for name in ("values", "gates", "entries"):
        twin, ours = (getattr(state, name) for state in states)
        # Entries are normed, of size one: bf16 rounds them to 2**-8 three times on the way.
        close = 2**-7 if dtype == torch.bfloat16 and name == "entries" else 1e-5
        torch.testing.assert_close(ours, twin, rtol=close, atol=close)


@pytest.mark.triton
@torch.no_grad()
@pytest.mark.parametrize(
    ("topk", "has_ties", "is_cut"), [(1, False, True), (2, True, False), (5, False, False), (14, True, True)]
)
def test_picks_equal_the_twin_s_also_among_equal_scores(
    topk, has_ties, is_cut, smallest, triton_device, monkeypatch
):
    from consilience.model.kernels import triton_decode_pick

    monkeypatch.setitem(triton_decode_pick.SELECT, "block", 4)  # two levels and more
    monkeypatch.setitem(triton_decode_pick.SCORES, "keys", 16)
    config = replace(smallest, index_topk=topk)
    indexer = Indexer(config, None)
    for seed, p in enumerate(indexer.parameters()):
        p.copy_(draw(*p.shape, seed=seed))
    indexer = indexer.to(triton_device)
    starts = [0, 11, 47, 60]
    state = filled(config, triton_device, starts, lookahead=1)
    keys, layout = state.layers[1].indexer, step_of(config, state, 2)
    if has_ties:  # keys of ±1 or 0 in one channel: scores of a few values, exact in any order
        keys.entries.zero_()
        keys.entries[..., 0] = draw(*keys.entries.shape[:2]).round().clamp(-1, 1)
    rows, width = len(starts), config.hidden_size
    hidden, latent = (draw(rows, 2, n, seed=7).to(triton_device) for n in (width, config.q_lora_rank))
    found = keys.read(state.tables, layout.windows[4].num_columns)
    index = replace(indexer.queries(hidden, latent, found, layout), is_cut=is_cut)
    if is_cut and not has_ties:
        # A score near a tie in bf16 rounds otherwise by a sum in another order: take those that do not.
        index = replace(
            index, query=index.query.round(), weight=index.weight.round(), keys=index.keys.round()
        )
        keys.entries.copy_(keys.entries.round())
    given = (index.query, index.weight, topk, layout, 4, keys, is_cut)
    columns, pages = gpu_decode.columns_and_rows(*given)
    assert torch.equal(gpu_decode.pick(*given), pages)
    assert torch.equal(columns, indexer.pick(index, layout))
    per = keys.entries.shape[1]
    blocks = state.tables.gather(1, columns.clamp(min=0).flatten(1) // per).view_as(columns)
    assert torch.equal(pages.long(), torch.where(columns < 0, -1, blocks * per + columns % per))


@pytest.mark.triton
@torch.no_grad()
def test_scores_that_are_not_numbers_pick_visible_columns_only(smallest, triton_device):
    state = filled(smallest, triton_device)
    layout, keys = step_of(smallest, state), state.layers[1].indexer
    keys.entries[2] = float("nan")
    query, weight = draw(9, 1, 6, 12).to(triton_device), draw(9, 1, 6).to(triton_device)
    columns, _ = gpu_decode.columns_and_rows(query, weight, 3, layout, 4, keys, False)
    assert (columns < layout.windows[4].stop[..., None]).all() and (columns >= -1).all()


@pytest.mark.triton
@torch.no_grad()
def test_a_model_s_steps_of_one_and_two_tokens_equal_the_twins(
    rough_model, smallest, triton_device, monkeypatch
):
    def serves(layout, x):
        return layout.state is not None and layout.lengths is None and layout.position.shape[1] < 3

    model = rough_model(smallest).to(triton_device)
    ids = torch.randint(53, (2, 34), generator=torch.Generator().manual_seed(1)).to(triton_device)
    hidden = []
    for ours in (False, True):
        monkeypatch.setattr(gpu_decode, "is_available", serves if ours else lambda layout, x: False)
        monkeypatch.setattr(decode_attention, "is_available", lambda layout, x: False)
        monkeypatch.setattr(gpu_decode, "num_splits", lambda state: 2)
        state = DecodeState.allocate(smallest, 2, 48, lookahead=1, device=triton_device)
        model.hidden(ids[:, :30], state=state, lengths=torch.tensor([30, 21], device=triton_device))
        cuts = ((30, 31), (31, 33), (33, 34))  # an entry of CSA closes within the second
        hidden.append(torch.cat([model.hidden(ids[:, a:b], state=state) for a, b in cuts], dim=1))
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-4)  # four layers, values of size 1
