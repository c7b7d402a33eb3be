"""The index loss by the Triton kernels against the plain one in fp64; on a GPU, or interpreted.

Tolerances: fp32 sums of a few hundred products of numbers of size 1; half precision (bf16 on a GPU; fp16
interpreted, as the interpreter multiplies bf16's bit patterns) rounds what multiplies keys in the backward.
"""

from dataclasses import replace

import pytest
import torch

from consilience.model.indexer import Indexer, IndexQueries, index_loss
from consilience.model.kernels import gpu_attention, gpu_index_loss
from consilience.model.kernels.attention_keys import Keys
from consilience.model.layout import packed_layout

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 11 queries, and the kernels for every call but one in fp64."""
    monkeypatch.setattr(gpu_index_loss, "BUFFER_BYTES", 1)
    monkeypatch.setattr(gpu_index_loss, "MIN_QUERIES", 11)
    serves = lambda *given: all(x is None or x.dtype != torch.float64 for x in given)
    monkeypatch.setattr(gpu_index_loss, "uses_triton", serves)
    monkeypatch.setattr(gpu_attention, "uses_triton", serves)


def packed(config):
    """A row of one sample, a row of two with padding behind: 34 tokens each, 8 and 6 + 1 entries."""
    position = torch.stack((torch.arange(34), torch.tensor([*range(24), *range(7), 0, 0, 0])))
    segment = torch.tensor([[0] * 34, [0] * 24 + [1] * 7 + [-1] * 3])
    return packed_layout(config, segment, position, None)


def drawn(config, topk, dtype):
    """(index, attention, is_valid) in `dtype`, rounded to it; picks by the plain indexer, or None."""
    layout = packed(replace(config, sliding_window=6))
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    windows = layout.windows[4]
    columns = windows.num_columns
    index = IndexQueries(draw(2, 34, 3, 20), draw(2, 34, 3).float(), draw(2, columns, 20))
    picks = Indexer(replace(config, index_topk=topk or 100), None).pick(index, layout)
    assert (picks is None) == (topk is None)
    keys = Keys(layout, 6, draw(2, 34, 16), draw(2, columns, 16), windows, picks)
    return index, (draw(2, 34, 5, 16), keys, draw(5).float(), 0.25), layout.is_valid


def moved(index, attention, is_valid, place, dtype=None):
    """The same call elsewhere, its floating-point tensors in `dtype` if one is given."""

    def to(x):
        if x is None or dtype is None or not x.is_floating_point():
            return None if x is None else x.to(place)
        return x.to(place, dtype)

    query, keys, sink, scale = attention
    layout = replace(keys.layout, position=to(keys.layout.position), oldest=to(keys.layout.oldest))
    windows = replace(keys.windows, first=to(keys.windows.first), stop=to(keys.windows.stop))
    keys = Keys(layout, keys.size, to(keys.window), to(keys.entries), windows, to(keys.picks))
    index = replace(index, query=to(index.query), weight=to(index.weight), keys=to(index.keys))
    return index, (to(query), keys, to(sink), scale), to(is_valid)


def loss_and_gradients(call):
    leaves = [call[0].query, call[0].weight, call[0].keys]
    for leaf in leaves:
        leaf.requires_grad_()
    loss, count = index_loss(*call)
    return loss, count, torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("is_half", [False, True])
def test_loss_and_gradients_equal_the_plain_ones_in_fp64(topk, is_half, smallest, triton_device):
    half = torch.bfloat16 if triton_device == "cuda" else torch.float16
    call = drawn(smallest, topk, half if is_half else torch.float32)
    exact = moved(*call, "cpu", torch.float64)
    wanted, num_wanted, gradients = loss_and_gradients(exact)
    loss, count, found = loss_and_gradients(moved(*call, triton_device))
    assert count.item() == num_wanted.item() > 20 and wanted > 0.1
    assert loss.grad_fn.name().startswith("_IndexLoss") and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), wanted, rtol=5e-6, atol=0)
    tolerance = 2**-8 if is_half else 5e-6
    for a, b, leaf in zip(found, gradients, (call[0].query, call[0].weight, call[0].keys)):
        assert a.dtype == leaf.dtype
        error = (a.double().cpu() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < tolerance


@pytest.mark.parametrize("topk", [None, 3])
def test_gradients_repeat_bit_for_bit_however_the_queries_are_cut(topk, smallest, triton_device, monkeypatch):
    call = moved(*drawn(smallest, topk, torch.float32), triton_device)
    first, again = loss_and_gradients(call), loss_and_gradients(call)
    assert all(torch.equal(a, b) for a, b in zip(first[2], again[2]))
    monkeypatch.setattr(gpu_index_loss, "MIN_QUERIES", 100)
    whole = loss_and_gradients(call)
    assert torch.equal(first[2][0], whole[2][0]) and torch.equal(first[2][1], whole[2][1])
    torch.testing.assert_close(first[2][2], whole[2][2], rtol=0, atol=1e-6)


def test_the_denominators_may_come_from_the_attention_that_ran(smallest, triton_device):
    index, attention, is_valid = moved(*drawn(smallest, 3, torch.float32), triton_device)
    query, keys, sink, scale = attention
    near = torch.einsum("bthc,bsc->bths", query, keys.window) * scale
    slot = torch.arange(34, device=triton_device)
    seen = (slot >= keys.layout.oldest[:, :, None]) & (slot <= slot[:, None])
    near = near.masked_fill(~seen[:, :, None], float("-inf"))
    far = torch.einsum("bthc,bsc->bths", query, keys.entries) * scale
    picked = torch.zeros(2, 34, far.shape[-1] + 1, dtype=torch.bool, device=triton_device)
    picked.scatter_(2, torch.where(keys.picks < 0, far.shape[-1], keys.picks), True)
    far = far.masked_fill(~picked[:, :, None, :-1], float("-inf"))
    sinks = sink.view(1, 1, -1, 1).expand(2, 34, -1, 1)
    wanted = torch.logsumexp(torch.cat((near, far, sinks), -1).double(), -1) / torch.log(torch.tensor(2.0))
    found = gpu_index_loss.denominators(query, keys, sink, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    teacher = gpu_index_loss.Teacher(query, keys.entries, wanted.float(), scale, is_valid)
    bounds = (keys.windows.first, keys.windows.stop)
    parts = (index.query, index.weight, index.keys)
    loss, _ = gpu_index_loss.index_loss(parts, teacher, keys.picks, bounds)
    torch.testing.assert_close(loss, index_loss(index, attention, is_valid)[0], rtol=1e-5, atol=0)
