"""Attention's Triton kernels against the plain twin in fp64: every kind of entries, borders, determinism.

Without a GPU they run under Triton's interpreter. Tolerances: fp32 (tf32x3 products on a GPU) sums up to
a few hundred products of numbers of size 1; bf16 rounds probabilities, dS and results to 8 bits.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import case, continued, leaves, packed

from consilience.model.kernels import gpu_attention
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.attention_problem import problem_of
from consilience.model.kernels.sink_attention import sink_attention_dense

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


def gradients(call, upstream):
    """Our output and gradients."""
    out = gpu_attention.sink_attention(*call, call[0].shape[3] ** -0.5)
    return out, torch.autograd.grad(out, leaves(*call), upstream.to(out))


def assert_equals_the_twin(call, device, dtype, tolerance):
    # The twin gets the rounded inputs, in fp64.
    rounded = moved(*call, "cpu", dtype)
    exact = moved(*rounded, "cpu", torch.float64)
    exact = (exact[0], exact[1], rounded[2].detach().double().requires_grad_())
    ours = moved(*call, device, dtype)
    upstream = torch.randn(call[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    out, found = gradients(ours, upstream)
    twin = sink_attention_dense(*exact, call[0].shape[3] ** -0.5)
    wanted = torch.autograd.grad(twin, leaves(*exact), upstream.double())
    assert out.dtype == dtype and errors(out, twin) < tolerance
    for a, b, leaf in zip(found, wanted, leaves(*ours)):
        assert a.dtype == leaf.dtype and errors(a, b) < 2 * tolerance


CALLS = [
    ("packed", 26, 0, None),
    ("packed", 26, 12, None),
    ("packed", 26, 4, 3),
    ("packed", 26, 4, 1),
    ("continued", 9, 4, None),
    ("continued", 9, 4, 1),
]


@pytest.mark.parametrize(("kind", "length", "ratio", "num_picks"), CALLS)
def test_every_kind_of_keys_equals_the_twin(kind, length, ratio, num_picks, config, triton_device):
    layout = packed(config, length)
    if kind == "continued":
        layout = continued(config, [0, 3, 33], length, [length, length - 1, length])
    call = case(layout, config, ratio, num_picks, heads=3, width=16)
    assert_equals_the_twin(call, triton_device, torch.float32, 2e-5)


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (9, 18), (24, 26)])
@pytest.mark.parametrize(("ratio", "num_picks"), [(0, None), (12, None), (4, 3), (4, 1)])
def test_a_piece_of_the_queries_equals_the_twin(start, stop, ratio, num_picks, config, triton_device):
    """With fewer earlier window keys than a window has, as many, and more, of which some are left out."""
    query, keys, sink = case(packed(config, 26), config, ratio, num_picks, heads=3, width=16)
    picks = None if keys.picks is None else keys.picks[:, start:stop]
    piece = keys.of_queries(start, stop, keys.window, keys.entries, picks)
    assert piece.layout.offset == min(start, keys.size)
    assert_equals_the_twin((query[:, start:stop], piece, sink), triton_device, torch.float32, 2e-5)


@pytest.mark.parametrize(
    ("heads", "width", "num_picks"), [(20, 32, 3), (65, 16, 1), (3, 512, None), (3, 512, 1)]
)
def test_half_precision_and_any_number_of_heads_and_channels_equal_the_twin(
    heads, width, num_picks, config, triton_device
):
    # Triton 3.6's interpreter multiplies the bits of bf16 as integers.
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    call = case(packed(config, 13), config, 4, num_picks, heads=heads, width=width)
    assert_equals_the_twin(call, triton_device, dtype, 5e-3)


@pytest.mark.parametrize("num_picks", [3, 1])
def test_ranges_of_queries_add_up_and_repeat_bit_by_bit(num_picks, config, triton_device):
    from consilience.model.kernels import triton_attention, triton_attention_backward

    call = case(packed(config, 66), config, 12, num_picks, heads=2, width=16)
    query, keys, sink = moved(*call, triton_device, torch.float32)
    row = slice(1, 2)
    layout = replace(keys.layout, oldest=keys.layout.oldest[row])
    windows = replace(keys.windows, first=keys.windows.first[row], stop=keys.windows.stop[row])
    keys = Keys(layout, keys.size, keys.window[row], keys.entries[row], windows, keys.picks[row])
    problem = problem_of(query[row].detach(), keys, sink.detach(), 0.25)
    out, denominator = triton_attention.forward(problem)
    grad = torch.ones_like(out)
    whole, parts, again = (
        triton_attention_backward.backward(problem, out, denominator, grad, budget)
        for budget in (1 << 30, 1, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(parts, again))
    for a, b in zip(parts, whole):
        assert errors(a, b.detach().double().cpu()) < 1e-6  # fp32 sums in another order


def test_one_key_and_the_sink_worked_by_hand(config, triton_device):
    """Logit 16 · 2 · 0.5 · scale 1/4 = 4 against a sink of 4: the key gets one half, and is the value too."""
    query, key = torch.full((1, 1, 1, 16), 2.0), torch.full((1, 1, 16), 0.5)
    layout = packed(config, 1)
    keys = Keys(replace(layout, oldest=layout.oldest[:1]), 20, key.requires_grad_())
    call = moved(query, keys, torch.tensor([4.0]), triton_device, torch.float32)
    out, (d_query, d_sink, d_key) = gradients(call, torch.ones(1, 1, 1, 16))
    each = lambda x: torch.full_like(x, 1.0)
    torch.testing.assert_close(out, 0.25 * each(out))
    # dO · O = 4, dO · K = 8: dS = 1/2 · (8 - 4) = 2, the sink's -1/2 · 4; dQ = 2 · K / 4, dK = P + 2 · Q / 4.
    torch.testing.assert_close(d_query, 0.25 * each(d_query))
    torch.testing.assert_close(d_key, 1.5 * each(d_key))
    torch.testing.assert_close(d_sink, -2 * each(d_sink))


def test_the_cpu_and_odd_widths_stay_with_the_twin(config, triton_device):
    query, keys, sink = case(packed(config, 4), config, heads=3, width=16, dtype=torch.float32)
    assert not gpu_attention.is_available(query, keys, sink)
    narrow = moved(*case(packed(config, 4), config, heads=3, width=24), triton_device, torch.float32)
    assert not gpu_attention.is_available(*narrow)
    fits = moved(query, keys, sink, triton_device, torch.float32)
    assert gpu_attention.is_available(*fits) == (triton_device == "cuda")
