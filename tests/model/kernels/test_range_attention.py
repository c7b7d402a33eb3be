"""The compiled attention against the plain twin in fp64, forward and gradients, at every border."""

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import SCALE, case, continued, leaves, packed

from consilience.model.kernels import range_attention
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.compiled import library
from consilience.model.kernels.sink_attention import sink_attention, sink_attention_dense

torch.set_num_threads(1)


@pytest.fixture
def config(smallest):
    return replace(smallest, sliding_window=4)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("range_attention"), str), library("range_attention")
    x = torch.zeros(1)
    assert range_attention.is_available(x) and not range_attention.is_available(x.double())


def test_one_key_and_a_sink_worked_by_hand(config):
    """Logit ln 3 against a sink of 0: weights 3/4 and 1/4; d p / d logit = 3/16."""
    query, key = torch.tensor([[[[2.0]]]]), torch.tensor([[[math.log(3) / 2]]])
    keys, sink = Keys(packed(config, 1), 4, key), torch.zeros(1)
    keys = replace(keys, layout=replace(keys.layout, oldest=keys.layout.oldest[:1]))
    out = range_attention.forward(query, keys, sink, 1.0)
    torch.testing.assert_close(out, 0.75 * key[:, :, None])
    grads = range_attention.backward(query, keys, sink, 1.0, out, torch.ones(1, 1, 1, 1))
    k, slope = key.item(), 3 / 16
    assert grads[0].item() == pytest.approx(slope * k * k, rel=1e-5)
    assert grads[1].item() == pytest.approx(0.75 + slope * 2 * k, rel=1e-5)
    assert grads[2] is None and grads[3].item() == pytest.approx(-slope * k, rel=1e-5)


@pytest.mark.parametrize("length", [1, 4, 5, 30, 61])
@pytest.mark.parametrize("kind", ["packed", "continued"])
@pytest.mark.parametrize(("ratio", "num_picks"), [(0, None), (4, None), (12, None), (4, 3), (4, 1), (4, 20)])
@pytest.mark.parametrize(("heads", "width"), [(3, 5), (4, 64), (5, 83)])
def test_output_and_gradients_equal_the_dense_twin_s(length, kind, ratio, num_picks, heads, width, config):
    layout = packed(config, length)
    if kind == "continued":
        layout = continued(config, [0, 3, 33], length, [length, length - 1, length])
    sizes = {"heads": heads, "width": width}
    exact = case(layout, config, ratio, num_picks, **sizes)
    single = case(layout, config, ratio, num_picks, **sizes, dtype=torch.float32)
    upstream = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    scale = SCALE * (5 / width) ** 0.5
    twin, ours = sink_attention_dense(*exact, scale), sink_attention(*single, scale)
    # Sums of up to 85 products of numbers of size 1 in fp32; gradients of keys add those of up to 61 queries.
    torch.testing.assert_close(ours.double(), twin, rtol=1e-4, atol=2e-5)
    wanted = torch.autograd.grad(twin, leaves(*exact), upstream)
    found = torch.autograd.grad(ours, leaves(*single), upstream.float(), retain_graph=True)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4)
    again = torch.autograd.grad(ours, leaves(*single), upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_a_query_has_the_same_bits_in_any_company(config):
    query, keys, sink = case(packed(config, 30), config, 4, 3, dtype=torch.float32)
    with torch.no_grad():
        together = sink_attention(query, keys, sink, SCALE)
        row = slice(1, 2)
        layout, windows = keys.layout, keys.windows
        own = replace(layout, position=layout.position[row], oldest=layout.oldest[row])
        ranges = replace(windows, first=windows.first[row], stop=windows.stop[row])
        alone = Keys(own, 4, keys.window[row], keys.entries[row], ranges, keys.picks[row])
        assert torch.equal(sink_attention(query[row], alone, sink, SCALE), together[row])
