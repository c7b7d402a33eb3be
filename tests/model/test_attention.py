"""Parts of attention that whole-model comparisons cannot tell apart from each other."""

from dataclasses import replace

import pytest
import torch

from consilience.model.attention import Attention
from consilience.model.forward_trace import Trace
from consilience.model.layout import packed_layout

torch.set_num_threads(1)


def layer(config, ratio, seed=0):
    module = Attention(config, ratio, torch.float64).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return module


def run(module, config, hidden, trace=None):
    steps = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    return module(hidden, packed_layout(config, torch.zeros_like(steps), steps, trace), None)


def reach(module, config, length, query):
    """Positions whose hidden state the output at `query` depends on."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, length, config.hidden_size, dtype=torch.float64, generator=g).requires_grad_()
    run(module, config, hidden)[0, query].square().sum().backward()
    return hidden.grad[0].abs().sum(1).nonzero()[:, 0].tolist()


def test_a_sliding_layer_sees_the_window_the_current_token_included(smallest):
    config = replace(smallest, sliding_window=6)
    assert reach(layer(config, 0), config, 24, 14) == [9, 10, 11, 12, 13, 14]
    assert reach(layer(config, 0), config, 24, 2) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ratio", "query", "seen"),
    [
        (12, 22, [*range(12), *range(17, 23)]),  # entry 1 closes with token 23
        (12, 23, [*range(24)]),  # and is seen by the very token that closes it
        (4, 14, [*range(15)]),  # entries 0-2, window 9-14
        (4, 3, [0, 1, 2, 3]),
    ],
)
def test_a_compressed_layer_sees_complete_blocks_too(ratio, query, seen, smallest):
    config = replace(smallest, sliding_window=6, index_topk=100)
    assert reach(layer(config, ratio), config, 24, query) == seen


@pytest.mark.parametrize("length", [24, 48])  # 6 entries: others are masked; 12: the picked one is gathered
def test_top_k_narrows_what_a_csa_query_sees(length, smallest):
    config = replace(smallest, sliding_window=6, index_topk=1)
    module = layer(config, 4)
    seen = reach(module, config, length, length - 1)
    earlier = [t for t in seen if t < length - 6]
    assert set(range(length - 6, length)) < set(seen) and 4 <= len(earlier) <= 8
    module.indexer.sees_all = True
    assert reach(module, config, length, length - 1) == [*range(length)]


def test_heads_reach_only_their_group_s_rows_of_the_low_rank_output(smallest):
    """wo_a is grouped: group i of heads is read by rows i·rank … of it and by nothing else."""
    module = layer(smallest, 0)
    hidden = torch.randn(1, 6, smallest.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        rank, heads = smallest.o_lora_rank, smallest.num_attention_heads // smallest.o_groups
        module.wo_b.weight[:, rank:] = 0  # only group 0 is left
        before = run(module, smallest, hidden)
        module.attn_sink[heads:] += 5  # changes heads of group 1
        assert torch.equal(run(module, smallest, hidden), before)
        module.attn_sink[:heads] += 5
        assert not torch.allclose(run(module, smallest, hidden), before)
    assert module.wo_a.weight.shape == (2 * rank, heads * smallest.head_dim)


def test_the_index_target_keeps_window_and_sink_in_the_denominator(smallest):
    """A head that spends itself on its sink weighs little in the target, as section 5.3 settles it."""
    config = replace(smallest, index_topk=100)
    module = layer(config, 4)
    hidden = torch.randn(1, 24, config.hidden_size, dtype=torch.float64)

    def loss(sinks):
        with torch.no_grad():
            module.attn_sink.copy_(sinks)
            trace = Trace(wants_losses=True)
            run(module, config, hidden, trace)
        return trace.indexer_loss[0]

    low, high = torch.full((4,), -30.0), torch.full((4,), 30.0)
    only_first = torch.tensor([-30.0, 30.0, 30.0, 30.0])
    # Equal shifts of all heads cancel in the normalisation; muting three heads does not.
    torch.testing.assert_close(loss(high), loss(high + 1), rtol=1e-6, atol=0)
    assert (loss(only_first) - loss(low)).abs() > 1e-3


def test_csa_and_hca_layers_turn_by_the_compressed_table_and_sliding_ones_by_the_other(smallest):
    hidden = torch.randn(1, 12, smallest.hidden_size, dtype=torch.float64)
    for ratio in (0, 4, 12):
        module = layer(smallest, ratio)
        with torch.no_grad():
            outputs = [
                run(module, replace(smallest, **change), hidden)
                for change in ({}, {"rope_theta": 9.0}, {"compress_rope_theta": 9.0})
            ]
        moved = [not torch.equal(outputs[0], other) for other in outputs[1:]]
        assert moved == ([True, False] if ratio == 0 else [False, True]), ratio
