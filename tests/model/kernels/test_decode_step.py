"""A block's decoding step in one call against `Block.forward` in PyTorch; its rows alone and in company."""

from dataclasses import replace

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.forward_trace import Trace
from consilience.model.kernels import decode_step
from consilience.model.kernels.compiled import library
from consilience.model.layout import chunk_layout
from consilience.model.quantization import FP4
from consilience.model.routing import Routing
from consilience.model.state import DecodeState

torch.set_num_threads(1)

STARTS = [0, 1, 3, 5, 6, 11, 12, 47, 60]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config, num_rows, lookahead=0):
    """A state whose rows stand at STARTS by turns, every number of it drawn; blocks lie in mixed order."""
    blocks = num_rows * DecodeState.blocks_of(config, 72)
    state = DecodeState.allocate(config, num_rows, 72, num_blocks=blocks, lookahead=lookahead)
    for length in range(12, 73, 12):
        for row in range(num_rows):
            state.reserve(row, length)
    state.position[:] = torch.tensor([STARTS[row % len(STARTS)] for row in range(num_rows)])
    for seed, tensor in enumerate(t for t in state.tensors() if t.is_floating_point()):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    return state


def step(model, layer, streams, ids, state, *, in_pytorch=False):
    """Streams after a block and the layer's state after the step."""
    layout, block = chunk_layout(model.config, state, 1, None, None), model.layers[layer]
    with torch.set_grad_enabled(in_pytorch):  # the twin goes where gradients are wanted
        assert decode_step.is_available(block, streams, layout) != in_pytorch
        found = block(streams, ids, layout, state.layers[layer])
    return found, state.layers[layer].rings() + state.layers[layer].pages()


@pytest.fixture
def model(rough_model, smallest):
    return rough_model(smallest).requires_grad_(False)


def test_this_machine_runs_the_compiled_step_where_nothing_is_traced_or_rounded(model, smallest):
    assert not isinstance(library("decode_step"), str), library("decode_step")
    state, streams = filled(smallest, 2), draw(2, smallest.hc_mult, smallest.hidden_size)
    layout, block = chunk_layout(smallest, state, 1, None, None), model.layers[1]
    assert not decode_step.is_available(block, streams, layout)
    with torch.no_grad():
        assert decode_step.is_available(block, streams, layout)
        assert not decode_step.is_available(block, streams.double(), layout)
        few, most = (filled(smallest, decode_step.MOST_ROWS + more) for more in (0, 1))
        for state, fits in ((few, True), (most, False)):
            layout = chunk_layout(smallest, state, 1, None, None)
            wide = draw(len(state.position), smallest.hc_mult, smallest.hidden_size)
            assert decode_step.is_available(block, wide, layout) == fits
        layout = chunk_layout(smallest, filled(smallest, 2), 1, None, None)
        assert not decode_step.is_available(block, streams, replace(layout, trace=Trace()))
        assert not decode_step.is_available(block, streams, replace(layout, routing=Routing()))
        assert not decode_step.is_available(block, streams, replace(layout, routing=Routing.fixed({})))
        with exact_mode():
            assert not decode_step.is_available(block, streams, layout)
        model.quantize(replace(FP4, indexer=False))
        assert not decode_step.is_available(block, streams, layout)


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("num_rows", [1, 9, 40, 300])
@pytest.mark.parametrize("layer", range(4))
def test_streams_and_state_equal_the_twin_s(layer, num_rows, lookahead, model, smallest):
    assert len(model.layers) == 4
    streams = draw(num_rows, smallest.hc_mult, smallest.hidden_size, seed=3)
    ids = torch.arange(num_rows) % smallest.vocab_size
    found, kept = step(model, layer, streams, ids, filled(smallest, num_rows, lookahead))
    state = filled(smallest, num_rows, lookahead)
    wanted, twins = step(model, layer, streams, ids, state, in_pytorch=True)
    # Sums of some hundred fp32 terms of size 1, in another order, through two layers and their norms.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    for ours, twin in zip(kept, twins):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("sees_all", [False, True])
def test_the_indexer_picks_where_there_is_a_choice(topk, sees_all, rough_model, smallest):
    config = replace(smallest, index_topk=topk)
    model = rough_model(config).requires_grad_(False)
    layer = config.compress_ratios.index(4)
    model.layers[layer].attn.indexer.sees_all = sees_all
    streams, ids = draw(9, config.hc_mult, config.hidden_size), torch.arange(9)
    found, _ = step(model, layer, streams, ids, filled(config, 9))
    wanted, _ = step(model, layer, streams, ids, filled(config, 9), in_pytorch=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 49, 70, 261])
@pytest.mark.parametrize("layer", range(4))
def test_a_row_has_the_same_bits_alone_and_in_any_company(layer, num_rows, model, smallest):
    streams = draw(num_rows, smallest.hc_mult, smallest.hidden_size, seed=4)
    ids, state = torch.arange(num_rows) % smallest.vocab_size, filled(smallest, num_rows)
    before = filled(smallest, num_rows)
    together, kept = step(model, layer, streams, ids, state)
    for row in range(num_rows):
        one = slice(row, row + 1)
        alone, _ = step(model, layer, streams[one], ids[one], before.view(row, row + 1))
        assert torch.equal(alone[0], together[row])
    for ours, all_of_them in zip(before.layers[layer].rings() + before.layers[layer].pages(), kept):
        assert torch.equal(ours, all_of_them)


@torch.no_grad()
def test_a_value_that_is_not_finite_stays_in_its_row(model, smallest):
    streams = draw(5, smallest.hc_mult, smallest.hidden_size)
    streams[2, 1, 3] = float("nan")
    for layer in range(len(model.layers)):
        found, _ = step(model, layer, streams, torch.arange(5), filled(smallest, 5))
        assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()


@torch.no_grad()
def test_weights_that_were_replaced_are_used_and_others_refused(model, smallest):
    block, streams, ids = model.layers[1], draw(2, smallest.hc_mult, smallest.hidden_size), torch.arange(2)
    first, _ = step(model, 1, streams, ids, filled(smallest, 2))
    block.attn.wo_b.weight = torch.nn.Parameter(2 * block.attn.wo_b.weight, requires_grad=False)
    block.ffn.experts.w2.data = 0.5 * block.ffn.experts.w2.data
    second, _ = step(model, 1, streams, ids, filled(smallest, 2))
    assert not torch.equal(first, second)
    wanted, _ = step(model, 1, streams, ids, filled(smallest, 2), in_pytorch=True)
    torch.testing.assert_close(second, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    block.attn.wkv.weight.data = block.attn.wkv.weight.data.double()
    with pytest.raises(ValueError, match=r"attn\.wkv\.weight is torch\.float64"):
        step(model, 1, streams, ids, filled(smallest, 2))
