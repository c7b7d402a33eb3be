"""The batch-invariant product: its values against fp64, its rows against themselves in other batches."""

import pytest
import torch

pytestmark = pytest.mark.triton


def _draw(num_rows: int, num_columns: int, inner: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(num_columns)
    x = torch.randn(num_rows, inner, generator=generator).to(device, dtype)
    weight = torch.randn(num_columns, inner, generator=generator).to(device, dtype)
    return x, weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "num_columns", "inner"), [(1, 33, 64), (65, 300, 130), (300, 16, 200)])
def test_products_are_those_of_fp64(num_rows, num_columns, inner, dtype, triton_device):
    from consilience.model.kernels.triton_invariant import linear

    x, weight = _draw(num_rows, num_columns, inner, dtype, triton_device)
    found = linear(x, weight, torch.float32)
    exact = x.double() @ weight.double().t()
    # fp32 sums of `inner` exact products: some units of 2^-24 of the sum of their absolute values.
    bound = 2**-20 * (x.double().abs() @ weight.double().abs().t())
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_the_same_bits_in_any_batch_and_at_any_place(dtype, triton_device):
    from consilience.model.kernels.triton_invariant import FEW, linear

    x, weight = _draw(FEW + 75, 65, 200, dtype, triton_device)
    whole = linear(x, weight, torch.float32)  # tiles of many rows
    for first, last in ((0, 1), (5, 6), (FEW, FEW + 3), (0, FEW), (70, FEW + 75), (1, FEW + 70)):
        assert torch.equal(linear(x[first:last], weight, torch.float32), whole[first:last]), (first, last)


def test_tiles_of_every_size_give_the_same_bits(triton_device, monkeypatch):
    from consilience.model.kernels import triton_invariant

    x, weight = _draw(200, 300, 130, torch.bfloat16, triton_device)
    found = []
    for name in ("few", "middle", "many"):
        monkeypatch.setattr(triton_invariant, "_config", lambda *_, name=name: triton_invariant.CONFIGS[name])
        found.append(triton_invariant.linear(x, weight, torch.float32))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_operands_by_descriptor_and_by_pointer_give_the_same_bits(triton_device, monkeypatch):
    from consilience.model.kernels import triton_invariant

    x, weight = _draw(150, 300, 136, torch.bfloat16, triton_device)
    described = triton_invariant.linear(x, weight, torch.float32)
    monkeypatch.setattr(triton_invariant, "_is_described", lambda _: False)
    out = torch.empty_like(described)
    assert triton_invariant.linear(x, weight, out=out) is out and torch.equal(out, described)


def test_small_hand_made_case(triton_device):
    from consilience.model.kernels.triton_invariant import linear

    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]], device=triton_device)
    weight = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.5, -0.5]], device=triton_device)
    assert linear(x, weight).tolist() == [[1.0, 11.0, -0.5], [0.0, -4.0, 0.5]]
    assert linear(x[:0], weight).shape == (0, 3)


def test_other_shapes_or_types_are_refused(triton_device):
    from consilience.model.kernels.triton_invariant import linear

    x = torch.zeros(2, 4, device=triton_device)
    with pytest.raises(ValueError, match=r"\[3, 5\]"):
        linear(x, torch.zeros(3, 5, device=triton_device))
    with pytest.raises(ValueError, match=r"\[2, 3\], contiguous"):
        linear(x, torch.zeros(3, 4, device=triton_device), out=torch.zeros(3, 2, device=triton_device).t())
    with pytest.raises(ValueError, match="bfloat16"):
        linear(x, torch.zeros(3, 4, device=triton_device, dtype=torch.bfloat16))
