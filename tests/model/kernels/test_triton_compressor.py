"""The compressor's Triton kernels against the module in fp64: sample borders, both kinds, determinism.

On a GPU, or interpreted. Tolerances: fp32 sums of some 20 products of numbers of size 1; bf16 rounds hidden
states and weights to 8 bits (both sides get them so), the gradient of the projections before the products
back, and results once.
"""

from types import SimpleNamespace

import pytest
import torch

from consilience.model.compressor import Compressor
from consilience.model.kernels import gpu_compressor
from consilience.model.layout import _closing, packed_layout, ring_size

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

RATIOS = [4, 12]


@pytest.fixture(params=[True, False], ids=["fused", "by channels"])
def is_fused(request, monkeypatch):
    """Whether one program holds an entry; if not, its channels are cut in two."""
    from consilience.model.kernels import triton_compressor

    if not request.param:
        monkeypatch.setattr(triton_compressor, "FUSED_BELOW", 0)
        monkeypatch.setattr(triton_compressor, "LAUNCH", triton_compressor.Launch(64, 32, programs=3))
    return request.param


def packed(config, device):
    """A row of one sample, a row of three (the last too short for any window) with padding behind."""
    length = 50
    position = torch.stack((torch.arange(length), torch.tensor([*range(27), *range(17), *range(3), 0, 0, 0])))
    segment = torch.tensor([[0] * length, [0] * 27 + [1] * 17 + [2] * 3 + [-1] * 3])
    return packed_layout(config, segment.to(device), position.to(device), None)


def module_of(config, ratio, dtype):
    """A compressor without any zero, its parameters rounded to `dtype` but ape."""
    module = Compressor(config, 20, ratio, None)
    g = torch.Generator().manual_seed(ratio)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        for p in (module.wkv.weight, module.wgate.weight, module.norm.weight):
            p.copy_(p.to(dtype))
    return module


def ours(module, hidden, layout):
    weights = gpu_compressor.Weights(
        module.wkv.weight, module.wgate.weight, module.ape, module.norm.weight, module.norm.eps
    )
    windows = layout.windows[module.ratio]
    turn = layout.compressed_rotation
    return gpu_compressor.compress(hidden, weights, windows.closing, turn, windows.num_columns)


def gradients(entries, module, hidden, upstream):
    return torch.autograd.grad(entries, (hidden, *module.parameters()), upstream.to(entries))


def both(config, ratio, dtype, device):
    """(entries, gradients) of the kernels and of the twin in fp64, on equal inputs."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 50, config.hidden_size, generator=g).to(dtype)
    upstream = torch.randn(2, 50 // ratio + 1, 20, generator=g)
    module = module_of(config, ratio, dtype)
    exact, here = hidden.double().requires_grad_(), hidden.to(device).requires_grad_()
    layout = packed(config, "cpu")
    upstream = upstream[:, : layout.windows[ratio].num_columns].to(dtype)
    twin_module = module_of(config, ratio, dtype).double()
    twin = twin_module(exact, layout, None)
    wanted = gradients(twin, twin_module, exact, upstream)
    module = module.to(device)
    for part in (module.wkv, module.wgate, module.norm):
        part.to(dtype)
    entries = ours(module, here, packed(config, device))
    found = gradients(entries, module, here, upstream)
    assert entries.dtype == dtype and entries.shape == twin.shape
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    return (entries, *found), (twin, *wanted)


@pytest.mark.parametrize("ratio", RATIOS)
def test_entries_and_gradients_equal_the_twin_across_sample_borders(ratio, smallest, is_fused, triton_device):
    for a, b in zip(*both(smallest, ratio, torch.float32, triton_device)):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=5e-6 * b.abs().max().item())


@pytest.mark.parametrize("ratio", RATIOS)
def test_bf16_entries_and_gradients_equal_the_twin(ratio, smallest, is_fused, triton_device):
    for a, b in zip(*both(smallest, ratio, torch.bfloat16, triton_device)):
        error = (a.double().cpu() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < 6e-3  # 2^-8 of each number, independent of one another


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_repeat_bit_for_bit_and_entries_know_no_company(ratio, smallest, is_fused, triton_device):
    module = module_of(smallest, ratio, torch.float32).to(triton_device)
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 50, smallest.hidden_size, generator=g).to(triton_device).requires_grad_()
    entries = ours(module, hidden, packed(smallest, triton_device))
    upstream = torch.randn(entries.shape, generator=g).to(triton_device)
    first = torch.autograd.grad(entries, (hidden, *module.parameters()), upstream, retain_graph=True)
    again = torch.autograd.grad(entries, (hidden, *module.parameters()), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    # The second sample of row 1 by itself; cuBLAS may sum a product of other height otherwise.
    position = torch.arange(17, device=triton_device)[None]
    alone = packed_layout(smallest, torch.zeros_like(position), position, None)
    own = ours(module, hidden[1:, 27:44], alone)
    count, before = 17 // ratio, 27 // ratio
    torch.testing.assert_close(own[0], entries[1, before : before + count], rtol=0, atol=2e-6)


def test_without_a_closed_window_there_is_no_entry_and_no_gradient(smallest, is_fused, triton_device):
    module = module_of(smallest, 12, torch.float32).to(triton_device)
    position = torch.arange(9, device=triton_device)[None]
    layout = packed_layout(smallest, torch.zeros_like(position), position, None)
    hidden = torch.randn(1, 9, smallest.hidden_size, device=triton_device).requires_grad_()
    entries = ours(module, hidden, layout)
    assert entries.shape == (1, 0, 20)
    for grad in torch.autograd.grad(entries.sum(), (hidden, *module.parameters())):
        assert not grad.any()


def test_the_index_compressors_input_gets_no_gradient(smallest, triton_device):
    module = module_of(smallest, 4, torch.float32).to(triton_device)
    layout = packed(smallest, triton_device)
    hidden = torch.randn(2, 50, smallest.hidden_size, device=triton_device)
    ours(module, hidden, layout).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_the_module_takes_the_kernels_where_they_serve(smallest, triton_device, monkeypatch):
    module = module_of(smallest, 4, torch.float32).to(triton_device)
    layout = packed(smallest, triton_device)
    hidden = torch.randn(2, 50, smallest.hidden_size, device=triton_device)
    with torch.no_grad():
        monkeypatch.setattr(gpu_compressor, "uses_triton", lambda *_: False)
        plain = module(hidden, layout, None)
        monkeypatch.setattr(gpu_compressor, "uses_triton", lambda *_: True)
        kernels = module(hidden, layout, None)
    torch.testing.assert_close(kernels, plain, rtol=0, atol=5e-6)
    assert not torch.equal(kernels, plain)  # sums in another order


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_on_a_state_make_the_entries_of_one_pass(
    ratio, smallest, is_fused, triton_device, monkeypatch
):
    """Windows that begin in the ring of an earlier chunk among them."""
    module = module_of(smallest, ratio, torch.float32).to(triton_device)
    hidden = torch.randn(1, 50, smallest.hidden_size, generator=torch.Generator().manual_seed(5))
    position = torch.arange(50)[None]
    layout = packed_layout(smallest, torch.zeros_like(position), position, None)
    wanted = module_of(smallest, ratio, torch.float32).double()(hidden.double(), layout, None)
    monkeypatch.setattr(gpu_compressor, "uses_triton", lambda *_: True)
    ring, series = ring_size(ratio), module.ape.shape[1]
    kept = torch.zeros(2, 1, ring, series, device=triton_device)
    found, hidden = [], hidden.to(triton_device)
    with torch.no_grad():
        for begin, end in ((0, 19), (19, 23), (23, 50)):
            here = torch.arange(begin, end, device=triton_device)[None]
            closing = _closing(ratio, here, here >= 0, ring, here // ratio)
            values, gates = module._projected(hidden[:, begin:end])
            gates = gates + module.ape[here % ratio]
            joined = [torch.cat(pair, dim=1) for pair in zip(kept, (values, gates))]
            chunk = SimpleNamespace(frequencies=packed(smallest, triton_device).frequencies)
            found.append(module._pool(*joined, closing, chunk, torch.float32))
            for slots, new in zip(kept, (values, gates)):
                slots[:, here[0, -ring:] % ring] = new[:, -ring:]
    torch.testing.assert_close(torch.cat(found).double().cpu(), wanted[0], rtol=0, atol=1e-5)


def test_a_continued_row_has_its_projections_without_widened_weights(smallest, triton_device, monkeypatch):
    """Rows on a state ask for no gradient; where one is asked for, the product stays differentiable."""
    monkeypatch.setattr(gpu_compressor, "uses_triton", lambda *_: True)
    module = module_of(smallest, 4, torch.float32).to(triton_device)
    hidden = torch.randn(1, 3, smallest.hidden_size, device=triton_device)
    with torch.no_grad():
        found = module._projected(hidden)
    weights = module.wkv.weight, module.wgate.weight
    for x, weight in zip(found, weights):
        assert x.shape == (1, 3, 40) and x.dtype == torch.float32
        torch.testing.assert_close(x, hidden @ weight.t(), rtol=0, atol=2e-5)
    assert all(x.requires_grad for x in module._projected(hidden))
