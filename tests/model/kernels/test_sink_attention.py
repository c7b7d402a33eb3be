"""Sink attention against its plain twin in fp64, forward and gradients, at every border of its blocks."""

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import SCALE, case, continued, leaves, packed, sample

from consilience.model.exact import exact_mode
from consilience.model.kernels.attention_keys import Keys, stretches
from consilience.model.kernels.sink_attention import sink_attention, sink_attention_dense
from consilience.model.layout import packed_layout

torch.set_num_threads(1)


@pytest.fixture
def config(smallest):
    return replace(smallest, sliding_window=4)


def assert_equals_the_twin(query, keys, sink, buffer=1 << 22):
    """fp64: a few dozen terms of size about 1 each."""
    ours, twin = (
        sink_attention(query, keys, sink, SCALE, buffer),
        sink_attention_dense(query, keys, sink, SCALE),
    )
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-13)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(5))
    inputs = leaves(query, keys, sink)
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, upstream, materialize_grads=True) for y in (ours, twin))
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad(), exact_mode():
        torch.testing.assert_close(sink_attention(query, keys, sink, SCALE), twin, rtol=0, atol=1e-13)


def test_one_key_and_the_sink_worked_by_hand(config):
    # score 2·3·0.5 = 3, sink 3: the key gets one half, and is the value too.
    layout = packed_layout(
        config, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), None
    )
    query, keys = torch.tensor(2.0).view(1, 1, 1, 1), Keys(layout, 4, torch.tensor(3.0).view(1, 1, 1))
    assert sink_attention(query, keys, torch.tensor([3.0]), 0.5).item() == pytest.approx(1.5)
    even = 3 * math.exp(3) / (math.exp(3) + 1)
    assert sink_attention(query, keys, torch.tensor([0.0]), 0.5).item() == pytest.approx(even)


def test_queries_are_cut_into_blocks_of_the_window_as_many_at_once_as_the_buffer_allows(config):
    _, keys, _ = case(packed(config, 25), config, 4)
    whole = [(p.start, p.stop, p.blocks, p.key, p.span, p.columns) for p in stretches(keys, 25, 3, 2)]
    # The first block has no window before it; the last token is a block of its own.
    assert whole == [(0, 4, 1, 0, 4, 1), (4, 24, 5, 0, 8, 6), (24, 25, 1, 20, 5, 6)]
    single = [(p.start, p.stop, p.blocks, p.key, p.span, p.columns) for p in stretches(keys, 25, 3, 2, 1)]
    assert single[1:-1] == [(s, s + 4, 1, s - 4, 8, s // 4 + 1) for s in range(4, 24, 4)]
    # 3 rows · 2 heads · (8 window keys + 6 entries + the sink) · 4 queries = 360 logits a block.
    pairs = [p.blocks for p in stretches(keys, 25, 3, 2, 360 * 2 + 359)]
    assert pairs == [1, 2, 2, 1, 1]


@pytest.mark.parametrize("window", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 23, 48])
@pytest.mark.parametrize("ratio", [0, 4, 12])
def test_packed_rows_equal_the_plain_twin(window, length, ratio, config):
    config = replace(config, sliding_window=window)
    assert_equals_the_twin(*case(packed(config, length), config, ratio))


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize(("length", "num_picks", "gathers"), [(30, 3, False), (30, 50, False), (76, 2, True)])
def test_packed_rows_with_picks_equal_the_plain_twin(window, length, num_picks, gathers, config):
    config = replace(config, sliding_window=window)
    query, keys, sink = case(packed(config, length), config, 4, num_picks)
    assert keys.gathers == gathers
    assert_equals_the_twin(query, keys, sink)


@pytest.mark.parametrize(
    ("starts", "length", "lengths"),
    [
        ([0, 0, 0], 9, None),
        ([0, 3, 61], 1, [1, 1, 0]),
        ([2, 75, 9], 3, None),
        ([50, 4, 33], 23, [23, 1, 0]),
        ([3, 4, 5], 32, [30, 32, 31]),
        ([3, 20, 40], 20, [20, 0, 1]),  # padding that would see more than there is
    ],
)
@pytest.mark.parametrize(("ratio", "num_picks"), [(0, None), (4, None), (12, None), (4, 2), (4, 1)])
def test_chunks_on_a_decode_state_equal_the_plain_twin(starts, length, lengths, ratio, num_picks, config):
    query, keys, sink = case(continued(config, starts, length, lengths), config, ratio, num_picks)
    if num_picks:
        assert keys.gathers == (keys.windows.num_columns > 8 * num_picks)
    assert_equals_the_twin(query, keys, sink)


@pytest.mark.parametrize(("ratio", "num_picks"), [(0, None), (12, None), (4, 3), (4, 1)])
@pytest.mark.parametrize("buffer", [1, 2000])
def test_a_small_buffer_changes_nothing(buffer, ratio, num_picks, config):
    query, keys, sink = case(packed(config, 61), config, ratio, num_picks)
    assert len(list(stretches(keys, 61, 3, 3, buffer))) > len(list(stretches(keys, 61, 3, 3))) == 3
    assert_equals_the_twin(query, keys, sink, buffer)


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize(("ratio", "num_picks"), [(0, None), (4, None), (12, None), (4, 2), (4, 1)])
def test_a_single_step_on_the_ring_equals_the_same_token_as_a_chunk(lookahead, ratio, num_picks, config):
    starts = [0, 1, 3, 4, 47, 60]
    chunk = continued(config, starts, 1, [1] * 6, lookahead)
    query, keys, sink = case(chunk, config, ratio, num_picks)
    step = continued(config, starts, 1, None, lookahead)
    assert step.is_step and not chunk.is_step
    ring = torch.full((6, 4 + lookahead, 5), 1e3, dtype=torch.float64)  # what a step must not see
    with torch.no_grad():
        for row, start in enumerate(starts):
            for back in range(min(start, 3) + 1):
                ring[row, (start - back) % (4 + lookahead)] = keys.window[row, 4 - back]
        stepping = replace(keys, layout=step, window=ring)
        as_chunk = sink_attention(query, keys, sink, SCALE)
        torch.testing.assert_close(sink_attention(query, stepping, sink, SCALE), as_chunk, rtol=0, atol=1e-13)
        with exact_mode():
            exact = sink_attention(query, stepping, sink, SCALE)
            assert torch.equal(exact, sink_attention(query, keys, sink, SCALE))
        torch.testing.assert_close(exact, as_chunk, rtol=0, atol=1e-13)
    assert_equals_the_twin(query, keys, sink)


@pytest.mark.parametrize("num_picks", [None, 2, 1])
def test_gradcheck(num_picks, config):
    config = replace(config, sliding_window=2)
    layout = continued(config, [33], 5)
    if num_picks != 1:
        layout = packed_layout(config, *(x[None] for x in sample(9, 2)), None)
    query, keys, sink = case(layout, config, 4, num_picks, heads=2, width=2)
    function = lambda q, s, w, e: sink_attention(q, replace(keys, window=w, entries=e), s, 0.6)
    assert torch.autograd.gradcheck(function, (query, sink, keys.window, keys.entries))


def test_what_a_sample_contributes_stays_in_it(config):
    """Gradients of sample 0's outputs reach its own keys and entries alone."""
    query, keys, sink = case(packed(config, 30), config, 4)
    layout, windows = keys.layout, keys.windows
    out = sink_attention(query, keys, sink, SCALE)
    d_query, d_window, d_entries = torch.autograd.grad(out[1, :10].sum(), (query, keys.window, keys.entries))
    reached = [x.abs().sum(-1).nonzero().tolist() for x in (d_query.sum(2), d_window, d_entries)]
    assert reached[0] == reached[1] == [[1, t] for t in range(10)]
    assert layout.position[1, 10] == 0 and windows.stop[1, 9] == 2
    assert reached[2] == [[1, 0], [1, 1]]


def test_padding_has_finite_outputs_and_gradients(config):
    query, keys, sink = case(packed(config, 22), config, 4, 1, dtype=torch.float32)
    out = sink_attention(query * 1e4, keys, sink * 1e4, 1.0)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves(query, keys, sink))
    assert not query.grad[2].isnan().any() and out[2].any()


@pytest.mark.parametrize(("length", "num_picks"), [(33, None), (33, 3), (61, 1)])
def test_two_runs_are_bit_equal_forward_and_backward(length, num_picks, config):
    query, keys, sink = case(packed(config, length), config, 4, num_picks, width=16, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = sink_attention(query, keys, sink, 0.25)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves(query, keys, sink))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_strides_do_not_matter_and_inputs_are_left_as_they_were(config):
    query, keys, sink = case(packed(config, 30), config, 4)
    before = [x.detach().clone() for x in leaves(query, keys, sink)]
    turn = lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided = turn(query), replace(keys, window=turn(keys.window), entries=turn(keys.entries)), sink
    found, expected = (sink_attention(*c, SCALE) for c in (strided, (query, keys, sink)))
    # A library may sum strided factors in another order: fp64, so the last bits of it.
    same = lambda a, b: torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    assert same(found, expected)
    upstream = torch.randn(1, dtype=torch.float64).expand(found.shape)  # strides 0
    grads = zip(torch.autograd.grad(found, leaves(*strided), upstream), leaves(query, keys, sink))
    expected.backward(upstream)
    assert all(same(a, x.grad) for a, x in grads)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(query, keys, sink)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("num_picks", [None, 1])
def test_narrow_types_stay_near_fp64(dtype, bound, num_picks, config):
    """fp32: sums of a dozen terms near 1. bf16: fp32 logits and weights, the output rounds once, 2^-8."""
    query, keys, sink = case(packed(config, 61), config, 4, num_picks, dtype=dtype)
    wide = replace(keys, window=keys.window.double(), entries=keys.entries.double())
    exact = sink_attention_dense(query.double(), wide, sink.double(), SCALE)
    out = sink_attention(query, keys, sink, SCALE)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < bound * exact.abs().max()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    for got, wanted in zip(
        torch.autograd.grad(out, leaves(query, keys, sink), upstream),
        torch.autograd.grad(exact, leaves(query, keys, sink), upstream.double()),
    ):
        # The bf16 backward subtracts the rounded output's share: one more rounding of that size.
        assert got.dtype == dtype and (got - wanted).abs().max() < 2 * bound * wanted.abs().max()
