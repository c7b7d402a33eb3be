"""The compiled pooling of windows against a softmax over gathered slots, one case by hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from consilience.model.compressor import Compressor
from consilience.model.config import TINY
from consilience.model.exact import exact_mode
from consilience.model.kernels.compiled import library
from consilience.model.kernels.window_pool import is_available, pool
from consilience.model.layout import Closing, packed_layout

torch.set_num_threads(1)


def _closing(source: list[list[int]], is_present: list[list[bool]]) -> Closing:
    none = torch.zeros(len(source), dtype=torch.int64)
    return Closing(none, none, torch.tensor(source), torch.tensor(is_present), none)


def test_this_machine_runs_the_compiled_kernel():
    assert not isinstance(library("window_pool"), str), library("window_pool")
    x = torch.zeros(1)
    assert is_available(x) and not is_available(x, x.double())
    with exact_mode():
        assert not is_available(x)


def test_a_window_of_two_tokens_worked_by_hand():
    """One channel, gates equal but for ape = (0, ln 3): a quarter of the first value, three of the second."""
    values, gates = torch.tensor([[[9.0], [4.0], [8.0]]]), torch.full((1, 3, 1), 5.0)
    ape = torch.tensor([[0.0], [3.0]]).log1p()  # log 1, log 4
    found = pool(values, gates, ape, _closing([[1, 2]], [[True, True]]))
    assert_close(found, torch.tensor([[0.2 * 4 + 0.8 * 8]]))


def test_an_absent_slot_counts_for_nothing_whatever_it_holds():
    values, gates, ape = torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 2), torch.zeros(1, 2)
    values[..., 0], gates[..., 0] = float("nan"), float("inf")
    assert_close(pool(values, gates, ape, _closing([[0, 0]], [[False, True]])), torch.tensor([[2.0]]))


@pytest.mark.parametrize("ratio", [4, 3])
@pytest.mark.parametrize(("lengths", "width"), [((1,), 4), ((4, 9), 6), ((70, 3, 700, 4, 2000), 40)])
def test_entries_and_gradients_equal_the_twin_s_in_fp64(ratio, lengths, width):
    sizes = {"hidden_size": 6, "head_dim": width, "qk_rope_head_dim": 2, "num_hidden_layers": 2}
    config = replace(TINY, compress_ratios=(4, 3), **sizes)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    layout = packed_layout(config, segments, positions, None)
    compressor, generator = Compressor(config, width, ratio, None), torch.Generator().manual_seed(width)
    for parameter in compressor.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(1, sum(lengths), 6, generator=generator)

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        module, x = compressor.to(dtype), hidden.to(dtype).requires_grad_()
        entries = module(x, layout, None)
        weights = torch.linspace(-1, 1, entries.numel()).view(entries.shape).to(dtype)
        found = torch.autograd.grad((entries * weights).sum(), (x, *module.parameters()), allow_unused=True)
        return entries.detach(), *(g for g in found if g is not None)

    # fp32 sums of up to 6 numbers before, and of up to 700 windows after the pooling.
    for mine, twin in zip(run(torch.float32), run(torch.float64), strict=True):
        assert_close(
            mine.double(), twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max() if twin.numel() else 0)
        )


def test_threads_change_no_bit():
    position = torch.arange(4100)[None]
    layout = packed_layout(TINY, torch.zeros_like(position), position, None)
    generator = torch.Generator().manual_seed(0)
    values, gates = (torch.randn(1, 4100, 16, generator=generator).requires_grad_() for _ in range(2))
    ape = torch.randn(4, 16, generator=generator).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            entries = pool(values, gates, ape, layout.windows[4].closing)
            found.append((entries, *torch.autograd.grad(entries.square().sum(), (values, gates, ape))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
