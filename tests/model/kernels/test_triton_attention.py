"""Attention's Triton kernels against the plain twin in fp64: every kind of entries, borders, determinism.

Without a GPU they run under Triton's interpreter. Tolerances: fp32 (tf32x3 products on a GPU) sums up to a few
hundred products of numbers of size 1; bf16 rounds inputs, probabilities and dS to 8 bits.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import case, continued, leaves, packed

from consilience.model.kernels import gpu_attention
from consilience.model.kernels.sink_attention import Keys, sink_attention_dense

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture
def config(smallest):
    return replace(smallest, sliding_window=20)


def moved(query, keys, sink, device, dtype):
    """The same call on the device, the sink in fp32 as the model keeps it."""
    to = lambda x: None if x is None else x.detach().to(device, dtype).requires_grad_()
    place = lambda x: None if x is None else x.to(device)
    layout = replace(keys.layout, position=place(keys.layout.position), oldest=place(keys.layout.oldest))
    windows = keys.windows
    if windows is not None:
        windows = replace(windows, first=place(windows.first), stop=place(windows.stop))
    keys = Keys(layout, keys.size, to(keys.window), to(keys.entries), windows, place(keys.picks))
    return to(query), keys, sink.detach().to(device, torch.float32).requires_grad_()


def errors(found, wanted):
    """RMS of the difference over the RMS of what is wanted; zero where nothing is."""
    scale = wanted.pow(2).mean().sqrt()
    return ((found.double().cpu() - wanted).pow(2).mean().sqrt() / scale.clamp(min=1e-30)).item()


def assert_equals_the_twin(call, device, dtype, tolerance):
    # The twin gets the rounded inputs, in fp64.
    rounded = moved(*call, "cpu", dtype)
    exact = moved(*rounded, "cpu", torch.float64)
    exact = (exact[0], exact[1], rounded[2].detach().double().requires_grad_())
    ours = moved(*call, device, dtype)
    scale = ours[0].shape[3] ** -0.5
    twin, out = sink_attention_dense(*exact, scale), gpu_attention.sink_attention(*ours, scale)
    assert out.dtype == dtype and errors(out, twin) < tolerance
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    given = upstream.to(device)
    wanted = torch.autograd.grad(twin, leaves(*exact), upstream.double())
    found = torch.autograd.grad(out, leaves(*ours), given, retain_graph=True)
    for a, b, leaf in zip(found, wanted, leaves(*ours)):
        assert a.dtype == leaf.dtype and errors(a, b) < 2 * tolerance
    again = torch.autograd.grad(out, leaves(*ours), given)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert torch.equal(out, gpu_attention.sink_attention(*ours, scale))


KINDS = [(0, None), (12, None), (4, None), (4, 3), (4, 12)]


@pytest.mark.parametrize(("ratio", "num_picks"), KINDS)
@pytest.mark.parametrize(("heads", "width"), [(3, 16), (20, 32)])
def test_packed_rows_equal_the_twin(ratio, num_picks, heads, width, config, triton_device):
    call = case(packed(config, 61), config, ratio, num_picks, heads=heads, width=width)
    assert_equals_the_twin(call, triton_device, torch.float32, 2e-5)
